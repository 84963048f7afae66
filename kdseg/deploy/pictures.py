"""Reads what people call an image, as a person sees it."""

from collections.abc import Iterable
import glob
import pathlib

import numpy as np
from PIL import Image
from PIL import ImageOps

from kdseg.data import archives
from kdseg.data import pairs

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"})


def find(names: Iterable[str]) -> list[pathlib.Path]:
  """Returns the files that names mean: files, folders, and patterns.

  A folder gives its images, sorted, and not those of folders in it. A name
  that means nothing comes back as it is, so that whoever reads it says so.
  """
  found: dict[pathlib.Path, None] = {}
  for name in names:
    path = pathlib.Path(name)
    if path.is_dir():
      inside = [
        p
        for p in sorted(path.iterdir())
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
      ]
      found |= dict.fromkeys(inside or [path])
    elif path.exists():
      found[path] = None
    else:
      matches = sorted(glob.glob(name, recursive=True))
      found |= dict.fromkeys([pathlib.Path(m) for m in matches] or [path])
  return list(found)


def read(path: pathlib.Path) -> np.ndarray:
  """Reads an image as uint8 RGB [h, w, 3].

  Turned as its EXIF orientation says; grey, palette, CMYK and 16-bit pictures
  become 8-bit RGB; transparency is dropped, as in training.

  Raises:
    DataError: if it is no image, cut off, too large, or of an unknown kind.
  """
  if path.is_dir():
    raise archives.DataError(f"{path} is a folder without images")
  try:
    content = path.read_bytes()
  except OSError as error:
    raise archives.DataError(f"{path} cannot be read: {error}") from error
  image = ImageOps.exif_transpose(pairs.open_image(content, str(path)))
  if image.mode == "1":
    image = image.convert("L")
  if image.mode.startswith("I"):
    return _from_16_bit(image, path)
  if image.mode not in pairs.IMAGE_MODES:
    raise archives.DataError(
      f"{path} has pixels of kind {image.mode!r}; convert it to 8-bit RGB."
    )
  return np.array(image.convert("RGB"))


def _from_16_bit(image: Image.Image, path: pathlib.Path) -> np.ndarray:
  grey = np.asarray(image).astype(np.int64)
  if grey.min() < 0 or grey.max() > 0xFFFF:
    raise archives.DataError(
      f"{path} has pixels from {grey.min()} to {grey.max()}, not 16-bit ones; "
      "convert it to 8-bit RGB."
    )
  # 65535 / 255 = 257, without a remainder.
  grey = np.round(grey / 257).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=2)
