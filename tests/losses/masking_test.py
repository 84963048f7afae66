import functools
import math
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
from maps import KEY
from maps import REGION
from maps import STUDENT
from maps import TEACHER
from maps import mean_squares
import numpy as np
import pytest

from kdseg.losses.masking import Comparison
from kdseg.losses.masking import Hiding
from kdseg.losses.masking import hide
from kdseg.losses.masking import keep_mask
from kdseg.losses.masking import squared_error


class KeepMaskTest(chex.TestCase):
  @chex.variants(with_jit=True, with_pmap=True)
  @parameterized.parameters(0.25, 0.75)
  def test_hides_its_share_of_the_region_and_nothing_outside(self, ratio):
    region = jnp.zeros((2, 64, 64)).at[:, 8:40].set(1)
    keep = self.variant(
      lambda region, seed: keep_mask(
        jax.random.key(seed), region, Hiding(ratio)
      )
    )(region, 3)
    assert keep.dtype == jnp.bool_
    hidden = 1 - np.asarray(keep, np.float64)
    assert np.all(hidden[:, :8] == 0)
    assert np.all(hidden[:, 40:] == 0)
    # 4096 draws: five standard deviations of a binomial share.
    bound = 5 * math.sqrt(ratio * (1 - ratio) / 4096)
    assert abs(np.mean(hidden[:, 8:40]) - ratio) < bound

  def test_ratios_of_one_and_zero_are_exact(self):
    region = jnp.zeros((2, 32, 32)).at[:, :9].set(1)
    np.testing.assert_array_equal(
      keep_mask(KEY, region, Hiding(1.0)), region == 0
    )
    assert np.all(keep_mask(KEY, region, Hiding(0.0)))

  def test_a_draw_of_exactly_zero_hides_nothing_at_ratio_zero(self):
    with mock.patch.object(
      jax.random, "uniform", lambda key, shape: jnp.zeros(shape)
    ):
      assert np.all(keep_mask(KEY, jnp.ones((1, 4, 4)), Hiding(0.0)))

  def test_outside_has_its_own_ratio(self):
    region = jnp.zeros((2, 64, 64)).at[:, :32].set(1)
    keep = keep_mask(KEY, region, Hiding(0.0, outside=0.15))
    hidden = 1 - np.asarray(keep, np.float64)
    assert np.all(hidden[:, :32] == 0)
    bound = 5 * math.sqrt(0.15 * 0.85 / 4096)
    assert abs(np.mean(hidden[:, 32:]) - 0.15) < bound

  @parameterized.parameters(2, 4)
  def test_blocks_share_a_draw_also_where_they_are_cut(self, side):
    keep = np.asarray(
      keep_mask(KEY, jnp.ones((2, 30, 31)), Hiding(0.5, block=side))
    )
    for y in range(0, 30, side):
      for x in range(0, 31, side):
        block = keep[:, y : y + side, x : x + side]
        assert np.all(block == block[:, :1, :1])
    corners = keep[:, ::side, ::side]
    assert 0.25 < np.mean(corners) < 0.75

  def test_images_draw_apart_and_an_image_draws_the_same_in_any_batch(self):
    rng = jax.random.split(KEY, 4)
    draw = functools.partial(keep_mask, hiding=Hiding(0.5))
    whole = draw(rng, jnp.ones((4, 8, 8)))
    halves = [draw(rng[i : i + 2], jnp.ones((2, 8, 8))) for i in (0, 2)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))
    one_key = draw(KEY, jnp.ones((4, 8, 8)))
    np.testing.assert_array_equal(one_key[:2], draw(KEY, jnp.ones((2, 8, 8))))
    assert np.any(one_key[0] != one_key[1])

  @parameterized.parameters(
    (Hiding(1.1), "ratio"),
    (Hiding(0.5, outside=-0.1), "outside"),
    (Hiding(0.5, block=0), "block"),
  )
  def test_values_out_of_range_are_refused(self, hiding, message):
    with pytest.raises(ValueError, match=message):
      keep_mask(KEY, jnp.ones((1, 4, 4)), hiding)


def test_hidden_cells_are_zero_whatever_they_held():
  keep = jnp.asarray([[[True, False]]])
  feat = jnp.asarray([[[[1.0, 2.0], [jnp.nan, 3.0]]]], jnp.bfloat16)
  hidden = hide(feat, keep)
  np.testing.assert_array_equal(
    hidden.astype(jnp.float32), [[[[1.0, 2.0], [0.0, 0.0]]]]
  )
  assert hidden.dtype == jnp.bfloat16


class SquaredErrorTest(chex.TestCase):
  @parameterized.parameters("all", "band", "band_weighted")
  def test_equals_slow_loops(self, where):
    comparison = Comparison(where, band_weight=2.0)
    expected = []
    for image in range(2):
      total = count = 0.0
      for i in range(6):
        for j in range(8):
          inside = float(REGION[image, i, j])
          weight = {
            "all": 1.0,
            "band": inside,
            "band_weighted": 1.0 + 2.0 * inside,
          }[where]
          error = STUDENT[image, i, j] - TEACHER[image, i, j]
          total += weight * float(jnp.sum(error**2))
          count += 3 * weight
      expected.append(total / count)
    value = squared_error(STUDENT, TEACHER, REGION, comparison)
    chex.assert_type(value, jnp.float32)
    np.testing.assert_allclose(value, expected, rtol=1e-5)

  def test_an_image_without_a_band_costs_nothing_in_the_band(self):
    def in_band(student):
      return squared_error(
        student, TEACHER, REGION.at[0].set(0), Comparison("band")
      )

    value = in_band(STUDENT)
    assert value[0] == 0
    assert value[1] > 0
    slope = jax.grad(lambda s: jnp.sum(in_band(s)))(STUDENT)
    chex.assert_tree_all_finite(slope)
    np.testing.assert_array_equal(slope[0], 0)

  def test_in_the_band_ignores_what_lies_outside_and_all_does_not(self):
    moved = TEACHER + 5 * (1 - REGION)[..., None]
    for where, ignored in (("band", True), ("all", False)):
      one, other = (
        squared_error(STUDENT, teacher, REGION, Comparison(where))
        for teacher in (TEACHER, moved)
      )
      assert np.array_equal(one, other) == ignored

  def test_std_divides_the_teacher_only(self):
    std = jnp.asarray([0.5, 1.0, 4.0])

    def loss(std):
      return squared_error(
        STUDENT, TEACHER, REGION, Comparison(normalise="std", teacher_std=std)
      )

    np.testing.assert_allclose(
      loss(std), mean_squares(STUDENT, TEACHER / std), rtol=1e-6
    )
    slope = jax.grad(lambda std: jnp.sum(loss(std)))(std)
    np.testing.assert_array_equal(slope, 0)

  def test_l2_compares_directions(self):
    # Unit vectors at a right angle differ by 2 in squared length; half that in
    # the mean over two channels.
    student = jnp.asarray([[[[3.0, 0.0]]], [[[0.0, 0.5]]]])
    teacher = jnp.asarray([[[[0.0, 7.0]]], [[[0.0, 9.0]]]])
    loss = functools.partial(
      squared_error,
      teacher_feat=teacher,
      region=jnp.ones((2, 1, 1)),
      comparison=Comparison(normalise="l2"),
    )
    np.testing.assert_allclose(loss(student), [1.0, 0.0], atol=1e-6)
    slope = jax.grad(lambda s: jnp.sum(loss(s)))(jnp.zeros_like(student))
    chex.assert_tree_all_finite(slope)

  @parameterized.parameters(
    (Comparison("edge"), "where must be one of all, band"),
    (Comparison(normalise="max"), "normalise must be one of none, std, l2"),
    (Comparison(normalise="std"), "needs teacher_std"),
    (Comparison(normalise="std", teacher_std=jnp.ones(2)), "shape"),
  )
  def test_options_that_do_not_fit_are_refused(self, comparison, message):
    with pytest.raises(ValueError, match=message):
      squared_error(STUDENT, TEACHER, REGION, comparison)
