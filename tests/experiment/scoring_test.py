import json

import numpy as np
from PIL import Image
import pytest
from tiny_run import TOO_MUCH
from tiny_run import allocate_too_much
from tiny_run import copy
from tiny_run import read_rows
from tiny_run import snapshot

from kdseg.experiment import run
from kdseg.experiment import scoring
from kdseg.runtime import checkpoint
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import step as step_lib


def test_every_image_is_scored_once_for_every_network(finished):
  rows = read_rows(finished.workdir)
  assert len(rows) == 3 * 6
  keys = {(row["arm"], row["seed"], row["dataset"], row["id"]) for row in rows}
  assert len(keys) == len(rows)
  assert {key[:3] for key in keys} == {
    ("teacher_unet", "0", "synthetic_test"),
    ("patch_unet-none", "0", "synthetic_test"),
    ("patch_unet-mbf", "0", "synthetic_test"),
  }
  assert {key[3] for key in keys} == {f"test_{i:05d}" for i in range(6)}


def test_scores_are_those_of_the_predictions_at_the_images_own_size(finished):
  for row in read_rows(finished.workdir):
    assert (row["height"], row["width"]) == ("40", "40")
    path = (
      finished.workdir
      / "predictions"
      / f"{row['arm']}-seed{row['seed']}"
      / row["dataset"]
      / f"{row['id']}.png"
    )
    with Image.open(path) as image:
      predicted = np.asarray(image.convert("L")) > 0
    counted = int(row["true_positive"]) + int(row["false_positive"])
    assert predicted.shape == (40, 40)
    assert predicted.sum() == counted


def test_scoring_that_is_stopped_after_every_batch_is_as_never_stopped(
  finished, tmp_path
):
  config = finished.config.copy_and_resolve_references()
  config.evaluation.batch_size = 4
  config.evaluation.teacher_tta = "dihedral"
  whole, torn = (
    copy(finished, tmp_path / name, "teachers", "arms")
    for name in ("whole", "torn_scores")
  )
  run.run(config, whole)
  said = []
  while True:
    try:
      run.run(config, torn, stop=lambda: True)
      break
    except preemption.StoppedError as error:
      said.append(str(error))
    # And killed as the next was noted.
    with open(torn / "scoring.jsonl", "ab") as file:
      file.write(b'[{"boundary_f1": 0.')
  # Two batches of three networks, none of them twice.
  assert len(said) == 6
  assert said[0] == (
    "stopped while teacher_unet seed 0 was scored on synthetic_test; the same "
    "command continues from there"
  )
  for part in ("scores.csv", "table.md"):
    assert (torn / part).read_bytes() == (whole / part).read_bytes()
  masks = [
    {
      name: content
      for name, (_, content) in snapshot(w / "predictions").items()
    }
    for w in (torn, whole)
  ]
  assert masks[0] == masks[1]
  assert len(masks[0]) == 18
  assert not (torn / "scoring.jsonl").exists()


def test_what_was_noted_of_other_weights_is_not_gone_on_from(tmp_path):
  path = tmp_path / "scoring.jsonl"
  assert scoring._read_noted(path, "old") == []
  checkpoint.append_json_line(path, [{"id": "a"}])
  assert scoring._read_noted(path, "old") == [[{"id": "a"}]]
  assert scoring._read_noted(path, "new") == []
  assert scoring._read_noted(path, "old") == []


def test_scores_that_take_too_much_memory_go_on_in_smaller_batches(
  finished, tmp_path, monkeypatch
):
  workdir = copy(
    finished, tmp_path / "large", "config.json", "teachers", "arms"
  )
  config = finished.config.copy_and_resolve_references()
  with monkeypatch.context() as patch:
    patch.setattr(
      step_lib, "parallel_predict", lambda *network: allocate_too_much
    )
    with pytest.raises(
      memory.OutOfMemoryError,
      match=r"^scores: teacher_unet seed 0 on synthetic_test in batches of 8: "
      rf"{TOO_MUCH}\. Free some, or lower evaluation\.batch_size, then the "
      r"same command continues$",
    ):
      run.run(config, workdir)
  config.evaluation.batch_size = 4
  assert run.run(config, workdir) is True
  assert len(read_rows(workdir)) == 3 * 6


def test_a_search_scores_the_images_that_choose_and_no_others(
  finished, tmp_path
):
  workdir = copy(finished, tmp_path / "search", "teachers", "arms")
  config = finished.config.copy_and_resolve_references()
  config.data.tests = ("validation",)
  run.run(config, workdir)
  rows = read_rows(workdir)
  assert {row["dataset"] for row in rows} == {"synthetic_validation"}
  assert {row["id"] for row in rows} == {
    f"validation_{i:05d}" for i in range(8)
  }
  by_arm = {}
  for row in rows:
    by_arm.setdefault(row["arm"], []).append(float(row["dice"]))
  about = json.loads(
    (workdir / "arms" / "patch_unet-mbf-seed0" / "about.json").read_text()
  )
  assert "Warning" not in (workdir / "table.md").read_text().split("Gate")[0]
  assert "synthetic_validation, n = 8;" in (workdir / "table.md").read_text()
  # The one at the images' own size, 40 pixels, the other at 32.
  assert (
    abs(np.mean(by_arm["patch_unet-mbf"]) - about["validation_dice"]) < 0.05
  )
