import json
import os
import shutil

import numpy as np
from PIL import Image
from tiny_run import copy
from tiny_run import make_run

from kdseg.evaluation import evaluate
from kdseg.experiment import reporting
from kdseg.experiment import run
from kdseg.report import scores
from kdseg.training import stage


def test_the_table_says_what_it_is_made_of(finished):
  table = (finished.workdir / "table.md").read_text()
  few = "synthetic_test has only 6 test images"
  for text in ("24 of 24", "6 of 6", "teacher_unet", "patch_unet-mbf", few):
    assert text in table
  report = json.loads((finished.workdir / "report.json").read_text())
  assert report["teacher"] == "teacher_unet"
  # Both are called "patch_unet", and only one of them is large.
  arms = report["arms"]
  assert arms["teacher_unet"]["macs"] > arms["patch_unet-none"]["macs"] > 0
  assert (
    arms["teacher_unet"]["parameters"] > arms["patch_unet-none"]["parameters"]
  )


def test_the_picture_shows_something(finished):
  with Image.open(finished.workdir / "overlays.png") as image:
    assert min(image.size) > 40
    assert len(image.getcolors(1 << 24)) > 100


def test_each_row_of_the_picture_shows_one_image_of_every_arm(
  finished, tmp_path, monkeypatch
):
  workdir = copy(finished, tmp_path / "run")
  drawn = []

  def draw(cases, *, title):
    assert "3 of 3 arms\nworst, median and best of patch_unet-none" in title
    assert "improved and worsened: patch_unet-mbf against it" in title
    drawn.extend(cases)
    return Image.new("RGB", (1, 1))

  monkeypatch.setattr(reporting.overlays, "overlays", draw)
  (workdir / ".reported").unlink()
  run.run(finished.config, workdir)
  shown = {(case.arm, case.rank): case for case in drawn}
  arms = list(dict.fromkeys(arm for arm, _ in shown))
  assert arms == ["teacher_unet", "patch_unet-none", "patch_unet-mbf"]
  assert len(shown) == len(drawn) == 3 * 5
  rows = scores.read(workdir / "scores.csv")
  dice = {(row["arm"], row["id"]): row["dice"] for row in rows}
  for (arm, rank), case in shown.items():
    assert case.id == shown[arms[0], rank].id
    np.testing.assert_array_equal(case.image, shown[arms[0], rank].image)
    assert case.dice == dice[arm, case.id]


def test_the_primary_family_is_written_down_with_what_chooses_in_it(
  finished, tmp_path
):
  workdir = tmp_path / "primary"
  copy(finished, workdir)
  config = finished.config.copy_and_resolve_references()
  config.primary = (("mbf", "none"), ("mbf", ("none", "boom")))
  # The comparisons of a finished run may change: its report is made again.
  assert run.run(config, workdir) is True
  report = json.loads((workdir / "report.json").read_text())
  here = {"dataset": "synthetic_test", "arm": "patch_unet-mbf"}
  assert report["primary"] == [
    {**here, "against": "patch_unet-none"},
    {**here, "against": ["patch_unet-none", "patch_unet-boom"]},
  ]
  about = workdir / "arms" / "patch_unet-mbf-seed0" / "about.json"
  assert report["validation"]["patch_unet-mbf"] == {
    "0": json.loads(about.read_text())["validation_dice"]
  }
  assert "patch_unet-boom" not in report["validation"]
  assert run.run(config, workdir) is False


def test_a_lost_table_is_written_again_and_nothing_else_is_done(
  finished, tmp_path, monkeypatch
):
  workdir = tmp_path / "lost"
  copy(finished, workdir)
  expected = (workdir / "table.md").read_bytes()
  (workdir / "table.md").unlink()
  scores = (workdir / "scores.csv").stat().st_mtime_ns
  monkeypatch.setattr(stage, "train_together", None)
  monkeypatch.setattr(evaluate, "score", None)
  assert run.run(finished.config, workdir) is True
  assert (workdir / "table.md").read_bytes() == expected
  assert (workdir / "scores.csv").stat().st_mtime_ns == scores


def test_a_report_is_known_by_what_it_was_made_of_not_by_its_time(
  finished, tmp_path
):
  workdir = tmp_path / "times"
  copy(finished, workdir)
  this = make_run(finished.config, workdir)
  os.utime(workdir / "table.md", (0, 0))
  assert reporting.is_reported(this)
  # Scores that were changed since, by a clock that went backwards.
  with open(workdir / "scores.csv", "ab") as file:
    file.write(b"x")
  os.utime(workdir / "scores.csv", (0, 0))
  os.utime(workdir / "table.md")
  assert not reporting.is_reported(this)


def test_a_report_goes_without_predictions_that_were_deleted(
  finished, tmp_path, caplog
):
  workdir = copy(
    finished,
    tmp_path / "run",
    *("config.json", "scores.csv", "arms", "teachers", "predictions"),
  )
  shutil.rmtree(workdir / "predictions" / "patch_unet-mbf-seed0")
  run.run(finished.config, workdir)
  assert "overlays.png goes without" in caplog.text
  assert (workdir / "overlays.png").exists()
  shutil.rmtree(workdir / "predictions")
  (workdir / ".reported").unlink()
  (workdir / "overlays.png").unlink()
  run.run(finished.config, workdir)
  assert "patch_unet-mbf" in (workdir / "table.md").read_text()
  assert not (workdir / "overlays.png").exists()
