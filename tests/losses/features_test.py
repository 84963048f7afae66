import functools
import math
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import boundary
from kdseg.losses import features

SHAPE = (2, 6, 8, 3)


def _features(seed, shape=SHAPE):
  return jax.random.normal(jax.random.key(seed), shape)


STUDENT, TEACHER = _features(1), _features(2)
KEY = jax.random.key(7)


def _region():
  region = np.zeros(SHAPE[:3], np.float32)
  region[0, 1:4, 2:7] = 1
  region[1, :, 3] = 1
  return jnp.asarray(region)


REGION = _region()


def _identity(x):
  return x


def _conv(seed, size=3):
  """A generator: convolution, ReLU, convolution, with fixed weights."""
  first, second = 0.3 * _features(seed, (2, size, size, 3, 3))

  def apply(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  return lambda x: apply(jax.nn.relu(apply(x, first)), second)


class _Spy:
  """Remembers what a generator was given."""

  def __init__(self, generate=_identity):
    self.seen = []
    self.generate = generate

  def __call__(self, x):
    self.seen.append(x)
    return self.generate(x)


def _mean_squares(x, y):
  return np.mean(np.square(np.asarray(x) - np.asarray(y)), (1, 2, 3))


class KeepMaskTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.parameters(0.25, 0.75)
  def test_hides_its_share_of_the_region_and_nothing_outside(self, ratio):
    region = jnp.zeros((2, 64, 64)).at[:, 8:40].set(1)
    keep = self.variant(
      lambda region, seed: features.keep_mask(
        jax.random.key(seed), region, mask_ratio=ratio
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
    keep = features.keep_mask(KEY, region, mask_ratio=1.0)
    np.testing.assert_array_equal(keep, region == 0)
    assert np.all(features.keep_mask(KEY, region, mask_ratio=0.0))

  def test_a_draw_of_exactly_zero_hides_nothing_at_ratio_zero(self):
    with mock.patch.object(
      jax.random, "uniform", lambda key, shape: jnp.zeros(shape)
    ):
      keep = features.keep_mask(KEY, jnp.ones((1, 4, 4)), mask_ratio=0.0)
    assert np.all(keep)

  def test_outside_has_its_own_ratio(self):
    region = jnp.zeros((2, 64, 64)).at[:, :32].set(1)
    keep = features.keep_mask(KEY, region, mask_ratio=0.0, ratio_outside=0.15)
    hidden = 1 - np.asarray(keep, np.float64)
    assert np.all(hidden[:, :32] == 0)
    bound = 5 * math.sqrt(0.15 * 0.85 / 4096)
    assert abs(np.mean(hidden[:, 32:]) - 0.15) < bound

  @parameterized.parameters(2, 4)
  def test_blocks_share_a_draw_also_where_they_are_cut(self, side):
    keep = np.asarray(
      features.keep_mask(
        KEY, jnp.ones((2, 30, 31)), mask_ratio=0.5, granularity=side
      )
    )
    for y in range(0, 30, side):
      for x in range(0, 31, side):
        block = keep[:, y : y + side, x : x + side]
        assert np.all(block == block[:, :1, :1])
    corners = keep[:, ::side, ::side]
    assert 0.25 < np.mean(corners) < 0.75

  def test_images_draw_apart_and_an_image_draws_the_same_in_any_batch(self):
    rng = jax.random.split(KEY, 4)
    draw = functools.partial(features.keep_mask, mask_ratio=0.5)
    whole = draw(rng, jnp.ones((4, 8, 8)))
    halves = [draw(rng[i : i + 2], jnp.ones((2, 8, 8))) for i in (0, 2)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))
    one_key = draw(KEY, jnp.ones((4, 8, 8)))
    np.testing.assert_array_equal(one_key[:2], draw(KEY, jnp.ones((2, 8, 8))))
    assert np.any(one_key[0] != one_key[1])

  @parameterized.parameters(
    ({"mask_ratio": 1.1}, "mask_ratio"),
    ({"mask_ratio": 0.5, "ratio_outside": -0.1}, "ratio_outside"),
    ({"mask_ratio": 0.5, "granularity": 0}, "granularity"),
  )
  def test_values_out_of_range_are_refused(self, values, message):
    with pytest.raises(ValueError, match=message):
      features.keep_mask(KEY, jnp.ones((1, 4, 4)), **values)


class MbfTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.parameters("all", "band", "band_weighted")
  def test_equals_slow_loops_over_what_the_generator_saw(self, loss_region):
    spy = _Spy()
    options = {"loss_region": loss_region, "band_weight": 2.0}
    features.mbf(STUDENT, TEACHER, REGION, KEY, generate=spy, **options)
    visible = np.asarray(spy.seen[0])
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
          }[loss_region]
          for c in range(3):
            error = 2 * visible[image, i, j, c] - TEACHER[image, i, j, c]
            total += weight * float(error) ** 2
            count += weight
      expected.append(total / count)

    def loss(student, teacher, region, seed):
      return features.mbf(
        student,
        teacher,
        region,
        jax.random.key(seed),
        generate=lambda x: 2 * x,
        **options,
      )

    value = self.variant(loss)(STUDENT, TEACHER, REGION, 7)
    chex.assert_type(value, jnp.float32)
    np.testing.assert_allclose(value, expected, rtol=1e-5)

  def test_a_cell_is_hidden_with_all_its_channels_or_not_at_all(self):
    spy = _Spy()
    features.mbf(STUDENT, TEACHER, REGION, KEY, generate=spy, mask_ratio=0.5)
    same = np.asarray(spy.seen[0] == STUDENT)
    gone = np.asarray(spy.seen[0] == 0)
    whole_cells = np.all(same, -1) | np.all(gone, -1)
    assert np.all(whole_cells)
    assert np.all(np.all(same, -1) | (REGION > 0))
    inside = np.all(gone, -1)[np.asarray(REGION) > 0]
    assert 0 < np.mean(inside) < 1

  def test_region_everywhere_is_mgd(self):
    generate = _conv(3)
    everywhere = jnp.ones(SHAPE[:3])
    np.testing.assert_array_equal(
      features.mbf(STUDENT, TEACHER, everywhere, KEY, generate=generate),
      features.mgd(STUDENT, TEACHER, KEY, generate=generate),
    )

  def test_mask_ratio_zero_ignores_the_key_and_the_region(self):
    loss = functools.partial(
      features.mbf, STUDENT, TEACHER, generate=_conv(3), mask_ratio=0.0
    )
    first = loss(REGION, KEY)
    np.testing.assert_array_equal(loss(REGION, jax.random.key(8)), first)
    np.testing.assert_array_equal(loss(1 - REGION, KEY), first)

  def test_neither_mask_nor_generator_is_fitnet(self):
    np.testing.assert_array_equal(
      features.mbf(
        STUDENT, TEACHER, REGION, KEY, generate=_identity, mask_ratio=0.0
      ),
      features.fitnet(STUDENT, TEACHER),
    )

  def test_fitnet_is_the_mean_squared_difference(self):
    student = jnp.asarray([[[[1.0, 2.0]], [[0.0, -1.0]]]])
    teacher = jnp.asarray([[[[0.0, 4.0]], [[0.0, 2.0]]]])
    # (1 + 4 + 0 + 9) / 4.
    np.testing.assert_array_equal(features.fitnet(student, teacher), [3.5])

  def test_same_key_same_loss_and_another_key_another_loss(self):
    loss = functools.partial(
      features.mbf, STUDENT, TEACHER, REGION, generate=_conv(3)
    )
    np.testing.assert_array_equal(loss(KEY), loss(jax.random.key(7)))
    assert np.all(loss(KEY) != loss(jax.random.key(8)))

  @parameterized.named_parameters(
    ("identity", _identity), ("1x1", _conv(3, 1)), ("3x3", _conv(3, 3))
  )
  def test_hidden_cells_have_no_gradient_and_shown_ones_have(self, generate):
    spy = _Spy(generate)
    slope = jax.grad(
      lambda s: jnp.sum(
        features.mbf(s, TEACHER, REGION, KEY, generate=generate)
      )
    )(STUDENT)
    features.mbf(STUDENT, TEACHER, REGION, KEY, generate=spy)
    hidden = np.all(np.asarray(spy.seen[0]) == 0, -1)
    assert np.any(hidden)
    np.testing.assert_array_equal(np.asarray(slope)[hidden], 0)
    # All but those, with the 1x1 generator, where each ReLU happens to be 0.
    assert np.mean(np.any(np.asarray(slope)[~hidden] != 0, -1)) > 0.8

  def test_what_is_hidden_cannot_poison_the_loss(self):
    spy = _Spy()
    features.mbf(STUDENT, TEACHER, REGION, KEY, generate=spy)
    hidden = jnp.all(spy.seen[0] == 0, -1, keepdims=True)
    poisoned = jnp.where(hidden, jnp.nan, STUDENT)
    np.testing.assert_array_equal(
      features.mbf(poisoned, TEACHER, REGION, KEY, generate=_conv(3)),
      features.mbf(STUDENT, TEACHER, REGION, KEY, generate=_conv(3)),
    )

  def test_gradient_is_the_one_of_finite_differences(self):
    def smooth(x):
      return jnp.tanh(x) + 0.5 * jnp.roll(x, 1, 1)

    chex.assert_numerical_grads(
      lambda s: jnp.sum(
        features.mbf(
          s,
          TEACHER,
          REGION,
          KEY,
          generate=smooth,
          loss_region="band_weighted",
          normalise="l2",
        )
      ),
      (STUDENT,),
      order=1,
      atol=5e-3,
      rtol=5e-3,
    )

  def test_an_image_without_a_band_costs_what_it_shows_and_stays_finite(self):
    empty = jnp.zeros(SHAPE[:3])
    loss = features.mbf(STUDENT, TEACHER, empty, KEY, generate=_identity)
    np.testing.assert_allclose(loss, _mean_squares(STUDENT, TEACHER), rtol=1e-6)

    def in_band(student):
      return features.mbf(
        student,
        TEACHER,
        REGION.at[0].set(0),
        KEY,
        generate=_identity,
        loss_region="band",
      )

    assert in_band(STUDENT)[0] == 0
    assert in_band(STUDENT)[1] > 0
    slope = jax.grad(lambda s: jnp.sum(in_band(s)))(STUDENT)
    chex.assert_tree_all_finite(slope)
    np.testing.assert_array_equal(slope[0], 0)

  def test_loss_in_the_band_ignores_what_lies_outside_and_all_does_not(self):
    outside = (1 - REGION)[..., None]
    for name, ignored in (("band", True), ("all", False)):
      loss = functools.partial(
        features.mbf, generate=_identity, loss_region=name
      )
      there = loss(STUDENT, TEACHER, REGION, KEY)
      moved = loss(STUDENT, TEACHER + 5 * outside, REGION, KEY)
      assert np.array_equal(there, moved) == ignored

  def test_band_weight_zero_is_the_whole_map(self):
    loss = functools.partial(
      features.mbf, STUDENT, TEACHER, REGION, KEY, generate=_identity
    )
    np.testing.assert_allclose(
      loss(loss_region="band_weighted", band_weight=0.0), loss(), rtol=1e-6
    )

  def test_std_divides_the_teacher_only(self):
    std = jnp.asarray([0.5, 1.0, 4.0])
    np.testing.assert_allclose(
      features.fitnet(STUDENT, TEACHER, normalise="std", teacher_std=std),
      _mean_squares(STUDENT, TEACHER / std),
      rtol=1e-6,
    )
    slope = jax.grad(
      lambda d: jnp.sum(
        features.fitnet(STUDENT, TEACHER, normalise="std", teacher_std=d)
      )
    )(std)
    np.testing.assert_array_equal(slope, 0)

  def test_l2_compares_directions(self):
    # Unit vectors at a right angle differ by 2 in squared length; half that in
    # the mean over two channels.
    student = jnp.asarray([[[[3.0, 0.0]]], [[[0.0, 0.5]]]])
    teacher = jnp.asarray([[[[0.0, 7.0]]], [[[0.0, 9.0]]]])
    loss = features.fitnet(student, teacher, normalise="l2")
    np.testing.assert_allclose(loss, [1.0, 0.0], atol=1e-6)

  def test_l2_of_a_cell_without_features_has_a_finite_gradient(self):
    slope = jax.grad(
      lambda s: jnp.sum(features.fitnet(s, TEACHER, normalise="l2"))
    )(jnp.zeros(SHAPE))
    chex.assert_tree_all_finite(slope)

  def test_mean_weight_makes_a_mean_of_mgds_sum(self):
    generate = _conv(3)
    spy = _Spy(generate)
    mean = features.mgd(STUDENT, TEACHER, KEY, generate=spy)
    restored = np.asarray(generate(spy.seen[0]))
    total = np.sum(np.square(restored - np.asarray(TEACHER)), (1, 2, 3))
    weight = features.mean_weight(2e-5, SHAPE[1:])
    np.testing.assert_allclose(weight * mean, 2e-5 * total, rtol=1e-5)
    # Tabled: 64 channels at 64 x 64.
    assert round(features.mean_weight(2e-5, (64, 64, 64)), 2) == 5.24

  def test_mgd_hides_its_share_anywhere(self):
    spy = _Spy()
    ones = jnp.ones((2, 64, 64, 2))
    features.mgd(ones, ones, KEY, generate=spy, mask_ratio=0.75)
    hidden = 1 - float(jnp.mean(spy.seen[0]))
    assert abs(hidden - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 8192)

  def test_shapes_and_options_that_do_not_fit_are_refused(self):
    loss = functools.partial(features.mbf, generate=_identity)
    for student, teacher, region in (
      (STUDENT, TEACHER[..., :2], REGION),
      (STUDENT[0], TEACHER[0], REGION),
      (STUDENT, TEACHER, REGION[:, :5]),
      (STUDENT, TEACHER, REGION[..., None]),
    ):
      with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
        loss(student, teacher, region, KEY)
    for options, message in (
      ({"loss_region": "edge"}, "loss_region must be one of all, band"),
      ({"normalise": "max"}, "normalise must be one of none, std, l2"),
      ({"normalise": "std"}, "needs teacher_std"),
      ({"normalise": "std", "teacher_std": jnp.ones(2)}, "shape"),
      ({"generate": lambda x: x[..., :1]}, "shape"),
    ):
      with pytest.raises(ValueError, match=message):
        loss(STUDENT, TEACHER, REGION, KEY, **options)


def _every_feature_loss():
  one = {"generate": _conv(3)}
  three = {
    "generate": [_conv(3), _conv(4), _conv(5)],
    "mask_ratios": (0.75,) * 3,
  }

  def multiscale(student, teacher, rng, **options):
    return features.m2bf_multiscale(
      [student, 2 * student],
      [teacher, 3 * teacher],
      [REGION] * 2,
      rng,
      generate=[_conv(3), _conv(4)],
      carry=[_identity],
      mask_ratios=(0.75,) * 2,
      **options,
    )

  def heads(student, teacher, rng, **options):
    return features.m2bf(
      student, teacher, [REGION] * 3, rng, **three, **options
    )

  return (
    ("fitnet", lambda s, t, rng: features.fitnet(s, t)),
    ("mgd", lambda s, t, rng: features.mgd(s, t, rng, **one)),
    ("mbf", lambda s, t, rng: features.mbf(s, t, REGION, rng, **one)),
    ("cascade", heads),
    ("residual", functools.partial(heads, head_input="residual")),
    ("parallel", functools.partial(heads, topology="parallel")),
    ("multiscale", multiscale),
  )


class EveryFeatureLossTest(chex.TestCase):
  @parameterized.named_parameters(*_every_feature_loss())
  def test_the_teacher_gets_no_gradient_and_the_student_does(self, loss):
    student, teacher = jax.grad(lambda s, t: jnp.sum(loss(s, t, KEY)), (0, 1))(
      STUDENT, TEACHER
    )
    np.testing.assert_array_equal(teacher, 0)
    assert np.max(np.abs(student)) > 1e-3

  @parameterized.named_parameters(*_every_feature_loss())
  def test_one_value_per_image_whoever_is_beside_it(self, loss):
    value = loss(STUDENT, TEACHER, KEY)
    chex.assert_shape(value, (2,))
    changed = loss(STUDENT.at[1].set(9.0), TEACHER, KEY)
    np.testing.assert_allclose(changed[0], value[0], rtol=1e-5)
    assert abs(changed[1] - value[1]) > 0.1

  @chex.variants(with_jit=True, with_pmap=True)
  def test_a_compiled_cascade_is_the_one_that_runs_step_by_step(self):
    loss = dict(_every_feature_loss())["cascade"]
    compiled = self.variant(lambda s, t, seed: loss(s, t, jax.random.key(seed)))
    np.testing.assert_allclose(
      compiled(STUDENT, TEACHER, 7), loss(STUDENT, TEACHER, KEY), rtol=1e-5
    )

  @parameterized.named_parameters(*_every_feature_loss())
  def test_bfloat16_in_float32_out(self, loss):
    teacher = TEACHER.astype(jnp.bfloat16)
    value = loss(STUDENT, teacher, KEY)
    chex.assert_type(value, jnp.float32)
    wide = loss(STUDENT, teacher.astype(jnp.float32), KEY)
    # Only the 3 * teacher of the multi-scale case rounds on the way.
    np.testing.assert_allclose(value, wide, rtol=1e-2)

  def test_bfloat16_features_are_compared_in_float32(self):
    student, teacher = (x.astype(jnp.bfloat16) for x in (STUDENT, TEACHER))
    value = features.mbf(student, teacher, REGION, KEY, generate=_identity)
    chex.assert_type(value, jnp.float32)
    wide = features.mbf(
      student.astype(jnp.float32),
      teacher.astype(jnp.float32),
      REGION,
      KEY,
      generate=_identity,
    )
    np.testing.assert_array_equal(value, wide)

  def test_the_generator_computes_in_the_type_of_the_student(self):
    spy = _Spy()
    student = STUDENT.astype(jnp.bfloat16)
    features.mbf(student, TEACHER, REGION, KEY, generate=spy)
    assert spy.seen[0].dtype == jnp.bfloat16


class M2bfTest(chex.TestCase):
  def _loss(self, generate, **options):
    heads = len(generate)
    options = {"mask_ratios": (0.75,) * heads, **options}
    return features.m2bf(
      STUDENT, TEACHER, [REGION] * heads, KEY, generate=generate, **options
    )

  @parameterized.product(
    topology=("cascade", "parallel"),
    head_input=("generated", "residual"),
    weights=("uniform", "last", "geometric"),
  )
  def test_one_head_is_mbf_to_the_bit(self, topology, head_input, weights):
    options = {"loss_region": "band_weighted", "normalise": "l2"}
    value = self._loss(
      [_conv(3)],
      topology=topology,
      head_input=head_input,
      weights=weights,
      **options,
    )
    expected = features.mbf(
      STUDENT, TEACHER, REGION, KEY, generate=_conv(3), **options
    )
    np.testing.assert_array_equal(value, expected)

  @parameterized.parameters(
    ("cascade", "generated"), ("cascade", "residual"), ("parallel", "generated")
  )
  def test_heads_read_what_their_topology_hands_on(self, topology, head_input):
    spies = [_Spy(_conv(seed)) for seed in (3, 4, 5)]
    loss = self._loss(spies, topology=topology, head_input=head_input)
    made = [spy.generate(spy.seen[0]) for spy in spies]
    if topology == "parallel":
      sources = [STUDENT] * 3
    elif head_input == "generated":
      sources = [STUDENT, made[0], made[1]]
    else:
      sources = [STUDENT, STUDENT + made[0], STUDENT + made[1]]
    for spy, source in zip(spies, sources):
      seen = np.asarray(spy.seen[0])
      hidden = np.all(seen == 0, -1)
      assert 0.4 < np.mean(hidden[np.asarray(REGION) > 0]) < 1
      assert not np.any(hidden[np.asarray(REGION) == 0])
      np.testing.assert_allclose(seen[~hidden], source[~hidden], rtol=1e-6)
    expected = np.mean([_mean_squares(x, TEACHER) for x in made], 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

  def test_each_head_hides_other_cells(self):
    spies = [_Spy(), _Spy(), _Spy()]
    self._loss(spies, topology="parallel")
    seen = [np.asarray(spy.seen[0]) for spy in spies]
    assert np.any(seen[0] != seen[1])
    assert np.any(seen[1] != seen[2])
    assert np.any(seen[0] != seen[2])

  def test_each_head_has_its_region_and_its_ratio(self):
    regions = [REGION, 1 - REGION, REGION]
    spies = [_Spy(), _Spy(), _Spy()]
    features.m2bf(
      STUDENT,
      TEACHER,
      regions,
      KEY,
      generate=spies,
      mask_ratios=(1.0, 1.0, 0.0),
      topology="parallel",
    )
    for spy, shown in zip(spies, (1 - REGION, REGION, jnp.ones_like(REGION))):
      np.testing.assert_array_equal(spy.seen[0], STUDENT * shown[..., None])

  @parameterized.parameters(
    ("uniform", (1 / 3, 1 / 3, 1 / 3)),
    ("last", (0, 0, 1)),
    ("geometric", (1 / 7, 2 / 7, 4 / 7)),
  )
  def test_heads_are_weighed(self, kind, expected):
    np.testing.assert_allclose(features.head_weights(3, kind), expected)
    spies = [_Spy(_conv(seed)) for seed in (3, 4, 5)]
    loss = self._loss(spies, weights=kind)
    each = [_mean_squares(spy.generate(spy.seen[0]), TEACHER) for spy in spies]
    np.testing.assert_allclose(loss, np.dot(expected, each), rtol=1e-5)

  def test_the_last_heads_loss_reaches_the_first_generator(self):
    def loss(scale):
      first, last = _conv(3), _conv(4)
      return jnp.sum(
        self._loss([lambda x: scale * first(x), last], weights="last")
      )

    assert abs(jax.grad(loss)(1.0)) > 1e-3

  def test_options_reach_the_heads(self):
    plain = self._loss([_identity] * 2)
    std = jnp.asarray([2.0, 2.0, 2.0])
    for options in (
      {"ratio_outside": 0.5},
      {"granularity": 4},
      {"loss_region": "band"},
      {"loss_region": "band_weighted", "band_weight": 3.0},
      {"normalise": "l2"},
      {"normalise": "std", "teacher_std": std},
    ):
      with self.subTest(str(options)):
        assert np.all(self._loss([_identity] * 2, **options) != plain)

  def test_what_does_not_fit_is_refused(self):
    for generate, options, message in (
      ([], {}, "at least one"),
      ([_identity] * 2, {"mask_ratios": (0.5,)}, "mask_ratios .* 2 heads: 1"),
      ([_identity], {"topology": "ring"}, "topology"),
      ([_identity], {"topology": "multiscale"}, "topology"),
      ([_identity], {"head_input": "both"}, "head_input"),
      ([_identity], {"weights": "first"}, "head_weights"),
    ):
      with pytest.raises(ValueError, match=message):
        self._loss(generate, **options)
    with pytest.raises(ValueError, match=r"[Ss]hape"):
      features.m2bf(
        STUDENT,
        TEACHER,
        [REGION, REGION[:, :5]],
        KEY,
        generate=[_identity] * 2,
        mask_ratios=(0.5,) * 2,
      )


class MultiscaleTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    self.deep = _features(11, (2, 3, 4, 5)), _features(12, (2, 3, 4, 5))
    self.deep_region = boundary.to_grid(REGION, 3, 4)

  def _carry(self, x):
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)[..., :3]

  def _loss(self, generate, **options):
    return features.m2bf_multiscale(
      [self.deep[0], STUDENT],
      [self.deep[1], TEACHER],
      [self.deep_region, REGION],
      KEY,
      generate=generate,
      carry=[self._carry],
      mask_ratios=(0.5, 0.75),
      **options,
    )

  def test_the_shallow_head_reads_its_tap_plus_what_the_deep_one_made(self):
    deep, shallow = _Spy(jnp.tanh), _Spy(_conv(3))
    loss = self._loss([deep, shallow], weights="geometric")
    made = jnp.tanh(deep.seen[0])
    source = STUDENT + self._carry(made)
    seen = np.asarray(shallow.seen[0])
    hidden = np.all(seen == 0, -1)
    assert np.any(hidden)
    assert not np.any(hidden[np.asarray(REGION) == 0])
    np.testing.assert_allclose(seen[~hidden], source[~hidden], rtol=1e-6)
    each = [
      _mean_squares(made, self.deep[1]),
      _mean_squares(shallow.generate(shallow.seen[0]), TEACHER),
    ]
    np.testing.assert_allclose(loss, np.dot([1 / 3, 2 / 3], each), rtol=1e-5)

  def test_taps_of_one_size_hide_other_cells(self):
    spies = [_Spy(), _Spy()]
    features.m2bf_multiscale(
      [STUDENT] * 2,
      [TEACHER] * 2,
      [REGION] * 2,
      KEY,
      generate=spies,
      carry=[jnp.zeros_like],
      mask_ratios=(0.5, 0.5),
    )
    assert np.any(spies[0].seen[0] != spies[1].seen[0])

  def test_one_tap_is_mbf_to_the_bit(self):
    value = features.m2bf_multiscale(
      [STUDENT],
      [TEACHER],
      [REGION],
      KEY,
      generate=[_conv(3)],
      carry=[],
      mask_ratios=[0.75],
    )
    np.testing.assert_array_equal(
      value, features.mbf(STUDENT, TEACHER, REGION, KEY, generate=_conv(3))
    )

  def test_each_tap_has_its_own_teacher_std(self):
    std = [jnp.full(5, 2.0), jnp.full(3, 4.0)]
    spies = [_Spy(), _Spy()]
    loss = self._loss(spies, normalise="std", teacher_std=std)
    each = [
      _mean_squares(spies[0].seen[0], self.deep[1] / 2),
      _mean_squares(spies[1].seen[0], TEACHER / 4),
    ]
    np.testing.assert_allclose(loss, np.mean(each, 0), rtol=1e-5)

  def test_what_does_not_fit_is_refused(self):
    with pytest.raises(ValueError, match=r"student_taps .* 1 heads: 2"):
      self._loss([_identity])
    with pytest.raises(ValueError, match=r"teacher_std .* 2 heads: 1"):
      self._loss([_identity] * 2, normalise="std", teacher_std=[jnp.ones(5)])
    with pytest.raises(ValueError, match=r"[Ss]hape"):
      features.m2bf_multiscale(
        [self.deep[0], STUDENT],
        [self.deep[1], TEACHER],
        [self.deep_region, REGION],
        KEY,
        generate=[_identity] * 2,
        carry=[_identity],
        mask_ratios=(0.5, 0.75),
      )


@pytest.mark.parametrize(
  ("schedule", "radii"),
  # 5 * 1.5 = 7.5 and 5 * 2.25 = 11.25.
  [("const", (5, 5, 5)), ("narrowing", (11, 8, 5)), ("widening", (5, 8, 11))],
)
def test_band_radii(schedule, radii):
  assert features.band_radii(5, 3, schedule) == radii


@pytest.mark.parametrize(
  ("schedule", "ratios"),
  [("const", (0.75, 0.75, 0.75)), ("increasing", (0.25, 0.5, 0.75))],
)
def test_mask_ratios(schedule, ratios):
  assert features.mask_ratios(0.75, 3, schedule) == pytest.approx(ratios)


@pytest.mark.parametrize(
  "schedule",
  [
    functools.partial(features.band_radii, 5),
    functools.partial(features.mask_ratios, 0.75),
    features.head_weights,
  ],
)
def test_an_unknown_schedule_is_refused_by_name(schedule):
  with pytest.raises(ValueError, match="'sideways'"):
    schedule(3, "sideways")


class BoundaryDistillationTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    self.student = {"low": STUDENT, "high": STUDENT[:, ::2, ::2]}
    self.teacher = {"low": TEACHER, "high": TEACHER[:, ::2, ::2], "s16": None}
    labels = jnp.zeros((2, 24, 32)).at[:, 8:16, 8:24].set(1)
    self.regions = [
      boundary.region("gt_band", labels, radius=radius) for radius in (5, 2)
    ]

  def _losses(self, student=None, **options):
    return features.boundary_distillation(
      student or self.student,
      self.teacher,
      self.regions,
      KEY,
      generate=lambda tap, head, x: _conv(10 * len(tap) + head)(x),
      mask_ratios=(0.5, 0.75),
      **options,
    )

  def test_is_m2bf_on_each_taps_grid(self):
    options = {"topology": "parallel", "loss_region": "band"}
    losses = self._losses(**options)
    assert list(losses) == ["low", "high"]
    for tap, grid in (("low", (6, 8)), ("high", (3, 4))):
      expected = features.m2bf(
        self.student[tap],
        self.teacher[tap],
        [boundary.to_grid(region, *grid) for region in self.regions],
        features.tap_key(KEY, tap),
        generate=[_conv(10 * len(tap)), _conv(10 * len(tap) + 1)],
        mask_ratios=(0.5, 0.75),
        **options,
      )
      np.testing.assert_array_equal(losses[tap], expected)

  def test_taps_draw_apart_and_do_not_move_each_other(self):
    alone = self._losses({"high": self.student["high"]})
    np.testing.assert_array_equal(alone["high"], self._losses()["high"])
    data = [
      jax.random.key_data(features.tap_key(KEY, tap)).tolist()
      for tap in ("low", "high", "s16")
    ]
    assert len({tuple(key) for key in data}) == 3

  def test_each_tap_has_its_own_teacher_std(self):
    std = {"low": jnp.full(3, 2.0), "high": jnp.full(3, 4.0)}
    losses = self._losses(normalise="std", teacher_std=std)
    self.teacher = {"low": TEACHER / 2, "high": TEACHER[:, ::2, ::2] / 4}
    expected = self._losses()
    for tap in losses:
      np.testing.assert_allclose(losses[tap], expected[tap], rtol=1e-6)

  def test_a_tap_that_the_teacher_lacks_is_named(self):
    with pytest.raises(ValueError, match=r"no tap 'deep', only low, high, s16"):
      self._losses({"deep": STUDENT})
