"""One stage of an experiment: some networks, trained together to the end."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import logging
import operator
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdseg import networks
from kdseg.data import augment as augment_lib
from kdseg.data import pipeline
from kdseg.distill import layers as layers_lib
from kdseg.distill import objective
from kdseg.evaluation import evaluate
from kdseg.runtime import checkpoint
from kdseg.runtime import devices
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import batches as batches_lib
from kdseg.training import loop
from kdseg.training import optimizer
from kdseg.training import state as state_lib
from kdseg.training import step as step_lib

_LOG = logging.getLogger("kdseg")

# What to do if a network's answers do not fit into memory.
LOWER_EVALUATION = (
  "Free some, or lower evaluation.batch_size, then the same command continues"
)
# Their activations take that many times the memory.
SEEDS_ON_GPU = 8

Tree = Any
Computed = Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How the networks of a stage are trained, all of them alike.

  Attributes:
    epochs: over the training split.
    max_steps: in place of the epochs, if above 0.
    learning_rate: the highest.
    optimizer: "adamw" or "sgd".
    schedule: "cosine", "linear" or "constant".
    warmup: share of the training in which the learning rate rises.
    weight_decay: decoupled, on kernels.
    clip_norm: of the gradients; 0 for none.
    encoder_scale: share of the learning rate for pretrained encoders.
    ema_decay: of the moving average of the weights; 0 for none.
    validate_epochs: between validations.
    save_epochs: between checkpoints.
    on_non_finite: "stop" or "skip"; see `train.fit`.
  """

  epochs: float
  learning_rate: float
  max_steps: int = 0
  optimizer: str = "adamw"
  schedule: str = "cosine"
  warmup: float = 0.05
  weight_decay: float = 1e-4
  clip_norm: float = 1.0
  encoder_scale: float = 1.0
  ema_decay: float = 0.0
  validate_epochs: float = 2.0
  save_epochs: float = 4.0
  on_non_finite: str = "stop"

  def check(self) -> None:
    """Raises ValueError on a value that would only fail in the training."""
    loop.check_on_non_finite(self.on_non_finite)
    if not 0 <= self.warmup < 1:
      raise ValueError(
        f"warmup is the share of the steps, from 0 to below 1: {self.warmup}"
      )
    self.make_tx(1)

  def make_tx(
    self, steps: int, is_frozen: Callable[[Any], bool] | None = None
  ) -> optax.GradientTransformation:
    """Returns the updates of a training of so many steps."""
    return optimizer.make_optimizer(
      name=self.optimizer,
      schedule=optimizer.make_schedule(
        peak=self.learning_rate,
        steps=steps,
        warmup_steps=int(self.warmup * steps),
        kind=self.schedule,
      ),
      weight_decay=self.weight_decay,
      clip_norm=self.clip_norm,
      encoder_scale=self.encoder_scale,
      is_frozen=is_frozen,
    )

  def steps(self, examples: int, batch_size: int) -> int:
    """Returns how many steps the training takes."""
    if self.max_steps > 0:
      return self.max_steps
    return pipeline.steps_for_epochs(self.epochs, batch_size, examples)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """What every stage of a run has in common.

  Attributes:
    seed: of the order of the data and of the augmentation.
    batch_size: over all devices and hosts.
    evaluation_batch_size: the same, for validation.
    size: side of the images in pixels.
    segmentation: weights of the segmentation terms.
    augment: options of `data.augment.augment`.
    encoder_weights: whether encoders start from published weights.
    log_every: steps between log lines.
    seeds_at_once: how many seeds of a kind are updated by one program; see
      `seeds_at_once`.
  """

  seed: int
  batch_size: int
  evaluation_batch_size: int
  size: int
  segmentation: Mapping[str, float]
  augment: Mapping[str, Any]
  encoder_weights: bool
  log_every: int
  seeds_at_once: int = 1


def seeds_at_once(wanted: int) -> int:
  """Returns how many seeds of a kind are updated by one program here.

  A small student leaves a GPU waiting for the processor that starts its
  kernels; a program for several seeds starts hardly more of them than for one.
  A CPU is busy with one, and several take it longer (convolutions with kernels
  of their own become grouped ones). Not measured on a TPU, nor on several
  hosts, which would have to agree on every array whenever arms are validated.

  Args:
    wanted: so many; 0 for what suits the backend.

  Raises:
    ValueError: if it is below 0.
    TypeError: if it is no integer.
  """
  if operator.index(wanted) < 0:
    raise ValueError(f"seeds_at_once must be 0 or more: {wanted}")
  if wanted:
    return wanted
  alone = jax.default_backend() != "gpu" or hosts.are_many()
  return 1 if alone else SEEDS_ON_GPU


@dataclasses.dataclass(frozen=True)
class ArmSpec:
  """One network of a stage.

  Attributes:
    kind: contenders of the same kind share their compiled step.
    network: the module.
    seed: of its parameters and its masks.
    method: how it is taught; without terms, it is not.
    distiller: the align and generator layers, for feature terms.
    distiller_inputs: shapes of what initialises it, (features, grids).
    destination: folder for its best weights.
    about: what to write beside them.
  """

  kind: str
  network: nn.Module
  seed: int
  destination: pathlib.Path
  about: Mapping[str, Any]
  method: objective.Method = dataclasses.field(default_factory=objective.Method)
  distiller: nn.Module | None = None
  distiller_inputs: tuple[Any, Any] = ((), ())


def train_together(
  stage: str,
  specs: Mapping[str, ArmSpec],
  *,
  run_config: RunConfig,
  training: TrainConfig,
  folder: pathlib.Path,
  arrays: pipeline.Arrays,
  validation: pipeline.Arrays,
  log: Callable[[Mapping[str, Any]], None],
  teach: Callable[..., Mapping[str, jax.Array]] | None = None,
  teacher_variables: Tree = None,
  cached_outputs: Computed | None = None,
  validation_encoded: Mapping[str, np.ndarray] | None = None,
  all_may_diverge: bool = False,
  stop: preemption.Stop = preemption.never,
) -> None:
  """Trains networks on the same batches and writes the best of each.

  An arm that diverges leaves the best weights it had; before its first
  validation, a `failed.json` that says why in their place.

  Args:
    stage: name for logs.
    specs: by name.
    run_config: of the run.
    training: of the stage.
    folder: for checkpoints; a training that was stopped goes on from there.
    arrays: the training split.
    validation: the split that chooses weights.
    log: writes one record.
    teach: see `step.make_prepare`.
    teacher_variables: for `teach`.
    cached_outputs: answers of frozen networks by orientation; see
      `feed.make_batches`.
    validation_encoded: what a frozen encoder made of the validation images.
    all_may_diverge: whether that is a result, and no error.
    stop: see `train.fit`.

  Raises:
    StoppedError: if `stop` says so.
    DivergedError: if every arm diverged, and they may not.
    CheckpointError: if the folder holds another stage's checkpoints.
  """
  steps = training.steps(len(arrays), run_config.batch_size)
  per_epoch = len(arrays) / run_config.batch_size
  batches = batches_lib.make_batches(
    arrays,
    seed=run_config.seed,
    batch_size=run_config.batch_size,
    steps=steps,
    cached_outputs=cached_outputs,
  )
  prepare = make_prepare(
    run_config, teach, teacher_variables, bool(cached_outputs)
  )
  teacher_std = None
  if any(c.method.normalise == "std" for c in specs.values()):
    teacher_std = measure_teacher_std(batches, prepare)

  arms = make_arms(specs, run_config, training, steps, teacher_std)
  predicts: dict[Any, Callable[..., Any]] = {}
  for spec in specs.values():
    network = type(spec.network), repr(spec.network)
    if network not in predicts:
      predicts[network] = make_predict(spec.network)

  def validate(name: str, variables: Tree) -> float:
    network = specs[name].network
    with memory.enough(
      f"{stage}: validation in batches of {run_config.evaluation_batch_size}",
      LOWER_EVALUATION,
    ):
      return evaluate.mean_dice(
        predicts[type(network), repr(network)],
        variables,
        validation,
        batch_size=run_config.evaluation_batch_size,
        encoder_features=validation_encoded,
      )

  def save_bad_batch(
    name: str, step: int, batch_info: Mapping[str, Any]
  ) -> None:
    if not hosts.is_first():
      return
    path = folder / f"non_finite-{name}-step{step}.npz"
    with files.whole(path) as file:
      np.savez_compressed(
        file,
        image=batch_info["image"],
        mask=batch_info["mask"],
        ids=np.array(batch_info["ids"]),
      )
    _LOG.warning("%s: the batch is saved in %s", stage, path)

  with contextlib.ExitStack() as stack:
    manager = None
    if hosts.is_first():
      manager = stack.enter_context(checkpoint.open_checkpoints(folder))
    first_step = _resume(manager, arms, stage, steps)
    if all_may_diverge:
      stack.enter_context(contextlib.suppress(loop.DivergedError))
    if first_step < steps:
      loop.fit(
        arms,
        batches,
        stage=stage,
        schedule=loop.Schedule(
          steps=steps,
          validate_every=max(1, round(training.validate_epochs * per_epoch)),
          save_every=max(1, round(training.save_epochs * per_epoch)),
          log_every=run_config.log_every,
        ),
        prepare=prepare,
        validate=validate,
        log=log,
        save=functools.partial(_save, manager),
        save_bad_batch=save_bad_batch,
        first_step=first_step,
        on_non_finite=training.on_non_finite,
        stop=hosts.share_question(stop),
        at_once=run_config.seeds_at_once,
      )
  if hosts.is_first():
    for name, arm in arms.items():
      _write_result(specs[name], arm, steps)


def make_arms(
  specs: Mapping[str, ArmSpec],
  run_config: RunConfig,
  training: TrainConfig,
  steps: int,
  teacher_std: Mapping[str, np.ndarray] | None = None,
) -> dict[str, loop.ArmState]:
  """Returns the contenders before their first step, with their updates.

  Args:
    specs: by name.
    run_config: of the run.
    training: of the stage.
    steps: of the whole training.
    teacher_std: of the teacher's taps, for methods that normalise by them; see
      `measure_teacher_std`.
  """
  # Compiled once for all that are alike.
  initializers: dict[Any, Callable[[jax.Array], Tree]] = {}
  distillers: dict[str, Callable[[jax.Array], Tree]] = {}
  initial: dict[str, Callable[[int], state_lib.TrainState]] = {}
  compiled: dict[str, tuple[loop.StepFn, loop.StepFn]] = {}
  arms: dict[str, loop.ArmState] = {}
  for name, spec in specs.items():
    if spec.kind not in compiled:
      tx = training.make_tx(steps, getattr(spec.network, "is_frozen", None))
      network = type(spec.network), repr(spec.network)
      if network not in initializers:
        initializers[network] = networks.make_initializer(
          spec.network, size=run_config.size, weights=run_config.encoder_weights
        )
      distiller = repr((spec.distiller, spec.distiller_inputs))
      if distiller not in distillers:
        distillers[distiller] = _distiller_initializer(spec)
      initial[spec.kind] = functools.partial(
        initial_state,
        initialize=initializers[network],
        initialize_distiller=distillers[distiller],
        tx=tx,
        terms=objective.balanced_names(spec.method),
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
      mapped = functools.partial(
        devices.parallel, replicated=1, out_replicated=True, donate=True
      )
      compiled[spec.kind] = (
        mapped(update),
        mapped(jax.vmap(update, in_axes=(0, None))),
      )
    one, several = compiled[spec.kind]
    arms[name] = loop.ArmState(
      state=devices.replicate(initial[spec.kind](spec.seed)),
      step=one,
      step_stacked=several,
    )
  return arms


def make_prepare(
  run_config: RunConfig,
  teach: Callable[..., Mapping[str, jax.Array]] | None,
  teacher_variables: Tree,
  oriented: bool,
) -> Callable[[int, Tree], Tree]:
  """Returns (step, batch) -> what the arms are given.

  Args:
    run_config: of the run.
    teach: asks the teacher; see `step.make_prepare`.
    teacher_variables: for `teach`.
    oriented: whether the batches come in an orientation that was drawn
      before, for which frozen networks have answered; no others are made then.
  """
  options = dict(run_config.augment)
  if oriented:
    # The frozen networks have answered for eight orientations, no others.
    options |= {"flips": False, "quarter_turns": False}
    options |= {"rotate": 0.0, "scale": 0.0, "translate": 0.0}
  mapped = devices.parallel(
    step_lib.make_prepare(
      functools.partial(augment_lib.augment, **options), teach
    ),
    replicated=3,
    out_replicated=False,
  )
  held = devices.replicate({} if teach is None else teacher_variables)
  seed = devices.replicate(jnp.asarray(run_config.seed, jnp.int32))

  def prepare(step: int, batch: Tree) -> Tree:
    at = devices.replicate(jnp.asarray(step, jnp.int32))
    return mapped(seed, at, held, batch)

  return prepare


def make_predict(network: nn.Module) -> Callable[..., Any]:
  """Returns `step.make_predict` of a network, mapped over the devices."""
  return devices.parallel(
    step_lib.make_predict(network),
    replicated=1,
    out_replicated=False,
  )


def measure_teacher_std(
  batches: Callable[[int], Any],
  prepare: Callable[[int, Tree], Tree],
  count: int = 16,
) -> dict[str, np.ndarray]:
  """Measures each channel of the teacher's taps over the first batches.

  Args:
    batches: as of `feed.make_batches`.
    prepare: gives "teacher_out".
    count: of batches, at most.

  Returns:
    {tap: [C] float32}, never below 1e-3 of the tap's largest.
  """
  sums: dict[str, list[np.ndarray]] = {}
  for number, (step, batch, _) in enumerate(batches(0)):
    if number == count:
      break
    for name, value in prepare(step, batch)["teacher_out"].items():
      if name != "logits":
        flat = np.asarray(value, np.float64).reshape(-1, value.shape[-1])
        moments = np.stack([flat.mean(0), np.square(flat).mean(0)])
        # Every host has seen its share of the batch.
        sums.setdefault(name, []).append(
          np.mean(hosts.gather(moments.tolist()), axis=0)
          if hosts.are_many()
          else moments
        )
  teacher_std = {}
  for name, moments in sums.items():
    mean, square = np.mean(moments, axis=0)
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    teacher_std[name] = np.maximum(
      deviation, 1e-3 * max(deviation.max(), 1e-6)
    ).astype(np.float32)
  return teacher_std


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
  method: objective.Method,
  *,
  size: int,
) -> tuple[nn.Module | None, tuple[Any, Any]]:
  """Returns the align and generator layers of a method, and their inputs.

  Args:
    student: the network that is taught.
    teacher_out: shapes of the teacher's outputs, [B, h, w, C].
    method: its feature terms decide what is needed.
    size: side of the images in pixels.

  Returns:
    (module, (features, grids)) for `ArmSpec`; (None, ...) where the method
    has no feature term.

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
  if not method.feature_terms:
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


def initial_state(
  seed: int,
  *,
  initialize: Callable[[jax.Array], Tree],
  initialize_distiller: Callable[[jax.Array], Tree],
  tx: Any,
  terms: tuple[str, ...],
  keep_average: bool,
) -> state_lib.TrainState:
  """Draws a first state, on the host's processor.

  Args:
    seed: everything is drawn from it.
    initialize: of the network, see `networks.make_initializer`.
    initialize_distiller: of what is trained beside it.
    tx: see `state.make_state`, as the others.
    terms: names of the terms whose weight is calibrated.
    keep_average: whether to keep an exponential moving average.
  """
  with jax.default_device(networks.processor()):
    rng = jax.random.key(seed)
    return state_lib.make_state(
      initialize(jax.random.fold_in(rng, 0)),
      initialize_distiller(jax.random.fold_in(rng, 1)),
      tx,
      seed=seed,
      terms=terms,
      keep_average=keep_average,
    )


def _distiller_initializer(spec: ArmSpec) -> Callable[..., Tree]:
  """Returns rng -> parameters of a distiller, {} where there is none."""
  if spec.distiller is None:
    return lambda rng: {}
  shapes, grids = spec.distiller_inputs
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  return networks.on_processor(
    lambda rng: spec.distiller.init(rng, zeros, grids).get("params", {})
  )


def _pack(arms: Mapping[str, loop.ArmState]) -> tuple[Tree, dict[str, Any]]:
  """Splits arms into arrays by path and what JSON can say."""
  tree, extra = {}, {}
  for name, arm in arms.items():
    tree[name] = {"state": checkpoint.flatten(arm.state)}
    if arm.best:
      tree[name]["best"] = checkpoint.flatten(arm.best["variables"])
    extra[name] = {
      "diverged": arm.diverged,
      "best": {k: v for k, v in arm.best.items() if k != "variables"},
      "skipped": arm.skipped,
    }
  return tree, {"arms": extra}


def _save(manager: Any, step: int, arms: Mapping[str, loop.ArmState]) -> None:
  """Saves the arms, on the host that has the checkpoints."""
  if manager is not None:
    checkpoint.save(manager, step, *_pack(arms))


def _resume(
  manager: Any, arms: dict[str, loop.ArmState], stage: str, steps: int
) -> int:
  """Puts the latest checkpoint into `arms`; returns the steps done.

  Args:
    manager: of the checkpoints; None on hosts that do not have them.
    arms: their states and bests are replaced.
    stage: name for the log.
    steps: of the whole training, for the log.

  Raises:
    CheckpointError: if none of them is whole, or they are of other arms.
    HostError: if the first host cannot read them, on the others.
  """
  found: tuple[int, Tree, dict[str, Any]] | None = None

  def read() -> dict[str, Any]:
    nonlocal found
    found = checkpoint.restore_latest(manager)
    if found is None:
      return {}
    step, _, extra = found
    return {"step": step, "extra": extra, "where": str(manager.directory)}

  told = hosts.on_first(read)
  if not told:
    return 0
  flat = hosts.arrays_of_first(lambda: _flat_arms(found[1]))
  step, extra, where = told["step"], told["extra"], told["where"]
  tree = _nest_arms(flat, list(extra["arms"]))
  if tree.keys() != arms.keys():
    raise checkpoint.CheckpointError(
      f"{where} holds the arms {', '.join(sorted(tree))}, not "
      f"{', '.join(sorted(arms))}; finish that run first, or delete the folder"
    )
  for name, arm in arms.items():
    state = checkpoint.unflatten(tree[name]["state"], arm.state, where)
    arm.state = devices.replicate(state)
    about = extra["arms"][name]
    arm.diverged, arm.skipped = about["diverged"], about.get("skipped", 0)
    if "best" in tree[name]:
      like = state_lib.network_variables(arm.state)
      variables = checkpoint.unflatten(tree[name]["best"], like, where)
      arm.best = {**about["best"], "variables": variables}
  _LOG.info("%s: goes on from step %d of %d", stage, step, steps)
  return step


# Between the name of an arm, what it is of the arm, and the path in that.
_GAP = "\t"


def _flat_arms(tree: Tree) -> dict[str, np.ndarray]:
  """Flattens {arm: {"state" | "best": {path: array}}}."""
  return {
    _GAP.join((name, part, path)): array
    for name, parts in tree.items()
    for part, arrays in parts.items()
    for path, array in arrays.items()
  }


def _nest_arms(flat: Mapping[str, np.ndarray], names: list[str]) -> Tree:
  """Undoes `_flat_arms`."""
  tree: Tree = {name: {} for name in names}
  for key, array in flat.items():
    name, part, path = key.split(_GAP)
    tree[name].setdefault(part, {})[path] = array
  return tree


def _write_result(spec: ArmSpec, arm: loop.ArmState, steps: int) -> None:
  about = {
    **spec.about,
    "seed": spec.seed,
    "steps": steps,
    "diverged": arm.diverged,
  }
  if not arm.best:
    with files.writing(spec.destination):
      spec.destination.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(spec.destination / "failed.json", about)
    return
  checkpoint.save_variables(
    spec.destination,
    arm.best["variables"],
    {
      **about,
      "validation_dice": arm.best["score"],
      "best_step": arm.best["step"],
      "parameters": networks.count_parameters(arm.best["variables"]),
    },
  )
