"""Checks and prepares data sets from the command line.

  kdseg data verify isic2016 --manual-dir ARCHIVES
  kdseg data prepare ph2 --manual-dir ARCHIVES --data-dir PREPARED

`verify` writes nothing and ends with status 1 if the data set cannot be used.
"""

import argparse
from collections.abc import Sequence
import sys

from kdseg.data import pairs
from kdseg.data import prepare
from kdseg.data import sets
from kdseg.data import verify
from kdseg.data.archives import DataError
from kdseg.data.sets import isic2016
from kdseg.runtime import commands
from kdseg.runtime import files


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  arguments = _parser().parse_args(argv)
  options = {}
  if arguments.grey_masks != "error":
    options["grey_masks"] = arguments.grey_masks
  if arguments.duplicates != "exclude":
    if arguments.name != "isic2016":
      _parser().error("--duplicates is an option of isic2016 only")
    options["duplicates"] = arguments.duplicates
  try:
    if arguments.command == "verify":
      report = verify.verify(
        arguments.name,
        manual_dir=arguments.manual_dir,
        data_dir=arguments.data_dir,
        **options,
      )
      print(verify.describe(report, limit=arguments.limit))
      return 0 if report.ok else 1
    builder = prepare.prepare(
      arguments.name,
      data_dir=arguments.data_dir,
      manual_dir=arguments.manual_dir,
      **options,
    )
    metadata = prepare.read_metadata(builder)
  except (DataError, files.WriteError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{arguments.name} is prepared in {builder.data_dir}")
  for split, info in builder.info.splits.items():
    print(
      f"  {split:<11}{info.num_examples:>5} examples,"
      f" {metadata['found_count'][split]} of"
      f" {metadata['official_count'][split]} official pairs found"
    )
  for note in metadata["notes"]:
    print(f"  note: {note}")
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = commands.Parser("data", __doc__)
  parser.add_argument("command", choices=("verify", "prepare"))
  parser.add_argument("name", choices=tuple(sets.BUILDERS))
  parser.add_argument(
    "--manual-dir", help="the official archives, or the folder of `folder`"
  )
  parser.add_argument("--data-dir", help="where prepared data sets lie")
  parser.add_argument(
    "--grey-masks",
    choices=pairs.GREY_MASKS,
    default="error",
    help="what to do with masks that have values between 0 and 255",
  )
  parser.add_argument(
    "--duplicates",
    choices=isic2016.DUPLICATES,
    default="exclude",
    help="training images known to show lesions of the test set (isic2016)",
  )
  parser.add_argument(
    "--limit", type=int, default=20, help="lines to print of each list"
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
