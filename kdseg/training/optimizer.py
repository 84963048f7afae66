"""Learning-rate schedules and optax chains, from plain values."""

from collections.abc import Callable
from typing import Any

import jax
import optax

ENCODER = "encoder"

Path = tuple[str, ...]


def make_schedule(
  *, peak: float, steps: int, warmup_steps: int = 0, kind: str = "cosine"
) -> optax.Schedule:
  """Returns the learning rate by step: linear warm-up, then decay to 0.

  Args:
    peak: the highest learning rate.
    steps: of the whole training, warm-up included.
    warmup_steps: of the linear rise from 0.
    kind: "cosine", "linear" or "constant".

  Raises:
    ValueError: on an unknown kind, or a warm-up as long as the training.
  """
  if not 0 <= warmup_steps < max(steps, 1):
    raise ValueError(
      f"warm-up of {warmup_steps} steps does not fit into {steps} steps"
    )
  rest = steps - warmup_steps
  decays = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
    "constant": lambda: optax.constant_schedule(peak),
  }
  if kind not in decays:
    raise ValueError(f"schedule must be one of {sorted(decays)}: {kind!r}")
  if not warmup_steps:
    return decays[kind]()
  rise = optax.linear_schedule(0.0, peak, warmup_steps)
  return optax.join_schedules([rise, decays[kind]()], [warmup_steps])


def _decayed(params: Any) -> Any:
  """Marks the kernels: biases, norms and tables are not decayed."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], "key", "") == "kernel", params
  )


def _labels(params: Any, is_frozen: Callable[[Path], bool] | None) -> Any:
  """Labels every leaf "frozen", "encoder" (below a module so named) or "rest".

  The first key of a path is left out: it says "network" or "distiller".
  """

  def label(path: Any, _: Any) -> str:
    names = tuple(getattr(part, "key", "") for part in path)
    if is_frozen and names[0] == "network" and is_frozen(names[1:]):
      return "frozen"
    return "encoder" if ENCODER in names else "rest"

  return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(
  *,
  name: str,
  schedule: optax.Schedule,
  weight_decay: float = 0.0,
  clip_norm: float = 0.0,
  encoder_scale: float = 1.0,
  is_frozen: Callable[[Path], bool] | None = None,
) -> optax.GradientTransformation:
  """Returns the optax chain: clip, rule, decoupled decay, learning rate.

  Args:
    name: "adamw" or "sgd" (momentum .9, Nesterov).
    schedule: learning rate by step.
    weight_decay: decoupled, on kernels only.
    clip_norm: largest global norm of the gradients; 0 for no bound.
    encoder_scale: the share of the learning rate that modules named
      "encoder" get; 0 leaves them as they were loaded.
    is_frozen: tells by its path which of the network's parameters stay as
      they are, decay included; None for none.

  Raises:
    ValueError: on an unknown name or a negative number.
  """
  if min(weight_decay, clip_norm, encoder_scale) < 0:
    raise ValueError(
      "weight_decay, clip_norm and encoder_scale must not be negative: "
      f"{weight_decay}, {clip_norm}, {encoder_scale}"
    )
  rules = {
    "adamw": lambda: optax.scale_by_adam(),
    "sgd": lambda: optax.trace(0.9, nesterov=True),
  }
  if name not in rules:
    raise ValueError(f"optimizer must be one of {sorted(rules)}: {name!r}")

  def rule(scale: float) -> optax.GradientTransformation:
    if scale == 0:
      return optax.set_to_zero()
    return optax.chain(
      rules[name](),
      optax.add_decayed_weights(weight_decay, mask=_decayed),
      optax.scale_by_learning_rate(lambda step: scale * schedule(step)),
    )

  if encoder_scale == 1.0 and is_frozen is None:
    parts = rule(1.0)
  else:
    parts = optax.multi_transform(
      {
        "encoder": rule(encoder_scale),
        "rest": rule(1.0),
        "frozen": optax.set_to_zero(),
      },
      lambda params: _labels(params, is_frozen),
    )
  if not clip_norm:
    return parts
  return optax.chain(optax.clip_by_global_norm(clip_norm), parts)
