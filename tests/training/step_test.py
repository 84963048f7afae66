"""The compiled functions, on four devices with the smallest of networks."""

import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from kdseg.data import augment
from kdseg.distill import method as method_lib
from kdseg.networks.students import patch_unet
from kdseg.runtime import devices
from kdseg.training import optimizer
from kdseg.training import prepare as prepare_lib
from kdseg.training import state as state_lib
from kdseg.training import step as step_lib

BATCH = 8
SEED = 11
STEPS = 20
DECAY = 0.9
METHOD = method_lib.Method(
  terms={"mbf": 1.0, "kd": 0.5}, calibration_steps=2, distill_ramp=0.2
)
SEGMENTATION = {"bce": 1.0, "dice": 1.0}
STUDENT = tiny.Network(3, axis_name=devices.AXIS)
TEACHER = tiny.Network(5, axis_name=devices.AXIS)
# SGD, as Adam makes full steps of what is rounding noise.
TX = optimizer.make_optimizer(
  name="sgd",
  schedule=optimizer.make_schedule(peak=0.1, steps=STEPS, kind="constant"),
  weight_decay=1e-3,
  clip_norm=1.0,
)


def host(tree):
  return jax.tree.map(np.array, tree)


@functools.cache
def teacher_variables():
  return host(
    TEACHER.init(jax.random.key(1), jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3)))
  )


def first_state(method=METHOD, network=STUDENT, tx=TX, seed=SEED, average=True):
  """On the host, as the mapped step gives its buffers away."""
  variables = network.init(
    jax.random.key(0), jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3))
  )
  params = {}
  if method.aligns:
    _, params = tiny.make_distiller(method)
  return host(
    state_lib.make_state(
      variables,
      params,
      tx,
      seed=seed,
      terms=method.balanced_names,
      keep_average=average,
    )
  )


def make_prepare():
  return prepare_lib.make_prepare(
    functools.partial(
      augment.augment, strengths=augment.Strengths(rotate=10.0)
    ),
    prepare_lib.make_teach(TEACHER, METHOD.taps),
  )


def make_train_step(method=METHOD, network=STUDENT, tx=TX, decay=DECAY):
  distiller = None
  if method.aligns:
    distiller, _ = tiny.make_distiller(method)
  return step_lib.make_train_step(
    network,
    tx,
    segmentation=SEGMENTATION,
    steps=STEPS,
    method=method,
    distiller=distiller,
    ema_decay=decay,
  )


def draw_batch(step=0):
  image, mask = tiny.draw_lesions(BATCH, seed=step)
  return {"image": image, "mask": mask}


@functools.cache
def on_four():
  """(prepare, step), mapped over the four devices as in a run.

  Whatever tests do with it, it is traced once: a second trace raises.
  """
  chex.clear_trace_counter()
  prepare = devices.parallel(make_prepare(), replicated=3, out_replicated=False)
  train_step = devices.parallel(
    chex.assert_max_traces(make_train_step(), n=1),
    replicated=1,
    out_replicated=True,
    donate=True,
  )
  teacher = devices.replicate(teacher_variables())

  def prepared(step, batch=None):
    at = [jnp.asarray(n, jnp.int32) for n in (SEED, step)]
    return prepare(
      *devices.replicate(at),
      teacher,
      devices.shard(draw_batch(step) if batch is None else batch),
    )

  return prepared, train_step, teacher


@functools.cache
def on_one():
  """The same functions, mapped over one device."""
  device = jax.devices()[:1]
  prepare = jax.pmap(
    make_prepare(),
    axis_name=devices.AXIS,
    in_axes=(None, None, None, 0),
    devices=device,
  )
  train_step = jax.pmap(
    make_train_step(),
    axis_name=devices.AXIS,
    in_axes=(None, 0),
    out_axes=None,
    devices=device,
  )

  def prepared(step):
    whole = jax.tree.map(lambda x: x[None], draw_batch(step))
    return prepare(jnp.int32(SEED), jnp.int32(step), teacher_variables(), whole)

  return prepared, train_step


def run(steps, state=None, first=0):
  """Returns the state and each step's metrics after some steps on four."""
  prepared, train_step, _ = on_four()
  state = devices.replicate(first_state() if state is None else state)
  history = []
  for step in range(first, first + steps):
    state, metrics = train_step(state, prepared(step))
    history.append(jax.tree.map(float, metrics))
  return host(state), history


@functools.cache
def five_steps():
  return run(5)


def assert_equal(left, right, **tolerance):
  chex.assert_trees_all_equal_structs(left, right)
  for (path, a), (_, b) in zip(
    jax.tree_util.tree_leaves_with_path(left),
    jax.tree_util.tree_leaves_with_path(right),
  ):
    where = jax.tree_util.keystr(path)
    if tolerance:
      np.testing.assert_allclose(a, b, **tolerance, err_msg=where)
    else:
      np.testing.assert_array_equal(a, b, err_msg=where)


def test_four_devices_do_what_one_does():
  prepared, train_step = on_one()
  state = first_state()
  for step in range(5):
    state, metrics = train_step(state, prepared(step))
  four, history = five_steps()
  assert_equal(host(state), four, rtol=1e-5, atol=1e-5)
  assert_equal(jax.tree.map(float, metrics), history[-1], rtol=1e-4, atol=1e-5)


def test_everything_that_should_move_moves():
  before, (after, _) = first_state(), five_steps()
  for part in ("params", "batch_stats", "opt_state", "average", "balance"):
    for (path, a), (_, b) in zip(
      jax.tree_util.tree_leaves_with_path(getattr(before, part)),
      jax.tree_util.tree_leaves_with_path(getattr(after, part)),
    ):
      assert (a != b).any(), part + jax.tree_util.keystr(path)
  assert (before.step, after.step) == (0, 5)
  assert before.seed == after.seed


def test_the_same_seed_gives_the_same_bits():
  state, history = run(5)
  expected, expected_history = five_steps()
  assert_equal(state, expected)
  assert history == expected_history


def test_a_resumed_training_is_as_if_it_had_not_stopped():
  half, _ = run(2)
  state, history = run(3, state=half, first=2)
  expected, expected_history = five_steps()
  assert_equal(state, expected)
  assert history == expected_history[2:]


def test_learns_a_batch_by_heart():
  prepared, train_step, _ = on_four()
  state = devices.replicate(first_state())
  same = prepared(0)
  losses = []
  for _ in range(60):
    state, metrics = train_step(state, same)
    losses.append(float(metrics["task"]))
  assert losses[-1] < 0.5 * losses[0]


def test_the_teacher_stays_what_it_was():
  _, _, teacher = on_four()
  run(2)
  assert_equal(host(teacher), teacher_variables())


def test_draws_differ_by_step_and_replay_from_a_state():
  prepared, train_step, _ = on_four()
  same = prepared(0)
  start = first_state()
  terms = []
  for step in (0, 1, 0):
    state = start.replace(step=np.int32(step))
    _, metrics = train_step(devices.replicate(state), same)
    terms.append([float(metrics[f"mbf_{tap}"]) for tap in METHOD.taps])
  assert terms[0] == terms[2]
  assert terms[0][0] != terms[1][0]
  assert terms[0][1] != terms[1][1]


def test_arms_of_other_seeds_hide_other_cells():
  prepared, train_step, _ = on_four()
  same = prepared(0)
  terms = []
  for seed in (1, 2):
    state = first_state().replace(seed=np.int32(seed))
    _, metrics = train_step(devices.replicate(state), same)
    terms.append(float(metrics["mbf_low"]))
  assert terms[0] != terms[1]


def test_a_batch_that_is_not_finite_leaves_the_state_as_it_was():
  prepared, train_step, _ = on_four()
  sound = prepared(0)
  # One pixel of one image on one device.
  image = np.array(sound["image"])
  image[2, 1, 3, 4, 0] = np.nan
  image = jax.device_put(image, sound["image"].sharding)
  state, _ = run(2)
  after, metrics = train_step(
    devices.replicate(state), {**sound, "image": image}
  )
  assert metrics["finite"] == 0
  assert not np.isfinite(metrics["loss"])
  assert_equal(host(after), state.replace(step=state.step + 1))
  # And the next one goes on from there.
  again, metrics = train_step(after, sound)
  assert metrics["finite"] == 1
  assert np.isfinite(metrics["loss"])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host(again)))


class Root(nn.Module):
  """Its logits are the root of its one weight: at 0 their slope is infinite.

  As statistics, it keeps a draw of its dropout.
  """

  @nn.compact
  def __call__(self, image, train=False):
    weight = self.param("weight", nn.initializers.zeros, ())
    drawn = self.variable("batch_stats", "drawn", lambda: jnp.zeros(()))
    if train:
      drawn.value = jax.random.uniform(self.make_rng("dropout"))
    return {"logits": jnp.sqrt(weight) + jnp.zeros(image.shape[:3])}


def update_root(weight, method=None):
  """Returns the state before a step of `Root`, after it, and the metrics."""
  network = Root()
  batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw_batch())
  variables = network.init(jax.random.key(0), batch["image"])
  variables["params"]["weight"] = jnp.float32(weight)
  terms = ("kd",) if method else ()
  before = state_lib.make_state(variables, {}, TX, seed=SEED, terms=terms)
  step = step_lib.make_train_step(
    network, TX, segmentation={"bce": 1.0}, steps=STEPS, method=method
  )
  after, metrics = jax.vmap(step, (None, 0), None, axis_name=devices.AXIS)(
    before, jax.tree.map(lambda x: x[None], {**batch, "teacher_out": {}})
  )
  return before, after, metrics


def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was():
  before, after, metrics = update_root(weight=0.0)
  # Where logits are 0, so is everything that is compared: ln 2.
  np.testing.assert_allclose(metrics["loss"], np.log(2.0), rtol=1e-6)
  assert not np.isfinite(metrics["gradient_norm"])
  assert metrics["finite"] == 0
  assert_equal(host(after), host(before.replace(step=before.step + 1)))
  _, after, metrics = update_root(weight=1.0)
  assert metrics["finite"] == 1
  assert after.params["network"]["weight"] != 1.0


def test_dropout_and_masking_draw_from_keys_of_their_own(monkeypatch):
  def drawn(out, teacher_out, labels, rng, **options):
    return {"kd": jnp.mean(jax.vmap(jax.random.uniform)(rng))}

  monkeypatch.setattr(step_lib.objective, "distillation_terms", drawn)
  _, after, metrics = update_root(1.0, method_lib.Method(terms={"kd": 1.0}))
  draw = functools.partial(
    step_lib.example_keys, jnp.int32(SEED), jnp.int32(0), batch=BATCH,
    mapped=False,
  )  # fmt: skip
  _, expected = Root().apply(
    {"params": {"weight": 1.0}},
    draw_batch()["image"],
    True,
    rngs={"dropout": draw(purpose=step_lib.DROP)[0]},
    mutable=["batch_stats"],
  )
  assert after.batch_stats == expected["batch_stats"]
  np.testing.assert_allclose(
    metrics["kd"],
    jnp.mean(jax.vmap(jax.random.uniform)(draw(purpose=step_lib.HIDE))),
    rtol=1e-6,
  )


def test_the_balance_is_the_ratio_of_mean_losses_then_frozen():
  _, history = five_steps()
  for tap in METHOD.taps:
    name = f"mbf_{tap}"
    for step, metrics in enumerate(history):
      counted = history[: min(step + 1, METHOD.calibration_steps)]
      alpha = sum(m["task"] for m in counted) / sum(m[name] for m in counted)
      # Faded in over a fifth of the 20 steps.
      fade = min((step + 1) / 4, 1.0)
      np.testing.assert_allclose(
        metrics[f"weight/{name}"], fade * alpha, rtol=1e-5
      )


def test_the_loss_is_what_its_parts_say():
  _, history = five_steps()
  for metrics in history:
    weighted = sum(
      metrics[f"weight/{name}"] * metrics[name]
      for name in ("mbf_low", "mbf_high", "kd")
    )
    np.testing.assert_allclose(
      metrics["loss"], metrics["task"] + weighted, rtol=1e-5
    )
    np.testing.assert_allclose(
      metrics["task"], metrics["bce"] + metrics["dice"], rtol=1e-5
    )


def test_the_average_moves_fast_at_first():
  states = [first_state(), run(1)[0], run(2)[0]]
  average = states[0].average
  # min(0.9, (1 + t) / (10 + t)) for t = 0 and 1.
  for decay, state in zip((1 / 10, 2 / 11), states[1:]):
    new = {
      "params": state.params["network"],
      "batch_stats": state.batch_stats,
    }
    average = jax.tree.map(
      lambda a, b, decay=decay: decay * a + (1 - decay) * b, average, new
    )
    assert_equal(state.average, average, rtol=1e-5, atol=1e-7)


def test_the_average_stops_at_its_decay():
  old = run(2)[0].replace(step=np.int32(1000))
  new, _ = run(1, state=old)
  expected = jax.tree.map(
    lambda a, b: 0.9 * a + 0.1 * b,
    old.average["params"],
    new.params["network"],
  )
  assert_equal(new.average["params"], expected, rtol=1e-4, atol=1e-6)


def test_without_terms_no_teacher_output_is_read():
  # Without a teacher's outputs in the batch: reading one would raise.
  method = method_lib.Method()
  state = first_state(method, average=False)
  train_step = devices.parallel(
    make_train_step(method, decay=0.0), replicated=1, out_replicated=True
  )
  batch = devices.shard(
    {
      "image": draw_batch()["image"] / np.float32(255.0),
      "mask": draw_batch()["mask"].astype(np.float32),
    }
  )
  after, metrics = train_step(devices.replicate(state), batch)
  assert set(metrics) == {
    "loss", "task", "bce", "dice", "gradient_norm", "finite",
  }  # fmt: skip
  assert metrics["loss"] == metrics["task"]
  assert after.average == {}
  assert after.params["distiller"] == {}


def test_a_frozen_encoder_stays_while_the_rest_moves():
  method = method_lib.Method(
    terms={"mbf": 1.0}, taps=("low",), distill_ramp=0.0
  )
  tx = optimizer.make_optimizer(
    name="adamw",
    schedule=optimizer.make_schedule(peak=0.1, steps=STEPS),
    weight_decay=0.1,
    encoder_scale=0.0,
  )
  before = first_state(method, tx=tx, average=False)
  train_step = devices.parallel(
    make_train_step(method, tx=tx, decay=0.0),
    replicated=1,
    out_replicated=True,
    donate=True,
  )
  state = devices.replicate(before)
  for step in range(2):
    state, _ = train_step(state, on_four()[0](step))
  after = host(state)
  assert_equal(
    after.params["network"]["encoder"], before.params["network"]["encoder"]
  )
  for part in (
    lambda params: params["network"]["head"],
    lambda params: params["distiller"],
  ):
    for a, b in zip(
      jax.tree.leaves(part(before.params)), jax.tree.leaves(part(after.params))
    ):
      assert (a != b).any()


def test_half_precision_keeps_losses_parameters_and_statistics_whole():
  network = patch_unet.PatchUNet(
    widths=(2, 2, 2), depths=(1, 1, 1), dtype=jnp.bfloat16,
    axis_name=devices.AXIS,
  )  # fmt: skip
  method = method_lib.Method(terms={"kd": 1.0})
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3))
  )
  variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  state = state_lib.make_state(variables, {}, TX, seed=0, keep_average=True)
  train_step = devices.parallel(
    make_train_step(method, network), replicated=1, out_replicated=True
  )
  pixels = jax.ShapeDtypeStruct((4, 2, tiny.SIDE, tiny.SIDE), jnp.float32)
  image = jax.ShapeDtypeStruct((*pixels.shape, 3), jnp.float32)
  after, metrics = jax.eval_shape(
    train_step,
    state,
    {"image": image, "mask": pixels, "teacher_out": {"logits": pixels}},
  )
  for leaf in jax.tree.leaves(
    (after.params, after.batch_stats, after.average, metrics)
  ):
    assert leaf.dtype == jnp.float32


# ------------------------------------------------------------- predict and keys


def test_predicts_probabilities_of_bytes():
  image = tiny.draw_lesions(2)[0]
  found = step_lib.make_predict(TEACHER)(teacher_variables(), {"image": image})
  logits = TEACHER.apply(teacher_variables(), image / np.float32(255))["logits"]
  np.testing.assert_allclose(
    found, 1 / (1 + np.exp(-np.asarray(logits))), rtol=1e-5
  )
  assert found.dtype == jnp.float32


def keys(seed=0, step=0, purpose=step_lib.HIDE, batch=3):
  found = step_lib.example_keys(
    jnp.int32(seed), jnp.int32(step), purpose, batch, mapped=False
  )
  return [tuple(row) for row in np.asarray(jax.random.key_data(found))]


def test_every_draw_has_a_key_of_its_own():
  every = [
    *keys(),
    *keys(seed=1),
    *keys(step=1),
    *keys(purpose=step_lib.AUGMENT),
    *keys(purpose=step_lib.DROP),
  ]
  assert len(set(every)) == len(every) == 15
  assert keys() == keys()


def test_a_key_is_its_places_in_the_batch_however_many_devices_share_it():
  mapped = jax.vmap(
    lambda _: jax.random.key_data(
      step_lib.example_keys(jnp.int32(0), jnp.int32(0), step_lib.HIDE, 2)
    ),
    axis_name=devices.AXIS,
  )(jnp.zeros(4))
  found = [tuple(row) for row in np.asarray(mapped).reshape(8, -1)]
  assert found == keys(batch=8)
