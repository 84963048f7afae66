"""Columns and cells of scores.csv: what a row holds, read and written.

Ids are the stems of people's own files. One that a spreadsheet would run as a
formula ("=cmd()") is stored with an apostrophe before it, which `parse` takes
off again.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from kdseg.evaluation import metrics

KEYS = ("arm", "seed", "dataset", "id")
COLUMNS = KEYS + metrics.COLUMNS
# A file from before a metric was added has no such column. Dice decides what
# the tables say, so that it is always there.
REQUIRED = (*KEYS, "dice", *metrics.FACTS)
_WHOLE = frozenset(("seed", *metrics.FACTS))
_TEXT = frozenset(("arm", "dataset", "id"))
_SHARES = frozenset(("dice", "jaccard"))
# The last four before the apostrophe are the same at full width, which some
# spreadsheets take for the plain ones.
_FORMULA_STARTS = (
  *("=", "+", "-", "@", "\t", "\r", "\n"),
  *("\uff1d", "\uff0b", "\uff0d", "\uff20", "'"),
)
SAVE_AS = "save it with ',' between the cells and '.' in the numbers"
_SHOWN = 60  # characters of a cell, in a message

Row = dict[str, Any]  # texts, int for seed and `metrics.FACTS`, else float


def safe(text: str) -> str:
  """Makes a text that no spreadsheet takes for a formula."""
  # Some spreadsheets strip the spaces first.
  is_risky = text.lstrip(" ").startswith(_FORMULA_STARTS)
  return "'" + text if is_risky else text


def name_of(cell: str) -> str:
  """Undoes `safe`."""
  return cell[1:] if cell.startswith("'") else cell


def line(row: Row) -> str:
  """Writes a checked row as a line of the file, its end included."""
  return ",".join(_cell(name, row.get(name)) for name in COLUMNS) + "\n"


def has_decimal_commas(cells: Sequence[str], columns: Sequence[str]) -> bool:
  """Whether a number of a line is written as a spreadsheet does, "0,5"."""
  return any(
    "," in cell for name, cell in zip(columns, cells) if name not in _TEXT
  )


def parse(
  cells: Sequence[str],
  columns: Sequence[str],
  where: str,
  decimal: str = ".",
) -> Row:
  """Reads the cells of one line.

  Args:
    cells: as the CSV reader splits them.
    columns: the file's header. An empty cell of a metric that is not
      `REQUIRED` leaves it out of the row.
    where: file and line, for messages.
    decimal: "." or ",", between the whole part of a number and the rest.

  Raises:
    ValueError: as `checked`, on another number of cells, and on a share above
      1, such as a spreadsheet makes of the digits of "0.97".
  """
  if len(cells) != len(columns):
    raise ValueError(f"{where}: {len(cells)} cells, not {len(columns)}")
  row: Row = {}
  for name, cell in zip(columns, cells):
    if name in _TEXT:
      row[name] = name_of(cell)
    elif cell or name in REQUIRED:
      row[name] = _number(name, cell, where, decimal)
      if name in _SHARES and row[name] > 1:
        raise ValueError(
          f"{where}: {name} is {shown(cell)}, more than 1. If a spreadsheet "
          f"lost its decimal point, export the file anew and {SAVE_AS}"
        )
  return checked(row, where)


def checked(row: Mapping[str, Any], where: str) -> Row:
  """Returns the row with its numbers as int and float.

  Args:
    row: by `COLUMNS`; metrics that are not `REQUIRED` may be missing.
    where: file and line, for messages.

  Raises:
    ValueError: on missing or unknown columns, an empty text, and what is not a
      finite number.
  """
  missing = [name for name in REQUIRED if name not in row]
  unknown = [name for name in row if name not in COLUMNS]
  if missing or unknown:
    raise ValueError(
      f"{where}: missing {', '.join(missing) or 'nothing'}, unknown "
      f"{', '.join(unknown) or 'nothing'}"
    )
  result: Row = {}
  for name in COLUMNS:
    if name not in row:
      continue
    value = row[name]
    if name in _TEXT:
      if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {name} has to be a text, got {value!r}")
      result[name] = value
      continue
    if not _is_number(value, whole=name in _WHOLE):
      raise ValueError(
        f"{where} (id {shown(row['id'])}): {name} is {shown(repr(value))}, "
        f"not a {'whole' if name in _WHOLE else 'finite'} number"
      )
    result[name] = int(value) if name in _WHOLE else float(value)
  return result


def shown(text: object) -> str:
  """Escapes what could steer a terminal, and cuts what would fill it."""
  text = str(text)
  text = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
  )


def _cell(name: str, value: Any) -> str:
  if name not in _TEXT:
    return "" if value is None else repr(value)
  # Not csv.writer: it leaves a bare carriage return unquoted, which its own
  # reader takes for the end of the row.
  text = safe(value)
  if any(character in text for character in ',"\r\n'):
    return '"' + text.replace('"', '""') + '"'
  return text


def _number(name: str, cell: str, where: str, decimal: str) -> float:
  try:
    # Python also reads "1_0" and digits of other scripts.
    if "_" in cell or not cell.isascii() or (decimal == "," and "." in cell):
      raise ValueError
    text = cell.replace(decimal, ".")
    return int(text) if name in _WHOLE else float(text)
  except ValueError:
    what = f"; {SAVE_AS}" if "," in cell or decimal == "," else ""
    raise ValueError(
      f"{where}: {name} is '{shown(cell)}', not a number{what}"
    ) from None


def _is_number(value: Any, *, whole: bool) -> bool:
  if not isinstance(value, int | float | np.integer | np.floating):
    return False
  try:
    finite = math.isfinite(value)
  except OverflowError:  # a whole number beyond every float
    return False
  return finite and (not whole or value % 1 == 0)
