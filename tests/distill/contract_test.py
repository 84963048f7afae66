"""What every term promises, whatever its formula: on logits, on features.

The terms are those of the records, so a new one is held to this by itself.
"""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.distill import method as method_lib
from kdseg.distill import term as term_lib
from kdseg.distill import terms as terms_lib
from kdseg.losses import relations

KEY = jax.random.key(7)


def _layers(tap, *arguments, method):
  """In place of what is trained along: no generator, some tokens."""
  if method == "receptive_tokens":
    return jnp.linspace(-1.0, 1.0, 15).reshape(3, 5)
  x = arguments[-1]
  return x if method == "generate" else jnp.sum(x, -1, keepdims=True)


def _value(term, out, teacher_out, student, labels, **switches):
  """What a record computes; the first of its parts."""
  method = method_lib.Method(
    terms={term.name: 1.0}, taps=("low",), heads=2, **switches
  )
  rng = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(
    jnp.arange(labels.shape[0])
  )
  values = term.values(
    term_lib.Inputs(out, teacher_out, student, labels, rng, method, _layers)
  )
  return next(iter(values.values()))


def _on_logits(term, **switches):
  """Labels are the teacher's mask."""

  def loss(student, teacher):
    labels = jnp.asarray(teacher > 0, jnp.float32)
    return _value(
      term, {"logits": student}, {"logits": teacher}, {}, labels, **switches
    )

  return loss


def _on_features(term):
  """What is left where the logits agree."""

  def loss(student, teacher, labels):
    out = {"logits": jnp.zeros(labels.shape)}
    return _value(term, out, {"low": teacher, **out}, {"low": student}, labels)

  return loss


@functools.cache
def compiled(loss):
  """(values [B], gradients of their sum), compiled once for all tests."""

  def total(*arguments):
    values = loss(*arguments)
    return jnp.sum(values), values

  @jax.jit
  def run(*arguments):
    by_all = tuple(range(len(arguments)))
    run = jax.value_and_grad(total, by_all, has_aux=True)
    (_, values), slopes = run(*arguments)
    return values, slopes

  return run


def assert_slope(loss, x, *others):
  """Holds the gradient by `x` against finite differences along two lines."""
  values, (slope, *_) = compiled(loss)(x, *others)
  scale = max(1.0, float(jnp.sum(values)))
  for seed in (0, 1):
    along = jax.random.normal(jax.random.key(100 + seed), x.shape)
    there, back = (
      np.sum(compiled(loss)(x + sign * 3e-3 * along, *others)[0], dtype=float)
      for sign in (1, -1)
    )
    np.testing.assert_allclose(
      np.vdot(slope, along) / scale,
      (there - back) / 6e-3 / scale,
      rtol=1e-2,
      atol=2e-3,
    )


def assert_cheaper_down_the_slope(loss, x, *others):
  before, (slope, *_) = compiled(loss)(x, *others)
  step = 0.01 / np.sqrt(np.sum(np.square(slope)))
  after, _ = compiled(loss)(x - step * slope, *others)
  assert np.sum(after) < np.sum(before)


def assert_refused(loss, *arguments):
  with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
    jax.eval_shape(loss, *arguments)


def of_terms(make, compares, hides=False):
  """Cases of the records that compare so, and hide features or do not."""
  return tuple(
    (term.name, make(term))
    for term in terms_lib.TERMS
    if term.compares == compares
    and bool(GENERATORS & set(term.trains)) == hides
  )


GENERATORS = {"generator", "generators"}
RECORDS = {term.name: term for term in terms_lib.TERMS}
OF_LOGITS = (
  *of_terms(_on_logits, term_lib.LOGITS),
  ("dist_inter", _on_logits(RECORDS["dist"], dist_inter_weight=1.0)),
)
LOSSES = (*terms_lib.SEGMENTATION.items(), *OF_LOGITS)


def _masks():
  masks = np.zeros((3, 6, 8), np.float32)
  masks[0, 1:4, 2:6] = 1
  masks[1, :3, :] = 1
  masks[2, 5, 7] = 1
  return jnp.asarray(masks)


def _logits(seed=0, scale=2.0):
  return scale * jax.random.normal(jax.random.key(seed), (3, 6, 8))


def target(loss, mask, logit=6.0):
  """What a mask becomes before a loss compares with it."""
  if loss in terms_lib.SEGMENTATION.values():
    return mask
  return logit * (2.0 * mask - 1.0)


class EveryLossOnLogitsTest(chex.TestCase):
  @parameterized.named_parameters(*LOSSES)
  def test_one_value_per_image_whatever_images_are_beside_it(self, loss):
    logits, labels = _logits(), target(loss, _masks())
    whole, _ = compiled(loss)(logits, labels)
    chex.assert_shape(whole, (3,))
    alone = jax.jit(loss)(logits[1:2], labels[1:2])
    np.testing.assert_allclose(whole[1:2], alone, rtol=1e-5)
    assert np.ptp(whole) > 0.001

  @parameterized.named_parameters(*LOSSES)
  def test_right_is_cheap_and_wrong_is_dear(self, loss):
    right, labels = 12.0 * _masks() - 6.0, target(loss, _masks())
    cheap, _ = compiled(loss)(right, labels)
    dear, _ = compiled(loss)(-right, labels)
    assert np.max(cheap) < 0.31
    assert np.min(dear - cheap) > 0.4

  @parameterized.named_parameters(*LOSSES)
  def test_the_gradient_is_right_and_points_up(self, loss):
    labels = target(loss, _masks())
    assert_slope(loss, _logits(scale=1.0), labels)
    assert_cheaper_down_the_slope(loss, _logits(), labels)

  @parameterized.named_parameters(*LOSSES)
  def test_value_and_gradient_stay_finite_at_logits_of_1e4(self, loss):
    signs = 2.0 * jax.random.bernoulli(jax.random.key(1), 0.5, (3, 6, 8)) - 1
    for mask in (_masks(), jnp.zeros((3, 6, 8)), jnp.ones((3, 6, 8))):
      for logit in (6.0, 1e4):
        labels = target(loss, mask, logit)
        for logits in (1e4 * signs, -1e4 * signs, jnp.full((3, 6, 8), -1e4)):
          value, (slope, _) = compiled(loss)(logits, labels)
          chex.assert_tree_all_finite((value, slope))
          assert np.all(value >= 0)

  @parameterized.named_parameters(*LOSSES)
  def test_bfloat16_in_float32_out(self, loss):
    half = [x.astype(jnp.bfloat16) for x in (_logits(), target(loss, _masks()))]
    value = jax.jit(loss)(*half)
    chex.assert_type(value, jnp.float32)
    wide, _ = compiled(loss)(*(x.astype(jnp.float32) for x in half))
    np.testing.assert_allclose(value, wide, rtol=1e-6)

  @parameterized.named_parameters(*LOSSES)
  def test_a_shape_that_does_not_fit_is_refused(self, loss):
    labels = target(loss, _masks())
    for logits in (labels[..., None], labels[0], labels[:2], labels[:, :, :7]):
      assert_refused(loss, logits, labels)

  @parameterized.named_parameters(*OF_LOGITS)
  def test_the_teacher_gets_no_gradient_and_copying_it_costs_nothing(
    self, loss
  ):
    teacher = target(loss, _masks()) + _logits(3)
    value, (_, slope) = compiled(loss)(_logits(), teacher)
    np.testing.assert_array_equal(slope, 0)
    assert np.min(value) > 0.1
    copied, _ = compiled(loss)(teacher, teacher)
    np.testing.assert_allclose(copied, 0, atol=1e-6)


# ------------------------------------------------------------------- features

GRID = (3, 4, 6)


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


def _imd(student, teacher, labels):
  return relations.imd(student, teacher)


HIDING = of_terms(_on_features, term_lib.ALIGNED, hides=True)
SAME_WIDTH = of_terms(_on_features, term_lib.ALIGNED)
ANY_WIDTH = (
  *of_terms(_on_features, term_lib.FEATURES),
  # Parts of emkd.
  ("imd", _imd),
  ("rad", relations.rad),
)
COPIES = (*SAME_WIDTH, *ANY_WIDTH)
EVERY = (*COPIES, *HIDING)
# It compares the images of a batch with each other.
ALONE = tuple(pair for pair in COPIES if pair[0] != "cirkd_lite")
# What reads labels for a part of its own, reads none for its first.
READS_LABELS = {t.name: t.labels and len(t.parts) == 1 for t in terms_lib.TERMS}
READS_LABELS |= {"imd": False, "rad": True}
WITH_LABELS = tuple(pair for pair in EVERY if READS_LABELS[pair[0]])
WITHOUT_LABELS = tuple(pair for pair in EVERY if not READS_LABELS[pair[0]])


class EveryLossOnFeaturesTest(chex.TestCase):
  @parameterized.named_parameters(*EVERY)
  def test_one_value_an_image_in_float32(self, loss):
    value, _ = compiled(loss)(STUDENT, TEACHER, _labels())
    chex.assert_shape(value, (3,))
    chex.assert_type(value, jnp.float32)
    assert np.ptp(value) > 1e-5

  @parameterized.named_parameters(*ALONE)
  def test_an_image_has_its_value_whatever_images_are_beside_it(self, loss):
    labels = _labels()
    whole, _ = compiled(loss)(STUDENT, TEACHER, labels)
    one = jax.jit(loss)(STUDENT[1:2], TEACHER[1:2], labels[1:2])
    np.testing.assert_allclose(whole[1:2], one, rtol=1e-4, atol=1e-7)

  @parameterized.named_parameters(*COPIES)
  def test_copying_the_teacher_costs_nothing_and_nothing_else_does(self, loss):
    copied, _ = compiled(loss)(TEACHER, TEACHER, _labels())
    np.testing.assert_allclose(copied, 0, atol=1e-6)
    assert np.all(compiled(loss)(STUDENT, TEACHER, _labels())[0] > 1e-4)

  @parameterized.named_parameters(*EVERY)
  def test_the_student_alone_gets_a_gradient(self, loss):
    _, (by_student, *by_others) = compiled(loss)(STUDENT, TEACHER, _labels())
    assert np.all(np.any(by_student != 0, (1, 2, 3)))
    for slope in by_others:
      np.testing.assert_array_equal(slope, 0)

  @parameterized.named_parameters(*EVERY)
  def test_the_gradient_is_right_and_points_up(self, loss):
    assert_slope(loss, STUDENT, TEACHER, _labels())
    assert_cheaper_down_the_slope(loss, STUDENT, TEACHER, _labels())

  @parameterized.named_parameters(*EVERY)
  def test_dead_cells_and_flat_maps_keep_value_and_gradient_finite(self, loss):
    nothing, flat = jnp.zeros_like(STUDENT), jnp.ones_like(STUDENT)
    dead = STUDENT.at[:, 1:3, 2:5].set(0)
    for student in (nothing, flat, dead, 1e3 * STUDENT):
      for teacher in (nothing, flat, dead, TEACHER):
        value, (slope, *_) = compiled(loss)(student, teacher, _labels())
        chex.assert_tree_all_finite((value, slope))
        assert np.sum(value) > -1e-5
        assert np.max(np.abs(slope)) < 1e5

  @parameterized.named_parameters(*WITH_LABELS)
  def test_empty_and_full_masks_keep_value_and_gradient_finite(self, loss):
    for labels in (jnp.zeros_like(_labels()), jnp.ones_like(_labels())):
      chex.assert_tree_all_finite(compiled(loss)(STUDENT, TEACHER, labels))

  @parameterized.named_parameters(*EVERY)
  def test_labels_matter_where_the_record_says_so_and_only_there(self, loss):
    one, other = (
      compiled(loss)(STUDENT, TEACHER, labels)[0]
      for labels in (_labels(), _labels()[:, ::-1, ::-1])
    )
    assert np.all((one != other) == (loss in dict(WITH_LABELS).values()))

  @parameterized.named_parameters(*COPIES)
  def test_bfloat16_in_float32_out(self, loss):
    half = [x.astype(jnp.bfloat16) for x in (STUDENT, TEACHER)]
    value = jax.jit(loss)(*half, _labels())
    chex.assert_type(value, jnp.float32)
    wide, _ = compiled(loss)(*(x.astype(jnp.float32) for x in half), _labels())
    np.testing.assert_allclose(value, wide, rtol=1e-5)

  @parameterized.named_parameters(*EVERY)
  def test_a_shape_that_does_not_fit_is_refused(self, loss):
    for student in (STUDENT[0], STUDENT[:2], STUDENT[:, :3], STUDENT[:, :, :5]):
      assert_refused(loss, student, TEACHER, _labels())

  @parameterized.named_parameters(*WITH_LABELS)
  def test_labels_that_do_not_fit_are_refused(self, loss):
    for labels in (_labels()[:2], _labels()[0], _labels()[..., None]):
      assert_refused(loss, STUDENT, TEACHER, labels)

  @parameterized.named_parameters(*SAME_WIDTH, *HIDING)
  def test_other_widths_are_refused_where_features_are_to_be_aligned(
    self, loss
  ):
    assert_refused(loss, _feat(1, 4), TEACHER, _labels())

  @parameterized.named_parameters(*ANY_WIDTH)
  def test_relations_compare_any_widths(self, loss):
    assert np.all(jax.jit(loss)(_feat(1, 4), TEACHER, _labels()) > 0)

  @parameterized.named_parameters(
    *(pair for pair in ANY_WIDTH if pair[0] in ("ifvd", "rad", "cirkd_lite"))
  )
  def test_what_is_made_of_cosines_sees_no_rotation_of_the_channels(self, loss):
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    turned, plain = (
      compiled(loss)(student, TEACHER, _labels())[0]
      for student in ((STUDENT @ turn).astype(jnp.float32), STUDENT)
    )
    np.testing.assert_allclose(turned, plain, rtol=1e-3)
