"""The tables of a report: table.md, .csv and .tex."""

from collections.abc import Iterable
from collections.abc import Sequence
import csv as csv_lib
import dataclasses
import io
import math
from typing import Any

from kdseg.evaluation import metrics
from kdseg.evaluation import statistics
from kdseg.report import cells
from kdseg.report import writers
from kdseg.report.arms import ArmScores
from kdseg.report.comparisons import Comparison
from kdseg.report.meta import Meta
from kdseg.report.summary import Summary
from kdseg.report.summary import summarize
from kdseg.report.writers import Table

_NONE = "-"
_COMPARED = tuple(m for m in metrics.METRICS if m.compared)
_POOLED = tuple(m for m in _COMPARED if m.takes == "counts")


def make_tables(rows: Iterable[cells.Row], meta: Meta) -> dict[str, str]:
  """Makes every table there is.

  Args:
    rows: of scores.csv, whole groups.
    meta: of report.json; see `report.meta`.

  Returns:
    File name -> text: "table.md", "table.csv", "table.tex".

  Raises:
    ValueError: as `summarize`.
  """
  summary = summarize(rows, meta)
  tables = _tables(summary)
  # In LaTeX, tables float: the first one of a data set states the protocol.
  floats = [
    dataclasses.replace(
      table, notes=(summary.protocol[table.title], *table.notes)
    )
    if table.title in summary.protocol
    else table
    for table in tables
  ]
  return {
    "table.md": writers.markdown(
      tables,
      protocol=list(summary.protocol.values()),
      warnings=summary.warnings,
      notes=summary.notes,
    ),
    "table.csv": _csv(summary),
    "table.tex": writers.latex(floats, summary.warnings),
  }


def _csv(summary: Summary) -> str:
  """Writes a row for every comparison of an arm on a data set, unrounded.

  Each of them repeats the arm's scores. An arm without a comparison has one
  row.
  """
  compared: dict[tuple[str, str], list[Any]] = {}
  for comparison in summary.comparisons:
    compared.setdefault((comparison.dataset, comparison.arm), []).append(
      comparison
    )
  header = ["dataset", "arm", "seeds", "images", "parameters", "macs"]
  for metric in metrics.METRICS:
    header += [metric.name, f"{metric.name}_seed_sd"]
  header += [f"pooled_{metric.name}" for metric in _POOLED]
  header += ["empty_predictions", "baseline", "compared_seeds"]
  for metric in _COMPARED:
    header += [f"{metric.name}_{x}" for x in ("difference", "low", "high")]
  header += ["random_effects_low", "random_effects_high"]
  header += ["wilcoxon_p", "holm_p", "verdict", "protocol"]
  text = io.StringIO()
  writer = csv_lib.writer(text, lineterminator="\n")
  writer.writerow(header)
  for arm in summary.arms:
    row: list[Any] = [cells.safe(arm.dataset), cells.safe(arm.arm)]
    row += [" ".join(map(str, arm.by_seed))]
    row += [arm.images, arm.parameters, arm.macs]
    for metric in metrics.METRICS:
      row += [_blank(arm.mean(metric.name)), _blank(arm.deviation(metric.name))]
    row += [arm.pooled[metric.name] for metric in _POOLED]
    row += [arm.empty]
    for comparison in compared.get((arm.dataset, arm.arm), [None]):
      found = _comparison_cells(comparison)
      writer.writerow([*row, *found, summary.protocol[arm.dataset]])
  return text.getvalue()


def _comparison_cells(comparison: Comparison | None) -> list[Any]:
  if comparison is None:
    return [None] * (2 + 3 * len(_COMPARED) + 5)
  row: list[Any] = [cells.safe(comparison.baseline)]
  row += [" ".join(map(str, comparison.seeds))]
  for metric in _COMPARED:
    interval = comparison.intervals.get(metric.name)
    row += interval[:3] if interval else [None] * 3
  return [
    *row,
    _blank(comparison.random_effects.low),
    _blank(comparison.random_effects.high),
    comparison.wilcoxon.p_value,
    comparison.holm,
    comparison.verdict,
  ]


def _tables(summary: Summary) -> list[Table]:
  tables = []
  share = f"{summary.level:.0%}".replace("%", " %")
  for dataset in summary.protocol:
    arms = [arm for arm in summary.arms if arm.dataset == dataset]
    compared = [c for c in summary.comparisons if c.dataset == dataset]
    tables.append(_main_table(dataset, arms, summary.gates[dataset]))
    if compared:
      tables.append(_dice_differences(dataset, compared, share))
      tables.append(_other_differences(dataset, compared, share))
    tables.append(_other_metrics(dataset, arms))
    if any(arm.groups for arm in arms):
      tables.append(_groups_table(dataset, arms))
  return tables


def _main_table(
  dataset: str, arms: Sequence[ArmScores], gates: Sequence[str]
) -> Table:
  boundary = [metric for metric in _COMPARED if metric not in _POOLED]
  return Table(
    title=dataset,
    header=(
      "arm",
      "seeds",
      *(metric.label for metric in _POOLED),
      *(f"{metric.label}, pooled" for metric in _POOLED),
      *(metric.label for metric in boundary),
      "empty predictions",
      "parameters",
      "MACs",
    ),
    rows=tuple(
      (
        arm.arm,
        str(len(arm.by_seed)),
        *(_spread(arm, metric) for metric in _POOLED),
        *(f"{arm.pooled[m.name]:.{m.digits}f}" for m in _POOLED),
        *(_spread(arm, metric) for metric in boundary),
        f"{arm.empty} of {arm.images * len(arm.by_seed)}",
        _NONE if arm.parameters is None else f"{arm.parameters:,}",
        _NONE if arm.macs is None else f"{arm.macs / 1e6:,.1f} M",
      )
      for arm in arms
    ),
    notes=(
      "Dice of every seed: " + "; ".join(map(_every_seed, arms)) + ".",
      f"HD95 and ASSD in pixels of an image whose shorter side is "
      f"{metrics.REFERENCE_SIDE}; an empty prediction scores the image's "
      "diagonal and is counted. FLOPs are 2 MACs.",
      *gates,
    ),
  )


def _every_seed(arm: ArmScores) -> str:
  return f"{arm.arm} " + ", ".join(
    f"{values['dice']:.4f} (seed {seed})"
    for seed, values in arm.by_seed.items()
  )


def _dice_differences(
  dataset: str, compared: Sequence[Comparison], share: str
) -> Table:
  family = sum(c.holm is not None for c in compared)
  return Table(
    title=f"{dataset}: paired difference in Dice",
    header=(
      "arm",
      "against",
      "seeds",
      "difference",
      f"{share}, bootstrap",
      f"{share}, random effects",
      "Wilcoxon p",
      "Holm p",
      "in words",
    ),
    rows=tuple(
      (
        c.arm,
        c.baseline,
        " ".join(map(str, c.seeds)),
        f"{c.intervals['dice'].value:+.4f}",
        _ends(c.intervals["dice"], 4),
        _ends(c.random_effects, 4),
        _p(c.wilcoxon.p_value),
        _NONE if c.holm is None else _p(c.holm),
        c.verdict,
      )
      for c in compared
    ),
    notes=(
      "Paired by seed and image. Bootstrap: over seeds and images (one seed: "
      "images only), too narrow for few seeds that differ much. Random "
      "effects: seeds and images, Student's t. Wilcoxon: signed ranks of the "
      f"images' means over seeds. Holm: over the primary family, {family} of "
      "it here.",
    ),
  )


def _other_differences(
  dataset: str, compared: Sequence[Comparison], share: str
) -> Table:
  others = [metric for metric in _COMPARED if metric.name != "dice"]
  lower = [m.label.partition(",")[0] for m in others if m.lower_is_better]
  return Table(
    title=f"{dataset}: paired differences in the other metrics",
    header=("arm", "against", *(metric.label for metric in others)),
    rows=tuple(
      (c.arm, c.baseline, *(_difference(c, metric) for metric in others))
      for c in compared
    ),
    notes=(
      f"With {share} bootstrap intervals; not tested, to be read as "
      f"description. Lower {', '.join(lower[:-1])} and {lower[-1]} are better.",
    ),
  )


def _difference(comparison: Comparison, metric: metrics.Metric) -> str:
  interval = comparison.intervals.get(metric.name)
  if interval is None:
    return _NONE
  ends = _ends(interval, metric.digits)
  return f"{interval.value:+.{metric.digits}f} {ends}"


def _other_metrics(dataset: str, arms: Sequence[ArmScores]) -> Table:
  others = [metric for metric in metrics.METRICS if not metric.compared]
  return Table(
    title=f"{dataset}: the other official metrics",
    header=("arm", *(metric.label for metric in others)),
    rows=tuple(
      (arm.arm, *(_spread(arm, metric) for metric in others)) for arm in arms
    ),
    notes=(),
  )


def _groups_table(dataset: str, arms: Sequence[ArmScores]) -> Table:
  names = list(dict.fromkeys(name for arm in arms for name in arm.groups))
  counts = {
    name: next(arm.groups[name][0] for arm in arms if name in arm.groups)
    for name in names
  }
  return Table(
    title=f"{dataset}: Dice by origin of the image",
    header=("arm", *(f"{name} (n = {counts[name]})" for name in names)),
    rows=tuple(
      (arm.arm, *(f"{arm.groups[name][1]:.4f}" for name in names))
      for arm in arms
    ),
    notes=(),
  )


def _spread(arm: ArmScores, metric: metrics.Metric) -> str:
  mean, deviation = arm.mean(metric.name), arm.deviation(metric.name)
  if math.isnan(mean):
    return _NONE
  text = f"{mean:.{metric.digits}f}"
  if math.isnan(deviation):
    return text
  return f"{text} ± {deviation:.{metric.digits}f}"


def _ends(interval: statistics.Interval, digits: int) -> str:
  if math.isnan(interval.low):
    return _NONE
  return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _p(value: float) -> str:
  return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _blank(value: float) -> float | None:
  return None if math.isnan(value) else value
