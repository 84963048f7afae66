"""Means, comparisons, verdicts, gate and alarms on made-up scores."""

import math

import numpy as np
import pytest

from kdseg.evaluation import metrics
from kdseg.evaluation import statistics
from kdseg.report import meta
from kdseg.report import summary

FAST = {"bootstrap": {"resamples": 400}}
NONE, M2BF = "patch_unet_50k-none", "patch_unet_50k-m2bf"
TEACHER = "teacher-unetpp"


def make_row(arm, seed, dataset, identity, dice):
  """One row whose every score follows from its Dice."""
  hit = round(1000 * dice)
  jaccard = dice / (2 - dice)
  row = dict.fromkeys(metrics.COLUMNS, dice)
  row |= {
    "jaccard": jaccard,
    "thresholded_jaccard": jaccard * (jaccard >= 0.65),
    "hd95": 100 * (1 - dice),
    "assd": 40 * (1 - dice),
    "true_positive": hit,
    "false_positive": 1000 - hit,
    "false_negative": 1000 - hit,
    "true_negative": 60_000,
    "height": 256,
    "width": 256,
    "empty_prediction": int(dice == 0),
  }
  return {
    "arm": arm, "seed": seed, "dataset": dataset, "id": identity, **row,
  }  # fmt: skip


def make_rows(arm, dices, *, seed=0, dataset="isic2016_test"):
  return [
    make_row(arm, seed, dataset, f"ISIC_{i:07d}", float(dice))
    for i, dice in enumerate(dices)
  ]


def make_arm(arm, mean, *, seeds=3, images=60, seed_sd=0.001, dataset=None):
  """Rows of an arm; arms share their images' difficulty and their seeds."""
  rng = np.random.default_rng(0)
  image = 0.05 * rng.normal(size=images)
  own = np.random.default_rng(sum(map(ord, arm)))
  luck = own.normal(size=seeds)
  luck = seed_sd * (luck - luck.mean())
  rows = []
  for seed in range(seeds):
    noise = 0.005 * own.normal(size=images)
    dices = np.clip(mean + image - image.mean() + luck[seed] + noise, 0, 1)
    dices += mean + luck[seed] - dices.mean()
    rows += make_rows(arm, dices, seed=seed, dataset=dataset or "isic2016_test")
  return rows


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


class TestComparisons:
  def test_equals_the_statistics_of_the_paired_arrays(self):
    baseline, method = make_arm(NONE, 0.88), make_arm(M2BF, 0.89)
    (got,) = summary.summarize(baseline + method, FAST).comparisons
    one, other = (
      np.array([row["dice"] for row in rows]).reshape(3, 60)
      for rows in (baseline, method)
    )
    (want,) = statistics.hierarchical_bootstrap(
      one[..., None], other[..., None], resamples=400, seed=0
    )
    assert got.intervals["dice"][:3] == pytest.approx(want[:3])
    assert got.random_effects == statistics.random_effects_interval(one, other)
    assert got.wilcoxon == statistics.wilcoxon(one, other)
    assert (got.arm, got.baseline, got.seeds) == (M2BF, NONE, (0, 1, 2))

  def test_the_order_of_the_rows_does_not_matter(self):
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.89)
    shuffled = list(rows)
    np.random.default_rng(3).shuffle(shuffled)
    one = summary.summarize(rows, FAST).comparisons
    other = summary.summarize(shuffled, FAST).comparisons
    assert one[0].intervals == other[0].intervals

  def test_distances_keep_their_sign_and_their_place(self):
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.89)
    (got,) = summary.summarize(rows, FAST).comparisons
    assert got.intervals["dice"].value == pytest.approx(0.01)
    assert got.intervals["hd95"].value == pytest.approx(-1)
    assert got.intervals["assd"].value == pytest.approx(-0.4)

  def test_only_the_seeds_of_both_are_compared(self):
    rows = make_arm(NONE, 0.88, seeds=3) + make_arm(M2BF, 0.89, seeds=2)
    (got,) = summary.summarize(rows, FAST).comparisons
    assert got.seeds == (0, 1)

  def test_no_common_seed_is_a_warning_and_no_comparison(self):
    rows = make_rows(NONE, [0.8, 0.9]) + make_rows(M2BF, [0.8, 0.9], seed=1)
    got = summary.summarize(rows, FAST)
    assert not got.comparisons
    assert any("share no seed" in warning for warning in got.warnings)

  def test_each_student_is_compared_with_its_own_baseline(self):
    rows = []
    for student in ("patch_unet_50k", "patch_unet_12k"):
      rows += make_arm(f"{student}-none", 0.88)
      rows += make_arm(f"{student}-m2bf", 0.89)
    got = summary.summarize(rows, FAST).comparisons
    assert [(c.arm, c.baseline) for c in got] == [
      ("patch_unet_50k-m2bf", "patch_unet_50k-none"),
      ("patch_unet_12k-m2bf", "patch_unet_12k-none"),
    ]

  def test_an_arm_without_its_baseline_is_a_warning(self):
    got = summary.summarize(make_arm(M2BF, 0.89), FAST)
    assert not got.comparisons
    assert f"{M2BF} has no {NONE} beside it" in got.warnings[0]

  def test_the_baseline_can_be_another_method(self):
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.89)
    got = summary.summarize(rows, {**FAST, "baseline": "m2bf"}).comparisons
    assert [(c.arm, c.baseline) for c in got] == [(NONE, M2BF)]

  def test_other_images_are_an_error_that_names_one(self):
    rows = make_rows(NONE, [0.8, 0.9, 0.7]) + make_rows(M2BF, [0.8, 0.9])
    with pytest.raises(ValueError, match="'ISIC_0000002' is in only one"):
      summary.summarize(rows, FAST)


class TestVerdicts:
  def verdict(self, rows, meta=FAST):
    return summary.summarize(rows, meta).comparisons[0].verdict

  @pytest.mark.parametrize(
    ("gain", "word"), [(0.01, "better"), (-0.01, "worse")]
  )
  def test_a_clear_difference_is_named(self, gain, word):
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.88 + gain)
    assert self.verdict(rows) == word

  def test_no_difference_is_not_significant_in_words(self):
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.88)
    assert self.verdict(rows) == "not significant"

  def test_one_seed_speaks_of_this_run_only(self):
    rows = make_arm(NONE, 0.88, seeds=1) + make_arm(M2BF, 0.89, seeds=1)
    assert self.verdict(rows) == (
      "better in this run; one seed says nothing of other runs"
    )

  def test_seeds_that_scatter_speak_of_these_runs_only(self):
    # Gains of .002, .010 and .012: all up, but three of them are few.
    rows = []
    for seed, gain in enumerate((0.002, 0.010, 0.012)):
      dices = 0.85 + 0.05 * np.random.default_rng(0).random(60)
      tilt = 0.001 * np.random.default_rng(seed + 1).normal(size=60)
      rows += make_rows(NONE, dices, seed=seed)
      rows += make_rows(M2BF, dices + gain + tilt, seed=seed)
    assert self.verdict(rows) == (
      "better in these 3 runs, not significant for new ones"
    )

  def test_a_small_p_does_not_outweigh_seeds_that_disagree(self):
    # Each image gains by .002 on average, one seed of three loses.
    rows = []
    dices = 0.85 + 0.05 * np.random.default_rng(0).random(60)
    for seed, gain in enumerate((-0.010, 0.006, 0.010)):
      rows += make_rows(NONE, dices, seed=seed)
      rows += make_rows(M2BF, dices + gain, seed=seed)
    (got,) = summary.summarize(rows, FAST).comparisons
    assert got.holm < 1e-6
    assert got.verdict == "not significant"

  @pytest.mark.parametrize("sign", [1, -1])
  def test_a_mean_against_the_ranks_is_called_mixed(self, sign):
    # Most lesions gain a little, seven are lost; and the other way round.
    noise = 0.01 * np.random.default_rng(1).random(60)
    dices = np.full((3, 60), 0.5 + sign * 0.4) + noise
    changed = dices + sign * 0.02
    changed[:, :7] = 0.5 - sign * 0.4
    rows = []
    for seed in range(3):
      rows += make_rows(NONE, dices[seed], seed=seed)
      rows += make_rows(M2BF, changed[seed], seed=seed)
    assert self.verdict(rows) == (
      "mixed: the mean and most images go opposite ways"
    )

  @pytest.mark.parametrize(("sign", "word"), [(1, "better"), (-1, "worse")])
  def test_a_mean_with_the_ranks_is_not_mixed_whatever_the_count(
    self, sign, word
  ):
    # 27 images gain much, 33 lose less: mean and ranks go with the fewer.
    rng = np.random.default_rng(1)
    gains = sign * np.where(np.arange(60) < 27, 0.2, -0.02)
    gains += 0.001 * rng.random(60)
    rows = make_rows(NONE, np.full(60, 0.5))
    rows += make_rows(M2BF, 0.5 + gains)
    assert self.verdict(rows).startswith(f"{word} in this run")

  def test_holm_covers_all_comparisons_when_no_family_is_named(self):
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.881)
    rows += make_arm("patch_unet_50k-mbf", 0.8805)
    rows += make_arm(NONE, 0.88, dataset="ph2")
    rows += make_arm(M2BF, 0.8803, dataset="ph2")
    got = summary.summarize(rows, FAST).comparisons
    want = statistics.holm([c.wilcoxon.p_value for c in got])
    assert [c.holm for c in got] == pytest.approx(list(want))
    assert len(got) == 3

  def test_outside_the_primary_family_it_is_exploratory(self):
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.89)
    rows += make_arm("patch_unet_50k-mbf", 0.89)
    primary = [{"dataset": "isic2016_test", "arm": M2BF}]
    inside, outside = summary.summarize(
      rows, {**FAST, "primary": primary}
    ).comparisons
    assert inside.holm == inside.wilcoxon.p_value
    assert inside.verdict == "better"
    assert outside.holm is None
    assert outside.verdict == "exploratory: better"

  def test_an_arm_is_set_against_what_the_family_names(self):
    mgd = "patch_unet_50k-mgd"
    rows = make_arm(NONE, 0.85) + make_arm(M2BF, 0.89) + make_arm(mgd, 0.88)
    entry = {"dataset": "isic2016_test", "arm": M2BF, "against": mgd}
    summed = summary.summarize(rows, {**FAST, "primary": [entry]})
    found = {(c.arm, c.baseline): c for c in summed.comparisons}
    assert set(found) == {(M2BF, NONE), (mgd, NONE), (M2BF, mgd)}
    named = found[M2BF, mgd]
    assert named.intervals["dice"].value == pytest.approx(0.01)
    assert named.holm == named.wilcoxon.p_value
    assert found[M2BF, NONE].holm is None
    # A gain over a rival says nothing of the baseline; one over it does.
    assert sum("gains" in warning for warning in summed.warnings) == 1

  def test_of_several_it_is_set_against_the_best_on_validation(self):
    kd, mgd = "patch_unet_50k-kd", "patch_unet_50k-mgd"
    rows = make_arm(NONE, 0.85) + make_arm(M2BF, 0.89)
    # On the test set kd is the better one, and is not taken for that.
    rows += make_arm(kd, 0.89) + make_arm(mgd, 0.88)
    entry = {"dataset": "isic2016_test", "arm": M2BF, "against": [kd, mgd]}
    validation = {
      # The arm's own validation, or the lack of it, is of no account.
      M2BF: {"2": 0.9},
      mgd: {"0": 0.92, "1": 0.92},
      # Better by a seed that its rival does not have.
      kd: {"0": 0.91, "1": 0.91, "7": 0.99},
    }
    meta = {**FAST, "primary": [entry], "validation": validation}
    got = [c for c in summary.summarize(rows, meta).comparisons if c.holm]
    assert [(c.arm, c.baseline) for c in got] == [(M2BF, mgd)]
    # They share no seed: each counts over its own.
    validation[mgd] = {"3": 0.92, "4": 0.92}
    got = [c for c in summary.summarize(rows, meta).comparisons if c.holm]
    assert [(c.arm, c.baseline) for c in got] == [(M2BF, kd)]

  def test_an_empty_family_makes_everything_exploratory(self):
    rows = make_arm(NONE, 0.85) + make_arm(M2BF, 0.89)
    (got,) = summary.summarize(rows, {**FAST, "primary": []}).comparisons
    assert got.holm is None
    assert got.verdict == "exploratory: better"

  def test_what_an_arm_is_set_against_must_be_there(self):
    entry = {"dataset": "isic2016_test", "arm": M2BF, "against": "x-mgd"}
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.89)
    first, second = summary.summarize(
      rows, {**FAST, "primary": [entry]}
    ).warnings[-2:]
    assert "has no x-mgd beside it" in first
    assert "x-mgd" in second

  def test_significance_is_judged_by_the_corrected_p(self):
    # A p between .01 and .05 passes alone and fails in a family of five. One
    # seed, so that interval and test look at the same thing.
    for gain in np.arange(0.0008, 0.0025, 0.00005):
      pair = make_arm(NONE, 0.88, seeds=1)
      pair += make_arm(M2BF, 0.88 + gain, seeds=1)
      alone = summary.summarize(pair, FAST).comparisons[0]
      if 0.012 < alone.wilcoxon.p_value < 0.045 and "better" in alone.verdict:
        break
    else:
      pytest.fail("no gain gave such a p")
    for name in "abcd":
      pair += make_arm(f"patch_unet_50k-{name}", 0.88, seeds=1)
    family = summary.summarize(pair, FAST).comparisons[0]
    assert family.wilcoxon == alone.wilcoxon
    assert family.holm > 0.05
    assert family.verdict == "not significant"

  def test_a_primary_arm_that_is_not_there_is_a_warning(self):
    meta = {**FAST, "primary": [{"dataset": "ph2", "arm": "typo-m2bf"}]}
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.89)
    assert "typo-m2bf" in summary.summarize(rows, meta).warnings[-1]


class TestGate:
  def gate(self, teacher, student, meta=FAST):
    rows = make_arm(TEACHER, teacher, seeds=1) + make_arm(NONE, student)
    return summary.summarize(rows, meta)

  @pytest.mark.parametrize(
    ("teacher", "passed"), [(0.92, True), (0.91, True), (0.9099, False)]
  )
  def test_takes_two_hundredths_of_dice(self, teacher, passed):
    got = self.gate(teacher, 0.89)
    (line,) = got.gates["isic2016_test"]
    assert ("NOT passed" in line) != passed
    warned = any("can show anything" in warning for warning in got.warnings)
    assert warned != passed

  def test_two_hundredths_pass_however_they_are_rounded(self):
    assert 0.95 - 0.93 < 0.02  # in floating point
    rows = make_rows(TEACHER, [0.95]) + make_rows(NONE, [0.93])
    (line,) = summary.summarize(rows, FAST).gates["isic2016_test"]
    assert line.endswith("passed.")
    assert "NOT" not in line

  def test_no_teacher_leaves_it_unknown(self):
    got = summary.summarize(make_arm(NONE, 0.89), FAST)
    assert "unknown" in got.gates["isic2016_test"][0]

  def test_a_teacher_that_knows_nothing_need_not_be_ahead(self):
    rows = make_arm(TEACHER, 0.3, seeds=1) + make_arm(NONE, 0.89)
    got = summary.summarize(rows, {**FAST, "teacher": ""})
    assert got.gates["isic2016_test"] == (
      f"Gate: unknown for {NONE}; no teacher was scored that knows anything.",
    )
    assert not [w for w in got.warnings if "can show anything" in w]

  def test_the_named_teacher_decides_it(self):
    rows = make_arm("teacher-a", 0.93) + make_arm("teacher-b", 0.90)
    rows += make_arm(NONE, 0.89)
    got = summary.summarize(rows, {**FAST, "teacher": "teacher-b"})
    (line,) = got.gates["isic2016_test"]
    assert "teacher-b" in line
    assert "NOT passed" in line


class TestAlarms:
  def warnings(self, rows, arms=None):
    got = summary.summarize(rows, {**FAST, "arms": arms or {}}).warnings
    return [w for w in got if "can show anything" not in w]

  @pytest.mark.parametrize(
    ("dice", "words"),
    [(0.934, None), (0.936, "bug or a leak"), (0.946, "pooled metric")],
  )
  def test_a_teacher_too_good_to_be_true(self, dice, words):
    got = self.warnings(make_arm(TEACHER, dice, images=400))
    assert len(got) == (words is not None)
    assert words is None or words in got[0]

  def test_a_student_above_the_ceiling(self):
    (got,) = self.warnings(make_arm(NONE, 0.95))
    assert "perfect mean expert" in got

  @pytest.mark.parametrize(
    ("parameters", "dice", "alarm"),
    [
      (49_532, 0.884, True),
      (49_532, 0.886, False),
      (50_000, 0.884, True),
      (70_000, 0.80, False),
      (360_000, 0.879, True),
      (360_000, 0.881, False),
      (None, 0.5, False),
    ],
  )
  def test_a_baseline_too_weak_for_its_size(self, parameters, dice, alarm):
    arms = {NONE: {"parameters": parameters}}
    got = self.warnings(make_arm(NONE, dice), arms)
    assert ["too weak" in warning for warning in got] == [True] * alarm

  def test_a_distilled_student_is_not_held_to_the_baselines_level(self):
    rows = make_arm(NONE, 0.886) + make_arm(M2BF, 0.87)
    size = {"parameters": 40_000}
    assert self.warnings(rows, {NONE: size, M2BF: size}) == []

  @pytest.mark.parametrize("dataset", ["isic2016_test", "ph2"])
  @pytest.mark.parametrize(("gain", "alarm"), [(0.029, False), (0.031, True)])
  def test_a_gain_too_good_to_be_true(self, dataset, gain, alarm):
    rows = make_arm(NONE, 0.88, dataset=dataset)
    rows += make_arm(M2BF, 0.88 + gain, dataset=dataset)
    got = self.warnings(rows)
    assert ["baseline is too weak" in warning for warning in got] == (
      [True] * alarm
    )

  def test_drawn_lesions_raise_no_alarm(self):
    rows = make_arm(TEACHER, 0.98, dataset="synthetic_test")
    rows += make_arm(NONE, 0.5, dataset="synthetic_test")
    rows += make_arm(M2BF, 0.9, dataset="synthetic_test")
    arms = {NONE: {"parameters": 40_000}}
    assert self.warnings(rows, arms) == []

  def test_a_count_other_than_the_stated_one(self):
    meta = {**FAST, "datasets": {"isic2016_test": {"found": 379}}}
    got = summary.summarize(make_arm(NONE, 0.89), meta)
    assert "60 images were scored, report.json states 379" in got.warnings[0]


PROTOCOL = {
  "train": {"name": "isic2016_train", "found": 751, "official": 900},
  "datasets": {"isic2016_test": {"found": 60, "official": 379}},
  "protocol": {
    "resolution": 192,
    "threshold": 0.5,
    "interpolation": "bilinear",
    "test_time_augmentation": "flips",
    "checkpoint": "best validation Dice",
  },
}


class TestProtocolLine:
  def line(self, meta, rows=None):
    rows = rows or make_arm(NONE, 0.89)
    return summary.summarize(rows, {**FAST, **meta}).protocol["isic2016_test"]

  @pytest.mark.parametrize(
    "words",
    [
      "isic2016_test, n = 60 of 379 (a subset)",
      "trained on isic2016_train, 751 of 900 (a subset)",
      "network input 192 x 192",
      "each image's own size (256 x 256)",
      "lesion where p > 0.5",
      "mean over images, then mean over seeds",
      "probabilities resized: bilinear",
      "test-time augmentation: flips",
      "checkpoint: best validation Dice",
    ],
  )
  def test_stamps(self, words):
    assert words in self.line(PROTOCOL)

  def test_a_whole_set_is_no_subset(self):
    line = self.line({"train": {"found": 900, "official": 900}})
    assert "900 of 900;" in line

  def test_says_what_was_not_stated(self):
    assert self.line({}).count("not stated") == 7

  def test_shows_the_smallest_and_the_largest_size(self):
    rows = make_rows(NONE, [0.8, 0.9, 0.7])
    for row, (height, width) in zip(rows, [(30, 40), (576, 767), (100, 9)]):
      row["height"], row["width"] = height, width
    assert "(100 x 9 to 576 x 767)" in self.line({}, rows)


class TestMergeMeta:
  def test_unions_what_agrees(self):
    one = {"arms": {"a": {"parameters": 1}}, "notes": ["x"], "teacher": "t"}
    other = {"arms": {"b": {"parameters": 2}}, "notes": ["x", "y"]}
    assert meta.merge([one, other]) == {
      "arms": {"a": {"parameters": 1}, "b": {"parameters": 2}},
      "notes": ["x", "y"],
      "teacher": "t",
    }

  @pytest.mark.parametrize("order", [1, -1])
  def test_a_control_of_the_teacher_takes_the_others_gate(self, order):
    metas = [{"teacher": "t"}, {"teacher": ""}, {"notes": []}, {"teacher": "t"}]
    assert meta.merge(metas[::order])["teacher"] == "t"
    assert meta.merge([{"teacher": ""}] * 2)["teacher"] == ""

  def test_leaves_its_arguments_alone(self):
    one = {"arms": {"a": {"parameters": 1}}, "notes": ["x"]}
    meta.merge([one, {"arms": {"b": {}}, "notes": ["y"]}])
    assert one == {"arms": {"a": {"parameters": 1}}, "notes": ["x"]}

  @pytest.mark.parametrize(
    ("one", "other", "where"),
    [
      (
        {"protocol": {"resolution": 256}},
        {"protocol": {"resolution": 192}},
        "protocol.resolution: 256 and 192",
      ),
      (
        {"arms": {"a": {"parameters": 1}}},
        {"arms": {"a": {"parameters": 2}}},
        "arms.a.parameters",
      ),
      ({"teacher": "a"}, {"teacher": "b"}, "teacher: 'a' and 'b'"),
      ({"groups": {"g": ["1"]}}, {"groups": {"g": ["2"]}}, "groups.g"),
    ],
  )
  def test_two_protocols_do_not_share_a_line(self, one, other, where):
    with pytest.raises(ValueError, match=where):
      meta.merge([one, other])


class TestBadInput:
  def test_no_scores_are_refused(self):
    with pytest.raises(ValueError, match="no scores"):
      summary.summarize([], {})

  def test_an_unknown_key_is_named(self):
    with pytest.raises(ValueError, match=r"unknown keys protocoll; known"):
      summary.summarize(make_arm(NONE, 0.9), {"protocoll": {}})
