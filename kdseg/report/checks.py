"""Gate and alarms: what makes the scores of a run doubtful."""

from collections.abc import Sequence

from kdseg.data import sets
from kdseg.report import meta as meta_lib
from kdseg.report.arms import ArmScores
from kdseg.report.comparisons import Comparison
from kdseg.report.meta import Meta

GATE = 0.02  # Dice between teacher and student without distillation
OFFICIAL = frozenset(
  builder.test_name for builder in sets.BUILDERS.values() if builder.official
)


def check_gates(
  dataset: str, scored: Sequence[ArmScores], meta: Meta
) -> tuple[tuple[str, ...], list[str]]:
  """Returns the gate's lines, and a warning for each student that fails it."""
  teachers = [arm for arm in scored if meta_lib.is_teacher(arm.arm)]
  if "teacher" in meta:
    teachers = [arm for arm in teachers if arm.arm == meta["teacher"]]
  lines, failed = [], []
  for student in scored:
    if not meta_lib.is_baseline(student.arm, meta):
      continue
    if not teachers:
      untrained = meta.get("teacher") == ""
      why = (
        "the teacher was not trained" if untrained else "no teacher was scored"
      )
      lines.append(f"Gate: unknown for {student.arm}; {why}.")
    for teacher in teachers:
      gap = teacher.mean("dice") - student.mean("dice")
      # The difference of two means of decimals: .02 must count as .02.
      passed = gap >= GATE - 1e-9
      lines.append(
        f"Gate: {teacher.arm} minus {student.arm} is {gap:+.4f} Dice; "
        f"{GATE} is needed: {'passed' if passed else 'NOT passed'}."
      )
      if not passed:
        failed.append(
          f"on {dataset}, {teacher.arm} is {gap:+.4f} Dice from "
          f"{student.arm}, and {GATE} is needed: no comparison of this "
          "student can show anything. Make the teacher stronger or the "
          "student smaller first"
        )
  return tuple(lines), failed


def check_levels(
  arms: Sequence[ArmScores], comparisons: Sequence[Comparison], meta: Meta
) -> list[str]:
  """Warns of scores on official test sets that are too good or too bad."""
  warnings = []
  for arm in arms:
    if arm.dataset != sets.BUILDERS["isic2016"].test_name:
      continue
    dice = arm.mean("dice")
    if dice > 0.945:
      warnings.append(
        f"{arm.arm} has Dice {dice:.4f} on {arm.dataset}, above what a "
        "perfect mean expert would reach (0.945): look for a leak, a subset "
        "or a pooled metric"
      )
    elif meta_lib.is_teacher(arm.arm) and dice > 0.935:
      warnings.append(
        f"{arm.arm} has Dice {dice:.4f} on {arm.dataset}, above 0.935: look "
        "for a bug or a leak"
      )
    if not meta_lib.is_baseline(arm.arm, meta):
      continue
    for low, high, level in ((0, 5e4, 0.885), (1e5, 4e5, 0.88)):
      if low < (arm.parameters or 0) <= high and dice < level:
        warnings.append(
          f"{arm.arm} has Dice {dice:.4f} on {arm.dataset}, below {level}: "
          "the student without distillation is too weak; look for a bug, or "
          "tune it"
        )
  for comparison in comparisons:
    gain = comparison.intervals["dice"].value
    baseline = meta_lib.baseline_of(comparison.arm, meta)
    official = comparison.dataset in OFFICIAL
    if comparison.baseline == baseline and official and gain > 0.03:
      warnings.append(
        f"{comparison.arm} gains {gain:.4f} Dice over {comparison.baseline} "
        f"on {comparison.dataset}, more than 0.03: the baseline is too weak"
      )
  return warnings
