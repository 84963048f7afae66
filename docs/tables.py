"""Writes the tables of docs/methods.md from the records and the switches.

python docs/tables.py
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import pathlib
import re

from kdseg import networks
from kdseg.distill import method as method_lib
from kdseg.distill import term as term_lib
from kdseg.distill import terms as terms_lib


def describe_terms(
  records: Iterable[term_lib.Term] = terms_lib.TERMS,
) -> str:
  """Returns a table of terms, in Markdown."""
  rows = [
    ["term", "taps", "weight", "balance", "labels", "trained along", "source"]
  ]
  for term in records:
    align = ("1x1",) if term.compares == term_lib.ALIGNED else ()
    rows.append(
      [
        term.name,
        ", ".join(term.taps) or "-",
        f"{term.weight:g}",
        "calibrated" if term.calibrated else "fixed",
        "yes" if term.labels else "no",
        ", ".join((*align, *term.trains)) or "-",
        term.source or "-",
      ]
    )
  return _table(rows)


def describe_switches() -> str:
  """Returns a table of the switches of a method, in Markdown."""
  attributes = (method_lib.Method.__doc__ or "").split("Attributes:\n")[1]
  parts = re.split(r"^    (\w+): ", attributes, flags=re.MULTILINE)[1:]
  meanings = dict(zip(parts[::2], parts[1::2]))
  values = {
    **method_lib.CHOICES,
    "taps": networks.TAPS,
    "segmentation": tuple(terms_lib.SEGMENTATION),
  }
  rows = [["switch", "default", "values", "meaning"]]
  for field in dataclasses.fields(method_lib.Method):
    default = field.default
    if default is dataclasses.MISSING:
      default = "none"
    elif isinstance(default, tuple):
      default = ", ".join(default)
    rows.append(
      [
        f"`{field.name}`",
        str(default),
        ", ".join(values.get(field.name, ())),
        " ".join(meanings[field.name].split()).rstrip("."),
      ]
    )
  return _table(rows)


def fill(page: str) -> str:
  """Replaces the tables between the marks of a page with those of the code."""
  for name, table in (
    ("terms", describe_terms()),
    ("switches", describe_switches()),
  ):
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.split(first)
    page = before + first + table + last + rest.split(last)[1]
  return page


def _table(rows: Sequence[Sequence[str]]) -> str:
  lines = [f"| {' | '.join(row)} |" for row in rows]
  lines.insert(1, "|" + "---|" * len(rows[0]))
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  path = pathlib.Path(__file__).with_name("methods.md")
  path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
