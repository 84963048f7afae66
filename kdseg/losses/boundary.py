"""Where the lesion's edge is, in pixels and on a feature map's grid.

Nothing here carries a gradient: a region is chosen, not trained.
"""

from collections.abc import Callable
from collections.abc import Mapping
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.runtime import rng as rng_lib

Array = jax.Array

# A roll by whole cells of the coarsest tap (stride 16) leaves the number of
# cells that a band meets as it was, on every tap.
_ROLL_STEP = 16


def radius_at(side: int, radius_at_256: float = 5.0) -> int:
  """Scales a radius given in pixels of a 256-pixel image to one of `side`.

  Returns:
    Pixels, halves rounded up, at least 1.
  """
  return max(1, math.floor(radius_at_256 * side / 256 + 0.5))


def _maximum_along(x: Array, axis: int, radius: int) -> Array:
  """Maximum of `x` within `radius` along one axis, by doubling windows.

  Three times as fast on a CPU as `reduce_window`, if each window is in memory
  before the next one reads it: hence the barrier.
  """
  frame = [(0, 0)] * x.ndim
  frame[axis] = (radius, radius)
  x = jnp.pad(x, frame, constant_values=-jnp.inf)
  width, wanted = 1, 2 * radius + 1
  while width < wanted:
    further = min(width, wanted - width)
    first = jax.lax.slice_in_dim(x, 0, x.shape[axis] - further, axis=axis)
    second = jax.lax.slice_in_dim(x, further, None, axis=axis)
    x = jax.lax.optimization_barrier(jnp.maximum(first, second))
    width += further
  return x


def boundary_band(labels: Array, *, radius: int) -> Array:
  """Marks the pixels within `radius` of the lesion's edge, on both sides.

  The morphological gradient: maximum minus minimum over a square window of side
  `2 * radius + 1`. Beyond the frame there is nothing, neither lesion nor skin,
  so a lesion that the frame cuts has no edge along the frame.

  Args:
    labels: [B, H, W], 0 or 1.
    radius: pixels, not negative; 0 gives an empty band.

  Returns:
    [B, H, W] float32, 0 or 1.

  Raises:
    ValueError: if `labels` has no three axes, or `radius` is negative.
  """
  chex.assert_rank(labels, 3, exception_type=ValueError)
  if radius < 0:
    raise ValueError(f"radius must not be negative: {radius}")
  labels = jax.lax.stop_gradient(labels).astype(jnp.float32)

  def maximum(x: Array) -> Array:
    return _maximum_along(_maximum_along(x, 1, radius), 2, radius)

  return maximum(labels) + maximum(-labels)


def to_grid(mask: Array, height: int, width: int) -> Array:
  """Marks the cells of a coarser grid that hold any marked pixel.

  Not the share of marked pixels, thresholded: at stride 16 that loses nearly
  every cell of a thin band, at stride 32 all of them.

  Args:
    mask: [B, H, W], not negative.
    height: rows of the grid. If it does not divide H, a pixel counts in each
      cell that it touches; so too for a grid finer than the mask.
    width: columns of the grid.

  Returns:
    [B, height, width] float32, the greatest pixel of each cell.

  Raises:
    ValueError: if `mask` has no three axes.
  """
  chex.assert_rank(mask, 3, exception_type=ValueError)
  mask = jax.lax.stop_gradient(mask).astype(jnp.float32)
  for axis, cells in ((1, height), (2, width)):
    pixels = mask.shape[axis]
    if pixels == cells:
      continue
    cell = np.arange(cells)
    first = cell * pixels // cells
    after_last = -(-(cell + 1) * pixels // cells)
    reach = np.arange(np.max(after_last - first))
    index = np.minimum(first[:, None] + reach, after_last[:, None] - 1)
    mask = jnp.max(jnp.take(mask, index, axis), axis + 1)
  return mask


def _roll_elsewhere(band: Array, rng: Array) -> Array:
  """Rolls each image by at least a quarter of its sides, both ways."""
  batch, *sides = band.shape

  def offset(key: Array, side: int) -> Array:
    step = math.gcd(_ROLL_STEP, side // 4) if side % 4 == 0 else 1
    first, last = -(-side // (4 * step)), 3 * side // (4 * step)
    return step * jax.random.randint(key, (), first, last + 1)

  def roll(image: Array, key: Array) -> Array:
    down, right = jax.random.split(key)
    shift = jnp.stack([offset(down, sides[0]), offset(right, sides[1])])
    return jnp.roll(image, shift, (0, 1))

  return jax.vmap(roll)(band, rng_lib.per_image(rng, batch))


class _Scene(NamedTuple):
  """What a region may depend on; see `region`."""

  name: str
  labels: Array
  radius: int
  teacher_logits: Array | None
  student_logits: Array | None
  rng: Array | None

  def band(self, mask: Array | None = None) -> Array:
    """The band of a mask, of the labels unless one is given."""
    mask = self.labels if mask is None else mask
    return boundary_band(mask, radius=self.radius)

  def logits(self, whose: str) -> Array:
    """The logits of "teacher" or "student"."""
    argument = f"{whose}_logits"
    logits: Array | None = getattr(self, argument)
    if logits is None:
      raise ValueError(f"region {self.name!r} needs {argument}")
    chex.assert_equal_shape([logits, self.labels], exception_type=ValueError)
    return jax.lax.stop_gradient(logits).astype(jnp.float32)

  def mask(self, whose: str) -> Array:
    """The lesion that "teacher" or "student" sees."""
    return self.logits(whose) > 0

  def rolled_band(self) -> Array:
    """The band of the labels, elsewhere."""
    if self.rng is None:
      raise ValueError(f"region {self.name!r} needs rng")
    return _roll_elsewhere(self.band(), self.rng)


_REGIONS: Mapping[str, Callable[[_Scene], Array]] = {
  "gt_band": _Scene.band,
  "teacher_band": lambda s: s.band(s.mask("teacher")),
  # The log-odds of .9, and of .1 with the sign changed.
  "teacher_uncertain": lambda s: jnp.abs(s.logits("teacher")) < math.log(9.0),
  "union": lambda s: jnp.maximum(s.band(), s.band(s.mask("teacher"))),
  "disagreement": lambda s: s.mask("teacher") != s.mask("student"),
  "all": lambda s: jnp.ones_like(s.labels),
  "none": lambda s: jnp.zeros_like(s.labels),
  "rolled_band": _Scene.rolled_band,
  "interior": lambda s: s.labels * (1.0 - s.band()),
  "exterior": lambda s: (1.0 - s.labels) * (1.0 - s.band()),
  "inv_band": lambda s: 1.0 - s.band(),
}
REGIONS = tuple(_REGIONS)


def region(
  name: str,
  labels: Array,
  *,
  radius: int,
  teacher_logits: Array | None = None,
  student_logits: Array | None = None,
  rng: Array | None = None,
) -> Array:
  """Marks the pixels where features are to be hidden.

  Args:
    name: "gt_band", within `radius` of the edge of `labels`; "teacher_band",
      the same of the teacher's mask (logit above 0), so as wide as "gt_band",
      but placed with no label; "teacher_uncertain", where the teacher's
      probability is in (.1, .9); "union", of "gt_band" and "teacher_band";
      "disagreement", where the teacher's and the student's masks differ; "all"
      and "none", every pixel and no pixel; "rolled_band", "gt_band" moved round
      the frame by a random offset of at least a quarter of each side: same
      area, same shape, wrong place, a control, which may still cross the edge
      of a large lesion; "interior" and "exterior", the lesion and the skin
      without "gt_band"; "inv_band", both of these.
    labels: [B, H, W], 0 or 1.
    radius: pixels.
    teacher_logits: [B, H, W]; for those with the teacher in them.
    student_logits: [B, H, W]; for "disagreement".
    rng: one key, or one an image; for "rolled_band".

  Returns:
    [B, H, W] float32, 0 or 1.

  Raises:
    ValueError: if `name` is unknown, an argument that it needs is missing, or
      a shape does not fit.
  """
  chex.assert_rank(labels, 3, exception_type=ValueError)
  if name not in _REGIONS:
    raise ValueError(f"region must be one of {', '.join(REGIONS)}: {name!r}")
  labels = jax.lax.stop_gradient(labels).astype(jnp.float32)
  scene = _Scene(name, labels, radius, teacher_logits, student_logits, rng)
  return _REGIONS[name](scene).astype(jnp.float32)
