"""The arms of a stage: the networks that it trains, and their updates.

Seeds of one kind may be stacked: one program then updates all of them. A
`Group` is what the loop steps, whether it holds one arm or a stack of several.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import functools
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg import networks
from kdseg.distill import layers as layers_lib
from kdseg.distill import method as method_lib
from kdseg.runtime import devices
from kdseg.runtime import hosts
from kdseg.training import settings
from kdseg.training import state as state_lib
from kdseg.training import step as step_lib

Tree = Any
TrainState = state_lib.TrainState
Metrics = Mapping[str, Any]
StepFn = Callable[[TrainState, Tree], tuple[TrainState, Metrics]]

# Programs that are compiled at the same time; each takes memory.
COMPILED_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class ArmSpec:
  """What an arm trains, and where its result goes.

  Attributes:
    kind: arms of the same kind differ in their seeds alone and share their
      compiled step.
    network: the module.
    seed: of its parameters and its masks.
    destination: folder for its best weights.
    about: what is written beside the weights.
    method: how it is distilled; a method without terms does not.
    distiller: the align and generator layers, for feature terms.
    distiller_inputs: shapes that initialise it, (features, grids).
  """

  kind: str
  network: nn.Module
  seed: int
  destination: pathlib.Path
  about: Mapping[str, Any]
  method: method_lib.Method = dataclasses.field(
    default_factory=method_lib.Method
  )
  distiller: nn.Module | None = None
  distiller_inputs: tuple[Any, Any] = ((), ())


@dataclasses.dataclass
class ArmState:
  """One network in training.

  Attributes:
    state: replicated over the devices; a checkpoint holds it.
    step: its update, mapped over the devices; arms of a kind share it.
    step_stacked: the update of several arms of that kind on one batch: their
      states are stacked on a leading axis, and so are the metrics.
    best: {"variables": host arrays, "score": validation Dice, "step"}, or {}.
    diverged: why it stopped early, or "".
    skipped: how many of its last updates in a row were left out.
  """

  state: TrainState
  step: StepFn
  step_stacked: StepFn | None = None
  best: dict[str, Any] = dataclasses.field(default_factory=dict)
  diverged: str = ""
  skipped: int = 0


@dataclasses.dataclass
class Group:
  """Arms that one program updates.

  Attributes:
    names: of the arms. A stack keeps its diverged arms: with fewer arms it
      would be another program, whose sums are rounded otherwise.
    step: their update.
    state: of the one arm; or of all, stacked on a leading axis.
  """

  names: tuple[str, ...]
  step: StepFn
  state: TrainState

  def update(self, prepared: Tree) -> Metrics:
    """Makes one step on a prepared batch; returns the group's metrics."""
    self.state, metrics = self.step(self.state, prepared)
    return metrics

  def states(self) -> dict[str, TrainState]:
    """Returns the state of each arm by name."""
    if len(self.names) == 1:
      return {self.names[0]: self.state}
    return dict(zip(self.names, _unstack(self.state)))

  def split(self, metrics: Metrics) -> dict[str, Metrics]:
    """Returns the metrics of each arm by name, from those of the group."""
    if len(self.names) == 1:
      return {self.names[0]: metrics}
    return {
      name: {key: value[i] for key, value in metrics.items()}
      for i, name in enumerate(self.names)
    }


def make_groups(arms: Mapping[str, ArmState], at_once: int = 1) -> list[Group]:
  """Groups arms for the loop; leaves out groups whose arms all diverged.

  Args:
    arms: by name. Their states are handed to the groups: an update reuses
      that memory, so read them from `Group.states` from then on.
    at_once: how many arms of a kind one program updates, at most.
  """
  kinds: dict[Any, list[str]] = {}
  for name, arm in arms.items():
    kinds.setdefault(arm.step_stacked or name, []).append(name)
  groups = []
  for kind in kinds.values():
    for first in range(0, len(kind), at_once):
      names = tuple(kind[first : first + at_once])
      members = [arms[name] for name in names]
      step, state = members[0].step, members[0].state
      if len(members) > 1:
        step = members[0].step_stacked or step
        state = _stack([arm.state for arm in members])
      if not all(arm.diverged for arm in members):
        groups.append(Group(names, step, state))
  return groups


def compile_groups(groups: Sequence[Group], prepared: Tree) -> None:
  """Compiles the programs of the groups side by side, if they can be lowered.

  Much of compiling uses one core. Tracing is done in this thread, to which
  JAX's context managers apply.
  """
  if hosts.are_many():
    return
  programs = {(g.step, len(g.names)): g for g in groups}
  pool = futures.ThreadPoolExecutor(COMPILED_AT_ONCE)
  try:
    begun = [
      pool.submit(group.step.lower(group.state, prepared))
      for group in programs.values()
      if hasattr(group.step, "lower")
    ]
    for compiled in begun:
      compiled.result()
  finally:
    pool.shutdown(cancel_futures=True)


def _stack(states: Sequence[TrainState]) -> TrainState:
  """Returns one state of several, on a leading axis."""
  host = jax.device_get(list(states))
  return devices.replicate(jax.tree.map(lambda *x: np.stack(x), *host))


def _unstack(state: TrainState) -> list[TrainState]:
  """Undoes `_stack`."""
  host = jax.device_get(state)
  # Copies, as the next step reuses the memory of the stack.
  return [
    devices.replicate(jax.tree.map(lambda x, i=i: np.array(x[i]), host))
    for i in range(len(host.step))
  ]


def make_arms(
  specs: Mapping[str, ArmSpec],
  run_config: settings.RunConfig,
  training: settings.TrainConfig,
  steps: int,
  teacher_std: Mapping[str, np.ndarray] | None = None,
) -> dict[str, ArmState]:
  """Returns the arms before their first step.

  Args:
    specs: by name.
    run_config: of the run.
    training: of the stage.
    steps: of the whole training.
    teacher_std: of the teacher's taps, for methods that normalise by them; see
      `prepare.measure_teacher_std`.
  """
  # Arms that are alike share the compiled programs that initialise them.
  initializers: dict[Any, Callable[[jax.Array], Tree]] = {}
  distillers: dict[str, Callable[[jax.Array], Tree]] = {}
  kinds: dict[str, tuple[Callable[[int], TrainState], StepFn, StepFn]] = {}
  arms = {}
  for name, spec in specs.items():
    if spec.kind not in kinds:
      network = type(spec.network), repr(spec.network)
      if network not in initializers:
        initializers[network] = networks.make_initializer(
          spec.network, size=run_config.size, weights=run_config.encoder_weights
        )
      distiller = repr((spec.distiller, spec.distiller_inputs))
      if distiller not in distillers:
        distillers[distiller] = _distiller_initializer(spec)
      tx = training.make_tx(steps, getattr(spec.network, "is_frozen", None))
      draw = functools.partial(
        _initial_state,
        initialize=initializers[network],
        initialize_distiller=distillers[distiller],
        tx=tx,
        terms=spec.method.balanced_names,
        keep_average=training.ema_decay > 0,
      )
      update = step_lib.make_train_step(
        spec.network,
        tx,
        segmentation=spec.method.segmentation or run_config.segmentation,
        steps=steps,
        method=spec.method,
        distiller=spec.distiller,
        teacher_std=teacher_std,
        ema_decay=training.ema_decay,
      )
      kinds[spec.kind] = draw, *_map_update(update, run_config.mapping)
    initialize, one, several = kinds[spec.kind]
    arms[name] = ArmState(
      devices.replicate(initialize(spec.seed)), one, several
    )
  return arms


def _map_update(
  update: step_lib.TrainStep, mapping: str
) -> tuple[StepFn, StepFn]:
  """Maps an update over the devices, of one arm and of stacked arms."""
  mapped = functools.partial(
    devices.parallel,
    replicated=1,
    out_replicated=True,
    donate=True,
    mapping=mapping,
  )
  return mapped(update), mapped(jax.vmap(update, in_axes=(0, None)))


def _initial_state(
  seed: int,
  *,
  initialize: Callable[[jax.Array], Tree],
  initialize_distiller: Callable[[jax.Array], Tree],
  tx: Any,
  terms: tuple[str, ...],
  keep_average: bool,
) -> TrainState:
  """Draws the state before the first step, on the CPU; see `make_state`."""
  with jax.default_device(networks.cpu()):
    rng = jax.random.key(seed)
    return state_lib.make_state(
      initialize(jax.random.fold_in(rng, 0)),
      initialize_distiller(jax.random.fold_in(rng, 1)),
      tx,
      seed=seed,
      terms=terms,
      keep_average=keep_average,
    )


def _distiller_initializer(spec: ArmSpec) -> Callable[[jax.Array], Tree]:
  """Returns rng -> parameters of a distiller, {} where there is none."""
  distiller = spec.distiller
  if distiller is None:
    return lambda rng: {}
  shapes, grids = spec.distiller_inputs
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  return networks.on_cpu(
    lambda rng: distiller.init(rng, zeros, grids).get("params", {})
  )


def check_taps(
  taps: Iterable[str], student: Iterable[str], teacher: Iterable[str]
) -> None:
  """Raises ValueError if the outputs of either lack a tap."""
  for tap in taps:
    for who, outputs in (("student", student), ("teacher", teacher)):
      if tap not in outputs:
        raise ValueError(
          f"the {who} has no tap {tap!r}, only {', '.join(sorted(outputs))}"
        )


def make_distiller(
  student: nn.Module,
  teacher_out: Mapping[str, jax.ShapeDtypeStruct],
  method: method_lib.Method,
  *,
  size: int,
) -> tuple[nn.Module | None, tuple[Any, Any]]:
  """Returns the align and generator layers of a method, and their inputs.

  Args:
    student: the network that is distilled.
    teacher_out: shapes of the teacher's outputs, [B, h, w, C].
    method: its feature terms decide which layers are needed.
    size: side of the images in pixels.

  Returns:
    (module, (features, grids)) for `ArmSpec`; (None, ((), ())) where the
    method has no feature term.

  Raises:
    ValueError: if the student or the teacher lacks a tap.
  """
  if not method.needs_taps:
    return None, ((), ())
  image = jnp.zeros((1, size, size, 3), jnp.float32)
  out = jax.eval_shape(
    lambda rng: student.init_with_output(rng, image)[0], jax.random.key(0)
  )
  check_taps(method.taps, out, teacher_out)
  if not method.aligns:
    return None, ((), ())
  module = layers_lib.Distiller(
    taps={tap: teacher_out[tap].shape[-1] for tap in method.taps},
    heads=method.generator_heads,
    generator=method.generator,
    width=method.generator_width,
    share_generators=method.share_generators,
    topology=method.topology,
    tokens=method.token_count,
  )
  features = {tap: out[tap] for tap in method.taps}
  grids = {tap: teacher_out[tap].shape[1:3] for tap in method.taps}
  return module, (features, grids)
