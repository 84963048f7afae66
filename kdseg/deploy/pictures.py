"""Reads image files of many kinds, upright and as 8-bit RGB."""

from collections.abc import Iterable
import glob
import os
import pathlib

import numpy as np
from PIL import Image
from PIL import ImageOps

from kdseg.data import archives
from kdseg.data import decode

SUFFIXES = frozenset(
  {".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}
)
# Images that cannot be read: in a folder they are named, not passed over.
OTHERS = frozenset({".avif", ".gif", ".heic", ".heif", ".webp"})


def find(names: Iterable[str]) -> list[pathlib.Path]:
  """Returns the files that names stand for: files, folders, and patterns.

  A folder stands for the images in it, sorted, without those of its folders. A
  name that matches nothing is returned as it is: `read` then names it.
  """
  found: dict[pathlib.Path, None] = {}
  for name in names:
    path = pathlib.Path(name)
    matches = [path]
    # Not `path.exists`, which raises on a name that is too long for a file.
    if not os.path.exists(path):
      # A pattern, as Windows' shell leaves it.
      matches = [pathlib.Path(m) for m in sorted(glob.glob(name))] or [path]
    for match in matches:
      inside = _inside(match) if os.path.isdir(match) else [match]
      found |= dict.fromkeys(inside)
  return list(found)


def _inside(folder: pathlib.Path) -> list[pathlib.Path]:
  try:
    everything = sorted(folder.iterdir())
  except OSError:
    everything = []
  images = [
    path
    for path in everything
    if path.suffix.lower() in SUFFIXES | OTHERS
    and not path.name.startswith(".")
  ]
  return images or [folder]


def read(path: pathlib.Path) -> np.ndarray:
  """Reads an image as uint8 RGB [h, w, 3].

  Turned as its EXIF orientation says; grey, palette, CMYK and 16-bit pictures
  become 8-bit RGB; transparency is dropped, as in training.

  Raises:
    DataError: if it is no image, cut off, too large, or of an unknown kind.
  """
  where = archives.shown(path)
  if os.path.isdir(path):
    raise archives.DataError(
      f"{where} is a folder without images, or one that may not be listed; "
      "name a file, or another folder."
    )
  image = decode.open_image(archives.read_path(path), where)
  try:
    image = ImageOps.exif_transpose(image)
  except Exception as error:
    # Pillow's EXIF readers raise SyntaxError, struct.error and others.
    raise archives.DataError(
      f"{where} has damaged EXIF data ({archives.shown(error)}), so that it is "
      "not known which way up it is; save it again without them."
    ) from error
  if image.mode == "1":
    image = image.convert("L")
  if image.mode.startswith("I"):
    return _from_16_bit(image, where)
  if image.mode not in decode.IMAGE_MODES:
    raise archives.DataError(
      f"{where} has pixels of kind {image.mode!r}; convert it to 8-bit RGB."
    )
  return np.array(image.convert("RGB"))


def _from_16_bit(image: Image.Image, where: str) -> np.ndarray:
  grey = np.asarray(image).astype(np.int64)
  # An image of 32 bits may hold 8-bit values, but does not say so.
  narrow = image.mode == "I" and grey.max() <= 0xFF
  if grey.min() < 0 or grey.max() > 0xFFFF or narrow:
    raise archives.DataError(
      f"{where} has pixels from {grey.min()} to {grey.max()} in a picture of "
      f"kind {image.mode!r}, not 16-bit ones; convert it to 8-bit RGB."
    )
  # 65535 / 255 = 257, without a remainder.
  grey = np.round(grey / 257).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=2)
