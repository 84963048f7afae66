"""What one arm scored on one data set: means, deviations, pooled, empty."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from kdseg.evaluation import metrics
from kdseg.report.cells import Row
from kdseg.report.meta import Meta

# Averaged over images; the other columns are counts and sizes.
MEANS = tuple(metric.name for metric in metrics.METRICS)


@dataclasses.dataclass(frozen=True)
class ArmScores:
  """One arm on one data set.

  `by_seed[seed][metric]` is the mean over images (NaN where scores.csv lacks
  the metric for one of them), `pooled` the mean over seeds of what all pixels
  of a seed give together, `empty` how many of `images * len(by_seed)`
  predictions were empty.
  """

  dataset: str
  arm: str
  images: int
  by_seed: dict[int, dict[str, float]]
  pooled: dict[str, float]
  empty: int
  groups: dict[str, tuple[int, float]]  # name -> images, mean Dice
  parameters: int | None
  macs: float | None

  def mean(self, metric: str) -> float:
    """Averages over the seeds."""
    return float(np.mean([seed[metric] for seed in self.by_seed.values()]))

  def deviation(self, metric: str) -> float:
    """Returns the seeds' standard deviation (n - 1); NaN for one seed."""
    if len(self.by_seed) < 2:
      return math.nan
    return float(
      np.std([seed[metric] for seed in self.by_seed.values()], ddof=1)
    )


def score_arm(
  dataset: str, arm: str, by_seed: Mapping[int, Sequence[Row]], meta: Meta
) -> ArmScores:
  """Averages the rows of an arm, by seed, on a data set."""
  rows = [row for members in by_seed.values() for row in members]
  pools = [metrics.pooled(members) for members in by_seed.values()]
  size = meta.get("arms", {}).get(arm, {})
  return ArmScores(
    dataset=dataset,
    arm=arm,
    images=len(rows) // len(by_seed),
    by_seed={
      seed: {
        name: float(np.mean([row.get(name, math.nan) for row in by_seed[seed]]))
        for name in MEANS
      }
      for seed in sorted(by_seed)
    },
    pooled={
      name: float(np.mean([pool[name] for pool in pools])) for name in pools[0]
    },
    empty=sum(int(row["empty_prediction"]) for row in rows),
    groups=_group_means(rows, len(by_seed), meta),
    parameters=size.get("parameters"),
    macs=size.get("macs"),
  )


def _group_means(
  rows: Sequence[Row], seeds: int, meta: Meta
) -> dict[str, tuple[int, float]]:
  wanted = {name: set(ids) for name, ids in meta.get("groups", {}).items()}
  named = set().union(*wanted.values())
  parts = {
    name: [row["dice"] for row in rows if row["id"] in ids]
    for name, ids in wanted.items()
  }
  if not any(parts.values()):
    return {}
  parts["the others"] = [row["dice"] for row in rows if row["id"] not in named]
  return {
    name: (len(values) // seeds, float(np.mean(values)))
    for name, values in parts.items()
    if values
  }
