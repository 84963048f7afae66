"""Tables that carry their protocol: markdown, LaTeX and CSV from a summary.

Cells are plain text until they are written; the writers escape whatever arms,
data sets and notes are called, for HTML, markdown, LaTeX and spreadsheets.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import csv as csv_lib
import dataclasses
import io
import math
import re
from typing import Any

from kdseg.evaluation import metrics
from kdseg.evaluation import statistics
from kdseg.report import scores
from kdseg.report.summary import COMPARED
from kdseg.report.summary import MEANS
from kdseg.report.summary import ArmScores
from kdseg.report.summary import Comparison
from kdseg.report.summary import Meta
from kdseg.report.summary import Summary
from kdseg.report.summary import summarize

_LABELS = {
  "dice": "Dice",
  "jaccard": "Jaccard",
  "accuracy": "accuracy",
  "sensitivity": "sensitivity",
  "specificity": "specificity",
  "thresholded_jaccard": f"Jaccard, 0 below {metrics.JACCARD_FLOOR}",
  "hd95": "HD95, px",
  "hd95_diagonal": "HD95 / diagonal",
  "assd": "ASSD, px",
  "assd_diagonal": "ASSD / diagonal",
  "nsd": f"NSD at {metrics.TOLERANCE} px",
  "boundary_iou": "boundary IoU",
}
_NONE = "-"


@dataclasses.dataclass(frozen=True)
class Table:
  """Plain text, escaped only when it is written."""

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  notes: tuple[str, ...]


def make_tables(rows: Iterable[scores.Row], meta: Meta) -> dict[str, str]:
  """Makes every table there is.

  Args:
    rows: of scores.csv, whole groups.
    meta: of report.json; see `summary`.

  Returns:
    File name -> text: "table.md", "table.csv", "table.tex".

  Raises:
    ValueError: on no rows, unknown keys in `meta`, or groups of one data set
      that do not have the same images.
  """
  summary = summarize(rows, meta)
  return {
    "table.md": markdown(summary),
    "table.csv": csv(summary),
    "table.tex": latex(summary),
  }


def markdown(summary: Summary) -> str:
  """Writes GitHub-flavoured markdown, the warnings first."""
  lines = ["# Scores", ""]
  for warning in summary.warnings:
    lines += [f"> **Warning.** {_escape_markdown(warning)}.", ""]
  for table in _tables(summary):
    lines += [f"## {_escape_markdown(table.title)}", ""]
    lines.append(_markdown_row(table.header))
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.header) - 1)))
    lines[-1] += "|"
    lines += [_markdown_row(row) for row in table.rows]
    lines.append("")
    for note in table.notes:
      lines += [_escape_markdown(note), ""]
  if summary.notes:
    lines += ["## Notes", ""]
    lines += [f"* {_escape_markdown(note)}" for note in summary.notes]
    lines.append("")
  return "\n".join(lines)


def latex(summary: Summary) -> str:
  r"""Writes tables for `\input`; they need the package booktabs."""
  lines = [r"% Needs \usepackage{booktabs} and \usepackage[T1]{fontenc}."]
  for warning in summary.warnings:
    # One line, whatever an id holds: what follows a line end is no comment.
    lines.append(f"% Warning: {' '.join(warning.split())}.")
  for table in _tables(summary):
    columns = "l" + "r" * (len(table.header) - 1)
    lines += [
      "",
      r"\begin{table}",
      r"\centering",
      rf"\caption{{{_escape_latex(table.title)}. "
      rf"{_escape_latex(' '.join(table.notes))}}}",
      r"\resizebox{\linewidth}{!}{%",
      rf"\begin{{tabular}}{{{columns}}}",
      r"\toprule",
      _latex_row(table.header),
      r"\midrule",
      *(_latex_row(row) for row in table.rows),
      r"\bottomrule",
      r"\end{tabular}}",
      r"\end{table}",
    ]
  return "\n".join(lines) + "\n"


def csv(summary: Summary) -> str:
  """Writes a row for every comparison of an arm on a data set, unrounded.

  What an arm scored stands in each of its rows, and alone in one where it was
  compared with nothing.
  """
  compared: dict[tuple[str, str], list[Any]] = {}
  for comparison in summary.comparisons:
    compared.setdefault((comparison.dataset, comparison.arm), []).append(
      comparison
    )
  header = ["dataset", "arm", "seeds", "images", "parameters", "macs"]
  for metric in MEANS:
    header += [metric, f"{metric}_seed_sd"]
  header += ["pooled_dice", "pooled_jaccard", "empty_predictions"]
  header += ["baseline", "compared_seeds"]
  for metric in COMPARED:
    header += [f"{metric}_{x}" for x in ("difference", "low", "high")]
  header += ["random_effects_low", "random_effects_high"]
  header += ["wilcoxon_p", "holm_p", "verdict", "protocol"]
  text = io.StringIO()
  writer = csv_lib.writer(text, lineterminator="\n")
  writer.writerow(header)
  for arm in summary.arms:
    cells: list[Any] = [scores.safe_cell(arm.dataset)]
    cells += [scores.safe_cell(arm.arm), " ".join(map(str, arm.by_seed))]
    cells += [arm.images, arm.parameters, arm.macs]
    for metric in MEANS:
      cells += [arm.mean(metric), _blank(arm.deviation(metric))]
    cells += [arm.pooled["dice"], arm.pooled["jaccard"], arm.empty]
    for comparison in compared.get((arm.dataset, arm.arm), [None]):
      found = _comparison_cells(comparison)
      writer.writerow([*cells, *found, summary.protocol[arm.dataset]])
  return text.getvalue()


def _comparison_cells(comparison: Any) -> list[Any]:
  if comparison is None:
    return [None] * (2 + 3 * len(COMPARED) + 5)
  cells = [scores.safe_cell(comparison.baseline)]
  cells += [" ".join(map(str, comparison.seeds))]
  for metric in COMPARED:
    interval = comparison.intervals[metric]
    cells += [interval.value, interval.low, interval.high]
  return [
    *cells,
    _blank(comparison.random_effects.low),
    _blank(comparison.random_effects.high),
    comparison.wilcoxon.p_value,
    comparison.holm,
    comparison.verdict,
  ]


def _tables(summary: Summary) -> list[Table]:
  tables = []
  for dataset, protocol in summary.protocol.items():
    arms = [arm for arm in summary.arms if arm.dataset == dataset]
    compared = [c for c in summary.comparisons if c.dataset == dataset]
    tables.append(_main_table(dataset, arms, protocol, summary.gates[dataset]))
    if compared:
      tables.append(
        _difference_table(dataset, compared, protocol, summary.level)
      )
      tables.append(
        _other_differences(dataset, compared, protocol, summary.level)
      )
    tables.append(_other_metrics(dataset, arms, protocol))
    if any(arm.groups for arm in arms):
      tables.append(_groups_table(dataset, arms, protocol))
  return tables


def _main_table(
  dataset: str,
  arms: Sequence[ArmScores],
  protocol: str,
  gates: Sequence[str],
) -> Table:
  shown = ("dice", "jaccard")
  boundary = ("hd95", "assd", "nsd", "boundary_iou")
  return Table(
    title=dataset,
    header=(
      "arm",
      "seeds",
      *(_LABELS[metric] for metric in shown),
      "Dice, pooled",
      "Jaccard, pooled",
      *(_LABELS[metric] for metric in boundary),
      "empty predictions",
      "parameters",
      "MACs",
    ),
    rows=tuple(
      (
        arm.arm,
        str(len(arm.by_seed)),
        *(_spread(arm, metric) for metric in shown),
        f"{arm.pooled['dice']:.4f}",
        f"{arm.pooled['jaccard']:.4f}",
        *(_spread(arm, metric) for metric in boundary),
        f"{arm.empty} of {arm.images * len(arm.by_seed)}",
        _NONE if arm.parameters is None else f"{arm.parameters:,}",
        _NONE if arm.macs is None else f"{arm.macs / 1e6:,.1f} M",
      )
      for arm in arms
    ),
    notes=(
      protocol,
      "Dice of every seed: "
      + "; ".join(_every_seed(arm) for arm in arms)
      + ".",
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


def _difference_table(
  dataset: str,
  compared: Sequence[Comparison],
  protocol: str,
  level: float,
) -> Table:
  share = f"{level:.0%}".replace("%", " %")
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
      protocol,
      "Paired by seed and image. Bootstrap: over seeds and images (one seed: "
      "images only), too narrow for few seeds that differ much. Random "
      "effects: seeds and images, Student's t. Wilcoxon: signed ranks of the "
      f"images' means over seeds. Holm: over the primary family, {family} of "
      "it here.",
    ),
  )


def _other_differences(
  dataset: str, compared: Sequence[Comparison], protocol: str, level: float
) -> Table:
  shown = COMPARED[1:]
  share = f"{level:.0%}".replace("%", " %")
  return Table(
    title=f"{dataset}: paired differences in the other metrics",
    header=("arm", "against", *(_LABELS[metric] for metric in shown)),
    rows=tuple(
      (
        c.arm,
        c.baseline,
        *(
          f"{c.intervals[m].value:+.{_digits(m)}f} "
          + _ends(c.intervals[m], _digits(m))
          for m in shown
        ),
      )
      for c in compared
    ),
    notes=(
      protocol,
      f"With {share} bootstrap intervals; not tested, to be read as "
      "description. Lower HD95 and ASSD are better.",
    ),
  )


def _other_metrics(
  dataset: str, arms: Sequence[ArmScores], protocol: str
) -> Table:
  shown = (
    "accuracy",
    "sensitivity",
    "specificity",
    "thresholded_jaccard",
    "hd95_diagonal",
    "assd_diagonal",
  )
  return Table(
    title=f"{dataset}: the other official metrics",
    header=("arm", *(_LABELS[metric] for metric in shown)),
    rows=tuple(
      (arm.arm, *(_spread(arm, metric) for metric in shown)) for arm in arms
    ),
    notes=(protocol,),
  )


def _groups_table(
  dataset: str, arms: Sequence[ArmScores], protocol: str
) -> Table:
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
    notes=(protocol,),
  )


def _digits(metric: str) -> int:
  return 2 if metric in ("hd95", "assd") else 4


def _spread(arm: ArmScores, metric: str) -> str:
  digits = _digits(metric)
  text = f"{arm.mean(metric):.{digits}f}"
  deviation = arm.deviation(metric)
  return text if math.isnan(deviation) else f"{text} ± {deviation:.{digits}f}"


def _ends(interval: statistics.Interval, digits: int) -> str:
  if math.isnan(interval.low):
    return _NONE
  return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _p(value: float) -> str:
  return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _blank(value: float) -> float | None:
  return None if math.isnan(value) else value


def _markdown_row(cells: Iterable[str]) -> str:
  return "| " + " | ".join(_escape_markdown(cell) for cell in cells) + " |"


def _escape_markdown(text: str) -> str:
  """Makes a text that markdown, HTML and spreadsheets show as it is."""
  text = " ".join(text.split())
  text = re.sub(r"[\\`*|~$#]", r"\\\g<0>", text)
  # Brackets are what intervals are made of; these are what links are made of.
  text = re.sub(r"\](?=[(\[:])", r"\\]", text)
  # An underscore within a word is one already, and arms are full of them.
  text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
  text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
  text = re.sub(r"(?i)(https?|ftp)://", r"\1:&#47;/", text)
  text = re.sub(r"(?i)\bwww\.", "www&#46;", text)
  text = text.replace("@", "&#64;")
  # A number's sign stays; nobody's formula is a number.
  if text[:1] in ("=", "+", "-") and not re.match(r"-$|[+-][\d.]+(\s|$)", text):
    text = "\\" + text
  return text


_LATEX = {
  "\\": r"\textbackslash{}",
  "&": r"\&",
  "%": r"\%",
  "$": r"\$",
  "#": r"\#",
  "_": r"\_",
  "{": r"\{",
  "}": r"\}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "<": r"\textless{}",
  ">": r"\textgreater{}",
  "|": r"\textbar{}",
  '"': r"\textquotedbl{}",
  "[": "{[}",
  "]": "{]}",
  "*": "{*}",
  "±": r"$\pm$",
}


def _latex_row(cells: Iterable[str]) -> str:
  return " & ".join(_escape_latex(cell) for cell in cells) + r" \\"


def _escape_latex(text: str) -> str:
  return "".join(
    _LATEX.get(character, character) for character in " ".join(text.split())
  )
