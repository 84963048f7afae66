"""Random draws that belong to an image, not to its place in a batch."""

import jax
import jax.numpy as jnp

Array = jax.Array


def _check(rng: Array) -> None:
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise ValueError(
      f"rng must be a typed key, as jax.random.key(seed) makes: got {rng.dtype}"
    )


def fold_in(rng: Array, data: int) -> Array:
  """Folds `data` into one key [], or into each of one key an image [B]."""
  _check(rng)
  if rng.ndim == 0:
    return jax.random.fold_in(rng, data)
  return jax.vmap(lambda key: jax.random.fold_in(key, data))(rng)


def per_image(rng: Array, batch: int) -> Array:
  """Returns one key an image.

  Args:
    rng: one key [], into which each image's index is folded; or one key an
      image [B], used as given, which makes an image's draw independent of how a
      batch is split over devices.
    batch: B.

  Returns:
    [B] keys.

  Raises:
    ValueError: if `rng` is no typed key, or has another shape.
  """
  _check(rng)
  if rng.ndim == 0:
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(batch))
  if rng.shape != (batch,):
    raise ValueError(
      f"rng must be one key, or one for each of {batch} images: {rng.shape}"
    )
  return rng
