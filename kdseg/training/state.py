"""The state of an arm, which training carries from step to step."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any


class TrainState(struct.PyTreeNode):
  """The state of one arm, replicated over the devices.

  Attributes:
    step: [] int32, updates made so far.
    seed: [] int32; every draw is folded from (seed, step, device, purpose).
    params: {"network": ..., "distiller": ...}; the second subtree is trained
      with the first, never exported, and empty without feature distillation.
    batch_stats: the network's running statistics.
    opt_state: optax state over `params`.
    average: {"params", "batch_stats"}, exponential moving average of the
      network, or {} where none is kept.
    balance: sums from which the weights of the feature terms are calibrated.
  """

  step: Array
  seed: Array
  params: dict[str, Tree]
  batch_stats: Tree
  opt_state: Tree
  average: dict[str, Tree]
  balance: dict[str, Array]


def make_state(
  variables: dict[str, Tree],
  distiller_params: Tree,
  tx: Any,
  *,
  seed: int,
  terms: tuple[str, ...] = (),
  keep_average: bool = False,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    variables: {"params", "batch_stats"} of the network.
    distiller_params: parameters of the align and generator layers, or {}.
    tx: optax transformation over {"network", "distiller"}.
    seed: of this arm.
    terms: names of the terms whose weight is calibrated.
    keep_average: whether to keep an exponential moving average.
  """
  params = {"network": variables["params"], "distiller": distiller_params}
  batch_stats = variables.get("batch_stats", {})
  average: dict[str, Tree] = {}
  if keep_average:
    # Copies: the step donates its state, and a buffer can be given once only.
    average = jax.tree.map(
      jnp.array, {"params": variables["params"], "batch_stats": batch_stats}
    )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    seed=jnp.asarray(seed, jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=tx.init(params),
    average=average,
    balance={
      name: jnp.zeros((), jnp.float32) for name in ("task", "count", *terms)
    },
  )


def network_variables(state: TrainState) -> dict[str, Tree]:
  """Returns the variables to validate, score and export.

  They are the moving average of the network where one is kept.
  """
  if state.average:
    return {
      "params": state.average["params"],
      "batch_stats": state.average["batch_stats"],
    }
  return {
    "params": state.params["network"],
    "batch_stats": state.batch_stats,
  }
