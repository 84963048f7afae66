import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import segmentation

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def _one_row(*values):
  return jnp.asarray([[values]], jnp.float32)


def _squares(*columns):
  """8x8 masks, one a pair of columns, each four columns wide or as given."""
  mask = np.zeros((len(columns), 8, 8), np.float32)
  for row, (first, last) in enumerate(columns):
    mask[row, 2:6, first:last] = 1
  return jnp.asarray(mask)


def test_bce_is_the_mean_of_minus_log_probabilities():
  # Probabilities 1/2 and 3/4 of a lesion where there is one and where there
  # is none: -ln(1/2) and -ln(1/4).
  loss = segmentation.bce(_one_row(0.0, LN3), _one_row(1.0, 0.0))
  np.testing.assert_allclose(loss, [(LN2 + LN4) / 2], rtol=1e-6)


def test_label_smoothing_moves_a_share_of_the_label_to_the_other_class():
  # Label .9: .9 * -ln(3/4) + .1 * -ln(1/4).
  loss = segmentation.bce(_one_row(LN3), _one_row(1.0), label_smoothing=0.2)
  np.testing.assert_allclose(
    loss, [0.9 * math.log(4 / 3) + 0.1 * LN4], rtol=1e-6
  )


def test_bce_keeps_the_tail_of_a_sure_and_right_prediction():
  # -ln(sigmoid(20)) = 2.0612e-9; softplus(20) - 20 would round to 0.
  loss = segmentation.bce(_one_row(20.0), _one_row(1.0))
  np.testing.assert_allclose(loss, [2.0611536e-9], rtol=1e-4)


def test_the_slope_of_bce_is_probability_minus_label():
  # In the logit sigmoid(z) - y; in the label, as smoothing moves it, -z.
  logits, labels = _one_row(-LN3, 0.0, 2.0), _one_row(0.0, 1.0, 0.5)
  by_logit, by_label = jax.grad(lambda z, y: segmentation.bce(z, y)[0], (0, 1))(
    logits, labels
  )
  np.testing.assert_allclose(
    by_logit[0, 0], np.array([0.25, -0.5, 0.3807970]) / 3, rtol=1e-6
  )
  np.testing.assert_allclose(
    by_label[0, 0], np.array([LN3, 0.0, -2.0]) / 3, rtol=1e-6
  )


def test_dice_of_half_overlapping_squares_is_a_half_and_of_disjoint_ones_one():
  labels = _squares((0, 4), (0, 4), (0, 4))
  logits = 2e4 * _squares((2, 6), (4, 8), (0, 4)) - 1e4
  loss = segmentation.soft_dice(logits, labels, smooth=1e-6)
  np.testing.assert_allclose(loss, [0.5, 1.0, 0.0], atol=1e-6)


def test_dice_adds_its_smoothing_above_and_below():
  # p = 1/2, y = 1, s = 1: 1 - (2/2 + 1) / (1/2 + 1 + 1).
  loss = segmentation.soft_dice(_one_row(0.0), _one_row(1.0))
  np.testing.assert_allclose(loss, [1 - 2 / 2.5], rtol=1e-6)


def test_dice_of_nothing_found_where_nothing_is_costs_nothing():
  loss = segmentation.soft_dice(jnp.full((2, 4, 4), -1e4), jnp.zeros((2, 4, 4)))
  np.testing.assert_array_equal(loss, 0)


def test_focal_weighs_each_pixel_by_its_squared_miss():
  # Lesion probability 3/4. No lesion: (3/4)^2 * ln 4; a lesion:
  # (1/4)^2 * ln(4/3).
  loss = segmentation.focal(_one_row(LN3, LN3), _one_row(0.0, 1.0))
  expected = (9 / 16 * LN4 + 1 / 16 * math.log(4 / 3)) / 2
  np.testing.assert_allclose(loss, [expected], rtol=1e-6)


def test_focal_without_gamma_is_bce():
  logits = jax.random.normal(jax.random.key(0), (2, 8, 8))
  labels = _squares((0, 4), (3, 8))
  np.testing.assert_allclose(
    segmentation.focal(logits, labels, gamma=0.0),
    segmentation.bce(logits, labels),
    rtol=1e-6,
  )


def test_hyper_parameters_out_of_range_are_refused():
  x = jnp.zeros((1, 2, 2))
  with pytest.raises(ValueError, match="label_smoothing"):
    segmentation.bce(x, x, label_smoothing=1.0)
  with pytest.raises(ValueError, match="smooth must be positive"):
    segmentation.soft_dice(x, x, smooth=0.0)
  with pytest.raises(ValueError, match="gamma"):
    segmentation.focal(x, x, gamma=-1.0)
