"""Tiny copies of the official archives, in their names and layouts."""

from collections.abc import Collection
from collections.abc import Mapping
import dataclasses
import io
import pathlib
import zipfile

import numpy as np
from PIL import Image

from kdseg.data.sets import isic2016

HEIGHT, WIDTH = 8, 12
TRAIN_IDS = (*(f"ISIC_{n:07d}" for n in range(90001, 90031)), "ISIC_0001184")

Files = dict[str, bytes]


def encode(array: np.ndarray, kind: str) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, format=kind)
  return buffer.getvalue()


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def lesion(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
  """A rectangle whose left edge tells the seed, bool."""
  mask = np.zeros((height, width), bool)
  mask[2:6, 1 + seed % 4 : 9] = True
  return mask


def mask_bytes(mask: np.ndarray, kind: str = "PNG") -> bytes:
  return encode(mask.astype(np.uint8) * 255, kind)


def write_zip(path: pathlib.Path, files: Mapping[str, bytes]) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in files.items():
      # Not by name, which would put the time of day into the checksum.
      archive.writestr(zipfile.ZipInfo(name), content)
  return path


def write_folder(
  path: pathlib.Path, files: Mapping[str, bytes]
) -> pathlib.Path:
  for name, content in files.items():
    target = path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
  return path


@dataclasses.dataclass
class IsicParts:
  """The files of the four archives, to be changed before they are written."""

  files: dict[str, Files]

  def write(
    self,
    directory: pathlib.Path,
    *,
    unpacked: Collection[str] = (),
    without: Collection[str] = (),
  ) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    for part, stem in isic2016.ARCHIVES.items():
      if part in without:
        continue
      if part in unpacked:
        write_folder(directory, self.files[part])
      else:
        write_zip(directory / f"{stem}.zip", self.files[part])
    return directory

  def path(self, part: str, id_: str) -> str:
    ending = "_Segmentation.png" if part.endswith("mask") else ".jpg"
    return f"{isic2016.ARCHIVES[part]}/{id_}{ending}"
