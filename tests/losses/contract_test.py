"""What every loss promises, whatever its formula: on logits, on features."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import attention
from kdseg.losses import features
from kdseg.losses import logits as logit_losses
from kdseg.losses import mbf
from kdseg.losses import relations
from kdseg.losses import segmentation


def _smoothed_bce(logits, labels):
  return segmentation.bce(logits, labels, label_smoothing=0.1)


def _both_parts_of_dist(student, teacher):
  return logit_losses.dist(student, teacher, inter_weight=1.0)


def _bpkd(student, teacher):
  """With labels that are the teacher's mask; its weights as a mean."""
  return logit_losses.bpkd(
    student,
    teacher,
    jnp.asarray(teacher > 0, jnp.float32),
    radius=1,
    edge_weight=0.5,
    body_weight=0.2,
  )


def _as_logits(mask):
  return 12.0 * mask - 6.0


# name, loss, what a mask becomes before it is compared with
LOSSES = (
  ("bce", segmentation.bce, lambda mask: mask),
  ("smoothed_bce", _smoothed_bce, lambda mask: mask),
  ("soft_dice", segmentation.soft_dice, lambda mask: mask),
  ("focal", segmentation.focal, lambda mask: mask),
  ("kd", logit_losses.kd, _as_logits),
  ("cwd", logit_losses.cwd, _as_logits),
  ("dist", logit_losses.dist, _as_logits),
  ("bpkd", _bpkd, _as_logits),
  ("ultralbm", logit_losses.ultralbm, _as_logits),
)
FROM_TEACHER = (*LOSSES[4:], ("dist_inter", _both_parts_of_dist, _as_logits))


def _masks():
  masks = np.zeros((3, 6, 8), np.float32)
  masks[0, 1:4, 2:6] = 1
  masks[1, :3, :] = 1
  masks[2, 5, 7] = 1
  return jnp.asarray(masks)


def _logits(seed=0, scale=2.0):
  return scale * jax.random.normal(jax.random.key(seed), (3, 6, 8))


class EveryLossOnLogitsTest(chex.TestCase):
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


# ------------------------------------------------------------------- features

GRID = (3, 4, 6)
KEY = jax.random.key(7)


def _feat(seed, channels=5):
  return jax.random.normal(jax.random.key(seed), (*GRID, channels))


STUDENT, TEACHER = _feat(1), _feat(2)


def _labels():
  """Twice the sides of the features; lesions of three sizes."""
  labels = np.zeros((3, 8, 12), np.float32)
  labels[0, 2:8, 4:10] = 1
  labels[1, :4, :9] = 1
  labels[2, 6:, 8:] = 1
  return jnp.asarray(labels)


def _fitnet(student, teacher, labels):
  return features.fitnet(student, teacher)


def _mgd(student, teacher, labels):
  return features.mgd(student, teacher, KEY, generate=lambda x: x)


def _mbf(student, teacher, labels):
  region = labels[:, ::2, ::2]
  return mbf.mbf(student, teacher, region, KEY, generate=lambda x: x)


def _maskd(student, teacher, labels):
  tokens = jnp.linspace(-1.0, 1.0, 3 * teacher.shape[-1])
  tokens = tokens.reshape(3, -1)
  masks = attention.token_masks(teacher, tokens)
  return attention.maskd(student, teacher, masks)


def _at(student, teacher, labels):
  return relations.at(student, teacher)


def _imd(student, teacher, labels):
  return relations.imd(student, teacher)


def _skd_pa(student, teacher, labels):
  return relations.skd_pa(student, teacher)


def _cirkd_lite(student, teacher, labels):
  return relations.cirkd_lite(student, teacher)


def _emkd(student, teacher, labels):
  """What is left of it where the logits agree."""
  agreed = jnp.zeros(labels.shape)
  return relations.emkd(
    agreed, agreed, {"low": student}, {"low": teacher}, labels
  )


SAME_WIDTH = (
  ("fitnet", _fitnet),
  ("fgd", attention.fgd),
  ("maskd", _maskd),
)
HIDING = (("mgd", _mgd), ("mbf", _mbf))
ANY_WIDTH = (
  ("at", _at),
  ("imd", _imd),
  ("skd_pa", _skd_pa),
  ("ifvd", relations.ifvd),
  ("rad", relations.rad),
  ("emkd", _emkd),
)
ACROSS_THE_BATCH = (("cirkd_lite", _cirkd_lite),)
ALONE = (*SAME_WIDTH, *ANY_WIDTH)
COPIES = (*ALONE, *ACROSS_THE_BATCH)
EVERY = (*COPIES, *HIDING)
WITH_LABELS = tuple(
  pair for pair in EVERY if pair[0] in ("ifvd", "rad", "emkd", "fgd")
)


class EveryLossOnFeaturesTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.named_parameters(*EVERY)
  def test_one_value_an_image_the_same_however_it_is_run(self, loss):
    value = self.variant(loss)(STUDENT, TEACHER, _labels())
    chex.assert_shape(value, (3,))
    chex.assert_type(value, jnp.float32)
    expected = jax.jit(loss)(STUDENT, TEACHER, _labels())
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-7)
    assert np.ptp(value) > 1e-5

  @parameterized.named_parameters(*ALONE)
  def test_an_image_has_its_value_whoever_is_beside_it(self, loss):
    labels = _labels()
    whole = loss(STUDENT, TEACHER, labels)
    one = loss(STUDENT[1:2], TEACHER[1:2], labels[1:2])
    np.testing.assert_allclose(whole[1:2], one, rtol=1e-4, atol=1e-7)

  @parameterized.named_parameters(*COPIES)
  def test_copying_the_teacher_costs_nothing_and_nothing_else_does(self, loss):
    copied = loss(TEACHER, TEACHER, _labels())
    np.testing.assert_allclose(copied, 0, atol=1e-6)
    assert np.all(loss(STUDENT, TEACHER, _labels()) > 1e-4)

  @parameterized.named_parameters(*EVERY)
  def test_the_teacher_gets_no_gradient_and_the_student_one(self, loss):
    by_student, by_teacher = jax.jit(
      jax.grad(lambda s, t: jnp.sum(loss(s, t, _labels())), (0, 1))
    )(STUDENT, TEACHER)
    np.testing.assert_array_equal(by_teacher, 0)
    assert np.all(np.any(by_student != 0, (1, 2, 3)))

  @parameterized.named_parameters(*COPIES)
  def test_a_step_down_the_gradient_is_cheaper(self, loss):
    labels = _labels()

    @jax.jit
    def before_and_after(student):
      value, slope = jax.value_and_grad(
        lambda s: jnp.sum(loss(s, TEACHER, labels))
      )(student)
      step = 0.01 / jnp.sqrt(jnp.sum(jnp.square(slope)))
      return value, jnp.sum(loss(student - step * slope, TEACHER, labels))

    before, after = before_and_after(STUDENT)
    assert after < before

  @parameterized.named_parameters(*EVERY)
  def test_gradient_is_the_one_of_finite_differences(self, loss):
    labels = _labels()
    chex.assert_numerical_grads(
      jax.jit(lambda s: jnp.sum(loss(s, TEACHER, labels))),
      (STUDENT,),
      order=1,
      atol=5e-3,
      rtol=5e-3,
    )

  @parameterized.named_parameters(*EVERY)
  def test_dead_cells_and_flat_maps_keep_value_and_gradient_finite(self, loss):
    labels = _labels()
    run = jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(loss(s, t, labels))))
    nothing, flat = jnp.zeros_like(STUDENT), jnp.ones_like(STUDENT)
    dead = STUDENT.at[:, 1:3, 2:5].set(0)
    for student in (nothing, flat, dead, 1e3 * STUDENT):
      for teacher in (nothing, flat, dead, TEACHER):
        value, slope = run(student, teacher)
        chex.assert_tree_all_finite((value, slope))
        assert value > -1e-5
        assert np.max(np.abs(slope)) < 1e5

  @parameterized.named_parameters(*WITH_LABELS)
  def test_empty_and_full_masks_keep_value_and_gradient_finite(self, loss):
    run = jax.jit(jax.value_and_grad(lambda s, y: jnp.sum(loss(s, TEACHER, y))))
    for labels in (jnp.zeros_like(_labels()), jnp.ones_like(_labels())):
      chex.assert_tree_all_finite(run(STUDENT, labels))

  @parameterized.named_parameters(*WITH_LABELS)
  def test_labels_matter_and_get_no_gradient(self, loss):
    labels = _labels()
    value = loss(STUDENT, TEACHER, labels)
    assert np.all(value != loss(STUDENT, TEACHER, labels[:, ::-1, ::-1]))
    slope = jax.grad(lambda y: jnp.sum(loss(STUDENT, TEACHER, y)))(labels)
    np.testing.assert_array_equal(slope, 0)

  @parameterized.named_parameters(*COPIES)
  def test_bfloat16_in_float32_out(self, loss):
    half = [x.astype(jnp.bfloat16) for x in (STUDENT, TEACHER)]
    value = loss(*half, _labels())
    chex.assert_type(value, jnp.float32)
    wide = loss(*(x.astype(jnp.float32) for x in half), _labels())
    np.testing.assert_allclose(value, wide, rtol=1e-5)

  @parameterized.named_parameters(*EVERY)
  def test_a_shape_that_does_not_fit_is_refused(self, loss):
    labels = _labels()
    for student in (STUDENT[0], STUDENT[:2], STUDENT[:, :3], STUDENT[:, :, :5]):
      with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
        jax.eval_shape(loss, student, TEACHER, labels)

  @parameterized.named_parameters(*WITH_LABELS)
  def test_labels_that_do_not_fit_are_refused(self, loss):
    for labels in (_labels()[:2], _labels()[0], _labels()[..., None]):
      with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
        jax.eval_shape(loss, STUDENT, TEACHER, labels)

  @parameterized.named_parameters(*SAME_WIDTH, *HIDING)
  def test_other_widths_are_refused_where_features_are_to_be_aligned(
    self, loss
  ):
    with pytest.raises(ValueError, match=r"[Ss]hape"):
      jax.eval_shape(loss, _feat(1, 4), TEACHER, _labels())

  @parameterized.named_parameters(*ANY_WIDTH, *ACROSS_THE_BATCH)
  def test_relations_compare_any_widths_and_see_no_rotation(self, loss):
    assert np.all(loss(_feat(1, 4), TEACHER, _labels()) > 0)
    if loss in (relations.ifvd, relations.rad, _cirkd_lite):
      # What is made of cosines is the same after a rotation of the channels.
      turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
      np.testing.assert_allclose(
        loss(STUDENT @ turn, TEACHER, _labels()),
        loss(STUDENT, TEACHER, _labels()),
        rtol=1e-3,
      )
