"""What a run refuses or says of its images before it trains on them."""

import logging
import re

import numpy as np
from PIL import Image
import pytest
import tiny_archives as tiny

from kdseg.data.archives import DataError
from kdseg.data.sets import BUILDERS
from kdseg.data.sets import folder
from kdseg.data.sets import synthetic
from kdseg.experiment import splits
from kdseg.experiment.records import DataConfig


class Other(folder.Folder):
  """A second folder, to score on."""

  name = test_name = "other"


def draw(seed):
  return Image.fromarray(synthetic.draw(np.random.default_rng(seed), 64)[0])


def make_own(root, **seeds):
  """Writes drawings of seeds into SPLIT/images, turned by their place."""
  for split, numbers in seeds.items():
    for turn, seed in enumerate(numbers):
      image = draw(seed).rotate(90 * turn)
      for kind, content in (
        ("images", image),
        ("masks", Image.fromarray(tiny.lesion(0, 64, 64))),
      ):
        path = root / split / kind / f"{split}{turn}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content.save(path)
  return root


def load(tmp_path, tests=("folder",), **changes):
  options = {"other": {"directory": str(tmp_path / "other")}}
  return splits.load(
    DataConfig(
      **{
        "name": "folder",
        "tests": tests,
        "size": 32,
        "batch_size": 2,
        "manual_dir": str(tmp_path / "own"),
        "data_dir": str(tmp_path / "data"),
        "options": options,
        "builders": {**BUILDERS, "other": Other},
        **changes,
      }
    )
  )


def test_a_copy_in_training_and_test_is_refused_until_its_id_is_allowed(
  tmp_path,
):
  make_own(tmp_path / "own", train=[0, 1], validation=[2], test=[3, 1])
  with pytest.raises(
    DataError, match=r"train/train1 and folder/test1 .*same picture"
  ) as error:
    load(tmp_path)
  allowed = re.search(r"--config\.data\.allow_alike=(\S+)", str(error.value))[1]
  assert allowed == "test1"
  notes = load(tmp_path, allow_alike=allowed).notes
  assert notes[0].startswith("allowed to look alike: train/train1 and folder/t")
  with pytest.raises(DataError, match="train/train1 and folder/test1"):
    load(tmp_path, allow_alike="test0,test11")


def test_a_copy_in_the_test_set_of_another_data_set_is_refused(tmp_path):
  make_own(tmp_path / "own", train=[0, 1], validation=[2], test=[3])
  make_own(tmp_path / "other", test=[4, 2])
  load(tmp_path)
  with pytest.raises(DataError, match="validation/validation0 and other/test1"):
    load(tmp_path, tests=("folder", "other"))
  # Two test sets may share a picture.
  make_own(tmp_path / "other", test=[4, 3])
  assert len(load(tmp_path, tests=("folder", "other")).tests["other"]) == 2


@pytest.mark.parametrize("wrong", ["red", 2])
def test_a_value_that_an_option_cannot_have_is_named_with_its_key(
  tmp_path, wrong
):
  make_own(tmp_path / "own", train=[0], validation=[1], test=[2])
  with pytest.raises(DataError, match=r"^data\.options\.folder: .*"):
    load(tmp_path, options={"folder": {"lesion": wrong}})


def test_validation_images_may_be_scored(tmp_path):
  make_own(tmp_path / "own", train=[0, 1], validation=[2], test=[3])
  data = load(tmp_path, tests=("validation",))
  assert data.tests["folder_validation"] is data.validation


@pytest.mark.parametrize("count", [19, 20])
def test_a_small_test_set_is_warned_of_in_the_log_and_the_notes(
  tmp_path, caplog, count
):
  numbers = range(10, 10 + count)
  make_own(tmp_path / "own", train=[0], validation=[1], test=numbers)
  with caplog.at_level(logging.WARNING, "kdseg"):
    notes = load(tmp_path).notes
  said = [r.message for r in caplog.records if "test images" in r.message]
  if count == 19:
    assert notes[0].startswith("folder has only 19 test images")
    assert said == [f"data: {notes[0]}"]
  else:
    assert (*notes, *said) == ()


def test_inverted_masks_are_warned_of_until_the_flag_inverts(tmp_path, caplog):
  own = make_own(
    tmp_path / "own", train=range(4), validation=range(4, 8), test=range(8, 30)
  )
  for path in own.glob("*/masks/*"):
    Image.fromarray(~tiny.lesion(0, 64, 64)).save(path)
  load(tmp_path)
  warnings = [r.message for r in caplog.records if "inverted" in r.message]
  assert len(warnings) == 3
  assert "folder: 4 of 4 masks" in warnings[0]
  option = re.search(r"folder\.lesion=(\w+)", warnings[0])[1]
  caplog.clear()
  turned = load(tmp_path, options={"folder": {"lesion": option}})
  np.testing.assert_array_equal(
    turned.train.native_mask(0), tiny.lesion(0, 64, 64)
  )
  assert not any(r.name == "kdseg" for r in caplog.records)
