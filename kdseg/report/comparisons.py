"""Arm against arm: intervals, tests, and what they say in words."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import numpy as np

from kdseg.evaluation import metrics
from kdseg.evaluation import statistics
from kdseg.report import meta as meta_lib
from kdseg.report.cells import Row
from kdseg.report.meta import Meta

ALPHA = 0.05
# The rows of every arm on one data set, by arm and seed.
Arms = Mapping[str, Mapping[int, Sequence[Row]]]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One arm against another of the same student, on one data set."""

  dataset: str
  arm: str
  baseline: str
  seeds: tuple[int, ...]  # those that both have
  intervals: dict[str, statistics.Interval]  # bootstrap, of compared metrics
  random_effects: statistics.Interval  # of Dice
  wilcoxon: statistics.Wilcoxon  # of Dice
  holm: float | None  # None outside the primary family
  verdict: str


def compare_all(
  dataset: str, here: Arms, meta: Meta
) -> tuple[list[Comparison], list[str]]:
  """Compares every arm on a data set with what it has to be compared with.

  Args:
    dataset: what it is called.
    here: its rows, by arm and seed, all on the same images.
    meta: of report.json.

  Returns:
    The comparisons, without verdicts, and a warning for each arm that cannot
    be compared.
  """
  made, warnings = [], []
  for arm, baseline in _pairs(dataset, here, meta):
    seeds = tuple(sorted(here[arm].keys() & here.get(baseline, {}).keys()))
    if seeds:
      made.append(_compare(dataset, (arm, baseline), seeds, here, meta))
    elif baseline in here:
      warnings.append(
        f"{dataset}: {arm} was not compared, as it shares no seed with "
        f"{baseline}"
      )
    else:
      warnings.append(
        f"{dataset}: {arm} was not compared, as {baseline} was not scored"
      )
  return made, warnings


def add_verdicts(
  comparisons: Sequence[Comparison], meta: Meta
) -> list[Comparison]:
  """Corrects the p values of the primary family and adds the verdicts."""
  primary = meta_lib.primary(meta)
  family = [
    number
    for number, c in enumerate(comparisons)
    if "primary" not in meta or (c.dataset, c.arm, c.baseline) in primary
  ]
  p_values = [comparisons[number].wilcoxon.p_value for number in family]
  adjusted = dict(zip(family, map(float, statistics.holm(p_values))))
  return [
    dataclasses.replace(
      c, holm=adjusted.get(n), verdict=_verdict(c, adjusted.get(n))
    )
    for n, c in enumerate(comparisons)
  ]


def _pairs(dataset: str, here: Arms, meta: Meta) -> list[tuple[str, str]]:
  """Returns (arm, what it is compared with), the baselines first."""
  pairs = [(arm, meta_lib.baseline_of(arm, meta)) for arm in here]
  pairs = [(arm, baseline) for arm, baseline in pairs if arm != baseline]
  pairs += [
    (arm, against)
    for where, arm, against in meta_lib.primary(meta)
    if where == dataset and arm in here
  ]
  return list(dict.fromkeys(pairs))


def _compare(
  dataset: str,
  pair: tuple[str, str],
  seeds: tuple[int, ...],
  here: Arms,
  meta: Meta,
) -> Comparison:
  arm, baseline = pair
  rows = {
    name: [{str(row["id"]): row for row in here[name][s]} for s in seeds]
    for name in pair
  }
  ids = sorted(rows[arm][0])
  names = [
    metric.name
    for metric in metrics.METRICS
    if metric.compared
    and all(
      metric.name in row
      for parts in rows.values()
      for part in parts
      for row in part.values()
    )
  ]
  one, other = (  # [seeds, images, metrics]
    np.array(
      [[[part[i][m] for m in names] for i in ids] for part in rows[name]],
      float,
    )
    for name in (baseline, arm)
  )
  options = meta_lib.bootstrap(meta)
  intervals = statistics.hierarchical_bootstrap(one, other, **options)
  dice = one[..., names.index("dice")], other[..., names.index("dice")]
  return Comparison(
    dataset=dataset,
    arm=arm,
    baseline=baseline,
    seeds=seeds,
    intervals=dict(zip(names, intervals)),
    random_effects=statistics.random_effects_interval(
      *dice, level=options["level"]
    ),
    wilcoxon=statistics.wilcoxon(*dice),
    holm=None,
    verdict="",
  )


def _verdict(comparison: Comparison, holm: float | None) -> str:
  """Returns the comparison's result in words.

  "better" and "worse" need a corrected p below .05 over the images, and a
  bootstrap and a random-effects interval without 0. Where only the last one
  fails, these runs differ and new ones may not.
  """
  prefix = "" if holm is not None else "exploratory: "
  p_value = comparison.wilcoxon.p_value if holm is None else holm
  interval = comparison.intervals["dice"]
  if p_value >= ALPHA or interval.low <= 0 <= interval.high:
    return prefix + "not significant"
  sign = 1 if interval.value > 0 else -1
  if comparison.wilcoxon.leaning == -sign:
    return prefix + "mixed: the mean and the ranks of images go opposite ways"
  word = "better" if sign > 0 else "worse"
  seeds = len(comparison.seeds)
  if seeds == 1:
    return prefix + f"{word} in this run; one seed says nothing of other runs"
  if comparison.random_effects.low <= 0 <= comparison.random_effects.high:
    return prefix + (
      f"{word} in these {seeds} runs, not significant for new ones"
    )
  return prefix + word
