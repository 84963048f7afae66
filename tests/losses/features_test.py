import functools
import math

import jax
import jax.numpy as jnp
from maps import KEY
from maps import REGION
from maps import SHAPE
from maps import STUDENT
from maps import TEACHER
from maps import Spy
from maps import conv
from maps import identity
from maps import mean_squares
import numpy as np

from kdseg.losses import features
from kdseg.losses import mbf
from kdseg.losses.masking import Comparison
from kdseg.losses.masking import Hiding


def test_fitnet_is_the_mean_squared_difference():
  student = jnp.asarray([[[[1.0, 2.0]], [[0.0, -1.0]]]])
  teacher = jnp.asarray([[[[0.0, 4.0]], [[0.0, 2.0]]]])
  # (1 + 4 + 0 + 9) / 4.
  np.testing.assert_array_equal(features.fitnet(student, teacher), [3.5])


def test_mbf_with_neither_mask_nor_generator_is_fitnet():
  np.testing.assert_array_equal(
    mbf.mbf(
      STUDENT, TEACHER, REGION, KEY, generate=identity, hiding=Hiding(0.0)
    ),
    features.fitnet(STUDENT, TEACHER),
  )


def test_mbf_of_a_region_everywhere_is_mgd():
  generate = conv(3)
  everywhere = jnp.ones(SHAPE[:3])
  np.testing.assert_array_equal(
    mbf.mbf(STUDENT, TEACHER, everywhere, KEY, generate=generate),
    features.mgd(STUDENT, TEACHER, KEY, generate=generate),
  )


def test_fitnet_and_mgd_know_no_band():
  in_band = Comparison("band_weighted", 9.0, "l2")
  whole = in_band._replace(where="all")
  for loss in (
    functools.partial(features.fitnet, STUDENT, TEACHER),
    functools.partial(features.mgd, STUDENT, TEACHER, KEY, generate=identity),
  ):
    np.testing.assert_array_equal(
      loss(comparison=in_band), loss(comparison=whole)
    )
    assert np.all(loss(comparison=whole) != loss())


def test_mgd_hides_its_share_anywhere():
  spy = Spy()
  ones = jnp.ones((2, 64, 64, 2))
  features.mgd(ones, ones, KEY, generate=spy, hiding=Hiding(0.75))
  hidden = 1 - float(jnp.mean(spy.seen[0]))
  assert abs(hidden - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 8192)


def test_mean_weight_makes_a_mean_of_mgds_sum():
  generate = conv(3)
  spy = Spy(generate)
  mean = features.mgd(STUDENT, TEACHER, KEY, generate=spy)
  restored = generate(spy.seen[0])
  cells_and_channels = math.prod(SHAPE[1:])
  total = cells_and_channels * mean_squares(restored, TEACHER)
  weight = features.mean_weight(2e-5, SHAPE[1:])
  np.testing.assert_allclose(weight * mean, 2e-5 * total, rtol=1e-5)
  # Tabled: 64 channels at 64 x 64.
  assert round(features.mean_weight(2e-5, (64, 64, 64)), 2) == 5.24


def test_features_of_half_precision_are_compared_in_float32():
  half = [x.astype(jnp.bfloat16) for x in (STUDENT, TEACHER)]
  value = features.fitnet(*half)
  assert value.dtype == jnp.float32
  wide = features.fitnet(*jax.tree.map(lambda x: x.astype(jnp.float32), half))
  np.testing.assert_array_equal(value, wide)
