"""Means over an image and norms over channels, guarded once."""

import jax
import jax.numpy as jnp

Array = jax.Array


def mean_per_image(values: Array) -> Array:
  """Averages `values` [B, ...] over all but the first axis; [B] float32."""
  # XLA's CPU backend would compute the values inside of the sum, one by one:
  # exponentials take twice as long there.
  values = jax.lax.optimization_barrier(values.astype(jnp.float32))
  return jnp.mean(values, tuple(range(1, values.ndim)))


def weighted_mean_per_image(values: Array, weights: Array) -> Array:
  """Averages `values` [B, ...] under `weights`, image by image.

  Args:
    values: [B, ...].
    weights: [B, ...], of a shape that broadcasts to that of `values`; not
      negative.

  Returns:
    [B] float32; 0, with gradient 0, for an image whose weights are all 0.

  Raises:
    ValueError: if `weights` does not broadcast to the shape of `values`.
  """
  values = values.astype(jnp.float32)
  weights = jnp.broadcast_to(weights.astype(jnp.float32), values.shape)
  axes = tuple(range(1, values.ndim))
  total = jnp.sum(weights, axes)
  return jnp.sum(values * weights, axes) / jnp.where(total > 0, total, 1.0)


def unit(x: Array) -> Array:
  """Divides each vector along the last axis by its norm.

  Args:
    x: [..., C].

  Returns:
    [..., C] float32. A vector shorter than 1e-6 stays as it is, so that one of
    zeros has a gradient that is finite.
  """
  return x.astype(jnp.float32) * inverse_norm(x)[..., None]


def inverse_norm(x: Array) -> Array:
  """Returns one over the norm along the last axis, [..., C] to [...].

  Float32; 1 for a vector shorter than 1e-6.
  """
  square = jnp.sum(jnp.square(x.astype(jnp.float32)), -1)
  return jax.lax.rsqrt(jnp.where(square > 1e-12, square, 1.0))
