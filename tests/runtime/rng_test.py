import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.runtime import rng as rng_lib


def _data(rng):
  return np.asarray(jax.random.key_data(rng))


def test_one_key_becomes_one_for_each_image_whatever_the_batch():
  rng = jax.random.key(3)
  small, large = (
    _data(rng_lib.per_image(rng, 2)),
    _data(rng_lib.per_image(rng, 5)),
  )
  np.testing.assert_array_equal(small, large[:2])
  assert len(np.unique(large, axis=0)) == 5


def test_keys_of_images_are_used_as_they_are():
  rng = jax.random.split(jax.random.key(3), 4)
  np.testing.assert_array_equal(_data(rng_lib.per_image(rng, 4)), _data(rng))


def test_folding_into_keys_of_images_folds_into_each():
  rng = jax.random.split(jax.random.key(3), 4)
  expected = [_data(rng_lib.fold_in(key, 7)) for key in rng]
  np.testing.assert_array_equal(_data(rng_lib.fold_in(rng, 7)), expected)
  np.testing.assert_array_equal(
    _data(rng_lib.fold_in(rng[0], 7)), _data(jax.random.fold_in(rng[0], 7))
  )


def test_another_number_of_keys_or_an_old_key_is_refused():
  rng = jax.random.split(jax.random.key(3), 4)
  with pytest.raises(ValueError, match="each of 3 images"):
    rng_lib.per_image(rng, 3)
  with pytest.raises(ValueError, match="typed key"):
    rng_lib.per_image(jnp.zeros(2, jnp.uint32), 2)
  with pytest.raises(ValueError, match="typed key"):
    rng_lib.fold_in(jnp.zeros(2, jnp.uint32), 2)
