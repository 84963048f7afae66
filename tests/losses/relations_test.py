"""Each relation against slow loops that restate its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import logits
from kdseg.losses import relations

SHAPE = (2, 4, 6)


def _features(seed, channels):
  return jax.random.normal(jax.random.key(seed), (*SHAPE, channels))


STUDENT, TEACHER = _features(1, 3), _features(2, 5)


def _labels():
  """Lesions of a third and of a half; twice the features' sides."""
  labels = np.zeros((2, 8, 12), np.float32)
  labels[0, 2:6, 4:12] = 1
  labels[1, :, :6] = 1
  return jnp.asarray(labels)


LABELS = _labels()


def _numpy(x):
  return np.asarray(x, np.float64)


def _cosine(a, b):
  return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _attention(feat, power):
  """Of one image [h, w, C]; a unit vector."""
  flat = [np.mean(np.abs(cell) ** power) for row in feat for cell in row]
  return np.array(flat) / np.linalg.norm(flat)


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("power", [2, 4])
def test_at_is_the_mean_square_between_unit_attention_vectors(power):
  expected = [
    np.mean((_attention(s, power) - _attention(t, power)) ** 2)
    for s, t in zip(_numpy(STUDENT), _numpy(TEACHER))
  ]
  loss = relations.at(STUDENT, TEACHER, power=power)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_at_by_hand_on_two_cells():
  # Squares (9, 16) / 25 against (1, 0): differences 9/sqrt(337) - 1 and
  # 16/sqrt(337), mean of their squares.
  student = jnp.asarray([3.0, 4.0]).reshape(1, 1, 2, 1)
  teacher = jnp.asarray([[2.0, 2.0], [0.0, 0.0]]).reshape(1, 1, 2, 2)
  norm = math.sqrt(9**2 + 16**2)
  expected = ((9 / norm - 1) ** 2 + (16 / norm) ** 2) / 2
  np.testing.assert_allclose(
    relations.at(student, teacher), [expected], rtol=1e-5
  )


def test_at_defaults_to_squares():
  np.testing.assert_array_equal(
    relations.at(STUDENT, TEACHER), relations.at(STUDENT, TEACHER, power=2)
  )


@pytest.mark.parametrize("scale", [1e-5, 1e5])
@pytest.mark.parametrize("loss", [relations.at, relations.imd])
def test_attention_does_not_depend_on_the_scale_of_the_features(loss, scale):
  np.testing.assert_allclose(
    loss(scale * STUDENT, TEACHER), loss(STUDENT, TEACHER), rtol=1e-4
  )
  slope, scaled = (
    jax.grad(lambda s: jnp.sum(loss(s, TEACHER)))(x)
    for x in (STUDENT, scale * STUDENT)
  )
  np.testing.assert_allclose(scale * scaled, slope, rtol=1e-3, atol=1e-6)


def test_a_power_that_is_not_even_is_refused():
  for power in (0, 1, 3):
    with pytest.raises(ValueError, match=f"even and positive: {power}"):
      relations.at(STUDENT, TEACHER, power=power)


# ------------------------------------------------------------------ pair-wise


def test_skd_pa_compares_the_cosines_of_all_pairs_of_pooled_nodes():
  expected = []
  for s, t in zip(_numpy(STUDENT), _numpy(TEACHER)):
    cosines = []
    for feat in (s, t):
      nodes = [
        feat[i : i + 2, j : j + 2].max((0, 1))
        for i in range(0, 4, 2)
        for j in range(0, 6, 2)
      ]
      cosines.append([[_cosine(a, b) for b in nodes] for a in nodes])
    expected.append(np.mean(np.square(np.subtract(*cosines))))
  np.testing.assert_allclose(
    relations.skd_pa(STUDENT, TEACHER), expected, rtol=1e-4
  )


def test_skd_pa_with_patches_of_one_cell_pools_nothing():
  # Orthogonal against parallel cells: of four cosines two differ, by 1.
  student = jnp.asarray([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 2, 2)
  teacher = jnp.asarray([[1.0], [5.0]]).reshape(1, 1, 2, 1)
  loss = relations.skd_pa(student, teacher, patch=1)
  np.testing.assert_allclose(loss, [0.5], rtol=1e-5)
  with pytest.raises(ValueError, match="at least 1"):
    relations.skd_pa(student, teacher, patch=0)


# ---------------------------------------------------------- means of a class


def _split(feat, image):
  """The cells of skin and of lesion of one image; labels at cell centres."""
  inside = np.asarray(LABELS)[image, 1::2, 1::2].astype(bool)
  return feat[~inside], feat[inside]


def test_ifvd_compares_each_cells_cosine_with_the_mean_of_its_class():
  expected = []
  for image in range(2):
    closeness = []
    for feat in (_numpy(STUDENT)[image], _numpy(TEACHER)[image]):
      closeness.append(
        [
          _cosine(cell, part.mean(0))
          for part in _split(feat, image)
          for cell in part
        ]
      )
    expected.append(np.mean(np.square(np.subtract(*closeness))))
  loss = relations.ifvd(STUDENT, TEACHER, LABELS)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_rad_compares_the_cosine_of_the_means_of_skin_and_lesion():
  expected = []
  for image in range(2):
    affinity = [
      _cosine(*(part.mean(0) for part in _split(feat, image)))
      for feat in (_numpy(STUDENT)[image], _numpy(TEACHER)[image])
    ]
    expected.append((affinity[0] - affinity[1]) ** 2)
  loss = relations.rad(STUDENT, TEACHER, LABELS)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rad_of_one_region_alone_is_nothing(value):
  labels = jnp.full_like(LABELS, value)
  np.testing.assert_array_equal(relations.rad(STUDENT, TEACHER, labels), 0)


# ---------------------------------------------------------------- cross-image


def _similarity(a, b):
  """Softmax of the rows of the cosines of two images' cells, over .1."""
  a, b = (
    x.reshape(-1, x.shape[-1]) / np.linalg.norm(
      x.reshape(-1, x.shape[-1]), axis=-1, keepdims=True
    )
    for x in (a, b)
  )  # fmt: skip
  exponentials = np.exp(a @ b.T / 0.1)
  return exponentials / exponentials.sum(-1, keepdims=True)


def test_cirkd_is_the_divergence_of_all_pairs_of_images():
  students, teachers = _numpy(STUDENT), _numpy(TEACHER)
  expected = []
  for i in range(2):
    pairs = []
    for j in range(2):
      p = _similarity(teachers[i], teachers[j])
      q = _similarity(students[i], students[j])
      pairs.append(np.mean(np.sum(p * np.log(p / q), -1)))
    expected.append(np.mean(pairs))
  loss = relations.cirkd_lite(STUDENT, TEACHER)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_cirkd_averages_what_is_wider_than_its_limit():
  def halve(x):
    return x.reshape(2, 2, 2, 3, 2, x.shape[-1]).mean((2, 4))

  np.testing.assert_allclose(
    relations.cirkd_lite(STUDENT, TEACHER, widest=3),
    relations.cirkd_lite(halve(STUDENT), halve(TEACHER)),
    rtol=1e-4,
  )


def test_cirkd_depends_on_the_images_beside():
  both = relations.cirkd_lite(STUDENT, TEACHER)
  alone = relations.cirkd_lite(STUDENT[:1], TEACHER[:1])
  assert abs(both[0] - alone[0]) > 0.01


def test_values_of_cirkd_out_of_range_are_refused():
  with pytest.raises(ValueError, match="temperature"):
    relations.cirkd_lite(STUDENT, TEACHER, temperature=0.0)
  with pytest.raises(ValueError, match="widest"):
    relations.cirkd_lite(STUDENT, TEACHER, widest=0)


# ----------------------------------------------------------------------- emkd


def test_imd_sums_fourth_powers_of_attention_over_the_cells():
  expected = [
    np.sum((_attention(s, 4) - _attention(t, 4)) ** 2)
    for s, t in zip(_numpy(STUDENT), _numpy(TEACHER))
  ]
  np.testing.assert_allclose(
    relations.imd(STUDENT, TEACHER), expected, rtol=1e-4
  )


def test_emkd_is_a_tenth_of_kd_and_nine_tenths_of_both_maps_of_both_taps():
  student_logits, teacher_logits = jax.random.normal(
    jax.random.key(3), (2, *LABELS.shape)
  )
  taps = {
    "low": (STUDENT, TEACHER),
    "high": (STUDENT[:, ::2, ::2], TEACHER[:, ::2, ::2]),
  }
  expected = 0.1 * logits.kd(student_logits, teacher_logits, temperature=4.0)
  for pair in taps.values():
    expected += 0.9 * relations.imd(*pair)
    expected += 0.9 * relations.rad(*pair, LABELS)
  loss = relations.emkd(
    student_logits,
    teacher_logits,
    {tap: pair[0] for tap, pair in taps.items()},
    {tap: pair[1] for tap, pair in taps.items()},
    LABELS,
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_emkd_takes_its_weights_and_temperature():
  student_logits, teacher_logits = jax.random.normal(
    jax.random.key(3), (2, *LABELS.shape)
  )
  loss = relations.emkd(
    student_logits,
    teacher_logits,
    {"low": STUDENT},
    {"low": TEACHER},
    LABELS,
    weights=(2.0, 3.0, 5.0),
    temperature=1.0,
  )
  expected = (
    2 * logits.kd(student_logits, teacher_logits, temperature=1.0)
    + 3 * relations.imd(STUDENT, TEACHER)
    + 5 * relations.rad(STUDENT, TEACHER, LABELS)
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_taps_or_weights_that_do_not_fit_are_refused():
  z = jnp.zeros(LABELS.shape)
  with pytest.raises(ValueError, match="three"):
    relations.emkd(z, z, {}, {}, LABELS, weights=(1.0,))
  with pytest.raises(ValueError, match=r"differ: \['low'\], \['high'\]"):
    relations.emkd(z, z, {"low": STUDENT}, {"high": TEACHER}, LABELS)
  with pytest.raises(ValueError, match=r"[Ss]hape"):
    relations.emkd(z, z, {}, {}, LABELS[:, :4])
