"""What the scores of several arms add up to: numbers, verdicts, warnings.

`summarize` takes the rows of scores.csv and the contents of report.json (see
`meta`), and nothing else, so that every table can be made again.
"""

from collections.abc import Iterable
import dataclasses

from kdseg.report import checks
from kdseg.report import comparisons
from kdseg.report import meta as meta_lib
from kdseg.report import scores
from kdseg.report.arms import ArmScores
from kdseg.report.arms import score_arm
from kdseg.report.cells import Row
from kdseg.report.comparisons import Comparison
from kdseg.report.meta import Meta


@dataclasses.dataclass(frozen=True)
class Summary:
  """Everything the tables say, as numbers."""

  arms: tuple[ArmScores, ...]
  comparisons: tuple[Comparison, ...]
  gates: dict[str, tuple[str, ...]]  # data set -> a line for each student
  warnings: tuple[str, ...]
  protocol: dict[str, str]  # data set -> line
  notes: tuple[str, ...]
  level: float


def summarize(rows: Iterable[Row], meta: Meta) -> Summary:
  """Computes what the tables show.

  Args:
    rows: of scores.csv, whole groups.
    meta: of report.json; see `meta`.

  Raises:
    ValueError: on no rows, unknown keys in `meta`, or groups of one data set
      that do not have the same images.
  """
  meta_lib.check(meta)
  grouped = scores.groups(rows)
  if not grouped:
    raise ValueError("there are no scores to make a table of")
  # Teachers first, then arms as they come.
  names = sorted(
    dict.fromkeys(arm for arm, _, _ in grouped),
    key=lambda arm: not meta_lib.is_teacher(arm),
  )
  arms: list[ArmScores] = []
  compared: list[Comparison] = []
  gates: dict[str, tuple[str, ...]] = {}
  warnings: list[str] = []
  protocol: dict[str, str] = {}
  for dataset in dict.fromkeys(dataset for _, _, dataset in grouped):
    here: dict[str, dict[int, list[Row]]] = {}
    for name in names:
      for (arm, seed, where), members in grouped.items():
        if (arm, where) == (name, dataset):
          here.setdefault(arm, {})[seed] = members
    warnings += _check_images(dataset, here, meta)
    scored = [score_arm(dataset, arm, here[arm], meta) for arm in here]
    found, unmade = comparisons.compare_all(dataset, here, meta)
    gates[dataset], failed = checks.check_gates(dataset, scored, meta)
    protocol[dataset] = meta_lib.protocol_line(dataset, here, meta)
    arms += scored
    compared += found
    warnings += unmade + failed
  made = {(c.dataset, c.arm, c.baseline) for c in compared}
  warnings += [
    f"report.json: the primary family names {entry}, which was not compared"
    for entry, named in zip(meta.get("primary", ()), meta_lib.primary(meta))
    if named not in made
  ]
  compared = comparisons.add_verdicts(compared, meta)
  return Summary(
    arms=tuple(arms),
    comparisons=tuple(compared),
    gates=gates,
    warnings=(*warnings, *checks.check_levels(arms, compared, meta)),
    protocol=protocol,
    notes=tuple(meta.get("notes", ())),
    level=meta_lib.bootstrap(meta)["level"],
  )


def _check_images(
  dataset: str, here: comparisons.Arms, meta: Meta
) -> list[str]:
  """Refuses other images, and warns of another number than the stated one."""
  first: set[str] = set()
  origin = ""
  for arm, by_seed in here.items():
    for seed, members in by_seed.items():
      ids = {str(row["id"]) for row in members}
      if not origin:
        first, origin = ids, f"{arm}, seed {seed}"
      elif ids != first:
        raise ValueError(
          f"{dataset}: {arm}, seed {seed}, has {len(ids)} images and "
          f"{origin}, {len(first)}; {min(ids ^ first)!r} is in only one of "
          "them. Arms can be compared on the same images only"
        )
  stated = meta.get("datasets", {}).get(dataset, {}).get("found", len(first))
  if stated == len(first):
    return []
  return [
    f"{dataset}: {len(first)} images were scored, report.json states {stated}"
  ]
