"""Where the lesion's edge is, in pixels and on a feature map's grid.

Nothing here carries a gradient: a region is chosen, not trained.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.runtime import rng as rng_lib

Array = jax.Array

REGIONS = (
  "gt_band",
  "teacher_band",
  "teacher_uncertain",
  "union",
  "disagreement",
  "all",
  "none",
  "rolled_band",
  "interior",
  "exterior",
  "inv_band",
)

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


def _dilate(x: Array, radius: int, element: str) -> Array:
  """Maximum of `x` [B, H, W] within `radius`; beyond the frame lies -inf."""
  if element == "square":
    return _maximum_along(_maximum_along(x, 1, radius), 2, radius)
  height = x.shape[1]
  frame = ((0, 0), (radius, radius), (0, 0))
  result = jnp.full_like(x, -jnp.inf)
  widened: dict[int, Array] = {}
  for row in range(-radius, radius + 1):
    half_width = math.isqrt(radius * radius - row * row)
    if half_width not in widened:
      widened[half_width] = jnp.pad(
        _maximum_along(x, 2, half_width), frame, constant_values=-jnp.inf
      )
    shifted = widened[half_width][:, radius + row : radius + row + height]
    result = jnp.maximum(result, shifted)
  return result


def boundary_band(
  labels: Array, *, radius: int, element: str = "square"
) -> Array:
  """Marks the pixels within `radius` of the lesion's edge, on both sides.

  The morphological gradient: maximum minus minimum over a window. Beyond the
  frame there is nothing, neither lesion nor skin, so a lesion that the frame
  cuts has no edge along the frame.

  Args:
    labels: [B, H, W], 0 or 1.
    radius: pixels, not negative; 0 gives an empty band.
    element: the window; "square", of side `2 * radius + 1`, or "disc", whose
      band is about pi / 4 as large, and takes several times as long on a CPU.

  Returns:
    [B, H, W] float32, 0 or 1.

  Raises:
    ValueError: if `labels` has no three axes, `radius` is negative, or
      `element` is unknown.
  """
  chex.assert_rank(labels, 3, exception_type=ValueError)
  if radius < 0:
    raise ValueError(f"radius must not be negative: {radius}")
  if element not in ("square", "disc"):
    raise ValueError(f'element must be "square" or "disc": {element!r}')
  labels = jax.lax.stop_gradient(labels).astype(jnp.float32)
  return _dilate(labels, radius, element) + _dilate(-labels, radius, element)


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


def region(
  name: str,
  labels: Array,
  *,
  radius: int,
  teacher_logits: Array | None = None,
  student_logits: Array | None = None,
  rng: Array | None = None,
  element: str = "square",
) -> Array:
  """Marks the pixels where features are to be hidden.

  Args:
    name: one of
      "gt_band", within `radius` of the edge of `labels`;
      "teacher_band", the same of the teacher's mask (logit above 0), so as
        wide as "gt_band", but placed with no label;
      "teacher_uncertain", where the teacher's probability is in (.1, .9);
      "union", of "gt_band" and "teacher_band";
      "disagreement", where the teacher's and the student's masks differ;
      "all" and "none", every pixel and no pixel;
      "rolled_band", "gt_band" moved round the frame by a random offset of at
        least a quarter of each side: same area, same shape, wrong place. A
        control; it may still cross the edge of a large lesion;
      "interior" and "exterior", the lesion and the skin without "gt_band";
      "inv_band", both of these.
    labels: [B, H, W], 0 or 1.
    radius: pixels.
    teacher_logits: [B, H, W]; for those with the teacher in them.
    student_logits: [B, H, W]; for "disagreement".
    rng: one key, or one an image; for "rolled_band".
    element: see `boundary_band`.

  Returns:
    [B, H, W] float32, 0 or 1.

  Raises:
    ValueError: if `name` is unknown, an argument that it needs is missing, or
      a shape does not fit.
  """
  chex.assert_rank(labels, 3, exception_type=ValueError)

  def needed(argument: str, logits: Array | None) -> Array:
    if logits is None:
      raise ValueError(f"region {name!r} needs {argument}")
    chex.assert_equal_shape([logits, labels], exception_type=ValueError)
    return jax.lax.stop_gradient(logits).astype(jnp.float32)

  def band(mask: Array) -> Array:
    return boundary_band(mask, radius=radius, element=element)

  labels = jax.lax.stop_gradient(labels).astype(jnp.float32)
  if name == "gt_band":
    return band(labels)
  if name == "teacher_band":
    return band(needed("teacher_logits", teacher_logits) > 0)
  if name == "teacher_uncertain":
    # The log-odds of .9, and of .1 with the sign changed.
    logits = needed("teacher_logits", teacher_logits)
    return (jnp.abs(logits) < math.log(9.0)).astype(jnp.float32)
  if name == "union":
    teacher = needed("teacher_logits", teacher_logits) > 0
    return jnp.maximum(band(labels), band(teacher))
  if name == "disagreement":
    teacher = needed("teacher_logits", teacher_logits) > 0
    student = needed("student_logits", student_logits) > 0
    return (teacher != student).astype(jnp.float32)
  if name == "all":
    return jnp.ones_like(labels)
  if name == "none":
    return jnp.zeros_like(labels)
  if name == "rolled_band":
    if rng is None:
      raise ValueError(f"region {name!r} needs rng")
    return _roll_elsewhere(band(labels), rng)
  if name == "interior":
    return labels * (1.0 - band(labels))
  if name == "exterior":
    return (1.0 - labels) * (1.0 - band(labels))
  if name == "inv_band":
    return 1.0 - band(labels)
  raise ValueError(f"region must be one of {', '.join(REGIONS)}: {name!r}")
