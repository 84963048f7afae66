"""The compiled functions: prepare a batch, update an arm, predict.

`prepare` runs once a batch, whatever the number of arms: it augments on the
device and asks the teacher. `train_step` turns what was prepared into an arm's
next state. Both are mapped over the devices by `parallel`, and nothing else in
the project knows how many devices there are.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdseg.distill import layers as layers_lib
from kdseg.distill import objective
from kdseg.runtime import devices
from kdseg.training import state as state_lib

Array = jax.Array
Tree = Any
Batch = dict[str, Array]
TrainState = state_lib.TrainState


# What a key is for: folded last, so that draws with different purposes differ.
AUGMENT, HIDE, DROP = range(3)


def example_keys(
  seed: Array, step: Array, purpose: int, batch: int, *, mapped: bool = True
) -> Array:
  """Returns one key an example, [B], from (seed, step, purpose, position).

  The position is the example's in the global batch, so that its draws don't
  depend on how many devices share the batch.

  Args:
    seed: [] int32.
    step: [] int32.
    purpose: AUGMENT, HIDE or DROP.
    batch: examples on this device.
    mapped: whether this is traced inside `parallel`.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  key = jax.random.fold_in(key, purpose)
  device = jax.lax.axis_index(devices.AXIS) if mapped else 0
  position = device * batch + jnp.arange(batch)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, position)


def make_prepare(
  augment: Callable[[Array, Array, Array], tuple[Array, Array]],
  teach: Callable[..., Mapping[str, Array]] | None = None,
) -> Callable[..., Batch]:
  """Makes `prepare(seed, step, teacher_variables, batch)`.

  Args:
    augment: (keys [B], image uint8, mask uint8) -> (image float32 in [0, 1],
      mask float32).
    teach: (teacher_variables, image) -> the named outputs that the arms
      read; None where nothing is taught, or where the batch brings the
      teacher's outputs with it, under "teacher_out".

  Returns:
    A function to be mapped by `parallel`; its batch holds "image" [B, H, W, 3]
    uint8, "mask" [B, H, W] uint8, and optionally "teacher_out" and
    "encoder_features", dictionaries of arrays computed before.
  """

  def prepare(
    seed: Array, step: Array, teacher_variables: Tree, batch: Batch
  ) -> Batch:
    keys = example_keys(seed, step, AUGMENT, batch["image"].shape[0])
    image, mask = augment(keys, batch["image"], batch["mask"])
    prepared = {"image": image, "mask": mask}
    if "encoder_features" in batch:
      prepared["encoder_features"] = batch["encoder_features"]
    if "teacher_out" in batch:
      prepared["teacher_out"] = jax.tree.map(
        lambda x: x.astype(jnp.float32), batch["teacher_out"]
      )
    elif teach is not None:
      prepared["teacher_out"] = teach(teacher_variables, image)
    return prepared

  return prepare


def make_teach(
  teacher: nn.Module, names: tuple[str, ...], *, channels: int = 0
) -> Callable[..., dict[str, Array]]:
  """Makes `teach(variables, image)`: the teacher's outputs `names`, frozen.

  The teacher is in evaluation mode and never differentiated. Taps too wide
  for a generator are projected here, once for all arms.

  Args:
    teacher: the network.
    names: the taps wanted; the logits always come.
    channels: taps are projected to at most so many channels; 0 for the rule of
      `distiller.target_channels`.
  """

  def teach(
    variables: Tree, image: Array, encoder_features: Batch | None = None
  ) -> dict[str, Array]:
    extra = (
      {} if encoder_features is None else {"encoder_features": encoder_features}
    )
    out = teacher.apply(variables, image, train=False, **extra)
    teacher_out = {"logits": out["logits"]}
    for name in names:
      if name != "logits":
        have = out[name].shape[-1]
        wanted = (
          min(have, channels) if channels else layers_lib.target_channels(have)
        )
        teacher_out[name] = layers_lib.project(out[name], wanted)
    return jax.tree.map(jax.lax.stop_gradient, teacher_out)

  return teach


def make_train_step(
  network: nn.Module,
  tx: optax.GradientTransformation,
  *,
  segmentation: Mapping[str, float],
  steps: int,
  method: objective.Method | None = None,
  distiller: nn.Module | None = None,
  teacher_std: Mapping[str, Array] | None = None,
  ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """Makes one arm's update, to be mapped by `parallel`.

  A step whose loss or gradient is not finite leaves the state as it was and
  says so in its metrics ("finite" is 0): the loop decides what happens then.

  Args:
    network: student, or teacher while it is trained itself.
    tx: over {"network", "distiller"}.
    segmentation: weights of the segmentation terms.
    steps: of the whole training.
    method: of distillation; None or one without terms for none.
    distiller: with the align and generator layers, if the method has feature
      terms.
    teacher_std: by tap, [C], for methods that normalise by it.
    ema_decay: of the moving average of the network; 0 for none. The
      average of the first steps is shorter, min(decay, (1 + t) / (10 + t)).

  Returns:
    (state, prepared) -> (state, metrics); metrics are means over the devices.
  """
  method = method or objective.Method()

  def train_step(
    state: TrainState, prepared: Batch
  ) -> tuple[TrainState, dict[str, Array]]:
    image, labels = prepared["image"], prepared["mask"]
    keys = functools.partial(
      example_keys, state.seed, state.step, batch=image.shape[0]
    )
    # Dropout draws once for the device's batch.
    rngs = {"dropout": keys(DROP)[0]}
    given = {}
    if "encoder_features" in prepared:
      given["encoder_features"] = prepared["encoder_features"]

    def loss_fn(params: Tree) -> tuple[Array, tuple[dict, Tree, dict]]:
      out, updated = network.apply(
        {"params": params["network"], "batch_stats": state.batch_stats},
        image,
        train=True,
        mutable=["batch_stats"],
        rngs=rngs,
        **given,
      )
      # Written once, and so is their gradient: fused into every pixelwise
      # loss, the network's last enlargement would be made over for each.
      out = {**out, "logits": jax.lax.optimization_barrier(out["logits"])}
      task, parts = objective.segmentation_loss(
        out["logits"], labels, segmentation
      )
      terms, weights, balance, total = {}, {}, state.balance, task
      if method.terms:
        bound = None
        if distiller is not None:
          bound = functools.partial(
            distiller.apply, {"params": params["distiller"]}
          )
        terms = objective.distillation_terms(
          out,
          prepared["teacher_out"],
          labels,
          keys(HIDE),
          method=method,
          distiller=bound,
          teacher_std=teacher_std,
        )
        # Every device must weigh alike, so the balance sees the mean of all.
        shared = jax.lax.pmean(
          jax.lax.stop_gradient((task, terms)), axis_name=devices.AXIS
        )
        balance = objective.update_balance(
          state.balance,
          *shared,
          state.step,
          calibration_steps=method.calibration_steps,
        )
        total, weights = objective.total_loss(
          task, terms, balance, state.step, method=method, steps=steps
        )
      metrics = {"loss": total, "task": task, **parts, **terms}
      metrics |= {f"weight/{name}": w for name, w in weights.items()}
      return total, (metrics, updated.get("batch_stats", {}), balance)

    grads, (metrics, batch_stats, balance) = jax.grad(loss_fn, has_aux=True)(
      state.params
    )
    grads, metrics, batch_stats = jax.lax.pmean(
      (grads, metrics, batch_stats), axis_name=devices.AXIS
    )
    metrics["gradient_norm"] = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"] + metrics["gradient_norm"])
    metrics["finite"] = finite.astype(jnp.float32)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if ema_decay:
      decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
      average = jax.tree.map(
        lambda old, new: decay * old + (1.0 - decay) * new,
        average,
        {"params": params["network"], "batch_stats": batch_stats},
      )
    after = state.replace(
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      average=average,
      balance=balance,
    )
    # The step counts in any case: it is the position in the data.
    kept = jax.tree.map(
      lambda old, new: jnp.where(finite, new, old), state, after
    )
    return kept.replace(step=state.step + 1), metrics

  return train_step


def make_predict(
  network: nn.Module,
) -> Callable[[Tree, Batch], Array]:
  """Makes `predict(variables, batch)`: probabilities [B, H, W], float32.

  The batch holds "image" [B, H, W, 3] uint8 and optionally "encoder_features".
  """

  def predict(variables: Tree, batch: Batch) -> Array:
    image = batch["image"].astype(jnp.float32) / 255.0
    given = {k: batch[k] for k in ("encoder_features",) if k in batch}
    out = network.apply(variables, image, train=False, **given)
    return jax.nn.sigmoid(out["logits"].astype(jnp.float32))

  return predict


def stack_states(states: Sequence[TrainState]) -> TrainState:
  """Returns one state with a leading axis, of the states of several arms."""
  host = jax.device_get(list(states))
  return devices.replicate(jax.tree.map(lambda *x: np.stack(x), *host))


def unstack_states(state: TrainState) -> list[TrainState]:
  """Undoes `stack_states`."""
  host = jax.device_get(state)
  # Copies, as the next step uses up the memory of the stack.
  return [
    devices.replicate(jax.tree.map(lambda x, i=i: np.array(x[i]), host))
    for i in range(len(host.step))
  ]
