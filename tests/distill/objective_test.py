"""How terms are weighed and added."""

from distilling import make_outputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.distill import method as method_lib
from kdseg.distill import objective
from kdseg.losses import segmentation


def test_the_task_is_the_weighted_sum_of_batch_means():
  out, _, labels = make_outputs()
  weights = {"bce": 0.5, "dice": 2.0, "focal": 3.0}
  total, parts = objective.segmentation_loss(out["logits"], labels, weights)
  by_hand = {
    "bce": segmentation.bce(out["logits"], labels).mean(),
    "dice": segmentation.soft_dice(out["logits"], labels).mean(),
    "focal": segmentation.focal(out["logits"], labels).mean(),
  }
  assert parts.keys() == by_hand.keys()
  for name, value in by_hand.items():
    np.testing.assert_allclose(parts[name], value, rtol=1e-6)
  expected = sum(weights[name] * by_hand[name] for name in weights)
  np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize("weights", [{}, {"bce": 1.0, "jaccard": 1.0}])
def test_an_unknown_or_missing_task_is_refused_with_the_known(weights):
  with pytest.raises(ValueError, match=r"bce.*dice.*focal"):
    objective.segmentation_loss(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2)),
                                weights)  # fmt: skip


def test_smoothed_labels_are_a_tenth_of_the_way_to_a_half():
  # -(.95 ln p + .05 ln (1 - p)) of a lesion at p = 3/4.
  logits = jnp.full((1, 2, 2), np.log(3.0))
  total, parts = objective.segmentation_loss(
    logits, jnp.ones((1, 2, 2)), {"smoothed_bce": 2.0}
  )
  expected = -(0.95 * np.log(0.75) + 0.05 * np.log(0.25))
  np.testing.assert_allclose(parts["smoothed_bce"], expected, rtol=1e-6)
  np.testing.assert_allclose(total, 2 * expected, rtol=1e-6)


def sums(**values):
  return {name: jnp.asarray(value) for name, value in values.items()}


def test_sums_grow_until_the_calibration_ends():
  balance = sums(task=0.0, count=0.0, mbf_low=0.0)
  for step, (task, term) in enumerate([(2.0, 0.5), (4.0, 0.25), (9.0, 9.0)]):
    balance = objective.update_balance(
      balance,
      jnp.asarray(task),
      sums(mbf_low=term, kd=7.0),
      jnp.asarray(step),
      calibration_steps=2,
    )
  assert balance == {"task": 6.0, "count": 2.0, "mbf_low": 0.75}


def test_no_gradient_goes_through_the_balance():
  def weight(values):
    balance = objective.update_balance(
      sums(task=1.0, count=1.0, mbf_low=1.0),
      values["task"],
      {"mbf_low": values["mbf_low"]},
      jnp.asarray(0),
      calibration_steps=2,
    )
    return balance["task"] / balance["mbf_low"]

  gradient = jax.grad(weight)(sums(task=3.0, mbf_low=2.0))
  assert gradient == {"task": 0.0, "mbf_low": 0.0}


@pytest.mark.parametrize(
  ("step", "ramp"), [(0, 0.2), (1, 0.4), (4, 1.0), (9, 1.0)]
)
def test_terms_are_ramped_in_and_calibrated(step, ramp):
  # Over the first half of 10 steps. Means so far: task 6 / 3 = 2, term
  # 1.5 / 3 = 0.5, so alpha is 4; logit terms are taken as they are.
  method = method_lib.Method(
    terms={"fitnet": 2.0, "kd": 0.5}, taps=("low",), distill_ramp=0.5
  )
  total, weights = objective.total_loss(
    jnp.asarray(1.5),
    sums(fitnet_low=0.3, kd=0.8),
    sums(task=6.0, count=3.0, fitnet_low=1.5),
    jnp.asarray(step),
    method=method,
    steps=10,
  )
  np.testing.assert_allclose(weights["fitnet_low"], ramp * 2 * 4, rtol=1e-6)
  np.testing.assert_allclose(weights["kd"], ramp * 0.5, rtol=1e-6)
  np.testing.assert_allclose(
    total, 1.5 + ramp * (2 * 4 * 0.3 + 0.5 * 0.8), rtol=1e-6
  )


def test_a_fixed_balance_without_warm_up_takes_the_weights_as_they_are():
  method = method_lib.Method(
    terms={"fitnet": 2.0}, taps=("low",), distill_ramp=0.0, balance="fixed"
  )
  total, weights = objective.total_loss(
    jnp.asarray(1.5),
    sums(fitnet_low=0.3),
    sums(task=6.0, count=3.0),
    jnp.asarray(0),
    method=method,
    steps=10,
  )
  assert weights == {"fitnet_low": 2.0}
  np.testing.assert_allclose(total, 1.5 + 2 * 0.3, rtol=1e-6)


def test_a_term_of_zero_stays_finite():
  method = method_lib.Method(
    terms={"fitnet": 1.0}, taps=("low",), distill_ramp=0.0
  )
  total, _ = objective.total_loss(
    jnp.asarray(1.5),
    sums(fitnet_low=0.0),
    sums(task=1.5, count=1.0, fitnet_low=0.0),
    jnp.asarray(0),
    method=method,
    steps=10,
  )
  np.testing.assert_allclose(total, 1.5)
