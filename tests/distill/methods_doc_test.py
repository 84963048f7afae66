"""docs/methods.md says what the code does."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re

import pytest

from kdseg import networks
from kdseg.distill import layers
from kdseg.distill import objective
from kdseg.losses import boundary
from kdseg.losses import segmentation

PAGE = (
  pathlib.Path(__file__).resolve().parents[2] / "docs" / "methods.md"
).read_text(encoding="utf-8")
DASH = "-"


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


TABLE = {row["term"]: row for row in rows(part("## At a glance"))}
CONTROLS = rows(part("## Controls"))
SWITCHES = {row["switch"]: row["values"] for row in rows(part("## Switches"))}


def resolve(name):
  """The function `losses.module.name`, and its module."""
  module, _, function = name.rpartition(".")
  module = importlib.import_module(f"kdseg.{module}")
  return getattr(module, function), module


def function_of(term):
  return resolve(re.match(r"\n`([\w.]+)`: ", part(f"### {term}"))[1])


def test_every_term_has_its_row_in_the_order_of_the_code():
  assert tuple(TABLE) == objective.TERMS


def test_every_section_is_a_term():
  assert set(re.findall(r"^### (.*)$", PAGE, re.M)) == set(objective.TERMS)


@pytest.mark.parametrize("term", objective.TERMS)
class TestEachTerm:
  def test_weight_and_balance_are_those_of_the_code(self, term):
    row = TABLE[term]
    assert float(row["weight"]) == objective.PUBLISHED_WEIGHTS[term]
    calibrated = term in objective.CALIBRATED_TERMS
    assert row["balance"] == ("calibrated" if calibrated else "fixed")

  def test_taps_exist_where_features_are_compared(self, term):
    taps = TABLE[term]["taps"]
    if term in objective.LOGIT_TERMS:
      assert taps == DASH
    else:
      assert set(taps.split(", ")) <= set(networks.TAPS)

  def test_what_is_trained_along_is_what_the_distiller_has(self, term):
    method = objective.Method(terms={term: 1.0})
    along = TABLE[term]["trained along"]
    assert ("1x1" in along) == bool(method.feature_terms)
    assert ("generator" in along) == (method.generator_heads > 0)
    assert ("tokens, probe" in along) == (method.token_count > 0)
    assert (along == DASH) == (not method.feature_terms)

  def test_labels_are_said_to_be_read_where_the_loss_takes_them(self, term):
    function, module = function_of(term)
    names = set(inspect.signature(function).parameters)
    if term == "maskd":
      names |= set(inspect.signature(module.token_fit).parameters)
    takes = bool(names & {"labels", "region", "regions"})
    assert (TABLE[term]["labels"] == "yes") == takes

  def test_the_source_is_named_by_the_loss_too(self, term):
    function, module = function_of(term)
    told = f"{function.__doc__}\n{module.__doc__}"
    told = " ".join(told.split())
    source = TABLE[term]["source"]
    author, year = re.match(r"(\w+).* (\d{4})$", source).groups()
    assert re.search(rf"{author}\b[^.]*( et al\.| and )[^)]*{year}", told)

  def test_its_section_says_what_differs(self, term):
    assert re.search(r"\n\nDiffers: \w", part(f"### {term}"))

  def test_its_function_is_named_as_the_term_is(self, term):
    assert function_of(term)[0].__name__ == term


def test_every_function_named_on_the_page_exists():
  named = re.findall(r"`((?:losses|networks)\.[\w.]+)`", PAGE)
  assert len(named) > len(objective.TERMS)
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
    ("mbf", "mask_ratio", "(.75)"),
    ("mgd", "mask_ratio", "(.75)"),
  ],
)
def test_a_number_in_a_formula_is_the_default_of_the_loss(
  term, parameter, written
):
  assert written in part(f"### {term}")
  default = inspect.signature(function_of(term)[0]).parameters[parameter]
  numbers = re.findall(r"\.?\d+(?:\.\d+)?(?:e-?\d+)?", written)
  assert default.default in [float(number) for number in numbers]


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
    objective.make_method(ast.literal_eval(row["switches"].strip("`")))
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


def test_every_switch_is_listed_with_its_default():
  fields = dataclasses.fields(objective.Method)
  assert [f"`{field.name}`" for field in fields] == list(SWITCHES)
  for field in fields:
    if field.default is dataclasses.MISSING:
      continue
    bold = re.search(r"\*\*(.*?)\*\*", SWITCHES[f"`{field.name}`"])[1]
    default = field.default
    if isinstance(default, tuple):
      default = ", ".join(default)
    if isinstance(default, int | float) and not isinstance(default, bool):
      assert float(bold) == default
    else:
      assert bold == str(default)


def test_every_value_of_a_choice_is_listed():
  def listed(name):
    return set(re.findall(r"\w+", SWITCHES[f"`{name}`"]))

  assert listed("region") == set(boundary.REGIONS)
  assert listed("taps") == set(networks.TAPS)
  assert listed("generator") == set(layers.GENERATORS)
  assert listed("segmentation") >= set(objective.SEGMENTATION_TERMS)
  for name, values in objective._CHOICES.items():
    assert listed(name) >= set(values)


def test_the_methods_of_the_example_are_methods():
  block = re.search(r"```python\nmethods = (.*?)```", PAGE, re.S)[1]
  methods = ast.literal_eval(block)
  for switches in methods.values():
    method = objective.make_method(switches)
    for term, weight in method.terms.items():
      assert weight == objective.PUBLISHED_WEIGHTS[term]


def test_labels_are_smoothed_by_what_the_page_and_the_loss_say():
  smoothed = objective.SEGMENTATION_TERMS["smoothed_bce"]
  assert smoothed.keywords == {"label_smoothing": 0.1}
  assert "Smoothed by .1 (Szegedy et al., CVPR 2016)" in PAGE
  assert "Szegedy et al., CVPR 2016" in segmentation.bce.__doc__
