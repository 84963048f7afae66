"""Tiny copies of the official archives as fixtures."""

from collections.abc import Callable
from collections.abc import Collection
import pathlib

import pytest
from tiny_archives import TRAIN_IDS
from tiny_archives import Files
from tiny_archives import IsicParts
from tiny_archives import encode
from tiny_archives import lesion
from tiny_archives import mask_bytes
from tiny_archives import picture
from tiny_archives import write_folder

from kdseg.data.sets import isic2016
from kdseg.data.sets import ph2


@pytest.fixture(scope="session")
def _isic_files() -> dict[str, Files]:
  files: dict[str, Files] = {part: {} for part in isic2016.ARCHIVES}
  for release, ids in (("train", TRAIN_IDS), ("test", isic2016.TEST_IDS)):
    for id_ in ids:
      seed = int(id_[5:])
      image_part, mask_part = f"{release}_image", f"{release}_mask"
      image = f"{isic2016.ARCHIVES[image_part]}/{id_}.jpg"
      mask = f"{isic2016.ARCHIVES[mask_part]}/{id_}_Segmentation.png"
      files[image_part][image] = encode(picture(seed), "JPEG")
      files[mask_part][mask] = mask_bytes(lesion(seed))
  return files


@pytest.fixture
def isic(_isic_files: dict[str, Files]) -> IsicParts:
  return IsicParts({part: dict(files) for part, files in _isic_files.items()})


@pytest.fixture(scope="session")
def _ph2_files() -> Files:
  files = {}
  for id_ in ph2.IDS:
    seed = int(id_[3:])
    root = f"PH2Dataset/PH2 Dataset images/{id_}"
    files[f"{root}/{id_}_Dermoscopic_Image/{id_}.bmp"] = encode(
      picture(seed), "BMP"
    )
    files[f"{root}/{id_}_lesion/{id_}_lesion.bmp"] = encode(lesion(seed), "BMP")
  return files


@pytest.fixture
def ph2_files(_ph2_files: Files) -> Files:
  return dict(_ph2_files)


@pytest.fixture
def make_folder() -> Callable[..., pathlib.Path]:
  def make(directory: pathlib.Path, names: Collection[str]) -> pathlib.Path:
    for seed, name in enumerate(names):
      write_folder(
        directory,
        {
          f"images/{name}.png": encode(picture(seed), "PNG"),
          f"masks/{name}.png": mask_bytes(lesion(seed)),
        },
      )
    return directory

  return make
