"""Finds and reads the image files that a command names."""

from collections.abc import Iterable
import glob
import os
import pathlib

import numpy as np

from kdseg.data import archives
from kdseg.data import decode

# Images that cannot be read: in a folder they are named, not passed over.
OTHERS = (".avif", ".heic", ".heif")


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
    if path.suffix.lower() in (*decode.SUFFIXES, *OTHERS)
    and not path.name.startswith(".")
  ]
  return images or [folder]


def read(path: pathlib.Path) -> np.ndarray:
  """Reads an image as uint8 RGB [h, w, 3], as `decode.decode_image` does.

  Raises:
    DataError: if it is no image, cut off, too large, or of an unknown kind.
  """
  where = archives.shown(path)
  if os.path.isdir(path):
    raise archives.DataError(
      f"{where} is a folder without images, or one that may not be listed; "
      "name a file, or another folder."
    )
  return decode.decode_image(archives.read_path(path), where)
