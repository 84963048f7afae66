"""scores.csv: one row for every image of every run, the source of all tables.

Columns: arm, seed, dataset, id, then `metrics.METRICS`. Rows come in *groups*:
the images of one (arm, seed, dataset). The file is only ever replaced whole,
so a crash of ours leaves the old file or the new one; what copying or a full
disk may cut off is found by `recover`, which keeps whole groups only.

Ids are the stems of people's own files. One that a spreadsheet would run as a
formula ("=cmd()") is stored with an apostrophe before it, which `read` takes
off again; what goes in comes out, whatever the text.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import csv
import io
import math
import numbers
import os
import pathlib

import numpy as np

from kdseg.evaluation import metrics
from kdseg.runtime import files

KEYS = ("arm", "seed", "dataset", "id")
COLUMNS = KEYS + metrics.METRICS
_WHOLE = frozenset(
  ("seed", "height", "width", "empty_prediction", *metrics.COUNTS)
)
_TEXT = frozenset(("arm", "dataset", "id"))
# The last four before the apostrophe are the same at full width, which some
# spreadsheets take for the plain ones.
_FORMULA_STARTS = (
  *("=", "+", "-", "@", "\t", "\r", "\n"),
  *("\uff1d", "\uff0b", "\uff0d", "\uff20", "'"),
)
_SHOWN = 60  # characters of a cell, in a message

Row = dict[str, str | int | float]
Group = tuple[str, int, str]  # arm, seed, dataset


def group_of(row: Mapping[str, str | int | float]) -> Group:
  """Names the run and the data set that a row belongs to."""
  return str(row["arm"]), int(row["seed"]), str(row["dataset"])


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
  """Sorts rows into groups, in the order of their first rows."""
  result: dict[Group, list[Row]] = {}
  for row in rows:
    result.setdefault(group_of(row), []).append(row)
  return result


def safe_cell(text: str) -> str:
  """Makes a text that no spreadsheet takes for a formula."""
  # Some take the spaces off first.
  is_risky = text.lstrip(" ").startswith(_FORMULA_STARTS)
  return "'" + text if is_risky else text


def read(path: str | os.PathLike[str]) -> list[Row]:
  """Reads every row of a whole file.

  Args:
    path: a scores.csv.

  Returns:
    One dict a row with the keys `COLUMNS`; counts, sizes and the seed are
    int, the other metrics float.

  Raises:
    FileNotFoundError: when there is none.
    ValueError: on other columns, a row that cannot be, an image that appears
      twice, or a file that ends within a row. The message names the line.
  """
  rows, cut = _parse(path)
  if cut is not None:
    name = f" of {_shown(cut[0])}" if cut and cut[0] else ""
    raise ValueError(
      f"{path} ends within a row{name}: the group it belongs to is not whole. "
      "Start the run again, which scores it anew (`recover` reads the rest)"
    )
  _check_unique(rows, str(path))
  return rows


def recover(
  path: str | os.PathLike[str],
  expected: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[Row], list[Group]]:
  """Reads the whole groups of a file that may be cut off.

  Args:
    path: a scores.csv; a missing one has no rows.
    expected: data set -> the ids a whole group has. A data set that it does
      not name (all of them without it) is judged by its neighbours: the last
      group of the file is partial if it lacks ids that another group of the
      same data set has.

  Returns:
    The rows of whole groups, and the groups that were dropped as partial.

  Raises:
    ValueError: as `read`, but for the cut-off end.
  """
  if not pathlib.Path(path).exists():
    return [], []
  rows, cut = _parse(path)
  _check_unique(rows, str(path))
  found = groups(rows)
  last = next(reversed(found), None)
  # The group that the cut-off row belongs to; where its name is cut too, that
  # may be the last one.
  damaged = last if cut is not None else None
  if cut is not None and len(cut) >= len(KEYS) and cut[1].isdecimal():
    damaged = _name(cut[0]), int(cut[1]), _name(cut[2])
  dropped = []
  if damaged is not None:
    found.setdefault(damaged, [])
  for group, members in found.items():
    ids = _ids(members)
    dataset = group[2]
    if expected is not None and dataset in expected:
      partial = ids != set(expected[dataset])
    elif group == last:
      partial = group == damaged or any(
        ids < _ids(others)
        for (_, _, name), others in found.items()
        if name == dataset
      )
    else:
      partial = group == damaged
    if partial:
      dropped.append(group)
  for group in dropped:
    del found[group]
  return [row for members in found.values() for row in members], dropped


def write(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
  """Replaces a file by these rows, at once.

  Args:
    path: where to; its folder has to exist.
    rows: dicts with the keys `COLUMNS`.

  Raises:
    ValueError: on missing or unknown columns, an empty name, a metric that is
      not finite, or an image that appears twice. The old file stays.
    WriteError: if the disk is full. The old file stays.
  """
  path = pathlib.Path(path)
  rows = [_checked(row, f"row {i}") for i, row in enumerate(rows)]
  _check_unique(rows, "the rows to write")
  lines = [",".join(COLUMNS)] + [
    ",".join(
      _cell(row[name]) if name in _TEXT else repr(row[name]) for name in COLUMNS
    )
    for row in rows
  ]
  # surrogateescape: file names need not be UTF-8.
  data = "".join(line + "\n" for line in lines)
  with files.whole(path) as file:
    file.write(data.encode("utf-8", "surrogateescape"))
    file.flush()
    os.fsync(file.fileno())


def append(
  path: str | os.PathLike[str],
  rows: Iterable[Row],
  expected: Mapping[str, Sequence[str]] | None = None,
) -> list[Group]:
  """Adds whole groups to a file; the file holds all of them or none.

  Args:
    path: a scores.csv, made if missing. Partial groups in it go.
    rows: all rows of one group or of several.
    expected: as for `recover`; the new rows have to be whole by it, too.

  Returns:
    The partial groups that were dropped from the file.

  Raises:
    ValueError: as `write`, when the file already has one of the groups, and
      when new rows are not the expected ones.
  """
  rows = [_checked(row, f"row {i}") for i, row in enumerate(rows)]
  for (arm, seed, dataset), members in groups(rows).items():
    wanted = set((expected or {}).get(dataset, _ids(members)))
    if _ids(members) != wanted:
      raise ValueError(
        f"{_shown(arm)}, seed {seed}, has {len(members)} rows for "
        f"{_shown(dataset)}, which "
        f"has {len(wanted)} images; {min(wanted ^ _ids(members))!r} is in "
        "only one of the two"
      )
  kept, dropped = recover(path, expected)
  # A partial group that comes again whole is replaced, not in the way.
  there = groups(kept).keys() & groups(rows).keys()
  if there:
    arm, seed, dataset = min(there)
    raise ValueError(
      f"{path} already has the scores of {_shown(arm)}, seed {seed}, on "
      f"{_shown(dataset)}; a run is scored once"
    )
  write(path, kept + rows)
  return dropped


def merge(*tables: Iterable[Row]) -> list[Row]:
  """Joins the rows of several files.

  Args:
    *tables: rows as `read` gives them. Groups that are the same in two tables
      count once.

  Returns:
    All rows, groups in the order of their first appearance.

  Raises:
    ValueError: when two tables have other scores for the same arm, seed and
      data set.
  """
  result: dict[Group, list[Row]] = {}
  for number, table in enumerate(tables, 1):
    for group, members in groups(table).items():
      known = result.setdefault(group, members)
      if known is not members and _by_id(known) != _by_id(members):
        arm, seed, dataset = group
        raise ValueError(
          f"table {number} has other scores than an earlier table for "
          f"{_shown(arm)}, seed {seed}, on {_shown(dataset)}: rename the arm "
          "in one of them, or leave one out"
        )
  return [row for members in result.values() for row in members]


def _ids(rows: Iterable[Row]) -> set[str]:
  return {str(row["id"]) for row in rows}


def _by_id(rows: Iterable[Row]) -> dict[str, Row]:
  return {str(row["id"]): row for row in rows}


def _parse(
  path: str | os.PathLike[str],
) -> tuple[list[Row], list[str] | None]:
  """Gives the rows, and the cells of a last row that is cut off, if any."""
  text = pathlib.Path(path).read_bytes().decode("utf-8", "surrogateescape")
  reader = csv.reader(io.StringIO(text, newline=""))
  try:
    header = next(reader, [])
    # The number of a row's last line, for a message one can act on.
    lines = [(reader.line_num, cells) for cells in reader]
  except csv.Error as error:
    raise ValueError(
      f"{path}, line {reader.line_num}: no CSV ({error}); put a copy in its "
      "place, or delete it and start the run again, which scores it anew"
    ) from None
  # A line end within quotes belongs to a name.
  cut = not text.endswith("\n") or text.count('"') % 2 == 1
  if tuple(header) != COLUMNS:
    if cut and ",".join(COLUMNS).startswith(text):
      return [], []
    missing = [name for name in COLUMNS if name not in header]
    unknown = [_shown(name) for name in header if name not in COLUMNS]
    raise ValueError(
      f"{path}: not the columns of a scores.csv (missing: "
      f"{', '.join(missing) or 'none'}; unknown: "
      f"{', '.join(unknown) or 'none'}; the order has to be "
      f"{', '.join(COLUMNS)})"
    )
  rows: list[Row] = []
  for position, (number, cells) in enumerate(lines):
    where = f"{path}, line {number}"
    if cut and position == len(lines) - 1:
      # Even with all its cells: the last number may have lost digits.
      return rows, cells
    rows.append(_row(cells, where))
  # A header without its line end holds no rows, and nothing is lost.
  return rows, None


def _cell(text: str) -> str:
  # Not csv.writer: it leaves a bare carriage return unquoted, which its own
  # reader takes for the end of the row.
  text = safe_cell(text)
  if any(character in text for character in ',"\r\n'):
    return '"' + text.replace('"', '""') + '"'
  return text


def _name(cell: str) -> str:
  return cell[1:] if cell.startswith("'") else cell


def _row(cells: Sequence[str], where: str) -> Row:
  if len(cells) != len(COLUMNS):
    raise ValueError(f"{where}: {len(cells)} cells, not {len(COLUMNS)}")
  row: Row = {}
  for name, cell in zip(COLUMNS, cells):
    if name in _TEXT:
      row[name] = _name(cell)
      continue
    try:
      # Python also reads "1_0" and digits of other scripts.
      if "_" in cell or not cell.isascii():
        raise ValueError
      row[name] = int(cell) if name in _WHOLE else float(cell)
    except ValueError:
      raise ValueError(
        f"{where}: {name} is '{_shown(cell)}', not a number"
      ) from None
  return _checked(row, where)


def _checked(row: Mapping[str, object], where: str) -> Row:
  missing = [name for name in COLUMNS if name not in row]
  unknown = [name for name in row if name not in COLUMNS]
  if missing or unknown:
    raise ValueError(
      f"{where}: missing {', '.join(missing) or 'nothing'}, unknown "
      f"{', '.join(unknown) or 'nothing'}"
    )
  result: Row = {}
  for name in COLUMNS:
    value = row[name]
    if name in _TEXT:
      if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {name} has to be a text, got {value!r}")
      result[name] = value
      continue
    # Any number will do, numpy's too; texts, None and infinities won't.
    if not _is_number(value, whole=name in _WHOLE):
      raise ValueError(
        f"{where} (id {_shown(row['id'])}): {name} is {_shown(repr(value))}, "
        f"not a {'whole' if name in _WHOLE else 'finite'} number"
      )
    result[name] = int(value) if name in _WHOLE else float(value)
  return result


def _is_number(value: object, *, whole: bool) -> bool:
  if not isinstance(value, numbers.Real | np.integer | np.floating):
    return False
  try:
    finite = math.isfinite(value)
  except OverflowError:  # a whole number beyond every float
    return False
  return finite and (not whole or int(value) == value)


def _shown(text: object) -> str:
  """Escapes what could steer a terminal, and cuts what would fill it."""
  text = str(text)
  text = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
  )


def _check_unique(rows: Iterable[Row], where: str) -> None:
  seen = set()
  for row in rows:
    key = (*group_of(row), row["id"])
    if key in seen:
      arm, seed, dataset, identity = key
      raise ValueError(
        f"{where}: image {_shown(identity)} of {_shown(dataset)} appears twice "
        f"for {_shown(arm)}, seed {seed}"
      )
    seen.add(key)
