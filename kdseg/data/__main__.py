"""Checks and prepares data sets from the command line.

  kdseg data verify isic2016 --manual-dir ARCHIVES
  kdseg data prepare ph2 --manual-dir ARCHIVES --data-dir PREPARED

`verify` writes nothing and ends with status 1 if the data set cannot be used.
"""

import argparse
from collections.abc import Sequence
import sys

from kdseg.data import prepare
from kdseg.data import sets
from kdseg.data import verify
from kdseg.data.archives import DataError
from kdseg.runtime import commands
from kdseg.runtime import files


def main(
  argv: Sequence[str] | None = None, builders: prepare.Builders = sets.BUILDERS
) -> int:
  """Runs one command.

  Args:
    argv: the command line, without the program's name; that of the process if
      None.
    builders: the data sets that it may name.

  Returns:
    The exit status.
  """
  arguments = _parser(builders).parse_args(argv)
  options = dict(option.partition("=")[::2] for option in arguments.option)
  where = {
    "manual_dir": arguments.manual_dir,
    "data_dir": arguments.data_dir,
    "builders": builders,
  }
  try:
    if arguments.command == "verify":
      report = verify.verify(
        arguments.name, allow_alike=arguments.allow_alike, **where, **options
      )
      print(verify.describe(report, limit=arguments.limit))
      return 0 if report.ok else 1
    builder = prepare.prepare(arguments.name, **where, **options)
    metadata = prepare.read_metadata(builder)
  except (DataError, ValueError, files.WriteError) as error:
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


def _parser(builders: prepare.Builders) -> argparse.ArgumentParser:
  parser = commands.Parser("data", __doc__)
  parser.add_argument("command", choices=("verify", "prepare"))
  parser.add_argument("name", choices=tuple(builders))
  parser.add_argument(
    "--manual-dir", help="the official archives, or the folder of `folder`"
  )
  parser.add_argument("--data-dir", help="where prepared data sets lie")
  parser.add_argument(
    "--option",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="as in the config's data.options, e.g. grey_masks=threshold"
    " or lesion=any (isic2016 also knows duplicates=include); may be repeated",
  )
  parser.add_argument(
    "--allow-alike",
    default="",
    metavar="ID,ID",
    help="images that may look like one of another split (`verify`)",
  )
  parser.add_argument(
    "--limit", type=int, default=20, help="lines to print of each list"
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
