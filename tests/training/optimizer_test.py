import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdseg.training import optimizer

PARAMS = {
  "network": {
    "encoder": {"kernel": jnp.full(2, 2.0), "scale": jnp.full(2, 2.0)},
    "head": {"kernel": jnp.full(2, 2.0), "bias": jnp.full(2, 2.0)},
  },
  "distiller": {"low": {"kernel": jnp.full(2, 2.0)}},
}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def updates(gradients, *, steps=1, learning_rate=0.1, **options):
  """The last of `steps` updates with the same gradients."""
  tx = optimizer.make_optimizer(
    schedule=optax.constant_schedule(learning_rate), **options
  )
  state = tx.init(PARAMS)
  for _ in range(steps):
    update, state = tx.update(gradients, state, PARAMS)
  return update


@pytest.mark.parametrize(
  ("kind", "values"),
  [
    # Half way down: cos(pi / 2) for the cosine, and a straight line.
    ("cosine", {0: 0.0, 1: 0.2, 2: 0.4, 6: 0.2, 10: 0.0}),
    ("linear", {0: 0.0, 1: 0.2, 2: 0.4, 4: 0.3, 6: 0.2, 10: 0.0}),
    ("constant", {0: 0.0, 1: 0.2, 2: 0.4, 9: 0.4}),
  ],
)
def test_rises_over_the_warm_up_then_falls_to_nothing(kind, values):
  schedule = optimizer.make_schedule(
    peak=0.4, steps=10, warmup_steps=2, kind=kind
  )
  for step, value in values.items():
    np.testing.assert_allclose(schedule(step), value, atol=1e-7)


def test_without_warm_up_the_first_step_is_the_highest():
  schedule = optimizer.make_schedule(peak=0.4, steps=10)
  np.testing.assert_allclose(schedule(0), 0.4, rtol=1e-6)
  np.testing.assert_allclose(schedule(5), 0.2, rtol=1e-6)


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warm_up_has_to_end_before_the_training(warmup):
  with pytest.raises(ValueError, match="does not fit into 10 steps"):
    optimizer.make_schedule(peak=1.0, steps=10, warmup_steps=warmup)


def test_an_unknown_schedule_is_answered_with_the_known():
  with pytest.raises(ValueError, match=r"constant.*cosine.*linear.*'step'"):
    optimizer.make_schedule(peak=1.0, steps=10, kind="step")


def test_sgd_has_nesterov_momentum():
  # Velocity v_1 = g, v_2 = 1.9 g; the update looks ahead: g + 0.9 v.
  first = updates(ONES, name="sgd")
  second = updates(ONES, name="sgd", steps=2)
  np.testing.assert_allclose(first["network"]["head"]["bias"], -0.19)
  np.testing.assert_allclose(
    second["network"]["head"]["bias"], -0.1 * (1 + 0.9 * 1.9), rtol=1e-6
  )


def test_adam_moves_by_the_learning_rate_first():
  moved = updates(jax.tree.map(lambda x: 7.0 * x, ONES), name="adamw")
  jax.tree.map(lambda x: np.testing.assert_allclose(x, -0.1, rtol=1e-5), moved)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_kernels_decay_and_nothing_else(name):
  moved = updates(ZEROS, name=name, weight_decay=0.01)
  # lr * decay * weight = 0.1 * 0.01 * 2
  network, distiller = moved["network"], moved["distiller"]
  np.testing.assert_allclose(network["head"]["kernel"], -0.002, rtol=1e-6)
  np.testing.assert_allclose(network["encoder"]["kernel"], -0.002, rtol=1e-6)
  np.testing.assert_allclose(distiller["low"]["kernel"], -0.002, rtol=1e-6)
  assert not network["head"]["bias"].any()
  assert not network["encoder"]["scale"].any()


def test_gradients_are_clipped_by_their_norm_over_all_parameters():
  # Ten ones: norm sqrt(10), clipped to 1, each 1 / sqrt(10); momentum 1.9.
  moved = updates(ONES, name="sgd", clip_norm=1.0)
  jax.tree.map(
    lambda x: np.testing.assert_allclose(x, -0.19 / np.sqrt(10), rtol=1e-5),
    moved,
  )
  small = jax.tree.map(lambda x: 0.1 * x, ONES)
  moved = updates(small, name="sgd", clip_norm=1.0)
  np.testing.assert_allclose(
    moved["network"]["head"]["bias"], -0.019, rtol=1e-5
  )


def test_encoders_move_by_their_share_of_the_learning_rate():
  moved = updates(ONES, name="sgd", encoder_scale=0.25)
  np.testing.assert_allclose(
    moved["network"]["encoder"]["kernel"], -0.19 / 4, rtol=1e-6
  )
  np.testing.assert_allclose(moved["network"]["head"]["kernel"], -0.19)
  np.testing.assert_allclose(moved["distiller"]["low"]["kernel"], -0.19)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_frozen_encoder_neither_moves_nor_decays(name):
  moved = updates(ONES, name=name, encoder_scale=0.0, weight_decay=0.1)
  for leaf in jax.tree.leaves(moved["network"]["encoder"]):
    assert not leaf.any()
  for part in (moved["network"]["head"], moved["distiller"]):
    assert all(leaf.all() for leaf in jax.tree.leaves(part))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_frozen_part_neither_moves_nor_decays_and_the_rest_does(scale):
  moved = updates(
    ONES,
    name="adamw",
    weight_decay=0.1,
    encoder_scale=scale,
    is_frozen=lambda path: path == ("encoder", "kernel"),
  )
  network = moved["network"]
  assert not network["encoder"].pop("kernel").any()
  np.testing.assert_allclose(
    network["encoder"]["scale"], -0.1 * scale, rtol=1e-5
  )
  # lr * (1 + decay * weight) = 0.1 * (1 + 0.1 * 2)
  np.testing.assert_allclose(network["head"]["kernel"], -0.12, rtol=1e-5)
  assert moved["distiller"]["low"]["kernel"].all()


def test_an_encoder_within_a_decoder_counts_as_one():
  params = {"decoder": {"encoder": {"kernel": jnp.ones(2)}}}
  tx = optimizer.make_optimizer(
    name="sgd", schedule=optax.constant_schedule(0.1), encoder_scale=0.0
  )
  moved, _ = tx.update(params, tx.init(params), params)
  assert not moved["decoder"]["encoder"]["kernel"].any()


@pytest.mark.parametrize(
  "option", ["weight_decay", "clip_norm", "encoder_scale"]
)
def test_negative_numbers_are_refused(option):
  with pytest.raises(ValueError, match="must not be negative"):
    updates(ONES, name="sgd", **{option: -0.1})


def test_an_unknown_rule_is_answered_with_the_known():
  with pytest.raises(ValueError, match=r"adamw.*sgd.*'lion'"):
    updates(ONES, name="lion")
