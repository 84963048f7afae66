"""A metric added as one record: its column, headings, digits, direction."""

import csv
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = """
  Metric(
    "missed",
    "missed, %",
    lambda c: 100 * c.false_negative / sum(c),
    "counts",
    digits=1,
    lower_is_better=True,
    compared=True,
  ),
"""
SCORE = """
import sys
import numpy as np
from kdseg.evaluation import metrics
from kdseg.report import __main__ as command
from kdseg.report import scores
rows = []
for i in range(8):
  rng = np.random.default_rng(i)
  truth = rng.random((9, 8)) > 0.5
  for arm, noise in (("net-none", 0.4), ("net-mbf", 0.2)):
    prediction = truth ^ (rng.random((9, 8)) < noise)
    row = {"arm": arm, "seed": 0, "dataset": "ph2", "id": f"{i}"}
    rows.append(row | metrics.score(prediction, truth))
scores.write(sys.argv[1] + "/scores.csv", rows)
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
  """A workdir scored and tabulated by a kdseg with one more record."""
  root = tmp_path_factory.mktemp("added")
  (root / "kdseg").mkdir()
  for path in (ROOT / "kdseg").iterdir():
    if path.name != "evaluation":
      (root / "kdseg" / path.name).symlink_to(path)
  shutil.copytree(ROOT / "kdseg" / "evaluation", root / "kdseg" / "evaluation")
  path = root / "kdseg" / "evaluation" / "metrics.py"
  text = path.read_text()
  assert text.count("\n)\n# What else") == 1
  path.write_text(text.replace("\n)\n# What else", RECORD + ")\n# What else"))
  workdir = root / "run"
  workdir.mkdir()
  (workdir / "report.json").write_text('{"bootstrap": {"resamples": 50}}')
  subprocess.run(
    [sys.executable, "-c", SCORE, str(workdir)], cwd=root, check=True
  )
  return workdir


def read_csv(path):
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


def table(text, title):
  """The header and the rows of the table below a title."""
  lines = text.split(f"\n## {title}\n\n")[1].split("\n\n")[0].split("\n")
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
  return [dict(zip(cells[0], row)) for row in cells[2:]]


def test_a_record_makes_a_column(scored):
  row = read_csv(scored / "scores.csv")[0]
  share = 100 * int(row["false_negative"]) / 72
  assert float(row["missed"]) == pytest.approx(share)


def test_a_record_makes_headings_with_its_digits_and_direction(scored):
  text = (scored / "table.md").read_text()
  rows = read_csv(scored / "scores.csv")
  mean = sum(float(r["missed"]) for r in rows if r["arm"] == "net-none") / 8
  none, _ = table(text, "ph2")
  assert none["missed, %"] == none["missed, %, pooled"] == f"{mean:.1f}"
  [row] = table(text, "ph2: paired differences in the other metrics")
  assert row["missed, %"].startswith("-")
  assert row["missed, %"].count(".") == 3
  assert "Lower HD95, ASSD and missed are better." in text
  assert "missed_difference" in read_csv(scored / "table.csv")[0]
