"""FGD and MasKD against slow loops that restate their definitions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import attention

SHAPE = (2, 3, 4, 5)


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


STUDENT, TEACHER = _normal(1, *SHAPE), _normal(2, *SHAPE)
TOKENS = _normal(3, 4, 5)


def _labels():
  labels = np.zeros((2, 6, 8), np.float32)
  labels[0, 2:6, 4:] = 1
  labels[1, :, :2] = 1
  return jnp.asarray(labels)


LABELS = _labels()


def _numpy(x):
  return np.asarray(x, np.float64)


def _softmax(x):
  exponentials = np.exp(x)
  return exponentials / exponentials.sum()


def _maps(feat):
  """Attention of one image [h, w, C] to cells and to channels, t = .5."""
  size = np.abs(feat)
  spatial = 12 * _softmax(size.mean(-1) / 0.5)
  return spatial, 5 * _softmax(size.mean((0, 1)) / 0.5)


@pytest.mark.parametrize(
  "weights", [(1e-3, 5e-4, 1e-3), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0),
              (0.0, 0.0, 1.0)]
)  # fmt: skip
def test_fgd_equals_slow_loops(weights):
  alpha, beta, gamma = weights
  expected = []
  for image in range(2):
    s, t = _numpy(STUDENT)[image], _numpy(TEACHER)[image]
    lesion = np.asarray(LABELS)[image, 1::2, 1::2]
    spatial, channel = _maps(t)
    total = 0.0
    for i in range(3):
      for j in range(4):
        inside = lesion[i, j] == 1
        area = (lesion == 1).sum() if inside else (lesion == 0).sum()
        for c in range(5):
          error = spatial[i, j] * channel[c] * (t[i, j, c] - s[i, j, c]) ** 2
          total += (alpha if inside else beta) * error / area
    own_spatial, own_channel = _maps(s)
    total += gamma * np.abs(own_spatial - spatial).sum()
    total += gamma * np.abs(own_channel - channel).sum()
    expected.append(total)
  loss = attention.fgd(
    STUDENT,
    TEACHER,
    LABELS,
    foreground=alpha,
    background=beta,
    attention=gamma,
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_fgd_weighs_lesion_skin_and_attention_as_published():
  loss = functools.partial(attention.fgd, STUDENT, TEACHER, LABELS)
  published = loss(foreground=1e-3, background=5e-4, attention=1e-3)
  np.testing.assert_array_equal(loss(), published)


def test_a_high_temperature_of_fgd_attends_to_all_alike():
  # Then only the squared errors are left: their sum over the channels,
  # averaged over the skin.
  loss = attention.fgd(
    STUDENT,
    TEACHER,
    jnp.zeros_like(LABELS),
    temperature=1e6,
    background=1.0,
  )
  squares = np.square(_numpy(STUDENT) - _numpy(TEACHER))
  np.testing.assert_allclose(loss, squares.sum(-1).mean((1, 2)), rtol=1e-3)
  with pytest.raises(ValueError, match="temperature"):
    attention.fgd(STUDENT, TEACHER, LABELS, temperature=0.0)


def test_a_token_masks_where_it_finds_itself():
  # (1, 0) finds the first channel: sigmoid(ln 3) = 3/4; (0, 2) twice the other.
  feat = jnp.asarray([math.log(3), 0.0]).reshape(1, 1, 1, 2)
  masks = attention.token_masks(feat, jnp.asarray([[1.0, 0.0], [0.0, 2.0]]))
  np.testing.assert_allclose(masks[0, 0, 0], [0.75, 0.5], rtol=1e-6)


def _masks():
  return attention.token_masks(TEACHER, TOKENS)


def test_maskd_equals_slow_loops():
  masks = _numpy(_masks())
  expected = []
  for image in range(2):
    total = 0.0
    for token in range(4):
      for c in range(5):
        above = below = 0.0
        for i in range(3):
          for j in range(4):
            mask = masks[image, i, j, token]
            error = STUDENT[image, i, j, c] - TEACHER[image, i, j, c]
            above += (mask * float(error)) ** 2
            below += mask
        total += above / below
    expected.append(0.5 * total / (4 * 5))
  np.testing.assert_allclose(
    attention.maskd(STUDENT, TEACHER, _masks()), expected, rtol=1e-4
  )


def test_the_masks_are_not_moved_by_the_distance_they_weigh():
  slope = jax.grad(
    lambda tokens: jnp.sum(
      attention.maskd(STUDENT, TEACHER, attention.token_masks(TEACHER, tokens))
    )
  )(TOKENS)
  np.testing.assert_array_equal(slope, 0)


def test_masks_of_nothing_cost_nothing():
  value, slope = jax.value_and_grad(
    lambda s: jnp.sum(attention.maskd(s, TEACHER, jnp.zeros((2, 3, 4, 1))))
  )(STUDENT)
  assert value == 0
  np.testing.assert_array_equal(slope, 0)


WEIGHT = np.linspace(-1.0, 1.0, 5)


def _probe(x):
  return x @ jnp.asarray(WEIGHT, jnp.float32)[:, None] + 0.5


def test_tokens_are_fitted_to_the_labels_and_apart_from_each_other():
  masks, teacher = _numpy(_masks()), _numpy(TEACHER)
  expected = []
  for image in range(2):
    lesion = np.asarray(LABELS)[image, 1::2, 1::2]
    task = []
    for token in range(4):
      seen = (masks[image, ..., token, None] * teacher[image]) @ WEIGHT + 0.5
      probability = 1 / (1 + np.exp(-seen))
      right = np.where(lesion == 1, probability, 1 - probability)
      task.append(-np.log(right).mean())
    dice = []
    for a in range(4):
      for b in range(a + 1, 4):
        first, second = masks[image, ..., a], masks[image, ..., b]
        dice.append(
          2 * (first * second).sum() / ((first**2).sum() + (second**2).sum())
        )
    expected.append(np.mean(task) + np.mean(dice))
  fit = attention.token_fit(_masks(), TEACHER, LABELS, probe=_probe)
  np.testing.assert_allclose(fit, expected, rtol=1e-4)


def test_one_token_alone_overlaps_with_none():
  one = _masks()[..., :1]
  twice = jnp.concatenate([one, one], -1)
  fit = functools.partial(
    attention.token_fit, teacher_feat=TEACHER, labels=LABELS, probe=_probe
  )
  # Two equal masks overlap by 1.
  np.testing.assert_allclose(fit(twice), fit(one) + 1, rtol=1e-5)


def test_fitting_moves_the_tokens_and_not_the_teacher():
  by_tokens, by_teacher = jax.grad(
    lambda tokens, teacher: jnp.sum(
      attention.token_fit(
        attention.token_masks(teacher, tokens), teacher, LABELS, probe=_probe
      )
    ),
    (0, 1),
  )(TOKENS, TEACHER)
  assert np.all(np.any(by_tokens != 0, -1))
  np.testing.assert_array_equal(by_teacher, 0)


def test_a_shape_of_tokens_or_masks_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r"[Ss]hape"):
    attention.token_masks(TEACHER, TOKENS[:, :4])
  with pytest.raises(ValueError, match="rank"):
    attention.token_masks(TEACHER[0], TOKENS)
  for masks in (_masks()[:, :2], _masks()[..., 0], _masks()[:1]):
    with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
      attention.maskd(STUDENT, TEACHER, masks)
    with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
      attention.token_fit(masks, TEACHER, LABELS, probe=_probe)
  with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
    attention.token_fit(_masks(), TEACHER, LABELS[:1], probe=_probe)


def test_half_precision_in_float32_out():
  half = [x.astype(jnp.bfloat16) for x in (TEACHER, TOKENS)]
  masks = attention.token_masks(*half)
  assert masks.dtype == jnp.float32
  masks = masks.astype(jnp.bfloat16)
  fit, wide = (
    attention.token_fit(x, half[0], LABELS, probe=_probe)
    for x in (masks, masks.astype(jnp.float32))
  )
  assert fit.dtype == jnp.float32
  np.testing.assert_allclose(fit, wide, rtol=1e-6)
