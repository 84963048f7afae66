"""Mapping over devices: pmap and its twin shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kdseg.runtime import devices
from kdseg.training import settings
from kdseg.training import state as state_lib
from kdseg.training import step as step_lib

EACH = pytest.mark.parametrize("mapping", devices.MAPPINGS)


def test_a_batch_is_split_in_order():
  x = np.arange(8)
  np.testing.assert_array_equal(devices.shard(x), x.reshape(4, 2))


def test_a_batch_that_does_not_split_says_what_to_change():
  with pytest.raises(ValueError, match=r"batch of 6 .* 4 devices.*batch_size"):
    devices.shard({"image": np.zeros((6, 2))})


def test_replicated_arrays_are_on_every_device_without_an_axis():
  [leaf] = jax.tree.leaves(devices.replicate({"w": np.ones(3)}))
  assert leaf.shape == (3,)
  assert len(leaf.devices()) == 4


def test_an_unknown_mapping_is_refused_with_the_known():
  with pytest.raises(ValueError, match='one of pmap, shard_map, not "vmap"'):
    devices.parallel(len, replicated=1, out_replicated=True, mapping="vmap")


@EACH
def test_empty_arguments_do_not_shift_the_axes(mapping):
  function = devices.parallel(
    lambda empty, w, x: x * w + jax.lax.psum(x, devices.AXIS),
    replicated=2,
    out_replicated=False,
    mapping=mapping,
  )
  found = function({}, jnp.float32(10), np.arange(4, dtype=np.float32))
  np.testing.assert_array_equal(found, [6, 16, 26, 36])


@EACH
def test_each_shape_is_traced_once_also_if_it_was_lowered_before(mapping):
  traces = []

  def scale(w, x):
    traces.append(x.shape)
    return x * w

  function = devices.parallel(
    scale, replicated=1, out_replicated=False, mapping=mapping
  )
  weight = devices.replicate(np.float32(10))
  for count in (1, 2, 1, 2):
    x = np.ones((4, count), np.float32)
    np.testing.assert_array_equal(function(weight, x), 10 * x)
  assert traces == [(1,), (2,)]
  x = np.ones((4, 3), np.float32)
  function.lower(weight, x)()
  np.testing.assert_array_equal(function(weight, x), 10 * x)
  assert traces == [(1,), (2,), (3,)]


@EACH
def test_a_donated_state_is_used_up(mapping):
  function = devices.parallel(
    lambda w, x: w + jax.lax.pmean(x.sum(), devices.AXIS),
    replicated=1,
    out_replicated=True,
    donate=True,
    mapping=mapping,
  )
  state = devices.replicate(np.zeros(3, np.float32))
  after = function(state, devices.shard(np.ones(8, np.float32)))
  np.testing.assert_array_equal(after, [2, 2, 2])
  assert state.is_deleted()


def test_jax_finds_nans_if_it_is_told_to():
  function = devices.parallel(
    lambda w, x: w / x, replicated=1, out_replicated=False
  )
  zeros = np.zeros(4, np.float32)
  assert np.isnan(function(jnp.float32(0), zeros)).all()
  with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
    function(jnp.float32(0), zeros)


# ------------------------------------------- several steps of a real training


@functools.cache
def trained(mapping, count):
  """The state after three steps on the first `count` devices."""
  chosen = jax.devices()[:count]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "local_devices", lambda: chosen)
    patch.setattr(jax, "local_device_count", lambda: count)
    return train(mapping)


def train(mapping):
  network = tiny.Network(2, axis_name=devices.AXIS)
  tx = settings.TrainConfig(
    epochs=1.0, learning_rate=0.1, optimizer="sgd", warmup=0.0
  ).make_tx(3)
  update = devices.parallel(
    step_lib.make_train_step(network, tx, segmentation={"bce": 1.0}, steps=3),
    replicated=1,
    out_replicated=True,
    local=True,
    mapping=mapping,
  )
  variables = network.init(
    jax.random.key(0), jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3))
  )
  state = state_lib.make_state(variables, {}, tx, seed=0)
  state = devices.replicate(jax.device_get(state), local=True)
  for step in range(3):
    image, mask = tiny.draw_lesions(8, seed=step)
    image, mask = image.astype(np.float32) / 255, mask.astype(np.float32)
    state, _ = update(state, devices.shard({"image": image, "mask": mask}))
  assert state.step.devices() == set(jax.local_devices())
  return jax.device_get(state)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shard_map_trains_the_weights_that_pmap_does(count):
  found = trained("shard_map", count)
  for expected in (trained("pmap", count), trained("pmap", 1)):
    for part in ("params", "batch_stats"):
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6),
        getattr(found, part),
        getattr(expected, part),
      )
