"""Writes tables as markdown and LaTeX.

Cells are plain text until they are written; the writers escape whatever arms,
data sets and notes are called, for HTML, markdown, LaTeX and spreadsheets.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Table:
  """Plain text, escaped only when it is written."""

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  notes: tuple[str, ...]


def markdown(
  tables: Sequence[Table],
  *,
  protocol: Sequence[str],
  warnings: Sequence[str],
  notes: Sequence[str],
) -> str:
  """Writes GitHub-flavoured markdown.

  The warnings and the protocol come first, the notes last.
  """
  lines = ["# Scores", ""]
  for warning in warnings:
    lines += [f"> **Warning.** {_escape_markdown(warning)}.", ""]
  for line in protocol:
    lines += [_escape_markdown(line), ""]
  for table in tables:
    lines += [f"## {_escape_markdown(table.title)}", ""]
    lines.append(_markdown_row(table.header))
    lines.append("|---" + "|---:" * (len(table.header) - 1) + "|")
    lines += [_markdown_row(row) for row in table.rows]
    lines.append("")
    for note in table.notes:
      lines += [_escape_markdown(note), ""]
  if notes:
    lines += ["## Notes", ""]
    lines += [f"* {_escape_markdown(note)}" for note in notes]
    lines.append("")
  return "\n".join(lines)


def latex(tables: Sequence[Table], warnings: Sequence[str]) -> str:
  r"""Writes tables for `\input`; the first line names their packages."""
  lines = [f"% Needs {' '.join(_PACKAGES)}."]
  for warning in warnings:
    # On one line: what follows a line end in an id would be no comment.
    lines.append(f"% Warning: {' '.join(warning.split())}.")
  for table in tables:
    columns = "l" + "r" * (len(table.header) - 1)
    lines += [
      "",
      r"\begin{table}",
      r"\centering",
      rf"\caption{{{_escape_latex(table.title)}}}",
      r"\resizebox{\linewidth}{!}{%",
      rf"\begin{{tabular}}{{{columns}}}",
      r"\toprule",
      _latex_row(table.header),
      r"\midrule",
      *(_latex_row(row) for row in table.rows),
      r"\bottomrule",
      r"\end{tabular}}",
      # Not in the caption: TeX sets that in one line first, whose length is
      # limited.
      r"\par\smallskip\scriptsize\raggedright",
      _escape_latex(" ".join(table.notes)),
      r"\end{table}",
    ]
  return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
  return "| " + " | ".join(_escape_markdown(cell) for cell in cells) + " |"


def _escape_markdown(text: str) -> str:
  """Makes a text that markdown, HTML and spreadsheets show as it is."""
  text = " ".join(text.split())
  text = re.sub(r"[\\`*|~$#]", r"\\\g<0>", text)
  # Intervals keep their brackets; those that could start a link do not.
  text = re.sub(r"\](?=[(\[:])", r"\\]", text)
  # Within a word, as in the names of arms, an underscore is plain already.
  text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
  # Only what starts an entity or a tag, so that "p > 0.5" is read as it is.
  text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
  text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
  text = re.sub(r"(?i)(https?|ftp)://", r"\1:&#47;/", text)
  text = re.sub(r"(?i)\bwww\.", "www&#46;", text)
  text = text.replace("@", "&#64;")
  # The sign of a number stays: it starts no formula.
  if text[:1] in ("=", "+", "-", ">") and not re.match(
    r"-$|[+-][\d.]+(\s|$)", text
  ):
    text = "\\" + text
  return text


_PACKAGES = (
  r"\usepackage{booktabs}",
  r"\usepackage{graphicx}",
  r"\usepackage[T1]{fontenc}",
)
_LATEX: dict[str, str | int | None] = {
  **{character: rf"\{character}" for character in "&%$#_{}"},
  **{character: f"{{{character}}}" for character in "[]*"},
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "<": r"\textless{}",
  ">": r"\textgreater{}",
  "|": r"\textbar{}",
  '"': r"\textquotedbl{}",
  "±": r"$\pm$",
}


def _latex_row(cells: Iterable[str]) -> str:
  return " & ".join(_escape_latex(cell) for cell in cells) + r" \\"


def _escape_latex(text: str) -> str:
  return " ".join(text.split()).translate(str.maketrans(_LATEX))
