"""One stage of an experiment: networks that are trained together to the end."""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import logging
import pathlib
from typing import Any

import numpy as np

from kdseg.data import loading
from kdseg.evaluation import evaluate
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import arms as arms_lib
from kdseg.training import batches as batches_lib
from kdseg.training import checkpoints
from kdseg.training import loop
from kdseg.training import prepare as prepare_lib
from kdseg.training import settings
from kdseg.training import step as step_lib

_LOG = logging.getLogger("kdseg")

Tree = Any
Log = Callable[[Mapping[str, Any]], None]
Specs = Mapping[str, arms_lib.ArmSpec]


@dataclasses.dataclass(frozen=True)
class Stage:
  """Which stage of a run this is.

  Attributes:
    name: for the log.
    folder: of its checkpoints; a stopped stage resumes from there.
    all_may_diverge: whether it is a result, and no error, that all of its arms
      diverged.
  """

  name: str
  folder: pathlib.Path
  all_may_diverge: bool = False


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the networks of a stage are trained and validated on.

  Attributes:
    train: the training split.
    validation: the split that chooses weights.
    teach: see `prepare.make_teach`; None where no arm is distilled, or the
      teacher's outputs are cached.
    teacher_variables: for `teach`.
    cached_outputs: outputs of frozen networks by orientation; see
      `batches.make_batches`.
    validation_features: what a frozen encoder computed of the validation
      images; see `evaluate.probabilities`.
  """

  train: loading.Arrays
  validation: loading.Arrays
  teach: prepare_lib.Teach | None = None
  teacher_variables: Tree = None
  cached_outputs: batches_lib.CachedOutputs | None = None
  validation_features: Mapping[str, np.ndarray] | None = None


def train_together(
  stage: Stage,
  specs: Specs,
  *,
  run_config: settings.RunConfig,
  training: settings.TrainConfig,
  inputs: Inputs,
  log: Log,
  stop: preemption.Stop = preemption.never,
) -> None:
  """Trains networks on the same batches and writes the best of each.

  An arm that diverges leaves the best weights it had; if it had none, a
  `failed.json` that says why.

  Args:
    stage: its name and its folder.
    specs: of the arms, by name.
    run_config: of the run.
    training: of the stage.
    inputs: of the stage.
    log: writes one record.
    stop: polled after each step, see `loop.Callbacks`.

  Raises:
    StoppedError: if `stop` says so.
    DivergedError: if every arm diverged, and they may not.
    CheckpointError: if the folder holds checkpoints of other arms.
  """
  steps = training.steps(len(inputs.train), run_config.batch_size)
  batches = _make_prepared_batches(run_config, inputs, steps)
  teacher_std = None
  if any(spec.method.normalise == "std" for spec in specs.values()):
    teacher_std = prepare_lib.measure_teacher_std(batches)
  arms = arms_lib.make_arms(specs, run_config, training, steps, teacher_std)
  with contextlib.ExitStack() as stack:
    manager = None
    if hosts.is_first():
      manager = stack.enter_context(checkpoint.open_checkpoints(stage.folder))
    first_step = checkpoints.resume(manager, arms, stage.name, steps)
    if stage.all_may_diverge:
      stack.enter_context(contextlib.suppress(loop.DivergedError))
    if first_step < steps:
      loop.fit(
        arms,
        arms_lib.make_groups(arms, run_config.seeds_at_once),
        batches,
        _make_loop_config(stage, run_config, training, inputs, first_step),
        loop.Callbacks(
          validate=_make_validate(stage, specs, run_config, inputs),
          log=log,
          save=functools.partial(checkpoints.save, manager),
          save_bad_batch=functools.partial(_save_bad_batch, stage),
          stop=hosts.share_question(stop),
        ),
      )
  if hosts.is_first():
    for name, arm in arms.items():
      checkpoints.write_result(specs[name], arm, steps)


def _make_prepared_batches(
  run_config: settings.RunConfig, inputs: Inputs, steps: int
) -> batches_lib.Batches:
  batches = batches_lib.make_batches(
    inputs.train,
    seed=run_config.seed,
    batch_size=run_config.batch_size,
    steps=steps,
    cached_outputs=inputs.cached_outputs,
  )
  prepare = prepare_lib.parallel_prepare(
    run_config,
    inputs.teach,
    inputs.teacher_variables,
    oriented=bool(inputs.cached_outputs),
  )
  return lambda first_step: (
    (step, prepare(step, batch), batch_info)
    for step, batch, batch_info in batches(first_step)
  )


def _make_loop_config(
  stage: Stage,
  run_config: settings.RunConfig,
  training: settings.TrainConfig,
  inputs: Inputs,
  first_step: int,
) -> loop.LoopConfig:
  """Returns the loop's settings, with epochs turned into steps."""
  examples = len(inputs.train)
  per_epoch = examples / run_config.batch_size
  return loop.LoopConfig(
    stage=stage.name,
    steps=training.steps(examples, run_config.batch_size),
    validate_every=max(1, round(training.validate_epochs * per_epoch)),
    save_every=max(1, round(training.save_epochs * per_epoch)),
    log_every=run_config.log_every,
    first_step=first_step,
    on_non_finite=training.on_non_finite,
  )


def _make_validate(
  stage: Stage,
  specs: Specs,
  run_config: settings.RunConfig,
  inputs: Inputs,
) -> Callable[[str, Tree], float]:
  """Returns (arm, variables) -> Dice; arms of one network share its program."""
  keys = {n: (type(s.network), repr(s.network)) for n, s in specs.items()}
  chosen = {keys[name]: spec.network for name, spec in specs.items()}
  predicts = {
    key: step_lib.parallel_predict(network, run_config.mapping)
    for key, network in chosen.items()
  }
  batch_size = run_config.evaluation_batch_size

  def validate(name: str, variables: Tree) -> float:
    with memory.enough(
      f"{stage.name}: validation in batches of {batch_size}",
      settings.LOWER_EVALUATION,
    ):
      return evaluate.mean_dice(
        predicts[keys[name]],
        variables,
        inputs.validation,
        batch_size=batch_size,
        encoder_features=inputs.validation_features,
      )

  return validate


def _save_bad_batch(
  stage: Stage,
  name: str,
  step: int,
  batch_info: loop.BatchInfo,
) -> None:
  """Saves the batch of an update that was not finite, on the first host."""
  if not hosts.is_first():
    return
  path = stage.folder / f"non_finite-{name}-step{step}.npz"
  with files.whole(path) as file:
    np.savez_compressed(
      file,
      image=batch_info["image"],
      mask=batch_info["mask"],
      ids=np.array(batch_info["ids"]),
    )
  _LOG.warning("%s: the batch is saved in %s", stage.name, path)
