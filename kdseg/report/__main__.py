"""Makes the tables of one finished folder, or of several together.

  kdseg report runs/isic2016
  kdseg report runs/seed0 runs/seed1 --out results
  kdseg report runs/isic2016 --without ISIC_0011292 --out without

A folder is a workdir, or an --out of this command.
"""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

from kdseg.report import meta as meta_lib
from kdseg.report import scores
from kdseg.report import tables
from kdseg.runtime import commands
from kdseg.runtime import files


def main(argv: Sequence[str] | None = None) -> int:
  """Reads scores.csv and report.json, writes table.md, .csv and .tex.

  An --out folder gets the joined scores.csv and report.json too, so that it can
  be rebuilt, or joined with others, later.

  Args:
    argv: the arguments after the command's name; of the process if None.

  Returns:
    0, or 1 after an error, which is printed.
  """
  parser = commands.Parser("report", __doc__)
  parser.add_argument(
    "workdir",
    nargs="+",
    type=pathlib.Path,
    help="folder with scores.csv and report.json",
  )
  parser.add_argument(
    "--out",
    type=pathlib.Path,
    help="folder for the tables; the workdir itself if there is only one",
  )
  parser.add_argument(
    "--without",
    nargs="+",
    metavar="ID",
    default=(),
    help="images to leave out; the tables say how many are left",
  )
  args = parser.parse_args(argv)
  if args.out is None and len(args.workdir) > 1:
    parser.error("several folders: say with --out where their table goes")
  out = args.out or args.workdir[0]
  is_new = all(out.resolve() != folder.resolve() for folder in args.workdir)
  if args.without and not is_new:
    parser.error("--without: say with --out where the tables of the rest go")
  try:
    rows, meta = _load(args.workdir)
    rows = _leave_out(rows, args.without)
    texts = tables.make_tables(rows, meta)
    with files.writing(out):
      out.mkdir(parents=True, exist_ok=True)
    if is_new:
      scores.write(out / "scores.csv", rows)
      text = json.dumps(meta, indent=2, sort_keys=True) + "\n"
      texts = {"report.json": text, **texts}
      print(out / "scores.csv")
    for name, text in texts.items():
      files.write_text(out / name, text)
      print(out / name)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def _load(
  folders: Sequence[pathlib.Path],
) -> tuple[list[scores.Row], dict[str, Any]]:
  parts, metas = [], []
  for folder in folders:
    path = folder / "scores.csv"
    if not path.is_file():
      raise ValueError(f"{path} does not exist: {folder} has no scores yet")
    rows, dropped = scores.recover(path)
    for group in dropped:
      print(
        f"warning: {path}: {scores.title(group)} is cut off and was left out",
        file=sys.stderr,
      )
    parts.append(rows)
    metas.append(_read_meta(folder / "report.json"))
  stated = [meta for meta in metas if meta is not None]
  if stated and len(stated) < len(metas):
    missing = folders[metas.index(None)]
    raise ValueError(
      f"{missing} has no report.json and others do: its protocol is not known "
      "to be theirs, so that its scores do not belong in their table"
    )
  if not stated:
    print(
      "warning: no report.json; the protocol lines say 'not stated'",
      file=sys.stderr,
    )
  return scores.merge(*parts), meta_lib.merge(stated)


def _leave_out(rows: list[scores.Row], ids: Sequence[str]) -> list[scores.Row]:
  unknown = set(ids) - {row["id"] for row in rows}
  if unknown:
    raise ValueError(f"--without: no image is called {min(unknown)}")
  return [row for row in rows if row["id"] not in ids]


def _read_meta(path: pathlib.Path) -> dict[str, Any] | None:
  if not path.is_file():
    return None
  try:
    meta = json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is no JSON: {error}") from error
  if not isinstance(meta, dict):
    raise ValueError(
      f"{path} has to hold an object, not a {type(meta).__name__}"
    )
  return meta


if __name__ == "__main__":
  sys.exit(main())
