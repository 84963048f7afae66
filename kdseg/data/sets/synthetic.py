"""Drawn lesions: data for the quickstart and the tests, with no download.

Skin of several tones under uneven light; a lesion with an irregular border, of
several colours, sharp here and fading there, sometimes barely darker than the
skin; and what gets in the way: freckles, redness, hair, gel bubbles, the dark
corners of a dermatoscope. The mask has an annotator's wobble, so that no
network can be perfect. They never stand in for a result on real lesions.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

import numpy as np

from kdseg.data import archives
from kdseg.data import builder
from kdseg.data import decode
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair

SPLITS = ("train", "validation", "test")

# Linear in between; from pale to dark, 8-bit sRGB.
_SKIN_TONES = np.array(
  [[238, 208, 190], [224, 177, 150], [198, 144, 112], [150, 102, 76]],
  np.float32,
)
_PIGMENTS = np.array(
  [[58, 36, 30], [92, 54, 40], [122, 74, 54], [88, 78, 90], [160, 78, 72]],
  np.float32,
)


class Synthetic(builder.PairBuilder):
  """Drawn skin lesions with masks, for tests and the quickstart."""

  name = "synthetic"
  title = "drawn lesions"
  test_name = "synthetic_test"
  terms_of_use = "made by this package"

  def __init__(
    self,
    *,
    train: int = 256,
    validation: int = 32,
    test: int = 64,
    image_size: int = 128,
    seed: int = 0,
    **kwargs: Any,
  ):
    """Makes the builder.

    Args:
      train: images to draw for training.
      validation: images to draw for validation.
      test: images to draw for testing.
      image_size: side of the images in pixels, at least 16.
      seed: image i of a split depends on the seed, the split, i and the size
        of the images.
      **kwargs: see `PairBuilder`.
    """
    counts = {"train": train, "validation": validation, "test": test}
    for split, count in counts.items():
      if count < 1:
        raise ValueError(f"synthetic: {split} is {count}; draw at least one.")
    if image_size < 16:
      raise ValueError(
        f"synthetic: image_size is {image_size}; draw at least 16 pixels."
      )
    self._counts = counts
    self._image_size = image_size
    self._seed = seed
    super().__init__(**kwargs)

  def options(self) -> dict[str, str]:
    """See base class."""
    counts = "_".join(str(count) for count in self._counts.values())
    return {
      "n": counts,
      "size": str(self._image_size),
      "seed": str(self._seed),
      **super().options(),
    }

  def inventory(
    self,
    manual_dir: pathlib.Path | None = None,
    download: builder.Download | None = None,
  ) -> Inventory:
    """See base class; draws nothing before a file is read."""
    del manual_dir, download

    # An image and its mask are read one after the other: draw them once.
    @functools.lru_cache(maxsize=1)
    def drawing(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
      sequence = np.random.SeedSequence(
        [self._seed, SPLITS.index(split), index]
      )
      rng = np.random.Generator(np.random.PCG64(sequence))
      return draw(rng, self._image_size)

    return Inventory(
      splits={
        split: tuple(_pair(split, index, drawing) for index in range(count))
        for split, count in self._counts.items()
      },
      stamp=f"drawn-{self.VERSION}",
    )


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws one lesion.

  Args:
    rng: decides everything.
    size: side of the picture in pixels.

  Returns:
    The picture, uint8 [size, size, 3], and its mask, bool [size, size]; never
    empty.
  """
  axis = (np.arange(size, dtype=np.float32) + 0.5) / size
  y, x = np.meshgrid(axis, axis, indexing="ij")

  tone = rng.uniform(0, len(_SKIN_TONES) - 1.001)
  low = int(tone)
  skin = _SKIN_TONES[low] + (tone - low) * (
    _SKIN_TONES[low + 1] - _SKIN_TONES[low]
  )
  picture = skin * (1 + 0.07 * _clouds(rng, size, 4)[..., None])
  picture *= 1 + 0.03 * _clouds(rng, size, size // 4)[..., None]
  for _ in range(rng.integers(0, 3)):
    picture = _redden(rng, picture, x, y)
  for _ in range(rng.integers(0, 5)):
    picture = _freckle(rng, picture, skin, x, y)

  outside, radius = _distance(rng, x, y)
  wobble = 0.035 * radius * _clouds(rng, size, 7)
  mask = outside + wobble < 0
  picture = _pigment(rng, picture, skin, outside, radius, size)

  if rng.random() < 0.55:
    picture = _add_hair(rng, picture, int(rng.integers(2, 22)))
  if rng.random() < 0.3:
    picture = _add_bubbles(rng, picture, x, y)
  if rng.random() < 0.4:
    picture = _darken_corners(rng, picture, x, y)
  # Light from one side, then the sensor.
  slope = rng.normal(0, 0.06, 2).tolist()
  picture = picture * (1 + slope[0] * (x - 0.5) + slope[1] * (y - 0.5))[
    ..., None
  ].astype(np.float32)
  noise = rng.standard_normal(picture.shape, np.float32)
  picture = picture + rng.uniform(1.5, 5) * noise
  return np.clip(picture, 0, 255).astype(np.uint8), mask


def _clouds(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
  """Smooth noise of about unit deviation, float32 [size, size]."""
  cells = max(2, min(cells, size))
  grid = rng.normal(0, 1, (cells + 1, cells + 1)).astype(np.float32)
  at = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
  low = at.astype(int)
  share = at - low
  share = share * share * (3 - 2 * share)
  rows = grid[low] * (1 - share)[:, None] + grid[low + 1] * share[:, None]
  noise = rows[:, low] * (1 - share) + rows[:, low + 1] * share
  return noise * np.float32(1.35)


def _distance(
  rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, float]:
  """Distance from an irregular closed border, negative inside, and its radius.

  A star-shaped outline: an ellipse whose radius is a Fourier series of the
  angle. In units of the picture's side, exact only near a smooth border.
  """
  radius = float(np.exp(rng.uniform(np.log(0.1), np.log(0.36))))
  center = rng.uniform(0.34, 0.66, 2).tolist()
  turn = rng.uniform(0, np.pi)
  stretch = rng.uniform(1.0, 1.45)
  dx, dy = x - center[0], y - center[1]
  along = (np.cos(turn) * dx + np.sin(turn) * dy) / stretch
  across = (np.cos(turn) * dy - np.sin(turn) * dx) * stretch
  distance = np.hypot(along, across)
  # Powers of a unit complex number are the harmonics of the angle.
  unit = (along + 1j * across) / np.maximum(distance, 1e-6)
  harmonic = unit
  irregularity = rng.uniform(0.02, 0.13)
  border = np.ones_like(distance)
  for order in range(2, 9):
    harmonic = harmonic * unit
    amplitude = rng.normal(0, irregularity / order**0.6)
    phase = rng.uniform(0, 2 * np.pi)
    border += amplitude * (
      np.cos(phase) * harmonic.real + np.sin(phase) * harmonic.imag
    )
  outside = distance - radius * np.clip(border, 0.45, 1.7)
  return outside, radius


def _pigment(
  rng: np.random.Generator,
  picture: np.ndarray,
  skin: np.ndarray,
  outside: np.ndarray,
  radius: float,
  size: int,
) -> np.ndarray:
  # From a sharp rim to one that fades over a third of the radius.
  rim = radius * float(np.exp(rng.uniform(np.log(0.02), np.log(0.16))))
  softness = np.maximum(rim * np.exp(0.5 * _clouds(rng, size, 3)), 0.4 / size)
  cover = 1 / (1 + np.exp(np.clip(outside / softness, -30, 30)))
  first, second = _PIGMENTS[rng.integers(0, len(_PIGMENTS), 2)]
  blend = 1 / (1 + np.exp(-3 * _clouds(rng, size, 4)))[..., None]
  color = first * blend + second * (1 - blend)
  color = color * (skin / _SKIN_TONES[1]) ** 0.6
  color = color * (1 + 0.16 * _clouds(rng, size, size // 8)[..., None])
  # One lesion in five is hardly darker than the skin around it.
  faint = rng.random() < 0.2
  strength = rng.uniform(0.25, 0.45) if faint else rng.uniform(0.5, 0.95)
  share = strength * np.clip(1 + 0.3 * _clouds(rng, size, 3), 0.35, 1.4)
  alpha = np.clip(cover * share, 0, 1)[..., None]
  return picture * (1 - alpha) + color * alpha


def _redden(
  rng: np.random.Generator, picture: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
  center = rng.uniform(0, 1, 2).tolist()
  width = rng.uniform(0.08, 0.25)
  spot = np.exp(-((x - center[0]) ** 2 + (y - center[1]) ** 2) / width**2)
  tint = np.array([0.0, 0.16, 0.12], np.float32) * rng.uniform(0.3, 1)
  return picture * (1 - spot[..., None] * tint)


def _freckle(
  rng: np.random.Generator,
  picture: np.ndarray,
  skin: np.ndarray,
  x: np.ndarray,
  y: np.ndarray,
) -> np.ndarray:
  center = rng.uniform(0, 1, 2)
  radius = rng.uniform(0.008, 0.035)
  alpha = rng.uniform(0.2, 0.6)
  size = len(picture)
  left, top = np.maximum(0, ((center - 3 * radius) * size).astype(int))
  right, bottom = ((center + 3 * radius) * size).astype(int) + 2
  at = (slice(top, bottom), slice(left, right))
  distance = np.hypot(x[at] - center[0], y[at] - center[1]) - radius
  cover = alpha / (1 + np.exp(np.clip(distance / (0.3 * radius), -30, 30)))
  picture[at] += (0.55 * skin - picture[at]) * cover[..., None]
  return picture


def _add_hair(
  rng: np.random.Generator, picture: np.ndarray, count: int
) -> np.ndarray:
  """Draws hairs as quadratic Bezier curves of about a pixel's width."""
  size = picture.shape[0]
  along = np.linspace(0, 1, 3 * size // 2)[:, None]
  start = rng.uniform(-0.1, 1.1, (count, 1, 2))
  angle = rng.normal(rng.uniform(0, np.pi), 0.5, (count, 1))
  length = rng.uniform(0.25, 0.9, (count, 1))
  heading = np.stack([np.cos(angle), np.sin(angle)], -1)
  end = start + length[..., None] * heading
  bend = (start + end) / 2 + rng.normal(0, 0.08, (count, 1, 2))
  curve = (
    (1 - along) ** 2 * start + 2 * along * (1 - along) * bend + along**2 * end
  )
  cells = np.floor(curve * size).astype(int)
  width = np.maximum(0.45, rng.uniform(0.35, 0.8, (count, 1)) * size / 128)
  darkness = rng.uniform(0.45, 0.9, (count, 1))
  shade = np.zeros((size, size), np.float32)
  reach = int(np.ceil(1.5 * width.max()))
  for dy in range(-reach, reach + 1):
    for dx in range(-reach, reach + 1):
      at = cells + np.array([dx, dy])
      gap = np.linalg.norm(at + 0.5 - curve * size, axis=-1)
      alpha = darkness * np.exp(-((gap / width) ** 2))
      inside = ((at >= 0) & (at < size)).all(-1)
      np.maximum.at(shade, (at[inside][:, 1], at[inside][:, 0]), alpha[inside])
  color = np.array([48, 36, 30], np.float32) * rng.uniform(0.5, 1.8)
  return picture * (1 - shade[..., None]) + color * shade[..., None]


def _add_bubbles(
  rng: np.random.Generator, picture: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
  """Draws gel bubbles: a bright rim, a lighter inside, a spark."""
  for _ in range(rng.integers(1, 7)):
    center = rng.uniform(0, 1, 2).tolist()
    radius = rng.uniform(0.012, 0.06)
    gap = np.hypot(x - center[0], y - center[1])
    rim = np.exp(-(((gap - radius) / (0.18 * radius + 0.002)) ** 2))
    spark = np.exp(
      -(
        (x - center[0] + 0.4 * radius) ** 2
        + (y - center[1] + 0.4 * radius) ** 2
      )
      / (0.3 * radius) ** 2
    )
    light = np.clip(0.35 * rim + 0.12 * (gap < radius) + 0.8 * spark, 0, 1)
    picture = picture + (250 - picture) * light[..., None]
  return picture


def _darken_corners(
  rng: np.random.Generator, picture: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
  gap = np.hypot(x - 0.5, y - 0.5)
  edge = rng.uniform(0.5, 0.66)
  softness = rng.uniform(0.008, 0.08)
  light = 1 / (1 + np.exp(np.clip((gap - edge) / softness, -30, 30)))
  floor = rng.uniform(0.04, 0.5)
  return picture * (floor + (1 - floor) * light)[..., None]


def _pair(
  split: str,
  index: int,
  drawing: Callable[[str, int], tuple[np.ndarray, np.ndarray]],
) -> Pair:
  """Returns the files of one drawing, drawn when read."""
  id_ = f"{split}_{index:05d}"

  def file(ending: str, read: Callable[[], np.ndarray]) -> archives.File:
    name = f"{id_}{ending}.png"
    return archives.File(
      name, "synthetic", f"drawn {name}", 0, lambda: decode.encode_png(read())
    )

  return Pair(
    id_,
    file("", lambda: drawing(split, index)[0]),
    file("_mask", lambda: drawing(split, index)[1].astype(np.uint8) * 255),
  )
