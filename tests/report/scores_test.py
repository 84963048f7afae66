"""scores.csv: what goes in comes out, and what is cut off is seen."""

import csv

import numpy as np
import pytest

from kdseg.evaluation import metrics
from kdseg.report import scores

# Names that a spreadsheet, a CSV reader or a browser could trip over.
NASTY = (
  "=cmd|' /C calc'!A0",
  "+1",
  "-1",
  "@SUM(A1)",
  "'quoted",
  "a,b",
  'say "no"',
  "two\nlines",
  "carriage\rreturn",
  "\ttab",
  "<script>alert(1)</script>",
  "caf\u00e9",
  "\udcff not utf-8",
  " spaces ",
  " =1+1",
  "\uff1d1+1",
  "'",
  "a|b`c",
  "\x1b[2J",
)


def make_rows(arm="student-none", seed=0, dataset="ph2", ids=("a", "b", "c")):
  rng = np.random.default_rng(seed + len(arm) + len(dataset))
  return [
    {
      "arm": arm,
      "seed": seed,
      "dataset": dataset,
      "id": identity,
      **metrics.score(rng.random((6, 7)), rng.random((6, 7)) > 0.5),
    }
    for identity in ids
  ]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "scores.csv"


class TestWriteAndRead:
  def test_rows_are_read_back_to_the_last_digit(self, path):
    rows = make_rows() + make_rows(seed=1)
    scores.write(path, rows)
    assert scores.read(path) == rows

  @pytest.mark.parametrize("name", NASTY)
  def test_any_name_comes_back_as_it_was(self, path, name):
    rows = make_rows(ids=(name, "plain"))
    scores.write(path, rows)
    assert scores.read(path) == rows

  @pytest.mark.parametrize("name", NASTY)
  def test_no_cell_can_be_run_as_a_formula(self, path, name):
    scores.write(path, make_rows(arm=name, dataset=name, ids=(name,)))
    with path.open(newline="", errors="surrogateescape") as file:
      cells = list(csv.reader(file))[1]
    risky = ("=", "+", "-", "@", "\t", "\r", "\uff1d")
    assert not any(c.lstrip(" ").startswith(risky) for c in cells)

  def test_columns_are_those_of_the_contract(self, path):
    scores.write(path, make_rows())
    assert path.read_text().splitlines()[0] == (
      "arm,seed,dataset,id,dice,jaccard,accuracy,sensitivity,specificity,"
      "thresholded_jaccard,hd95,hd95_diagonal,assd,assd_diagonal,nsd,"
      "boundary_iou,true_positive,false_positive,false_negative,"
      "true_negative,height,width,empty_prediction"
    )

  def test_numbers_of_numpy_are_numbers(self, path):
    rows = make_rows(ids=("a",))
    rows[0]["dice"] = np.float32(0.5)
    rows[0]["height"] = np.int64(6)
    scores.write(path, rows)
    assert "np." not in path.read_text()
    got = scores.read(path)[0]
    assert got["dice"] == 0.5
    assert type(got["height"]) is int

  def test_a_spreadsheet_may_have_changed_the_line_ends(self, path):
    rows = make_rows()
    scores.write(path, rows)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert scores.read(path) == rows

  def test_no_rows_is_a_header(self, path):
    scores.write(path, [])
    assert scores.read(path) == []

  def test_a_refused_table_leaves_the_old_one(self, path):
    scores.write(path, make_rows())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="appears twice"):
      scores.write(path, make_rows() + make_rows())
    assert path.read_bytes() == before

  def test_a_crash_while_writing_leaves_the_old_one(self, path, monkeypatch):
    scores.write(path, make_rows())
    before = path.read_bytes()

    def crash(_):
      raise OSError("disk full")

    monkeypatch.setattr(scores.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
      scores.append(path, make_rows(seed=1))
    assert path.read_bytes() == before

  def test_the_new_file_takes_the_old_ones_place_at_once(
    self, path, monkeypatch
  ):
    scores.write(path, make_rows())
    before = path.read_bytes()

    def crash(*_):
      raise OSError("killed")

    monkeypatch.setattr(scores.pathlib.Path, "replace", crash)
    with pytest.raises(OSError, match="killed"):
      scores.append(path, make_rows(seed=1))
    assert path.read_bytes() == before


def drop_column(path, name):
  with path.open(newline="") as file:
    lines = list(csv.reader(file))
  place = lines[0].index(name)
  path.write_text(
    "".join(",".join(line[:place] + line[place + 1 :]) + "\n" for line in lines)
  )


class TestOlderFile:
  def test_a_file_from_before_a_metric_is_read_without_it(self, path):
    rows = make_rows()
    scores.write(path, rows)
    drop_column(path, "nsd")
    for row in rows:
      del row["nsd"]
    assert scores.read(path) == rows

  def test_its_rows_are_written_with_empty_cells(self, path):
    rows = make_rows() + make_rows(seed=1)
    del rows[0]["boundary_iou"]
    scores.write(path, rows)
    assert path.read_text().splitlines()[0] == ",".join(scores.COLUMNS)
    assert scores.read(path) == rows

  @pytest.mark.parametrize("name", ["dice", "true_positive", "height", "id"])
  def test_a_required_column_may_not_be_missing(self, path, name):
    scores.write(path, make_rows())
    drop_column(path, name)
    with pytest.raises(ValueError, match=f"missing: {name}; unknown: none"):
      scores.read(path)

  def test_columns_in_another_order_are_refused(self, path):
    scores.write(path, make_rows())
    text = path.read_text()
    path.write_text(text.replace("dice,jaccard", "jaccard,dice"))
    with pytest.raises(ValueError, match="the order has to be"):
      scores.read(path)


class TestBadRows:
  @pytest.mark.parametrize("value", [np.nan, np.inf, None, "0.5"])
  def test_a_value_that_is_not_finite_is_refused_with_its_image(
    self, path, value
  ):
    rows = make_rows()
    rows[1]["dice"] = value
    with pytest.raises(ValueError, match=r"row 1 \(id b\): dice"):
      scores.write(path, rows)

  def test_half_a_pixel_is_refused(self, path):
    rows = make_rows()
    rows[0]["true_positive"] = 1.5
    with pytest.raises(ValueError, match=r"true_positive is 1\.5"):
      scores.write(path, rows)

  def test_missing_and_unknown_columns_are_named(self, path):
    rows = make_rows()
    del rows[0]["dice"]
    rows[0]["colour"] = 3
    with pytest.raises(ValueError, match="missing dice, unknown colour"):
      scores.write(path, rows)

  def test_an_empty_name_is_refused(self, path):
    with pytest.raises(ValueError, match="id has to be a text"):
      scores.write(path, make_rows(ids=("",)))

  def test_other_columns_in_a_file_are_named(self, path):
    scores.write(path, make_rows())
    path.write_text(path.read_text().replace("hd95,", "hausdorff,", 1))
    with pytest.raises(ValueError, match=r"missing: hd95; unknown: hausdorff"):
      scores.read(path)

  def test_a_damaged_cell_is_named_with_its_line(self, path):
    scores.write(path, make_rows())
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace(",ph2,b,", ",ph2,b,x", 1)
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match="line 3: dice is 'x"):
      scores.read(path)

  @pytest.mark.parametrize(
    "cell",
    ["nan", "inf", "-inf", "1e999", "text", "", "0,5", "1_0", "\u0663", "0x1"],
  )
  def test_a_cell_that_is_no_finite_number_is_named_with_its_line(
    self, path, cell
  ):
    rows = make_rows(ids=("a",))
    scores.write(path, rows)
    text = path.read_text()
    quoted = f'"{cell}"' if "," in cell else cell
    path.write_text(
      text.replace(f"ph2,a,{rows[0]['dice']!r}", f"ph2,a,{quoted}")
    )
    with pytest.raises(ValueError, match=r"scores\.csv, line 2.*: dice is"):
      scores.read(path)

  @pytest.mark.parametrize("digits", [400, 5000])
  def test_a_number_of_hundreds_of_digits_is_named_in_short(self, path, digits):
    scores.write(path, make_rows(ids=("a",)))
    text = path.read_text()
    path.write_text(text.replace(",0,ph2", f",{'9' * digits},ph2"))
    with pytest.raises(ValueError, match=r"line 2.*seed is") as error:
      scores.read(path)
    assert len(str(error.value)) < 300

  def test_a_quote_that_is_never_closed_is_named_with_its_line(self, path):
    scores.write(path, make_rows())
    path.write_text(path.read_text().replace("ph2,b", 'ph2,"b') + "x" * 200_000)
    with pytest.raises(ValueError, match=r"scores\.csv, line \d+: no CSV"):
      scores.recover(path)

  def test_control_characters_are_escaped_in_the_message(self, path):
    with pytest.raises(ValueError, match="appears twice") as error:
      scores.write(
        path, make_rows(arm="\x1b[2J", ids=("\x1b]0;x\x07", "b")) * 2
      )
    assert str(error.value).isprintable()

  def test_bytes_that_are_no_table_are_refused(self, path):
    path.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(ValueError, match="not the columns") as error:
      scores.read(path)
    assert str(error.value).isprintable()

  def test_a_missing_cell_is_named_with_its_line(self, path):
    scores.write(path, make_rows())
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace(",ph2,b,", ",ph2,", 1)
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match="line 3: 22 cells, not 23"):
      scores.read(path)

  def test_an_image_that_appears_twice_is_named(self, path):
    scores.write(path, make_rows())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[2]]))
    with pytest.raises(ValueError, match="image b appears twice for student"):
      scores.read(path)


class TestRecover:
  def test_no_file_has_no_rows(self, path):
    assert scores.recover(path) == ([], [])

  def test_a_whole_file_loses_nothing(self, path):
    rows = make_rows() + make_rows(seed=1) + make_rows(dataset="x", ids="q")
    scores.write(path, rows)
    assert scores.recover(path) == (rows, [])

  def test_wherever_the_file_is_cut_only_whole_groups_are_left(self, path):
    ids = ("=a,b", "two\nlines", "b")
    short = dict.fromkeys(metrics.COLUMNS, 0)  # a cut at every byte is slow
    first, second = (
      [row | short for row in make_rows(seed=seed, ids=ids)] for seed in (0, 1)
    )
    scores.write(path, first + second)
    whole = path.read_bytes()
    seen = set()
    for length in range(len(whole)):
      path.write_bytes(whole[:length])
      rows, dropped = scores.recover(path, {"ph2": ids})
      assert rows in ([], first), length
      seen.add((len(rows), tuple(dropped)))
    # Each group is dropped by name at some cut, and the first kept.
    assert (0, (("student-none", 0, "ph2"),)) in seen
    assert (3, (("student-none", 1, "ph2"),)) in seen

  def test_without_expectations_neighbours_tell(self, path):
    rows = make_rows() + make_rows(seed=1)
    scores.write(path, rows[:-1])
    assert scores.recover(path) == (rows[:3], [("student-none", 1, "ph2")])

  def test_a_number_that_may_have_lost_digits_is_not_kept(self, path):
    rows = make_rows() + make_rows(seed=1)
    scores.write(path, rows)
    path.write_bytes(path.read_bytes()[:-1])  # only the last line end
    assert scores.recover(path) == (rows[:3], [("student-none", 1, "ph2")])

  def test_a_group_of_another_data_set_may_be_smaller(self, path):
    rows = make_rows() + make_rows(dataset="isic2016_test", ids=("a",))
    scores.write(path, rows)
    assert scores.recover(path) == (rows, [])

  def test_expected_ids_find_a_partial_group_anywhere(self, path):
    part, whole = make_rows(ids=("a", "b")), make_rows(seed=1)
    scores.write(path, part + whole)
    got = scores.recover(path, {"ph2": ("a", "b", "c")})
    assert got == (whole, [("student-none", 0, "ph2")])

  def test_reading_it_as_whole_is_refused(self, path):
    scores.write(path, make_rows())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="ends within a row of student-none"):
      scores.read(path)

  def test_a_file_of_something_else_is_not_taken_for_a_cut_one(self, path):
    path.write_text("a,b\n1,2")
    with pytest.raises(ValueError, match="not the columns"):
      scores.recover(path)


class TestAppend:
  def test_groups_come_one_after_the_other(self, path):
    first, second = make_rows(), make_rows(seed=1)
    assert scores.append(path, first) == []
    assert scores.append(path, second) == []
    assert scores.read(path) == first + second

  def test_a_run_is_scored_once(self, path):
    scores.append(path, make_rows())
    with pytest.raises(ValueError, match="student-none, seed 0, on ph2"):
      scores.append(path, make_rows())

  def test_a_partial_group_makes_room_for_the_whole_one(self, path):
    first, second = make_rows(), make_rows(seed=1)
    scores.write(path, first + second)
    path.write_bytes(path.read_bytes()[:-9])
    dropped = scores.append(path, second)
    assert dropped == [("student-none", 1, "ph2")]
    assert scores.read(path) == first + second

  def test_new_rows_are_held_to_the_expected_images(self, path):
    with pytest.raises(ValueError, match="on ph2: 3 rows for 4 images; 'd'"):
      scores.append(path, make_rows(), {"ph2": "abcd"})
    assert not path.exists()

  def test_expected_images_make_room_in_the_file_too(self, path):
    scores.write(path, make_rows(ids="ab"))
    got = scores.append(path, make_rows(), {"ph2": "abc"})
    assert got == [("student-none", 0, "ph2")]
    assert scores.read(path) == make_rows()


class TestMerge:
  def test_joins_groups_in_their_order(self):
    one, two = make_rows(), make_rows(seed=1)
    assert scores.merge(two, one) == two + one

  def test_the_same_group_twice_counts_once(self):
    one, two = make_rows(), make_rows(seed=1)
    assert scores.merge(one + two, one[::-1]) == one + two

  def test_other_scores_for_the_same_run_are_an_error(self):
    one, two = make_rows(), make_rows()
    two[1]["dice"] = 0.123
    with pytest.raises(ValueError, match="table 2 has other scores"):
      scores.merge(one, two)

  def test_a_run_scored_on_fewer_images_is_an_error(self):
    with pytest.raises(ValueError, match="student-none, seed 0, on ph2"):
      scores.merge(make_rows(), make_rows()[:2])
