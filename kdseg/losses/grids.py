"""Brings features and labels to the grid on which they are compared."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def resize_features(feat: Array, height: int, width: int) -> Array:
  """Resizes `feat` [B, h, w, C] to [B, height, width, C], bilinearly.

  Pixel centres at one half, as in the alignment; the same array where the grid
  is that already.

  Raises:
    ValueError: if `feat` has no four axes.
  """
  chex.assert_rank(feat, 4, exception_type=ValueError)
  if feat.shape[1:3] == (height, width):
    return feat
  batch, *_, channels = feat.shape
  shape = (batch, height, width, channels)
  return jax.image.resize(
    feat.astype(jnp.float32), shape, "bilinear", antialias=False
  )


def nearest_labels(labels: Array, height: int, width: int) -> Array:
  """Reads `labels` [B, H, W] at the centre of each cell of a grid.

  Unlike `boundary.to_grid` this keeps the share of the lesion. Where a centre
  lies between two pixels it is the later one.

  Returns:
    [B, height, width] float32, without gradient.

  Raises:
    ValueError: if `labels` has no three axes.
  """
  chex.assert_rank(labels, 3, exception_type=ValueError)
  labels = jax.lax.stop_gradient(labels).astype(jnp.float32)
  for axis, cells in ((1, height), (2, width)):
    centre = (2 * np.arange(cells) + 1) * labels.shape[axis] // (2 * cells)
    labels = jnp.take(labels, centre, axis)
  return labels


def labels_at(labels: Array, feat: Array) -> Array:
  """Reads `labels` [B, H, W] at the cells of `feat` [B, h, w, C]; [B, h, w].

  Raises:
    ValueError: if `labels` has no three axes, or another batch.
  """
  chex.assert_rank(labels, 3, exception_type=ValueError)
  chex.assert_equal_shape_prefix([labels, feat], 1, exception_type=ValueError)
  return nearest_labels(labels, *feat.shape[1:3])


def pool(feat: Array, size: int, kind: str) -> Array:
  """Pools blocks of `size` x `size` cells; cut blocks hold what they have.

  Args:
    feat: [B, h, w, C].
    size: cells, at least 1.
    kind: "max" or "mean".

  Returns:
    [B, ceil(h / size), ceil(w / size), C].

  Raises:
    ValueError: if `size` is below 1 or `kind` is unknown.
  """
  if size < 1:
    raise ValueError(f"size must be at least 1: {size}")
  if kind not in ("max", "mean"):
    raise ValueError(f'kind must be "max" or "mean": {kind!r}')
  after = [(0, -side % size) for side in feat.shape[1:3]]
  padding = ((0, 0), *after, (0, 0))
  block = (1, size, size, 1)
  if kind == "max":
    # Not reduce_window, whose gradient is slow on a CPU.
    feat = jnp.pad(feat, padding, constant_values=-jnp.inf)
    batch, height, width, channels = feat.shape
    blocks = (batch, height // size, size, width // size, size, channels)
    return jnp.max(feat.reshape(blocks), (2, 4))
  total, count = (
    jax.lax.reduce_window(x, 0.0, jax.lax.add, block, block, padding)
    for x in (feat, jnp.ones_like(feat[:1, ..., :1]))
  )
  return total / count
