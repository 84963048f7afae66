"""Finds pictures that are the same, also turned, resized or saved anew.

The same picture in training and test makes scores too good. Another photograph
of the same lesion is not found.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import functools
import shlex

import numpy as np
from PIL import Image
from scipy import fft

from kdseg.data import orientations

# Bits of 255 in which two images may differ and still be called alike. On
# ISIC-2016 and PH2 the closest two of 1330 images differ in 44; an image and
# its copy saved as JPEG of quality 20, or at half the size, in at most 34.
# A copy that was cropped by more than about 2 % is not found.
ALIKE_BITS = 36

_HASH_SIDE = 16
_THUMB_SIDE = 32


@dataclasses.dataclass(frozen=True)
class Alike:
  """Two images that look alike, in one of eight orientations.

  Attributes:
    first: `split/id`.
    second: `split/id`.
    bits: in how many of the 255 bits of their hashes they differ.
  """

  first: str
  second: str
  bits: int

  @property
  def across(self) -> bool:
    """Whether they are in different splits."""
    return self.first.split("/", 1)[0] != self.second.split("/", 1)[0]

  def __str__(self) -> str:
    return f"{self.first} and {self.second} ({self.bits} of 255 bits differ)"


def thumb(image: np.ndarray) -> np.ndarray:
  """Shrinks uint8 [h, w, 3] to grey float32 [32, 32], the frame squashed."""
  grey = Image.fromarray(image).convert("L")
  small = grey.resize((_THUMB_SIDE, _THUMB_SIDE), Image.Resampling.BOX)
  return np.asarray(small, np.float32)


def perceptual_hash(thumbs: np.ndarray) -> np.ndarray:
  """Hashes pictures so that look-alikes differ in few bits.

  The signs of the lowest 255 frequencies of a cosine transform (Zauner,
  "Implementation and benchmarking of perceptual image hash functions", 2010)
  against their median; with 16 x 16 of them instead of 8 x 8, since
  dermoscopic images are all alike in the lowest 63.

  Args:
    thumbs: [n, 32, 32] float.

  Returns:
    [n, 4] uint64; the last bit is always 0.
  """
  waves = fft.dctn(thumbs, axes=(1, 2), norm="ortho")
  low = waves[:, :_HASH_SIDE, :_HASH_SIDE].reshape(len(thumbs), -1)[:, 1:]
  bits = low > np.median(low, axis=1, keepdims=True)
  packed = np.packbits(bits, axis=1)
  return np.ascontiguousarray(packed).view(np.uint64)


def find_alike(
  thumbs: Mapping[str, np.ndarray], rows: int | None = None
) -> tuple[Alike, ...]:
  """Finds pairs of images that look alike, in any of eight orientations.

  Args:
    thumbs: see `thumb`, by `split/id`.
    rows: how many of the first images are held against all that follow them;
      every one if None.

  Returns:
    The pairs, those across splits first, then by likeness.
  """
  if len(thumbs) < 2:
    return ()
  names = list(thumbs)
  stacked = np.stack(list(thumbs.values()))
  turned = [
    perceptual_hash(orientations.orient(stacked, k))
    for k in range(orientations.ORIENTATIONS)
  ]
  found = []
  last = len(names) - 1
  for row in range(last if rows is None else min(rows, last)):
    bits = functools.reduce(
      np.minimum,
      (
        np.bitwise_count(turned[0][row] ^ way[row + 1 :]).sum(-1, dtype=int)
        for way in turned
      ),
    )
    found += [
      Alike(names[row], names[row + 1 + other], int(bits[other]))
      for other in np.flatnonzero(bits <= ALIKE_BITS).tolist()
    ]
  return tuple(sorted(found, key=lambda pair: (not pair.across, pair.bits)))


def is_allowed(pair: Alike, allowed: str) -> bool:
  """Whether one of two images is named in a list of ids, joined by commas."""
  # So found, since an id may have commas itself.
  ids = [name.split("/", 1)[1] for name in (pair.first, pair.second)]
  return any(f",{id_}," in f",{allowed}," for id_ in ids)


def refuse(found: Iterable[Alike], allowed: str) -> list[str]:
  """Says of each two across splits why they are refused, and how to allow them.

  Args:
    found: images that look alike.
    allowed: ids, joined by commas, that are not refused.
  """
  problems = []
  for pair in found:
    if pair.across and not is_allowed(pair, allowed):
      id_ = shlex.quote(pair.second.split("/", 1)[1])
      problems.append(
        f"{pair} look like the same picture in two splits, so that scores would"
        " be too good. Remove one; or, if they differ, allow it by an id: "
        f"--config.data.allow_alike={id_} (`kdseg data verify`: --allow-alike"
        f" {id_}), several joined by commas."
      )
  return problems
