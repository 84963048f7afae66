"""Runs on the real archives: KDSEG_DATA names a folder with them."""

import os

import pytest

from kdseg.data import loading
from kdseg.data import pairs
from kdseg.data import verify
from kdseg.data.sets import ph2

DIRECTORY = os.environ.get("KDSEG_DATA", "")

pytestmark = pytest.mark.skipif(
  not DIRECTORY, reason="set KDSEG_DATA to a folder with the real archives"
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("prepared")


def _load(name, split, data_dir):
  return loading.load(
    name, split, size=64, data_dir=data_dir, manual_dir=DIRECTORY
  )


def test_isic2016_has_its_splits_and_counts(data_dir):
  train, validation, test = (
    _load("isic2016", split, data_dir)
    for split in ("train", "validation", "test")
  )
  assert len(test) == test.found_count == test.official_count == 379
  assert train.official_count == 900
  kept = len(train) + len(validation)
  assert kept + len(train.excluded) == train.found_count <= 900
  assert 0.06 < len(validation) / kept < 0.14
  assert all(pairs.is_validation(id_) for id_ in validation.ids)
  splits = [set(arrays.ids) for arrays in (train, validation, test)]
  assert len(set.union(*splits)) == sum(map(len, splits))
  assert not {"ISIC_0001184", "ISIC_0001385"} & set.union(*splits)
  for arrays in (train, validation, test):
    assert 0.15 < arrays.mask.mean() < 0.45


def test_ph2_has_its_200_images_in_their_own_aspect(data_dir):
  arrays = _load("ph2", "test", data_dir)
  assert arrays.ids == ph2.IDS
  for index in range(len(arrays)):
    height, width = arrays.native_size(index)
    # 575/767 in the official release, give or take some pixels.
    assert 1.25 < width / height < 1.45


@pytest.mark.parametrize("name", ["isic2016", "ph2"])
def test_nothing_is_wrong_with_them_and_no_two_are_alike(name):
  report = verify.verify(name, manual_dir=DIRECTORY)
  assert report.ok, report.problems
  assert report.alike == ()
  assert report.empty == ()
