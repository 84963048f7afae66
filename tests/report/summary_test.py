"""What each arm scored, and scores that are refused."""

import math

import pytest
from tiny_scores import FAST
from tiny_scores import M2BF
from tiny_scores import NONE
from tiny_scores import TEACHER
from tiny_scores import make_arm
from tiny_scores import make_rows

from kdseg.report import summary


class TestArms:
  def test_means_are_over_images_then_over_seeds(self):
    rows = make_rows(NONE, [0.5, 1.0]) + make_rows(NONE, [0.9, 0.8], seed=7)
    (arm,) = summary.summarize(rows, FAST).arms
    assert {s: v["dice"] for s, v in arm.by_seed.items()} == {
      0: pytest.approx(0.75),
      7: pytest.approx(0.85),
    }
    assert arm.mean("dice") == pytest.approx(0.8)
    # Two seeds .05 to either side of the mean: .05 * sqrt(2).
    assert arm.deviation("dice") == pytest.approx(0.05 * math.sqrt(2))
    assert arm.images == 2

  def test_a_mean_of_jaccards_is_not_the_jaccard_of_the_mean(self):
    (arm,) = summary.summarize(make_rows(NONE, [0.5, 1.0]), FAST).arms
    assert arm.mean("jaccard") == pytest.approx((1 / 3 + 1) / 2)
    assert arm.mean("jaccard") > 0.75 / (2 - 0.75)

  def test_pooled_scores_pool_within_a_seed(self):
    # One image of 1000 pixels found by half, one whole: Dice 3000 / 4000.
    rows = make_rows(NONE, [0.5, 1.0]) + make_rows(NONE, [1, 1], seed=1)
    (arm,) = summary.summarize(rows, FAST).arms
    assert arm.pooled["dice"] == pytest.approx((0.75 + 1) / 2)
    assert arm.pooled["jaccard"] == pytest.approx((0.75 / 1.25 + 1) / 2)

  def test_one_seed_has_no_deviation(self):
    (arm,) = summary.summarize(make_rows(NONE, [0.5, 1.0]), FAST).arms
    assert math.isnan(arm.deviation("dice"))

  def test_empty_predictions_are_counted_over_all_seeds(self):
    rows = make_rows(NONE, [0, 0.9]) + make_rows(NONE, [0, 0], seed=1)
    (arm,) = summary.summarize(rows, FAST).arms
    assert arm.empty == 3

  def test_teachers_come_first_then_arms_as_they_came(self):
    rows = [*make_arm(M2BF, 0.9), *make_arm(NONE, 0.89)]
    rows += make_arm(TEACHER, 0.92)
    got = summary.summarize(rows, FAST)
    assert [arm.arm for arm in got.arms] == [TEACHER, M2BF, NONE]

  def test_groups_are_averaged_apart_and_the_others_too(self):
    rows = make_rows(NONE, [0.2, 0.4, 0.8, 0.9])
    rows += make_rows(NONE, [0.4, 0.6, 0.8, 0.9], seed=1)
    groups = {"upscaled": ["ISIC_0000000", "ISIC_0000001"]}
    (arm,) = summary.summarize(rows, {**FAST, "groups": groups}).arms
    assert arm.groups == {
      "upscaled": (2, pytest.approx(0.4)),
      "the others": (2, pytest.approx(0.85)),
    }

  def test_a_data_set_without_the_groups_images_has_no_groups(self):
    groups = {"upscaled": ["IMD002"]}
    got = summary.summarize(make_arm(NONE, 0.9), {**FAST, "groups": groups})
    assert got.arms[0].groups == {}

  def test_sizes_come_from_the_report(self):
    meta = {**FAST, "arms": {NONE: {"parameters": 49532, "macs": 3.1e7}}}
    rows = make_arm(NONE, 0.9) + make_arm(M2BF, 0.9)
    one, other = summary.summarize(rows, meta).arms
    assert (one.parameters, one.macs) == (49532, 3.1e7)
    assert (other.parameters, other.macs) == (None, None)


class TestBadInput:
  def test_no_scores_are_refused(self):
    with pytest.raises(ValueError, match="no scores"):
      summary.summarize([], {})

  def test_an_unknown_key_is_named(self):
    with pytest.raises(ValueError, match=r"unknown keys protocoll; known"):
      summary.summarize(make_arm(NONE, 0.9), {"protocoll": {}})
