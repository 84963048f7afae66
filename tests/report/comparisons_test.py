"""Comparisons, their statistics and their verdicts."""

import numpy as np
import pytest
from tiny_scores import FAST
from tiny_scores import M2BF
from tiny_scores import NONE
from tiny_scores import make_arm
from tiny_scores import make_rows

from kdseg.evaluation import statistics
from kdseg.report import summary


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
    assert any("shares no seed" in warning for warning in got.warnings)

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
    assert f"{M2BF} was not compared, as {NONE} was not" in got.warnings[0]

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
      "mixed: the mean and the ranks of images go opposite ways"
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

  def test_an_arm_is_compared_with_the_rival_that_the_family_names(self):
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

  def test_of_several_rivals_the_best_on_validation_is_taken(self):
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

  def test_a_rival_of_the_family_that_is_not_there_is_a_warning(self):
    entry = {"dataset": "isic2016_test", "arm": M2BF, "against": "x-mgd"}
    rows = make_arm(NONE, 0.88) + make_arm(M2BF, 0.89)
    first, second = summary.summarize(
      rows, {**FAST, "primary": [entry]}
    ).warnings[-2:]
    assert "as x-mgd was not scored" in first
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
