import functools

import chex
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.distill import layers
from kdseg.losses import masking
from kdseg.losses import mbf

KEY = jax.random.key(0)
TAPS = {"high": 6, "low": 4}
GRIDS = {"high": (4, 4), "low": (8, 8)}


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


STUDENT = {"high": _normal(1, 2, 4, 4, 5), "low": _normal(2, 2, 8, 8, 4)}


def _initialised(**options):
  module = layers.Distiller(TAPS, **options)
  return module, module.init(KEY, STUDENT, GRIDS)


def _shapes(**options):
  return jax.eval_shape(
    lambda: layers.Distiller(TAPS, **options).init(KEY, STUDENT, GRIDS)
  )


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _subtrees(variables):
  return {tap: sorted(variables["params"][tap]) for tap in variables["params"]}


def test_parameters_are_one_subtree_a_tap():
  variables = _shapes(heads=2)
  assert list(variables) == ["params"]
  # The tap with equal channels needs no alignment.
  assert _subtrees(variables) == {
    "high": ["align", "generator_0", "generator_1"],
    "low": ["generator_0", "generator_1"],
  }
  shapes = jax.tree.map(jnp.shape, variables["params"]["high"])
  assert shapes["align"] == {"conv": {"kernel": (1, 1, 5, 6), "bias": (6,)}}
  conv = {"kernel": (3, 3, 6, 6), "bias": (6,)}
  assert shapes["generator_1"] == {"conv_0": conv, "conv_1": conv}


def test_shared_generators_are_one_and_every_head_runs_it():
  module, variables = _initialised(heads=3, share_generators=True)
  assert _subtrees(variables)["low"] == ["generator_0"]
  run = functools.partial(module.apply, variables, method="generate")
  np.testing.assert_array_equal(
    run("low", 0, STUDENT["low"]), run("low", 2, STUDENT["low"])
  )


def test_heads_that_share_nothing_differ():
  module, variables = _initialised(heads=2)
  run = functools.partial(module.apply, variables, method="generate")
  first, second = (run("low", head, STUDENT["low"]) for head in (0, 1))
  assert np.max(np.abs(first - second)) > 0.1


def test_a_multiscale_topology_carries_into_all_taps_but_the_deepest():
  module, variables = _initialised(heads=3, topology="multiscale")
  assert _subtrees(variables) == {
    "high": ["align", "generator_0"],
    "low": ["carry", "generator_0"],
  }
  carried = module.apply(
    variables, "low", _normal(3, 2, 4, 4, 6), 8, 8, method="carry"
  )
  chex.assert_shape(carried, (2, 8, 8, 4))


def test_align_resizes_to_the_teachers_grid_before_it_mixes_channels():
  module, variables = _initialised()
  align = functools.partial(module.apply, variables, "high", method="align")
  conv = variables["params"]["high"]["align"]["conv"]
  rows = jnp.asarray([0.0, 4.0])[None, :, None, None]
  x = jnp.broadcast_to(rows, (1, 2, 2, 5))
  aligned = align(x, 4, 4)
  chex.assert_shape(aligned, (1, 4, 4, 6))
  # Half-pixel centres: 0, 1, 3, 4.
  grown = jnp.broadcast_to(
    jnp.asarray([0.0, 1.0, 3.0, 4.0])[None, :, None, None], (1, 4, 4, 5)
  )
  expected = grown @ conv["kernel"][0, 0] + conv["bias"]
  np.testing.assert_allclose(aligned, expected, rtol=1e-5)


def test_align_of_equal_grid_and_channels_changes_nothing():
  module, variables = _initialised()
  aligned = module.apply(variables, "low", STUDENT["low"], 8, 8, method="align")
  np.testing.assert_array_equal(aligned, STUDENT["low"])


def _generator(kind, channels=4):
  module = layers.Generator(kind)
  x = _normal(5, 1, 9, 9, channels)
  return module, module.init(KEY, x), x


@pytest.mark.parametrize(
  ("kind", "width", "parameters"),
  [
    # Two convolutions of 9 * 4 * 4 weights and 4 biases.
    ("c3rc3", 0, 2 * (9 * 16 + 4)),
    ("c3rc3", 7, 2 * 9 * 28 + 7 + 4),
    ("c3rc3_norm", 0, 2 * (9 * 16 + 4) + 2 * 4),
    ("dwconv", 0, 2 * (9 * 4 + 16 + 4)),
    ("1x1", 0, 2 * (16 + 4)),
    ("identity", 0, 0),
  ],
)
def test_generators_keep_the_shape_and_have_their_number_of_parameters(
  kind, width, parameters
):
  module = layers.Generator(kind, width)
  x = jnp.zeros((1, 9, 9, 4))
  made, variables = jax.eval_shape(module.init_with_output, KEY, x)
  assert made.shape == x.shape
  assert _count(variables) == parameters
  assert set(variables) <= {"params"}


@pytest.mark.parametrize(
  ("kind", "reach"),
  [("c3rc3", 2), ("c3rc3_norm", 2), ("dwconv", 2), ("1x1", 0), ("identity", 0)],
)
def test_a_generator_sees_its_receptive_field_and_no_further(kind, reach):
  module, variables, x = _generator(kind, channels=8)
  moved = module.apply(variables, x.at[0, 4, 4].add(5.0))
  changed = np.any(np.asarray(moved != module.apply(variables, x))[0], -1)
  expected = np.zeros((9, 9), bool)
  expected[4 - reach : 5 + reach, 4 - reach : 5 + reach] = True
  np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("kind", ["c3rc3", "c3rc3_norm", "dwconv", "1x1"])
def test_a_generator_is_not_linear(kind):
  module, variables, x = _generator(kind)
  there, back = (module.apply(variables, sign * x) for sign in (1, -1))
  assert np.max(np.abs(there + back)) > 0.05


def test_a_norm_makes_the_generator_blind_to_scale():
  module, variables, x = _generator("c3rc3_norm")
  np.testing.assert_allclose(
    module.apply(variables, 9 * x), module.apply(variables, x), atol=1e-3
  )


@pytest.mark.parametrize(
  ("channels", "heads"), [(4, 1), (4, 3), (16, 2), (32, 3), (64, 4)]
)
def test_no_other_width_comes_closer_to_the_parameters_of_the_heads(
  channels, heads
):
  def parameters(width):
    module = layers.Generator("c3rc3", width)
    shapes = jax.eval_shape(module.init, KEY, jnp.zeros((1, 4, 4, channels)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

  together = heads * parameters(channels)
  best = layers.matched_width(channels, heads)
  off = [abs(parameters(best + d) - together) for d in (-1, 0, 1)]
  assert off[1] == min(off)
  if heads == 1:
    assert best == channels


def test_projection_directions_are_orthonormal_and_always_the_same():
  eye = jnp.eye(320)[None, None]
  directions = layers.project(eye, 128)[0, 0]
  np.testing.assert_allclose(directions.T @ directions, np.eye(128), atol=1e-5)
  np.testing.assert_array_equal(layers.project(eye, 128)[0, 0], directions)
  other = layers.project(eye, 128, seed=1)[0, 0]
  assert np.max(np.abs(other - directions)) > 0.1


def test_projection_signs_do_not_hang_on_the_implementation_of_qr():
  # With the triangle's diagonal positive, a column points the way of the
  # normal draw that it came from.
  directions = layers.project(jnp.eye(40)[None, None], 8)[0, 0]
  normal = np.random.default_rng(0).standard_normal((40, 8))
  assert np.all(np.sum(np.asarray(directions) * normal, 0) > 0)


def test_projection_keeps_a_tap_of_the_right_width_and_refuses_to_widen():
  x = _normal(3, 1, 2, 2, 16)
  assert layers.project(x, 16) is x
  with pytest.raises(ValueError, match="cannot project 16 channels to 17"):
    layers.project(x, 17)
  assert layers.project(x.astype(jnp.bfloat16), 8).dtype == jnp.bfloat16


def test_only_taps_wider_than_256_channels_are_narrowed():
  assert [layers.target_channels(c) for c in (24, 256, 257, 768)] == [
    24,
    256,
    128,
    128,
  ]


@pytest.mark.parametrize("topology", ["cascade", "parallel", "multiscale"])
def test_every_parameter_learns_from_the_loss_that_it_is_for(topology):
  module, variables = _initialised(heads=2, topology=topology)
  teacher = {
    tap: _normal(9, 2, *GRIDS[tap], channels) for tap, channels in TAPS.items()
  }

  def loss(params):
    bound = functools.partial(module.apply, {"params": params})
    aligned = {
      tap: bound(tap, STUDENT[tap], *GRIDS[tap], method="align") for tap in TAPS
    }

    def heads(tap, count):
      return [
        mbf.Head(
          jnp.ones((2, *GRIDS[tap])),
          functools.partial(bound, tap, head, method="generate"),
          masking.Hiding(0.5),
        )
        for head in range(count)
      ]

    if topology != "multiscale":
      return sum(
        jnp.sum(
          mbf.m2bf(
            aligned[tap], teacher[tap], heads(tap, 2), KEY, topology=topology
          )
        )
        for tap in TAPS
      )
    return jnp.sum(
      mbf.m2bf_multiscale(
        list(aligned.values()),
        list(teacher.values()),
        [*heads("high", 1), *heads("low", 1)],
        KEY,
        carry=[lambda x: bound("low", x, *GRIDS["low"], method="carry")],
      )
    )

  slopes = traverse_util.flatten_dict(
    jax.jit(jax.grad(loss))(variables["params"])
  )
  for name, slope in slopes.items():
    assert np.max(np.abs(slope)) > 1e-6, name


def test_parameters_stay_float32_when_it_computes_in_bfloat16():
  module, variables = _initialised(dtype=jnp.bfloat16)
  chex.assert_trees_all_equal_dtypes(
    variables, jax.tree.map(lambda x: x.astype(jnp.float32), variables)
  )
  for made in module.apply(variables, STUDENT, GRIDS).values():
    chex.assert_type(made, jnp.bfloat16)


def test_calling_it_runs_all_heads_in_a_row():
  module, variables = _initialised(heads=2)
  made = module.apply(variables, STUDENT, GRIDS)
  bound = functools.partial(module.apply, variables)
  x = bound("high", STUDENT["high"], 4, 4, method="align")
  for head in (0, 1):
    x = bound("high", head, x, method="generate")
  np.testing.assert_allclose(made["high"], x, rtol=1e-5)
  assert list(made) == ["high", "low"]


def test_tokens_are_vectors_of_the_teachers_channels_with_one_probe_a_tap():
  module, variables = _initialised(heads=0, tokens=3)
  assert _subtrees(variables) == {
    "high": ["align", "probe", "tokens"],
    "low": ["probe", "tokens"],
  }
  tokens = module.apply(variables, "high", method="receptive_tokens")
  assert tokens.shape == (3, 6)
  np.testing.assert_array_equal(tokens, variables["params"]["high"]["tokens"])
  x = _normal(4, 2, 4, 4, 6)
  seen = module.apply(variables, "high", x, method="probe")
  probe = variables["params"]["high"]["probe"]
  np.testing.assert_allclose(
    seen, x @ probe["kernel"] + probe["bias"], rtol=1e-5, atol=1e-6
  )


def test_tokens_start_with_logits_of_the_size_of_the_features():
  module = layers.Distiller({"wide": 400}, heads=0, tokens=400)
  variables = module.init(
    KEY, {"wide": jnp.zeros((1, 1, 1, 400))}, {"wide": (1, 1)}
  )
  x = _normal(1, 400)
  logits = variables["params"]["wide"]["tokens"] @ x
  np.testing.assert_allclose(jnp.std(logits), 1.0, rtol=0.1)


def test_without_tokens_there_is_no_probe():
  assert _subtrees(_shapes(heads=0)) == {"high": ["align"]}


def test_unknown_names_are_refused():
  module, variables = _initialised()
  with pytest.raises(ValueError, match="one of high, low: 'deep'"):
    module.apply(variables, "deep", 0, STUDENT["low"], method="generate")
  with pytest.raises(ValueError, match=r"one of c3rc3, .*: 'mlp'"):
    _initialised(generator="mlp")
  with pytest.raises(ValueError, match="topology"):
    _initialised(topology="ring")
  with pytest.raises(ValueError, match="no head 2"):
    module.apply(variables, "low", 2, STUDENT["low"], method="generate")
