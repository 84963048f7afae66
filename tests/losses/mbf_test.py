import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
from maps import KEY
from maps import REGION
from maps import SHAPE
from maps import STUDENT
from maps import TEACHER
from maps import Spy
from maps import conv
from maps import draw
from maps import identity
from maps import mean_squares
import numpy as np
import pytest

from kdseg.losses import boundary
from kdseg.losses.masking import Comparison
from kdseg.losses.masking import Hiding
from kdseg.losses.mbf import Head
from kdseg.losses.mbf import band_radii
from kdseg.losses.mbf import head_weights
from kdseg.losses.mbf import m2bf
from kdseg.losses.mbf import m2bf_multiscale
from kdseg.losses.mbf import mask_ratios
from kdseg.losses.mbf import mbf


class MbfTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  def test_equals_slow_loops_over_what_the_generator_saw(self):
    spy = Spy()
    mbf(STUDENT, TEACHER, REGION, KEY, generate=spy)
    visible = np.asarray(spy.seen[0])
    expected = []
    for image in range(2):
      total = 0.0
      for cell in np.ndindex(6, 8):
        error = 2 * visible[image][cell] - np.asarray(TEACHER)[image][cell]
        total += float(np.sum(error**2))
      expected.append(total / (6 * 8 * 3))

    def loss(student, teacher, region, seed):
      rng = jax.random.key(seed)
      return mbf(student, teacher, region, rng, generate=lambda x: 2 * x)

    value = self.variant(loss)(STUDENT, TEACHER, REGION, 7)
    chex.assert_type(value, jnp.float32)
    np.testing.assert_allclose(value, expected, rtol=1e-5)

  def test_a_cell_is_hidden_with_all_its_channels_or_not_at_all(self):
    spy = Spy()
    mbf(STUDENT, TEACHER, REGION, KEY, generate=spy, hiding=Hiding(0.5))
    same = np.asarray(spy.seen[0] == STUDENT)
    gone = np.asarray(spy.seen[0] == 0)
    assert np.all(np.all(same, -1) | np.all(gone, -1))
    assert np.all(np.all(same, -1) | (REGION > 0))
    inside = np.all(gone, -1)[np.asarray(REGION) > 0]
    assert 0 < np.mean(inside) < 1

  def test_mask_ratio_zero_ignores_the_key_and_the_region(self):
    loss = functools.partial(
      mbf, STUDENT, TEACHER, generate=conv(3), hiding=Hiding(0.0)
    )
    first = loss(REGION, KEY)
    np.testing.assert_array_equal(loss(REGION, jax.random.key(8)), first)
    np.testing.assert_array_equal(loss(1 - REGION, KEY), first)

  def test_same_key_same_loss_and_another_key_another_loss(self):
    loss = functools.partial(mbf, STUDENT, TEACHER, REGION, generate=conv(3))
    np.testing.assert_array_equal(loss(KEY), loss(jax.random.key(7)))
    assert np.all(loss(KEY) != loss(jax.random.key(8)))

  @parameterized.named_parameters(
    ("identity", identity), ("1x1", conv(3, 1)), ("3x3", conv(3, 3))
  )
  def test_hidden_cells_have_no_gradient_and_shown_ones_have(self, generate):
    spy = Spy(generate)
    slope = jax.grad(
      lambda s: jnp.sum(mbf(s, TEACHER, REGION, KEY, generate=generate))
    )(STUDENT)
    mbf(STUDENT, TEACHER, REGION, KEY, generate=spy)
    hidden = np.all(np.asarray(spy.seen[0]) == 0, -1)
    assert np.any(hidden)
    np.testing.assert_array_equal(np.asarray(slope)[hidden], 0)
    # All but those, with the 1x1 generator, where each ReLU happens to be 0.
    assert np.mean(np.any(np.asarray(slope)[~hidden] != 0, -1)) > 0.8

  def test_what_is_hidden_cannot_poison_the_loss(self):
    spy = Spy()
    mbf(STUDENT, TEACHER, REGION, KEY, generate=spy)
    hidden = jnp.all(spy.seen[0] == 0, -1, keepdims=True)
    poisoned = jnp.where(hidden, jnp.nan, STUDENT)
    loss = functools.partial(mbf, generate=conv(3))
    np.testing.assert_array_equal(
      loss(poisoned, TEACHER, REGION, KEY), loss(STUDENT, TEACHER, REGION, KEY)
    )

  def test_an_image_without_a_band_costs_what_it_shows(self):
    empty = jnp.zeros(SHAPE[:3])
    loss = mbf(STUDENT, TEACHER, empty, KEY, generate=identity)
    np.testing.assert_allclose(loss, mean_squares(STUDENT, TEACHER), rtol=1e-6)

  def test_the_generator_computes_in_the_type_of_the_student(self):
    spy = Spy()
    student = STUDENT.astype(jnp.bfloat16)
    loss = mbf(student, TEACHER, REGION, KEY, generate=spy)
    assert spy.seen[0].dtype == jnp.bfloat16
    assert loss.dtype == jnp.float32

  def test_shapes_that_do_not_fit_are_refused(self):
    loss = functools.partial(mbf, generate=identity)
    for student, teacher, region in (
      (STUDENT, TEACHER[..., :2], REGION),
      (STUDENT[0], TEACHER[0], REGION),
      (STUDENT, TEACHER, REGION[:, :5]),
      (STUDENT, TEACHER, REGION[..., None]),
    ):
      with pytest.raises(ValueError, match=r"[Ss]hape|rank"):
        loss(student, teacher, region, KEY)
    with pytest.raises(ValueError, match="shape"):
      mbf(STUDENT, TEACHER, REGION, KEY, generate=lambda x: x[..., :1])


def make_heads(generators, hiding=Hiding(), weights="uniform"):
  return [
    Head(REGION, generate, hiding, weight)
    for generate, weight in zip(
      generators, head_weights(len(generators), weights)
    )
  ]


def _cascades():
  three = make_heads([conv(3), conv(4), conv(5)])

  def multiscale(student, teacher, rng):
    return m2bf_multiscale(
      [student, 2 * student],
      [teacher, 3 * teacher],
      three[:2],
      rng,
      carry=[identity],
    )

  def heads(student, teacher, rng, **options):
    return m2bf(student, teacher, three, rng, **options)

  return (
    ("cascade", heads),
    ("residual", functools.partial(heads, head_input="residual")),
    ("parallel", functools.partial(heads, topology="parallel")),
    ("multiscale", multiscale),
  )


class EveryCascadeTest(chex.TestCase):
  @parameterized.named_parameters(*_cascades())
  def test_the_teacher_gets_no_gradient_and_the_student_does(self, loss):
    student, teacher = jax.grad(lambda s, t: jnp.sum(loss(s, t, KEY)), (0, 1))(
      STUDENT, TEACHER
    )
    np.testing.assert_array_equal(teacher, 0)
    assert np.max(np.abs(student)) > 1e-3

  @parameterized.named_parameters(*_cascades())
  def test_one_value_per_image_whatever_images_are_beside_it(self, loss):
    value = loss(STUDENT, TEACHER, KEY)
    chex.assert_shape(value, (2,))
    chex.assert_type(value, jnp.float32)
    changed = loss(STUDENT.at[1].set(9.0), TEACHER, KEY)
    np.testing.assert_allclose(changed[0], value[0], rtol=1e-5)
    assert abs(changed[1] - value[1]) > 0.1

  @chex.variants(with_jit=True, with_pmap=True)
  def test_a_compiled_cascade_is_the_one_that_runs_step_by_step(self):
    loss = dict(_cascades())["cascade"]
    compiled = self.variant(lambda s, t, seed: loss(s, t, jax.random.key(seed)))
    np.testing.assert_allclose(
      compiled(STUDENT, TEACHER, 7), loss(STUDENT, TEACHER, KEY), rtol=1e-5
    )


class M2bfTest(chex.TestCase):
  @parameterized.parameters(
    ("cascade", "generated"), ("cascade", "residual"), ("parallel", "generated")
  )
  def test_heads_read_what_their_topology_hands_on(self, topology, head_input):
    spies = [Spy(conv(seed)) for seed in (3, 4, 5)]
    loss = m2bf(
      STUDENT,
      TEACHER,
      make_heads(spies),
      KEY,
      topology=topology,
      head_input=head_input,
    )
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
    expected = np.mean([mean_squares(x, TEACHER) for x in made], 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)

  def test_each_head_hides_other_cells(self):
    spies = [Spy(), Spy(), Spy()]
    m2bf(STUDENT, TEACHER, make_heads(spies), KEY, topology="parallel")
    seen = [np.asarray(spy.seen[0]) for spy in spies]
    assert np.any(seen[0] != seen[1])
    assert np.any(seen[1] != seen[2])
    assert np.any(seen[0] != seen[2])

  def test_each_head_has_its_region_and_its_ratio(self):
    spies = [Spy(), Spy(), Spy()]
    heads = [
      Head(region, spy, Hiding(ratio))
      for region, spy, ratio in zip(
        (REGION, 1 - REGION, REGION), spies, (1.0, 1.0, 0.0)
      )
    ]
    m2bf(STUDENT, TEACHER, heads, KEY, topology="parallel")
    for spy, shown in zip(spies, (1 - REGION, REGION, jnp.ones_like(REGION))):
      np.testing.assert_array_equal(spy.seen[0], STUDENT * shown[..., None])

  @parameterized.parameters(
    ("uniform", (1 / 3, 1 / 3, 1 / 3)),
    ("last", (0, 0, 1)),
    ("geometric", (1 / 7, 2 / 7, 4 / 7)),
  )
  def test_heads_are_weighed(self, kind, expected):
    np.testing.assert_allclose(head_weights(3, kind), expected)
    spies = [Spy(conv(seed)) for seed in (3, 4, 5)]
    loss = m2bf(STUDENT, TEACHER, make_heads(spies, weights=kind), KEY)
    each = [mean_squares(spy.generate(spy.seen[0]), TEACHER) for spy in spies]
    np.testing.assert_allclose(loss, np.dot(expected, each), rtol=1e-5)

  def test_the_last_heads_loss_reaches_the_first_generator(self):
    def loss(scale):
      heads = make_heads(
        [lambda x: scale * conv(3)(x), conv(4)], weights="last"
      )
      return jnp.sum(m2bf(STUDENT, TEACHER, heads, KEY))

    assert abs(jax.grad(loss)(1.0)) > 1e-3

  def test_hiding_and_comparison_reach_every_head(self):
    def last(hiding=Hiding(), **options):
      heads = make_heads([identity] * 2, hiding, weights="last")
      return m2bf(STUDENT, TEACHER, heads, KEY, **options)

    plain = last()
    for changed in (
      last(Hiding(outside=0.5)),
      last(Hiding(block=4)),
      last(comparison=Comparison("band")),
      last(comparison=Comparison(normalise="l2")),
    ):
      assert np.all(changed != plain)

  def test_what_does_not_fit_is_refused(self):
    heads = make_heads([identity])
    for options, message in (
      ({"topology": "ring"}, "topology must be one of cascade, parallel"),
      ({"topology": "multiscale"}, "topology"),
      ({"head_input": "both"}, "head_input"),
    ):
      with pytest.raises(ValueError, match=message):
        m2bf(STUDENT, TEACHER, heads, KEY, **options)
    with pytest.raises(ValueError, match="at least one head"):
      m2bf(STUDENT, TEACHER, [], KEY)
    heads.append(Head(REGION[:, :5], identity))
    with pytest.raises(ValueError, match=r"[Ss]hape"):
      m2bf(STUDENT, TEACHER, heads, KEY)


class MultiscaleTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    self.deep = draw(11, (2, 3, 4, 5)), draw(12, (2, 3, 4, 5))
    self.deep_region = boundary.to_grid(REGION, 3, 4)

  def _carry(self, x):
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)[..., :3]

  def _loss(self, deep, shallow, weights="uniform", carry=None, **options):
    of_deep, of_shallow = head_weights(2, weights)
    return m2bf_multiscale(
      [self.deep[0], STUDENT],
      [self.deep[1], TEACHER],
      [
        Head(self.deep_region, deep, Hiding(0.5), of_deep),
        Head(REGION, shallow, Hiding(0.75), of_shallow),
      ],
      KEY,
      carry=[self._carry] if carry is None else carry,
      **options,
    )

  def test_the_shallow_head_reads_its_tap_plus_what_the_deep_one_made(self):
    deep, shallow = Spy(jnp.tanh), Spy(conv(3))
    loss = self._loss(deep, shallow, weights="geometric")
    made = jnp.tanh(deep.seen[0])
    source = STUDENT + self._carry(made)
    seen = np.asarray(shallow.seen[0])
    hidden = np.all(seen == 0, -1)
    assert np.any(hidden)
    assert not np.any(hidden[np.asarray(REGION) == 0])
    np.testing.assert_allclose(seen[~hidden], source[~hidden], rtol=1e-6)
    each = [
      mean_squares(made, self.deep[1]),
      mean_squares(shallow.generate(shallow.seen[0]), TEACHER),
    ]
    np.testing.assert_allclose(loss, np.dot([1 / 3, 2 / 3], each), rtol=1e-5)

  def test_taps_of_one_size_hide_other_cells(self):
    spies = [Spy(), Spy()]
    m2bf_multiscale(
      [STUDENT] * 2,
      [TEACHER] * 2,
      [Head(REGION, spy, Hiding(0.5)) for spy in spies],
      KEY,
      carry=[jnp.zeros_like],
    )
    assert np.any(spies[0].seen[0] != spies[1].seen[0])

  def test_one_tap_is_mbf_to_the_bit(self):
    value = m2bf_multiscale(
      [STUDENT], [TEACHER], make_heads([conv(3)]), KEY, carry=[]
    )
    np.testing.assert_array_equal(
      value, mbf(STUDENT, TEACHER, REGION, KEY, generate=conv(3))
    )

  def test_each_tap_has_its_own_comparison(self):
    spies = [Spy(), Spy()]
    loss = self._loss(
      *spies,
      comparisons=[
        Comparison(normalise="std", teacher_std=jnp.full(channels, std))
        for channels, std in ((5, 2.0), (3, 4.0))
      ],
    )
    each = [
      mean_squares(spies[0].seen[0], self.deep[1] / 2),
      mean_squares(spies[1].seen[0], TEACHER / 4),
    ]
    np.testing.assert_allclose(loss, np.mean(each, 0), rtol=1e-5)

  def test_what_does_not_fit_is_refused(self):
    with pytest.raises(ValueError, match=r"carry .* 2 taps but the first: 0"):
      self._loss(identity, identity, carry=[])
    with pytest.raises(ValueError, match=r"[Ss]hape"):
      self._loss(identity, identity, carry=[identity])
    with pytest.raises(ValueError, match="argument"):
      self._loss(identity, identity, comparisons=[Comparison()])


@pytest.mark.parametrize(
  ("schedule", "radii"),
  # 5 * 1.5 = 7.5 and 5 * 2.25 = 11.25.
  [("const", (5, 5, 5)), ("narrowing", (11, 8, 5)), ("widening", (5, 8, 11))],
)
def test_band_radii(schedule, radii):
  assert band_radii(5, 3, schedule) == radii


@pytest.mark.parametrize(
  ("schedule", "ratios"),
  [("const", (0.75, 0.75, 0.75)), ("increasing", (0.25, 0.5, 0.75))],
)
def test_mask_ratios(schedule, ratios):
  assert mask_ratios(0.75, 3, schedule) == pytest.approx(ratios)


@pytest.mark.parametrize(
  "schedule",
  [
    functools.partial(band_radii, 5),
    functools.partial(mask_ratios, 0.75),
    head_weights,
  ],
)
def test_an_unknown_schedule_is_refused_by_name(schedule):
  with pytest.raises(ValueError, match="'sideways'"):
    schedule(3, "sideways")
