"""Overlays: the right cases, outlined in the right colour, in their place."""

import dataclasses

import numpy as np
import pytest

from kdseg.report import overlays

SKIN = (190, 70, 150)  # no text and no line has such a colour


def make_case(arm="student-none", rank="worst", height=64, width=64, **kwargs):
  truth = np.zeros((height, width), bool)
  truth[16:48, 8:40] = True
  prediction = np.zeros((height, width), bool)
  prediction[16:48, 24:56] = True
  case = overlays.Case(
    arm=arm,
    rank=rank,
    id="ISIC_0000003",
    dice=0.5,
    image=np.full((height, width, 3), SKIN, np.uint8),
    truth=truth,
    prediction=prediction,
  )
  return dataclasses.replace(case, **kwargs)


def grid(arms, ranks, **kwargs):
  return [make_case(arm, rank, **kwargs) for rank in ranks for arm in arms]


def near(picture, colour, reach=40):
  distance = np.abs(np.asarray(picture, int) - colour).sum(-1)
  return distance < reach


def tile_of(picture, height=64, width=64):
  """Cuts out the first tile: the first pixels of skin from the top left."""
  rows, columns = np.nonzero(near(picture, SKIN, 6))
  top, left = rows.min(), columns.min()
  # 320 pixels are the longer side, whatever the image.
  scale = 320 / max(height, width)
  return np.asarray(picture)[
    top : top + round(height * scale), left : left + round(width * scale)
  ]


def at(tile, row, column, height=64, width=64):
  """The colour at a place given in pixels of the image."""
  return tuple(
    int(v)
    for v in tile[
      int(row * tile.shape[0] / height), int(column * tile.shape[1] / width)
    ]
  )


class TestChooseColumns:
  TEACHER, NONE, MBF = "teacher_vit", "s-none", "s-mbf"

  def test_takes_the_teacher_the_baseline_and_the_others_in_their_order(self):
    arms = [self.MBF, "s-kd", self.NONE, self.TEACHER]
    assert overlays.choose_columns(arms, {}) == (
      [self.TEACHER, self.NONE, self.MBF, "s-kd"],
      self.NONE,
      self.MBF,
    )

  def test_of_many_arms_takes_the_primary_ones(self):
    arms = [self.TEACHER, "s-none", "t-none", "t-m2bf"]
    arms += [f"t-a{i}" for i in range(40)]
    primary = [
      {"dataset": "ph2", "arm": "t-m2bf", "against": "t-a9"},
      {"dataset": "ph2", "arm": "t-a7", "against": ["t-unknown"]},
    ]
    shown, baseline, arm = overlays.choose_columns(arms, {"primary": primary})
    assert shown == [
      *(self.TEACHER, "t-none", "t-m2bf", "t-a7", "t-a9", "t-a0")
    ]
    assert (baseline, arm) == ("t-none", "t-m2bf")

  def test_takes_the_teacher_of_the_students_and_no_other(self):
    arms = ["teacher_a", "teacher_b", self.NONE]
    shown, *_ = overlays.choose_columns(arms, {"teacher": "teacher_b"})
    assert shown == ["teacher_b", self.NONE]

  def test_without_a_baseline_the_first_student_takes_its_place(self):
    got = overlays.choose_columns(["s-kd", self.MBF], {})
    assert got == (["s-kd", self.MBF], "s-kd", self.MBF)

  def test_a_teacher_alone_is_compared_with_nothing(self):
    got = overlays.choose_columns([self.TEACHER], {})
    assert got == ([self.TEACHER], self.TEACHER, None)


class TestPick:
  def rows(self, dices):
    return [
      {"arm": "a", "seed": 0, "dataset": "d", "id": f"{i}", "dice": dice}
      for i, dice in enumerate(dices)
    ]

  def test_takes_worst_median_and_best(self):
    got = overlays.pick(self.rows([0.5, 0.9, 0.1, 0.7, 0.6]))
    assert got == {"worst": "2", "median": "4", "best": "1"}

  def test_takes_what_another_arm_improved_and_worsened_most(self):
    baseline = self.rows([0.5, 0.9, 0.1, 0.7, 0.6])
    got = overlays.pick(baseline, self.rows([0.6, 0.8, 0.3, 0.3, 0.6]))
    assert got == {
      "worst": "2",
      "median": "4",
      "best": "1",
      "most improved": "2",
      "most worsened": "3",
    }

  def test_an_even_number_has_a_lower_median(self):
    assert overlays.pick(self.rows([0.1, 0.2, 0.3, 0.4]))["median"] == "1"

  def test_one_image_is_all_three(self):
    assert set(overlays.pick(self.rows([0.5])).values()) == {"0"}

  def test_ties_go_by_id_whatever_the_order(self):
    rows = self.rows([0.5, 0.5, 0.5])
    assert overlays.pick(rows) == overlays.pick(rows[::-1])
    assert overlays.pick(rows)["worst"] == "0"
    assert overlays.pick(rows, rows[::-1])["most improved"] == "0"
    assert overlays.pick(rows, rows[::-1])["most worsened"] == "0"

  def test_several_groups_are_refused(self):
    rows = self.rows([0.5, 0.6])
    rows[1]["seed"] = 1
    with pytest.raises(ValueError, match="one group, got 2"):
      overlays.pick(rows)
    with pytest.raises(ValueError, match="one group, got 0"):
      overlays.pick([])


class TestOverlays:
  def test_outlines_each_mask_in_its_colour_at_its_edge(self):
    tile = tile_of(overlays.overlays([make_case()]))
    # The annotation's left edge is at column 8, the prediction's right edge
    # at column 56; between them lies the untouched image.
    assert near(at(tile, 32, 8), overlays.TRUTH_COLOUR)
    assert near(at(tile, 32, 55.8), overlays.PREDICTION_COLOUR)
    assert at(tile, 32, 32) == SKIN
    assert at(tile, 4, 4) == SKIN
    assert at(tile, 32, 16) == SKIN

  def test_where_both_agree_both_are_seen(self):
    case = make_case()
    case = dataclasses.replace(case, prediction=case.truth)
    tile = tile_of(overlays.overlays([case]))
    across = tile[tile.shape[0] // 2, : tile.shape[1] // 4]
    assert near(across, overlays.PREDICTION_COLOUR).any()
    assert near(across, overlays.TRUTH_COLOUR, 60).any()

  def test_an_empty_prediction_has_no_outline(self):
    empty = np.zeros((64, 64), bool)
    tile = tile_of(overlays.overlays([make_case(prediction=empty)]))
    assert near(tile, overlays.TRUTH_COLOUR).any()
    assert not near(tile, overlays.PREDICTION_COLOUR).any()

  def test_an_empty_prediction_is_called_empty(self):
    empty = np.zeros((64, 64), bool)
    one = make_case(prediction=empty)
    dot = empty.copy()
    dot[0, 0] = True
    other = make_case(prediction=dot)
    beneath = [
      np.asarray(overlays.overlays([case]))[-50:] for case in (one, other)
    ]
    assert (beneath[0] < 100).sum() > (beneath[1] < 100).sum()

  def test_a_lesion_that_fills_the_frame_is_outlined_along_it(self):
    full = np.ones((64, 64), bool)
    case = make_case(truth=full, prediction=np.zeros((64, 64), bool))
    picture = overlays.overlays([case])
    cyan = near(picture, overlays.TRUTH_COLOUR, 90)
    assert (cyan.sum(0) > 250).sum() >= 2  # left and right edges
    assert (cyan.sum(1) > 250).sum() >= 2  # top and bottom edges

  def test_columns_are_arms_and_rows_are_ranks(self):
    small = overlays.overlays(grid(["a"], ["worst"]))
    wide = overlays.overlays(grid(["a", "b"], ["worst"]))
    tall = overlays.overlays(grid(["a"], ["worst", "best"]))
    assert wide.height == small.height
    assert wide.width - small.width >= 320
    assert tall.width == small.width
    assert tall.height - small.height >= 320

  def test_a_missing_case_is_a_blank_place(self):
    whole = [make_case("a", "worst"), *grid(["a", "b"], ["best"])]
    skin = near(overlays.overlays(whole), SKIN, 6)
    rows, columns = skin.shape
    assert not skin[: rows // 2, columns // 2 + 60 :].any()
    assert skin[: rows // 2, : columns // 2].any()
    assert skin[rows // 2 + 40 :, columns // 2 + 60 :].any()

  @pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40)])
  def test_keeps_the_aspect_ratio(self, height, width):
    case = make_case(
      height=height,
      width=width,
      truth=np.zeros((height, width), bool),
      prediction=np.zeros((height, width), bool),
    )
    rows, columns = np.nonzero(near(overlays.overlays([case]), SKIN, 6))
    assert rows.max() - rows.min() + 1 == 320 * height // 64
    assert columns.max() - columns.min() + 1 == 320 * width // 64

  def test_stands_on_white(self):
    picture = overlays.overlays([make_case()], title="isic2016_test")
    assert picture.mode == "RGB"
    corners = [(0, 0), (picture.width - 1, 0), (0, picture.height - 1)]
    assert {picture.getpixel(c) for c in corners} == {(255, 255, 255)}

  def test_a_title_takes_room_of_its_own(self):
    bare = overlays.overlays([make_case()])
    titled = overlays.overlays([make_case()], title="isic2016_test, seed 0")
    assert titled.height > bare.height
    longer = overlays.overlays([make_case()], title="a\n" + "long title " * 9)
    assert longer.width > titled.width
    assert longer.height > titled.height

  @pytest.mark.parametrize(
    "name", ["x" * 400, "two\nlines", "\udcff", "<b>", "\u4e2d\u6587"]
  )
  def test_any_name_fits_in_its_place(self, name):
    plain = overlays.overlays([make_case(arm="a")])
    got = overlays.overlays([make_case(arm=name, id=name)])
    assert got.size == plain.size
    # Nothing is written in the right margin.
    assert (np.asarray(got)[:, -20:] == 255).all()

  def test_a_picture_of_one_pixel_can_be_drawn(self):
    case = make_case(
      image=np.zeros((1, 1, 3), np.uint8),
      truth=np.ones((1, 1), bool),
      prediction=np.ones((1, 1), bool),
    )
    assert overlays.overlays([case]).height > 320
