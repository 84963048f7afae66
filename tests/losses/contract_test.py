"""What every loss on [B, H, W] logits promises, whatever its formula."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import logits as logit_losses
from kdseg.losses import segmentation


def _smoothed_bce(logits, labels):
  return segmentation.bce(logits, labels, label_smoothing=0.1)


# name, loss, what a mask becomes before it is compared with
LOSSES = (
  ("bce", segmentation.bce, lambda mask: mask),
  ("smoothed_bce", _smoothed_bce, lambda mask: mask),
  ("soft_dice", segmentation.soft_dice, lambda mask: mask),
  ("focal", segmentation.focal, lambda mask: mask),
  ("kd", logit_losses.kd, lambda mask: 12.0 * mask - 6.0),
  ("cwd", logit_losses.cwd, lambda mask: 12.0 * mask - 6.0),
)
FROM_TEACHER = LOSSES[4:]


def _masks():
  masks = np.zeros((3, 6, 8), np.float32)
  masks[0, 1:4, 2:6] = 1
  masks[1, :3, :] = 1
  masks[2, 5, 7] = 1
  return jnp.asarray(masks)


def _logits(seed=0, scale=2.0):
  return scale * jax.random.normal(jax.random.key(seed), (3, 6, 8))


class EveryLossTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.named_parameters(*LOSSES)
  def test_one_value_per_image_whoever_is_beside_it(self, loss, target):
    logits, labels = _logits(), target(_masks())
    whole = self.variant(loss)(logits, labels)
    chex.assert_shape(whole, (3,))
    alone = jnp.concatenate(
      [loss(logits[i : i + 1], labels[i : i + 1]) for i in range(3)]
    )
    np.testing.assert_allclose(whole, alone, rtol=1e-5)
    assert np.ptp(whole) > 0.001

  @parameterized.named_parameters(*LOSSES)
  def test_right_is_cheap_and_wrong_is_dear(self, loss, target):
    right = 12.0 * _masks() - 6.0
    cheap = loss(right, target(_masks()))
    dear = loss(-right, target(_masks()))
    assert np.max(cheap) < 0.31
    assert np.min(dear - cheap) > 0.4

  @parameterized.named_parameters(*LOSSES)
  def test_a_step_down_the_gradient_is_cheaper(self, loss, target):
    labels = target(_masks())
    logits = _logits()
    slope = jax.grad(lambda z: jnp.sum(loss(z, labels)))(logits)
    better = loss(logits - 0.1 * slope, labels)
    assert np.all(better < loss(logits, labels))

  @parameterized.named_parameters(*LOSSES)
  def test_value_and_gradient_stay_finite_at_logits_of_1e4(self, loss, target):
    signs = 2.0 * jax.random.bernoulli(jax.random.key(1), 0.5, (3, 6, 8)) - 1
    for mask in (_masks(), jnp.zeros((3, 6, 8)), jnp.ones((3, 6, 8))):
      for teacher_scale in (1.0, 1e4 / 6.0):
        labels = target(mask)
        if target(jnp.zeros(())) != 0:
          labels = labels * teacher_scale
        for logits in (1e4 * signs, -1e4 * signs, jnp.full((3, 6, 8), -1e4)):
          value = loss(logits, labels)
          slope = jax.grad(lambda z, y=labels: jnp.sum(loss(z, y)))(logits)
          chex.assert_tree_all_finite((value, slope))
          assert np.all(value >= 0)

  @parameterized.named_parameters(*LOSSES)
  def test_gradient_is_the_one_of_finite_differences(self, loss, target):
    labels = target(_masks())
    chex.assert_numerical_grads(
      lambda z: jnp.sum(loss(z, labels)),
      (_logits(scale=1.0),),
      order=1,
      atol=5e-3,
      rtol=5e-3,
    )

  @parameterized.named_parameters(*LOSSES)
  def test_bfloat16_in_float32_out(self, loss, target):
    logits = _logits().astype(jnp.bfloat16)
    labels = target(_masks()).astype(jnp.bfloat16)
    value = loss(logits, labels)
    chex.assert_type(value, jnp.float32)
    wide = loss(logits.astype(jnp.float32), labels.astype(jnp.float32))
    np.testing.assert_array_equal(value, wide)

  @parameterized.named_parameters(*LOSSES)
  def test_a_shape_that_does_not_fit_is_refused(self, loss, target):
    labels = target(_masks())
    for logits in (labels[..., None], labels[0], labels[:2], labels[:, :, :7]):
      with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
        loss(logits, labels)
      with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
        jax.eval_shape(loss, logits, labels)

  @parameterized.named_parameters(*FROM_TEACHER)
  def test_the_teacher_gets_no_gradient_and_copying_it_costs_nothing(
    self, loss, target
  ):
    teacher = target(_masks()) + _logits(3)
    slope = jax.grad(lambda t: jnp.sum(loss(_logits(), t)))(teacher)
    np.testing.assert_array_equal(slope, 0)
    np.testing.assert_allclose(loss(teacher, teacher), 0, atol=1e-6)
    assert np.min(loss(_logits(), teacher)) > 0.1
