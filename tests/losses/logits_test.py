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


# ----------------------------------------------------------------------- dist


def _sigmoid(z):
  return 1 / (1 + np.exp(-np.asarray(z, np.float64)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_one_minus_the_correlation_over_the_positions(temperature):
  student, teacher = 2 * jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
  expected = []
  for zs, zt in zip(student, teacher):
    correlation = np.corrcoef(
      _sigmoid(zs / temperature).ravel(), _sigmoid(zt / temperature).ravel()
    )[0, 1]
    expected.append(temperature**2 * (1 - correlation))
  np.testing.assert_allclose(
    logits.dist(student, teacher, temperature=temperature), expected, rtol=1e-4
  )


def test_dist_by_hand_on_four_pixels():
  # Probabilities (1, 1, 3, 3) / 4 and (1, 3, 1, 3) / 4 do not correlate, and
  # (1, 1, 3, 3) / 4 and (3, 3, 1, 1) / 4 correlate by -1.
  low, high = -math.log(3), math.log(3)
  one = jnp.asarray([[[low, low], [high, high]]])
  other = jnp.asarray([[[low, high], [low, high]]])
  np.testing.assert_allclose(logits.dist(one, other), 1.0, rtol=1e-5)
  np.testing.assert_allclose(logits.dist(one, -one), 2.0, rtol=1e-5)


def test_dist_of_a_linear_change_of_the_probabilities_is_nothing():
  probability = jax.random.uniform(jax.random.key(0), (2, 3, 4))
  flat = 0.3 + 0.4 * probability
  as_logits = [jnp.log(p / (1 - p)) for p in (probability, flat)]
  np.testing.assert_allclose(logits.dist(*as_logits), 0, atol=1e-5)


def test_dist_of_a_constant_is_a_half_and_of_two_is_nothing():
  constant = jnp.full((1, 3, 4), -2.0)
  varied = jax.random.normal(jax.random.key(0), (1, 3, 4))
  np.testing.assert_allclose(logits.dist(constant, varied), 0.5, rtol=1e-4)
  np.testing.assert_allclose(logits.dist(constant, constant + 1), 0, atol=1e-6)


def test_dist_between_two_classes_counts_the_pixels_on_different_sides():
  # Of four pixels, one correlates by -1 (costs 2), the others by 1.
  student = jnp.asarray([[[1.0, 2.0], [-1.0, -3.0]]])
  teacher = jnp.asarray([[[5.0, -0.5], [-2.0, -1.0]]])
  both, intra = (
    logits.dist(student, teacher, inter_weight=weight) for weight in (3.0, 0.0)
  )
  np.testing.assert_allclose(both - intra, 3.0 * 2 / 4, rtol=1e-4)


# ----------------------------------------------------------------------- bpkd


def _square():
  labels = np.zeros((1, 12, 12), np.float32)
  labels[:, 4:8, 4:8] = 1
  return labels


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bpkd_equals_slow_loops(temperature):
  labels = _square()
  student, teacher = 2 * jax.random.normal(jax.random.key(0), (2, 1, 12, 12))
  edge_sum = edge_count = 0.0
  layouts = ([], [])
  for i in range(12):
    for j in range(12):
      near = labels[0, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
      edge = near.min() != near.max()
      pair = [float(z[0, i, j]) / temperature for z in (student, teacher)]
      for layout, z in zip(layouts, pair):
        layout.append(0.0 if edge else z)
      if edge:
        edge_count += 1
        edge_sum += _divergence(_softmax([0, pair[1]]), _softmax([0, pair[0]]))
  body = _divergence(_softmax(layouts[1]), _softmax(layouts[0]))
  expected = 7 * 2 * edge_sum / edge_count + 11 * body
  loss = logits.bpkd(
    student,
    teacher,
    jnp.asarray(labels),
    radius=1,
    edge_weight=7.0,
    body_weight=11.0,
    temperature=temperature,
  )
  np.testing.assert_allclose(loss, [temperature**2 * expected], rtol=1e-4)


def test_bpkd_weighs_as_published_edge_by_class_by_50_and_body_by_20():
  # Student and teacher differ along the edge only: no body term.
  labels = jnp.asarray(_square())
  student, teacher = jax.random.normal(jax.random.key(0), (2, 1, 12, 12))
  band = logits.boundary.boundary_band(labels, radius=3)
  same = jnp.where(band > 0, student, teacher)
  edge = logits.bpkd(same, teacher, labels)
  only_edge = logits.kd(same, teacher, temperature=1.0) * 144 / jnp.sum(band)
  np.testing.assert_allclose(edge, 50 * 2 * only_edge, rtol=1e-4)
  # Without a lesion there is no edge, and all of it is body.
  empty = jnp.zeros_like(labels)
  body = logits.cwd(student, teacher, temperature=1.0)
  np.testing.assert_allclose(
    logits.bpkd(student, teacher, empty), 20 * body, rtol=1e-4
  )


# ------------------------------------------------------------------- ultralbm

PARTS = np.eye(3)


def test_the_edges_of_ultralbm_are_lengths_of_sobel_gradients():
  student, teacher = 2 * jax.random.normal(jax.random.key(0), (2, 1, 4, 5))

  def lengths(z):
    p = np.pad(_sigmoid(z[0]), 1, mode="edge")
    found = np.zeros((4, 5))
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    for i in range(4):
      for j in range(5):
        window = p[i : i + 3, j : j + 3]
        found[i, j] = np.hypot(
          np.sum(kernel * window), np.sum(kernel.T * window)
        )
    return found

  expected = np.mean((lengths(student) - lengths(teacher)) ** 2)
  loss = logits.ultralbm(student, teacher, weights=PARTS[1])
  np.testing.assert_allclose(loss, [expected], rtol=1e-4)


def test_the_pixels_of_ultralbm_are_eight_divergences():
  student, teacher = 2 * jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
  np.testing.assert_allclose(
    logits.ultralbm(student, teacher, weights=PARTS[0]),
    8 * logits.kd(student, teacher, temperature=1.0),
    rtol=1e-5,
  )


def test_the_layout_of_ultralbm_is_a_softmax_of_probabilities():
  student, teacher = 2 * jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
  expected = [
    _divergence(*(_softmax(_sigmoid(z).ravel() / 0.5) for z in (t, s)))
    for s, t in zip(student, teacher)
  ]
  loss = logits.ultralbm(student, teacher, weights=PARTS[2])
  np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-7)


def test_ultralbm_adds_its_parts_as_published():
  student, teacher = 2 * jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
  parts = [logits.ultralbm(student, teacher, weights=part) for part in PARTS]
  np.testing.assert_allclose(
    logits.ultralbm(student, teacher),
    0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2],
    rtol=1e-5,
  )


def test_a_flat_map_has_a_finite_gradient_through_its_sobel_length():
  flat = jnp.zeros((1, 4, 4))
  slope = jax.jit(
    jax.grad(lambda z: jnp.sum(logits.ultralbm(z, flat + 1, weights=PARTS[1])))
  )(flat)
  np.testing.assert_array_equal(slope, 0)


# ------------------------------------------------------------------- refusals


def test_options_out_of_range_are_refused():
  x = jnp.zeros((1, 2, 2))
  for loss in (logits.dist, logits.ultralbm):
    with pytest.raises(ValueError, match="temperature"):
      loss(x, x, temperature=0.0)
  with pytest.raises(ValueError, match="temperature"):
    logits.bpkd(x, x, x, temperature=0.0)
  with pytest.raises(ValueError, match="radius"):
    logits.bpkd(x, x, x, radius=-1)
  for labels in (x[:, :1], x[0], jnp.zeros((2, 2, 2))):
    with pytest.raises(ValueError, match=r"[Ss]hape"):
      logits.bpkd(x, x, labels)
  with pytest.raises(ValueError, match="three"):
    logits.ultralbm(x, x, weights=(1.0, 2.0))
