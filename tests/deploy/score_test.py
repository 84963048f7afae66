import csv
import json

import numpy as np
from PIL import Image
import pytest
import tiny_model

from kdseg.data import loading
from kdseg.data import sets
from kdseg.data.sets import synthetic
from kdseg.deploy import export
from kdseg.deploy import formats
from kdseg.deploy import models
from kdseg.deploy import score
from kdseg.deploy import weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("export")
  path = tiny_model.write(out / "tiny.safetensors")
  [stablehlo] = [f for f in formats.FORMATS if f.name == "stablehlo"]
  export.export(models.load_weights(path), out / "export", formats=[stablehlo])
  return out / "export"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Folders of a small data set with one image in each of the other splits."""
  pictures = tmp_path_factory.mktemp("pictures")
  for split, count in (("train", 1), ("validation", 1), ("test", 4)):
    for i in range(count):
      drawn = synthetic.draw(np.random.default_rng(i), 64)
      for kind, pixels in zip(("images", "masks"), drawn):
        path = pictures / split / kind / f"{split}{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
  return {
    "data_dir": str(tmp_path_factory.mktemp("data")),
    "manual_dir": str(pictures),
  }


@pytest.fixture(scope="module")
def arrays(data):
  return loading.load("folder", "test", size=tiny_model.SIZE, **data)


@pytest.fixture(scope="module")
def scored(folder, data):
  arguments = [str(folder), "--tests", "folder"]
  # An underscore is as good as a dash.
  arguments += ["--data_dir", data["data_dir"]]
  arguments += ["--manual-dir", data["manual_dir"]]
  assert score.main(arguments) == 0
  return folder


def test_every_file_is_scored_on_every_image(scored, arrays):
  with (scored / "scores.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  for file in ("weights.safetensors", "model.stablehlo"):
    ids = [row["id"] for row in rows if row["arm"] == file]
    assert sorted(ids) == sorted(arrays.ids)


def test_the_summary_is_the_mean_over_images_and_its_change(scored):
  summary = json.loads((scored / "SCORES.json").read_text())[
    sets.BUILDERS["folder"].test_name
  ]
  with (scored / "scores.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  for file, entry in summary.items():
    dice = np.mean([float(row["dice"]) for row in rows if row["arm"] == file])
    assert entry["dice"] == pytest.approx(dice)
  change = summary["model.stablehlo"]["dice_change"]
  assert abs(change) < 1e-3
  assert "model.stablehlo" in (scored / "SCORES.md").read_text()


def test_other_probabilities_have_other_scores(arrays):

  class Truth:
    threshold = 0.5

    def probabilities(self, batch):
      [index] = [
        i for i, image in enumerate(arrays.image) if (image == batch[0]).all()
      ]
      return arrays.mask[index][None].astype(np.float32)

  rows = score.score(Truth(), arrays, "synthetic_test", "truth")
  assert np.mean([row["dice"] for row in rows]) > 0.9
  # By the network's own threshold.
  Truth.threshold = 1.0
  rows = score.score(Truth(), arrays, "synthetic_test", "truth")
  assert all(row["dice"] == 0 for row in rows)


def test_a_probability_that_is_not_finite_is_refused(arrays):

  class Broken:
    def probabilities(self, batch):
      return np.full(batch.shape[:3], np.nan, np.float32)

  with pytest.raises(weights.WeightsError, match="broken gives a prob"):
    score.score(Broken(), arrays, "synthetic_test", "broken")


def test_a_folder_without_weights_says_how_to_make_them(tmp_path, capsys):
  assert score.main([str(tmp_path), "--tests", "synthetic"]) == 1
  assert "kdseg export MODEL" in capsys.readouterr().err
