"""Which cells of a feature map are hidden, and how the rest is compared.

The parts that the losses on aligned features share: `Hiding` draws the mask,
`Comparison` turns restored features and the teacher's into one number an image.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from kdseg.losses import reduce
from kdseg.runtime import rng as rng_lib

Array = jax.Array

LOSS_REGIONS = ("all", "band", "band_weighted")
NORMALISATIONS = ("none", "std", "l2")


class Hiding(NamedTuple):
  """How many cells are hidden, and in which pieces.

  Attributes:
    ratio: probability in [0, 1] that a cell of the region is hidden.
    outside: the same for the other cells.
    block: side, in cells, of the square blocks that share one draw. A hidden
      single cell is easily interpolated from its neighbours, a block is not.
  """

  ratio: float = 0.75
  outside: float = 0.0
  block: int = 1


class Comparison(NamedTuple):
  """How restored features are compared with the teacher's.

  Attributes:
    where: where errors count; "all", the whole map; "band", the region only (0
      for an image without one); "band_weighted", the whole map as a weighted
      mean, with weight `1 + band_weight` in the region.
    band_weight: for "band_weighted" only.
    normalise: "none"; "std", the teacher divided by `teacher_std`; "l2", each
      cell of both divided by its norm over the channels.
    teacher_std: [C], standard deviation of the teacher's features over the
      training set; for "std" only.
  """

  where: str = "all"
  band_weight: float = 1.0
  normalise: str = "none"
  teacher_std: Array | None = None


def check_features(student_feat: Array, teacher_feat: Array) -> None:
  """Raises ValueError unless both are [B, h, w, C]."""
  chex.assert_rank(student_feat, 4, exception_type=ValueError)
  chex.assert_equal_shape(
    [student_feat, teacher_feat], exception_type=ValueError
  )


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises ValueError unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(f"{what} must be one of {', '.join(choices)}: {value!r}")


def keep_mask(rng: Array, region: Array, hiding: Hiding) -> Array:
  """Draws which cells stay visible.

  Each cell is hidden or kept with all its channels, as MGD does for dense
  tasks; kept cells are not scaled up.

  Args:
    rng: one key, or one an image.
    region: [B, h, w]; a cell above 0 belongs to the region.
    hiding: how much of it is hidden.

  Returns:
    [B, h, w] bool, true where a cell is kept.

  Raises:
    ValueError: if `region` has no three axes, a ratio lies outside [0, 1], or
      `hiding.block` is below 1.
  """
  chex.assert_rank(region, 3, exception_type=ValueError)
  ratio, outside, block = hiding
  for name, value in (("ratio", ratio), ("outside", outside)):
    if not 0.0 <= value <= 1.0:
      raise ValueError(f"{name} must be in [0, 1]: {value}")
  if block < 1:
    raise ValueError(f"block must be at least 1: {block}")
  batch, height, width = region.shape
  blocks = (-(-height // block), -(-width // block))
  uniform = jax.vmap(lambda key: jax.random.uniform(key, blocks))(
    rng_lib.per_image(rng, batch)
  )
  uniform = jnp.repeat(jnp.repeat(uniform, block, 1), block, 2)
  return uniform[:, :height, :width] >= jnp.where(region > 0, ratio, outside)


def hide(feat: Array, keep: Array) -> Array:
  """Sets the cells of `feat` [B, h, w, C] to 0 where `keep` [B, h, w] is false.

  Unlike a product with the mask, this stops NaN in hidden cells.
  """
  return jnp.where(keep[..., None], feat, jnp.zeros((), feat.dtype))


def squared_error(
  restored: Array, teacher_feat: Array, region: Array, comparison: Comparison
) -> Array:
  """Compares restored features with the teacher's.

  Args:
    restored: [B, h, w, C].
    teacher_feat: [B, h, w, C]; receives no gradient.
    region: [B, h, w]; above 0 is inside.
    comparison: how.

  Returns:
    [B] float32, squared error averaged over cells and channels.

  Raises:
    ValueError: if a shape does not fit or an option is unknown.
  """
  where, band_weight, normalise, teacher_std = comparison
  check_choice("where", where, LOSS_REGIONS)
  check_choice("normalise", normalise, NORMALISATIONS)
  chex.assert_equal_shape([restored, teacher_feat], exception_type=ValueError)
  target = jax.lax.stop_gradient(teacher_feat).astype(jnp.float32)
  restored = restored.astype(jnp.float32)
  if normalise == "std":
    if teacher_std is None:
      raise ValueError('normalise="std" needs teacher_std, one a channel')
    chex.assert_shape(teacher_std, target.shape[-1:], exception_type=ValueError)
    target = target / jax.lax.stop_gradient(teacher_std).astype(jnp.float32)
  elif normalise == "l2":
    target, restored = reduce.unit(target), reduce.unit(restored)
  error = jnp.square(restored - target)
  if where == "all":
    return reduce.mean_per_image(error)
  inside = (region > 0).astype(jnp.float32)[..., None]
  if where == "band":
    return reduce.weighted_mean_per_image(error, inside)
  return reduce.weighted_mean_per_image(error, 1.0 + band_weight * inside)
