"""The compiled functions of an arm: its update, and its predictions.

`train_step` turns a prepared batch (see `prepare`) into an arm's next state.
`runtime.devices.parallel` maps it over the devices, which it knows only by
`devices.AXIS`: each device has its part of the batch, and gradients, metrics
and batch statistics are averaged over all of them.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from kdseg.distill import method as method_lib
from kdseg.distill import objective
from kdseg.runtime import devices
from kdseg.training import state as state_lib

Array = jax.Array
Tree = Any
Batch = Mapping[str, Any]
TrainState = state_lib.TrainState
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
# (params, state, prepared) -> (loss, (metrics, batch_stats, balance))
LossFn = Callable[[Tree, TrainState, Batch], tuple[Array, tuple[Any, ...]]]

# The purpose of a key, folded in last: draws of different purposes differ.
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


def make_train_step(
  network: nn.Module,
  tx: optax.GradientTransformation,
  *,
  segmentation: Mapping[str, float],
  steps: int,
  method: method_lib.Method | None = None,
  distiller: nn.Module | None = None,
  teacher_std: Mapping[str, Any] | None = None,
  ema_decay: float = 0.0,
) -> TrainStep:
  """Makes one arm's update, to be mapped by `parallel`.

  If the loss or a gradient is not finite, the update changes no more than the
  state's step, and its metric "finite" is 0.

  Args:
    network: student, or teacher while it is trained itself.
    tx: over {"network", "distiller"}.
    segmentation: weights of the segmentation terms.
    steps: of the whole training.
    method: of distillation; None, or one without terms, for none.
    distiller: the align and generator layers, for feature terms.
    teacher_std: by tap, [C], for methods that normalise by it.
    ema_decay: of the moving average of the network; 0 for none.

  Returns:
    (state, prepared) -> (state, metrics); metrics are means over the devices.
  """
  loss_fn = _make_loss(
    network,
    segmentation=segmentation,
    steps=steps,
    method=method or method_lib.Method(),
    distiller=distiller,
    teacher_std=teacher_std,
  )

  def train_step(
    state: TrainState, prepared: Batch
  ) -> tuple[TrainState, dict[str, Array]]:
    grads, (metrics, batch_stats, balance) = jax.grad(loss_fn, has_aux=True)(
      state.params, state, prepared
    )
    grads, metrics, batch_stats = jax.lax.pmean(
      (grads, metrics, batch_stats), axis_name=devices.AXIS
    )
    metrics["gradient_norm"] = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"] + metrics["gradient_norm"])
    metrics["finite"] = finite.astype(jnp.float32)
    after = _apply(state, tx, grads, batch_stats, ema_decay).replace(
      balance=balance
    )
    kept = jax.tree.map(
      lambda old, new: jnp.where(finite, new, old), state, after
    )
    # The step counts in any case: it is the position in the data.
    return kept.replace(step=state.step + 1), metrics

  return train_step


def _apply(
  state: TrainState,
  tx: optax.GradientTransformation,
  grads: Tree,
  batch_stats: Tree,
  ema_decay: float,
) -> TrainState:
  """Applies gradients and batch statistics to the network and its average."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params: Any = optax.apply_updates(state.params, updates)
  average = state.average
  if ema_decay:
    # The first steps are averaged over less: they are far from the last ones.
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    average = jax.tree.map(
      lambda old, new: decay * old + (1.0 - decay) * new,
      average,
      {"params": params["network"], "batch_stats": batch_stats},
    )
  return state.replace(
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    average=average,
  )


def _make_loss(
  network: nn.Module,
  *,
  segmentation: Mapping[str, float],
  steps: int,
  method: method_lib.Method,
  distiller: nn.Module | None,
  teacher_std: Mapping[str, Any] | None,
) -> LossFn:
  """Makes the loss of `make_train_step`, over one device's part of a batch."""

  def loss_fn(
    params: Tree, state: TrainState, prepared: Batch
  ) -> tuple[Array, tuple[Any, ...]]:
    image, labels = prepared["image"], prepared["mask"]
    keys = functools.partial(
      example_keys, state.seed, state.step, batch=image.shape[0]
    )
    applied: Any = network.apply(
      {"params": params["network"], "batch_stats": state.batch_stats},
      image,
      train=True,
      mutable=["batch_stats"],
      # Dropout draws once for the device's part of the batch.
      rngs={"dropout": keys(DROP)[0]},
      **_features_of(prepared),
    )
    out, updated = applied
    # Materialise the logits: otherwise XLA recomputes the last upsampling, and
    # its gradient, in every pixelwise loss.
    out = {**out, "logits": jax.lax.optimization_barrier(out["logits"])}
    task, parts = objective.segmentation_loss(
      out["logits"], labels, segmentation
    )
    terms: dict[str, Array] = {}
    weights: Mapping[str, Array | float] = {}
    balance, total = state.balance, task
    if method.terms:
      terms = objective.distillation_terms(
        out,
        prepared["teacher_out"],
        labels,
        keys(HIDE),
        method=method,
        distiller=_bind(distiller, params),
        teacher_std=teacher_std,
      )
      balance = _update_balance(state, task, terms, method)
      total, weights = objective.total_loss(
        task, terms, balance, state.step, method=method, steps=steps
      )
    metrics: dict[str, Any] = {"loss": total, "task": task, **parts, **terms}
    metrics |= {f"weight/{name}": w for name, w in weights.items()}
    return total, (metrics, updated.get("batch_stats", {}), balance)

  return loss_fn


def _bind(
  distiller: nn.Module | None, params: Tree
) -> Callable[..., Any] | None:
  """Returns the distiller with its parameters bound; None without one."""
  if distiller is None:
    return None
  return functools.partial(distiller.apply, {"params": params["distiller"]})


def _update_balance(
  state: TrainState,
  task: Array,
  terms: Mapping[str, Array],
  method: method_lib.Method,
) -> dict[str, Array]:
  """Updates the balance by the means over all devices: all weigh alike."""
  task, terms = jax.lax.pmean(
    jax.lax.stop_gradient((task, terms)), axis_name=devices.AXIS
  )
  return objective.update_balance(
    state.balance,
    task,
    terms,
    state.step,
    calibration_steps=method.calibration_steps,
  )


def make_predict(network: nn.Module) -> Callable[[Tree, Batch], Array]:
  """Makes `predict(variables, batch)`: probabilities [B, H, W], float32.

  The batch holds "image" [B, H, W, 3] uint8 and optionally "encoder_features".
  """

  def predict(variables: Tree, batch: Batch) -> Array:
    image = batch["image"].astype(jnp.float32) / 255.0
    out: Any = network.apply(
      variables, image, train=False, **_features_of(batch)
    )
    return jax.nn.sigmoid(out["logits"].astype(jnp.float32))

  return predict


def parallel_predict(
  network: nn.Module, mapping: str = "pmap"
) -> Callable[[Tree, Tree], Array]:
  """Returns `make_predict` of a network, mapped over the devices."""
  return devices.parallel(
    make_predict(network), replicated=1, out_replicated=False, mapping=mapping
  )


def _features_of(batch: Batch) -> dict[str, Any]:
  """Returns the argument of a network whose frozen encoder is precomputed."""
  return {k: batch[k] for k in ("encoder_features",) if k in batch}
