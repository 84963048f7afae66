import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import grids


def _normal(*shape):
  return jax.random.normal(jax.random.key(0), shape)


def test_resizing_interpolates_between_the_centres_of_cells():
  rows = jnp.asarray([0.0, 4.0])[None, :, None, None]
  feat = jnp.broadcast_to(rows, (1, 2, 3, 2))
  grown = grids.resize_features(feat, 4, 3)
  expected = np.array([0.0, 1.0, 3.0, 4.0])[None, :, None, None]
  np.testing.assert_allclose(grown, np.broadcast_to(expected, (1, 4, 3, 2)))


def test_resizing_to_the_same_grid_is_the_same_array():
  feat = _normal(1, 4, 6, 2).astype(jnp.bfloat16)
  assert grids.resize_features(feat, 4, 6) is feat


def test_half_precision_is_resized_in_float32():
  feat = _normal(1, 4, 6, 2).astype(jnp.bfloat16)
  grown = grids.resize_features(feat, 8, 12)
  assert grown.dtype == jnp.float32
  wide = grids.resize_features(feat.astype(jnp.float32), 8, 12)
  np.testing.assert_array_equal(grown, wide)


def test_shrinking_does_not_blur():
  # Every fourth centre lies between two pixels, and only these two count.
  feat = jnp.arange(8.0)[None, :, None, None]
  small = grids.resize_features(feat, 2, 1)
  np.testing.assert_allclose(small[0, :, 0, 0], [1.5, 5.5])


@pytest.mark.parametrize("cells", [(4, 8), (2, 2), (3, 5), (8, 8)])
def test_labels_are_read_at_the_centres_of_cells(cells):
  labels = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 8, 8))
  read = grids.nearest_labels(labels, *cells)
  assert read.dtype == jnp.float32
  for i in range(cells[0]):
    for j in range(cells[1]):
      y, x = (int((k + 0.5) * 8 / n) for k, n in zip((i, j), cells))
      np.testing.assert_array_equal(read[:, i, j], labels[:, y, x])


def test_labels_get_no_gradient():
  slope = jax.grad(lambda y: jnp.sum(grids.nearest_labels(y, 2, 2)))(
    jnp.ones((1, 4, 4))
  )
  np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("kind", ["max", "mean"])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_pooling_equals_slow_loops_and_a_cut_block_holds_what_it_has(
  kind, size
):
  feat = _normal(2, 5, 7, 3) - 3.0
  pooled = np.asarray(grids.pool(feat, size, kind))
  assert pooled.shape == (2, -(-5 // size), -(-7 // size), 3)
  for i in range(pooled.shape[1]):
    for j in range(pooled.shape[2]):
      block = np.asarray(feat)[
        :, i * size : (i + 1) * size, j * size : (j + 1) * size
      ]
      expected = getattr(block, kind)((1, 2))
      np.testing.assert_allclose(pooled[:, i, j], expected, rtol=1e-5)


def test_what_is_no_grid_or_no_kind_is_refused():
  with pytest.raises(ValueError, match="rank"):
    grids.resize_features(jnp.zeros((2, 4, 4)), 2, 2)
  with pytest.raises(ValueError, match="rank"):
    grids.nearest_labels(jnp.zeros((2, 4, 4, 1)), 2, 2)
  with pytest.raises(ValueError, match="size must be at least 1: 0"):
    grids.pool(jnp.zeros((1, 2, 2, 1)), 0, "max")
  with pytest.raises(ValueError, match="'min'"):
    grids.pool(jnp.zeros((1, 2, 2, 1)), 2, "min")
