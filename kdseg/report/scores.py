"""scores.csv: one row for every image of every run, the source of all tables.

Columns: arm, seed, dataset, id, then `metrics.COLUMNS`; see `cells`. Rows come
in *groups*: the images of one (arm, seed, dataset). The file is only ever
replaced whole, so that a crash leaves the old file or the new one; what copying
or a full disk cuts off is found by `recover`, which keeps whole groups only.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import csv
import io
import os
import pathlib

from kdseg.report import cells
from kdseg.runtime import files

COLUMNS = cells.COLUMNS
Row = cells.Row
Group = tuple[str, int, str]  # arm, seed, dataset


def group_of(row: Row) -> Group:
  """Names the run and the data set that a row belongs to."""
  return str(row["arm"]), int(row["seed"]), str(row["dataset"])


def title(group: Group) -> str:
  """Names a group in a message, whatever its arm and data set are called."""
  arm, seed, dataset = group
  return f"{cells.shown(arm)}, seed {seed}, on {cells.shown(dataset)}"


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
  """Sorts rows into groups, in the order of their first rows."""
  result: dict[Group, list[Row]] = {}
  for row in rows:
    result.setdefault(group_of(row), []).append(row)
  return result


def read(path: str | os.PathLike[str]) -> list[Row]:
  """Reads every row of a whole file.

  Args:
    path: a scores.csv; one that a spreadsheet saved, with a byte order mark,
      ";" between the cells and decimal commas, is read too.

  Returns:
    One dict a row with the keys `COLUMNS`; counts, sizes and the seed are
    int, the metrics float. A metric that the file does not have (it is older
    than the metric) is missing in its rows.

  Raises:
    FileNotFoundError: when there is none.
    ValueError: on other columns, a row that cannot be, an image that appears
      twice, or a file that ends within a row. The message names the line.
  """
  rows, cut = _parse(path)
  if cut is not None:
    name = f" of {cells.shown(cut[0])}" if cut and cut[0] else ""
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
  damaged = last if cut is not None else None
  if cut is not None and len(cut) >= len(cells.KEYS) and cut[1].isdecimal():
    damaged = cells.name_of(cut[0]), int(cut[1]), cells.name_of(cut[2])
  if damaged is not None:
    found.setdefault(damaged, [])
  dropped = []
  for group, members in found.items():
    ids, wanted = _ids(members), (expected or {}).get(group[2])
    if wanted is not None:
      partial = ids != set(wanted)
    else:
      partial = group == damaged or (
        group == last
        and any(
          ids < _ids(others)
          for other, others in found.items()
          if other[2] == group[2]
        )
      )
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
  rows = [cells.checked(row, f"row {i}") for i, row in enumerate(rows)]
  _check_unique(rows, "the rows to write")
  # surrogateescape: file names need not be UTF-8.
  data = ",".join(COLUMNS) + "\n" + "".join(map(cells.line, rows))
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
  rows = [cells.checked(row, f"row {i}") for i, row in enumerate(rows)]
  for group, members in groups(rows).items():
    wanted = set((expected or {}).get(group[2], _ids(members)))
    if _ids(members) != wanted:
      raise ValueError(
        f"{title(group)}: {len(members)} rows for {len(wanted)} images; "
        f"{min(wanted ^ _ids(members))!r} is in only one of the two"
      )
  kept, dropped = recover(path, expected)
  # A partial group that comes again whole is replaced, not in the way.
  there = groups(kept).keys() & groups(rows).keys()
  if there:
    raise ValueError(
      f"{path} already has the scores of {title(min(there))}; a run is scored "
      "once"
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
        raise ValueError(
          f"table {number} has other scores than an earlier table for "
          f"{title(group)}: rename the arm in one of them, or leave one out"
        )
  return [row for members in result.values() for row in members]


def _ids(rows: Iterable[Row]) -> set[str]:
  return {str(row["id"]) for row in rows}


def _by_id(rows: Iterable[Row]) -> dict[str, Row]:
  return {str(row["id"]): row for row in rows}


def _parse(
  path: str | os.PathLike[str],
) -> tuple[list[Row], list[str] | None]:
  """Returns the rows, and the cells of a last row that is cut off, if any."""
  # utf-8-sig: without the byte order mark that a spreadsheet writes.
  text = pathlib.Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
  first_line = text.partition("\n")[0]
  separator = ";" if ";" in first_line and "," not in first_line else ","
  reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
  try:
    header = next(reader, [""])
    # The number of a row's last line, for a message one can act on.
    lines = [(reader.line_num, found) for found in reader]
  except csv.Error as error:
    raise ValueError(
      f"{path}, line {reader.line_num}: no CSV ({error}); put a copy in its "
      "place, or delete it and start the run again, which scores it anew"
    ) from None
  # A line end within quotes belongs to a name.
  cut = not text.endswith("\n") or text.count('"') % 2 == 1
  # A header without its line end holds no rows, and nothing is lost.
  if not lines and cut and _starts_header(header):
    return [], None
  _check_header(header, str(path))
  # Even with all its cells: the last number may have lost digits.
  tail = lines.pop()[1] if cut else None
  # Between commas, "1,234" may also be a thousand.
  decimal = "."
  if separator == ";" and any(
    cells.has_decimal_commas(found, header) for _, found in lines
  ):
    decimal = ","
  rows = [
    cells.parse(found, header, f"{path}, line {number}", decimal)
    for number, found in lines
  ]
  return rows, tail


def _starts_header(header: Sequence[str]) -> bool:
  return set(header[:-1]) <= set(COLUMNS) and any(
    name.startswith(header[-1]) for name in COLUMNS
  )


def _check_header(header: Sequence[str], path: str) -> None:
  """Refuses what is no header; a newer metric's column may be missing."""
  if set(cells.REQUIRED) <= set(header) and list(header) == [
    name for name in COLUMNS if name in header
  ]:
    return
  missing = [name for name in COLUMNS if name not in header]
  unknown = [cells.shown(name) for name in header if name not in COLUMNS]
  raise ValueError(
    f"{path}: not the columns of a scores.csv (missing: "
    f"{', '.join(missing) or 'none'}; unknown: "
    f"{', '.join(unknown) or 'none'}; the order has to be "
    f"{', '.join(COLUMNS)}). If a spreadsheet saved it, {cells.SAVE_AS}"
  )


def _check_unique(rows: Iterable[Row], where: str) -> None:
  seen = set()
  for row in rows:
    key = (*group_of(row), row["id"])
    if key in seen:
      raise ValueError(
        f"{where}: image {cells.shown(row['id'])} appears twice for "
        f"{title(group_of(row))}"
      )
    seen.add(key)
