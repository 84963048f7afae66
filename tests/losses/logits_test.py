import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import logits


def _softmax(values):
  exponentials = [math.exp(value) for value in values]
  return [value / sum(exponentials) for value in exponentials]


def _divergence(p, q):
  return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_kd_is_the_divergence_of_three_quarters_from_a_half():
  # Teacher logit ln 3: (3/4, 1/4) against (1/2, 1/2).
  expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
  teacher = jnp.full((2, 2, 2), math.log(3))
  loss = logits.kd(jnp.zeros((2, 2, 2)), teacher, temperature=1.0)
  np.testing.assert_allclose(loss, [expected] * 2, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_two_class_form_on_0_and_z_pixel_by_pixel(temperature):
  student, teacher = 3 * jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
  expected = []
  for zs, zt in zip(np.asarray(student), np.asarray(teacher)):
    pixels = [
      _divergence(
        _softmax([0, b / temperature]), _softmax([0, a / temperature])
      )
      for a, b in zip(zs.flat, zt.flat)
    ]
    expected.append(temperature**2 * sum(pixels) / len(pixels))
  np.testing.assert_allclose(
    logits.kd(student, teacher, temperature=temperature), expected, rtol=1e-4
  )


def test_cwd_by_hand_on_four_pixels():
  # Teacher (1, 1, 1, 5) / 8 over the positions, student uniform.
  teacher = jnp.log(jnp.asarray([[[1.0, 1.0], [1.0, 5.0]]]))
  expected = 3 / 8 * math.log(1 / 2) + 5 / 8 * math.log(5 / 2)
  loss = logits.cwd(jnp.zeros((1, 2, 2)), teacher, temperature=1.0)
  np.testing.assert_allclose(loss, [expected], rtol=1e-5)


@pytest.mark.parametrize("loss", [logits.kd, logits.cwd])
def test_logits_and_temperature_times_three_cost_nine_times_as_much(loss):
  student, teacher = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
  np.testing.assert_allclose(
    loss(3 * student, 3 * teacher, temperature=3.0),
    9 * loss(student, teacher, temperature=1.0),
    rtol=1e-4,
  )


def test_cwd_ignores_a_constant_over_the_image_and_kd_does_not():
  student, teacher = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
  np.testing.assert_allclose(
    logits.cwd(student + 3, teacher), logits.cwd(student, teacher), rtol=1e-4
  )
  assert np.all(logits.kd(student + 3, teacher) > logits.kd(student, teacher))


@pytest.mark.parametrize("loss", [logits.kd, logits.cwd])
def test_a_temperature_that_is_not_positive_is_refused(loss):
  x = jnp.zeros((1, 2, 2))
  with pytest.raises(ValueError, match="temperature"):
    loss(x, x, temperature=0.0)
