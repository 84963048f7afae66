"""docs/methods.md says what the code does."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re

from distilling import TABLES
import pytest

from kdseg.distill import layers
from kdseg.distill import method as method_lib
from kdseg.distill import term as term_lib
from kdseg.distill import terms as terms_lib
from kdseg.losses import segmentation

PAGE = (
  pathlib.Path(__file__).resolve().parents[2] / "docs" / "methods.md"
).read_text(encoding="utf-8")


def part(heading):
  """The lines below a heading, up to the next of its level or above."""
  level = heading.split(" ")[0]
  text = PAGE.split(f"\n{heading}\n", 1)[1]
  return re.split(rf"\n#{{2,{len(level)}}} ", text)[0]


def rows(text):
  """The body of the table in a text, a dict by the cells of its head."""
  lines = [line for line in text.splitlines() if line.startswith("|")]
  head, _, *body = (
    [cell.strip() for cell in line.strip("|").split("|")] for line in lines
  )
  assert all(len(cells) == len(head) for cells in body)
  return [dict(zip(head, cells)) for cells in body]


CONTROLS = rows(part("## Controls"))
TERMS = {term.name: term for term in terms_lib.TERMS}


def resolve(name):
  """The function `losses.module.name`, and its module."""
  module, _, function = name.rpartition(".")
  module = importlib.import_module(f"kdseg.{module}")
  return getattr(module, function), module


def function_of(term):
  return resolve(re.match(r"\n`([\w.]+)`: ", part(f"### {term}"))[1])


def test_the_tables_are_those_of_the_records_and_the_switches():
  assert TABLES["fill"](PAGE) == PAGE, "run python docs/tables.py"


def test_every_section_is_a_term():
  assert set(re.findall(r"^### (.*)$", PAGE, re.M)) == set(TERMS)


@pytest.mark.parametrize("term", TERMS)
class TestEachTerm:
  def test_labels_are_said_to_be_read_where_the_loss_takes_them(self, term):
    function, module = function_of(term)
    names = set(inspect.signature(function).parameters)
    if term == "maskd":
      names |= set(inspect.signature(module.token_fit).parameters)
    takes = bool(names & {"labels", "region", "heads"})
    assert TERMS[term].labels == takes

  def test_the_source_is_named_by_the_loss_too(self, term):
    function, module = function_of(term)
    told = f"{function.__doc__}\n{module.__doc__}"
    told = " ".join(told.split())
    source = TERMS[term].source
    author, year = re.match(r"(\w+).* (\d{4})$", source).groups()
    assert re.search(rf"{author}\b[^.]*( et al\.| and )[^)]*{year}", told)

  def test_its_section_says_what_differs(self, term):
    assert re.search(r"\n\nDiffers: \w", part(f"### {term}"))

  def test_its_function_is_named_as_the_term_is(self, term):
    assert function_of(term)[0].__name__ == term


def test_every_function_named_on_the_page_exists():
  named = re.findall(r"`((?:losses|distill)(?:\.\w+){2,})`", PAGE)
  assert len(named) > len(TERMS)
  for name in named:
    assert callable(resolve(name)[0])


@pytest.mark.parametrize(
  ("term", "parameter", "written"),
  [
    ("bpkd", "edge_weight", "`50 * 2 * KL"),
    ("bpkd", "class_weight", "* 2 * KL"),
    ("bpkd", "body_weight", "\n20 * KL"),
    ("fgd", "foreground", "`1e-3 sum_lesion"),
    ("fgd", "background", "plus `5e-4`"),
    ("fgd", "attention", "plus `1e-3`"),
    ("fgd", "temperature", "/ .5)"),
    ("cirkd_lite", "temperature", "T_j^T / .1"),
    ("cirkd_lite", "widest", "at most 16 cells"),
    ("kd", "temperature", "t = 4"),
    ("cwd", "temperature", "t = 4"),
    ("ultralbm", "pixel_scale", "* 8 mean"),
    ("ultralbm", "temperature", "p_T / .5"),
    ("emkd", "temperature", "temperature 4"),
    ("skd_pa", "patch", "2x2 cells"),
    ("mbf", "hiding", "(.75)"),
    ("mgd", "hiding", "(.75)"),
  ],
)
def test_a_number_in_a_formula_is_the_default_of_the_loss(
  term, parameter, written
):
  assert written in part(f"### {term}")
  default = inspect.signature(function_of(term)[0]).parameters[parameter]
  numbers = re.findall(r"\.?\d+(?:\.\d+)?(?:e-?\d+)?", written)
  value = getattr(default.default, "ratio", default.default)
  assert value in [float(number) for number in numbers]


def test_the_weights_inside_of_emkd_and_ultralbm_are_the_defaults():
  for term, written in (
    ("emkd", r"`(\.\d) PMD \+ (\.\d) sum_taps IMD \+ (\.\d) sum_taps RAD`"),
    ("ultralbm", r"`(\.\d) \* 8.* \+ (\.\d) mean .*\+\s(\.\d) KL"),
  ):
    found = re.search(written, part(f"### {term}"), re.S).groups()
    signature = inspect.signature(function_of(term)[0])
    assert tuple(map(float, found)) == signature.parameters["weights"].default


def test_every_control_is_a_method_and_says_what_it_answers():
  names = [row["control"] for row in CONTROLS]
  assert len(set(names)) == len(names)
  methods = [
    method_lib.make_method(ast.literal_eval(row["switches"].strip("`")))
    for row in CONTROLS
  ]
  assert len(set(map(repr, methods))) == len(methods)
  assert all(row["what it answers"] for row in CONTROLS)
  regions = {method.region for method in methods}
  assert regions >= {"rolled_band", "interior", "exterior", "inv_band", "none"}
  assert {method.mask_ratio for method in methods} == {0.75, 0.0, 0.1}


def test_the_wide_generator_weighs_as_much_as_three_heads():
  by_name = {row["control"]: row["switches"] for row in CONTROLS}
  switches = by_name["one wide generator"]
  width = ast.literal_eval(switches.strip("`"))["generator_width"]
  assert width == layers.matched_width(64, 3)


def test_a_switch_is_listed_with_its_default_values_and_meaning():
  table = {row["switch"]: row for row in rows(part("## Switches"))}
  names = [field.name for field in dataclasses.fields(method_lib.Method)]
  assert list(table) == [f"`{name}`" for name in names]
  assert all(row["meaning"] for row in table.values())
  assert table["`topology`"] == {
    "switch": "`topology`",
    "default": "cascade",
    "values": "cascade, parallel, multiscale",
    "meaning": "of the heads of m2bf",
  }


def test_a_record_of_a_user_has_its_row():
  mine = term_lib.Term("mine", lambda inputs, tap: None, weight=2.5)
  [row] = rows(TABLES["describe_terms"]([mine]))
  assert row == {
    "term": "mine",
    "taps": "-",
    "weight": "2.5",
    "balance": "fixed",
    "labels": "no",
    "trained along": "-",
    "source": "-",
  }


def test_the_methods_of_the_example_are_methods():
  block = re.search(r"```python\nmethods = (.*?)```", PAGE, re.S)[1]
  methods = ast.literal_eval(block)
  for switches in methods.values():
    method = method_lib.make_method(switches)
    for term, weight in method.terms.items():
      assert weight == TERMS[term].weight


def test_labels_are_smoothed_by_what_the_page_and_the_loss_say():
  smoothed = terms_lib.SEGMENTATION["smoothed_bce"]
  assert smoothed.keywords == {"label_smoothing": 0.1}
  assert "Smoothed by .1 (Szegedy et al., CVPR 2016)" in PAGE
  assert "Szegedy et al., CVPR 2016" in segmentation.bce.__doc__
