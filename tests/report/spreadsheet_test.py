"""scores.csv after a spreadsheet opened and saved it."""

import csv

import pytest
from tiny_scores import make_arm

from kdseg.report import scores


def make_rows(ids=("a", "b", "c")):
  rows = make_arm("student-none", 0.8, seeds=1, images=len(ids))
  return [row | {"id": identity} for row, identity in zip(rows, ids)]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "scores.csv"


def save(path, *, mark=b"", separator=",", decimal="."):
  with path.open(newline="") as file:
    lines = list(csv.reader(file))
  for line in lines[1:]:
    line[4:] = [cell.replace(".", decimal) for cell in line[4:]]
  with path.open("w", newline="") as file:
    csv.writer(file, delimiter=separator).writerows(lines)
  path.write_bytes(mark + path.read_bytes())


@pytest.mark.parametrize("decimal", [".", ","])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_semicolons_and_decimal_commas_are_read(path, mark, decimal):
  rows = make_rows(ids=("a", "b;c", "d,e"))
  scores.write(path, rows)
  save(path, mark=mark, separator=";", decimal=decimal)
  assert scores.read(path) == rows


def test_a_byte_order_mark_is_passed_over(path):
  scores.write(path, make_rows())
  save(path, mark=b"\xef\xbb\xbf")
  assert scores.read(path) == make_rows()


def test_a_decimal_comma_between_commas_is_refused_with_what_to_do(path):
  scores.write(path, make_rows())
  save(path, decimal=",")
  with pytest.raises(ValueError, match=r"line 2: dice is.* save it with ','"):
    scores.read(path)


def test_points_beside_decimal_commas_are_refused(path):
  rows = make_rows()
  rows[1]["hd95"] = 1234.5
  scores.write(path, rows)
  save(path, separator=";", decimal=",")
  path.write_text(path.read_text().replace("1234,5", "1.234,5"))
  with pytest.raises(ValueError, match=r"line 3: hd95 is '1\.234,5'.* save it"):
    scores.read(path)


def test_a_share_that_lost_its_point_is_refused(path):
  rows = make_rows()
  scores.write(path, rows)
  dice = repr(rows[0]["dice"])
  path.write_text(path.read_text().replace(dice, dice.replace("0.", ""), 1))
  with pytest.raises(ValueError, match=r"line 2: dice is .*, more than 1"):
    scores.read(path)


def test_other_separators_are_refused_with_what_to_do(path):
  scores.write(path, make_rows())
  save(path, separator="\t")
  with pytest.raises(ValueError, match="If a spreadsheet saved it, save it"):
    scores.read(path)
