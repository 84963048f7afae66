import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import reduce


def test_each_image_has_its_own_mean():
  values = jnp.asarray([[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]])
  np.testing.assert_array_equal(reduce.mean_per_image(values), [3, 1])


def test_weights_are_broadcast_over_channels_and_divided_by():
  values = jnp.asarray([[[1.0, 3.0], [10.0, 20.0]]])
  # Cell 0 counts once, cell 1 three times: (1 + 3 + 3 * 30) / (2 + 6).
  weights = jnp.asarray([[[1.0], [3.0]]])
  loss = reduce.weighted_mean_per_image(values, weights)
  np.testing.assert_allclose(loss, [94 / 8])


def test_no_weight_gives_zero_with_zero_gradient_beside_an_image_with_weight():
  values = jnp.ones((2, 3))
  weights = jnp.asarray([[0.0] * 3, [1.0] * 3])
  loss = reduce.weighted_mean_per_image(values, weights)
  np.testing.assert_array_equal(loss, [0, 1])
  slope = jax.grad(
    lambda v: jnp.sum(reduce.weighted_mean_per_image(v, weights))
  )(values)
  np.testing.assert_allclose(slope, [[0] * 3, [1 / 3] * 3], rtol=1e-6)


def test_bfloat16_is_summed_in_float32():
  # 1 + 2^-9 is no bfloat16, nor is a sum of 4096 ones beside a small one.
  values = jnp.ones((1, 4097), jnp.bfloat16)
  mean = reduce.mean_per_image(values)
  assert mean.dtype == jnp.float32
  np.testing.assert_array_equal(mean, [1])
  weighted = reduce.weighted_mean_per_image(values, jnp.ones_like(values))
  assert weighted.dtype == jnp.float32
  np.testing.assert_array_equal(weighted, [1])


def test_weights_that_do_not_broadcast_are_refused():
  with pytest.raises(ValueError, match="broadcast"):
    reduce.weighted_mean_per_image(jnp.ones((2, 3)), jnp.ones((2, 4)))


def test_unit_vectors_by_hand():
  x = jnp.asarray([[3.0, 4.0], [0.0, -2.0]])
  np.testing.assert_allclose(reduce.unit(x), [[0.6, 0.8], [0.0, -1.0]])


def test_a_vector_of_zeros_stays_and_has_a_gradient_of_its_own_size():
  slope = jax.jacobian(reduce.unit)(jnp.zeros(2))
  np.testing.assert_array_equal(reduce.unit(jnp.zeros((3, 2))), 0)
  np.testing.assert_array_equal(slope, np.eye(2))


def test_unit_vectors_are_float32():
  made = reduce.unit(jnp.ones((2, 300), jnp.bfloat16))
  assert made.dtype == jnp.float32
  np.testing.assert_allclose(made, 300**-0.5, rtol=1e-6)
