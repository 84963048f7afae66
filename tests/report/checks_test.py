"""The gate between teacher and student, and the alarms."""

import pytest
from tiny_scores import FAST
from tiny_scores import M2BF
from tiny_scores import NONE
from tiny_scores import TEACHER
from tiny_scores import make_arm
from tiny_scores import make_rows

from kdseg.report import summary


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

  def test_an_untrained_teacher_leaves_it_unknown(self):
    rows = make_arm(TEACHER, 0.3, seeds=1) + make_arm(NONE, 0.89)
    got = summary.summarize(rows, {**FAST, "teacher": ""})
    assert got.gates["isic2016_test"] == (
      f"Gate: unknown for {NONE}; the teacher was not trained.",
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

  def test_the_synthetic_set_raises_no_alarm(self):
    rows = make_arm(TEACHER, 0.98, dataset="synthetic_test")
    rows += make_arm(NONE, 0.5, dataset="synthetic_test")
    rows += make_arm(M2BF, 0.9, dataset="synthetic_test")
    arms = {NONE: {"parameters": 40_000}}
    assert self.warnings(rows, arms) == []

  def test_a_count_other_than_the_stated_one(self):
    meta = {**FAST, "datasets": {"isic2016_test": {"found": 379}}}
    got = summary.summarize(make_arm(NONE, 0.89), meta)
    assert "60 images were scored, report.json states 379" in got.warnings[0]
