"""Stage 1: teachers, trained or taken from a file.

The outputs of a teacher's frozen blocks are computed once for all.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import contextlib
import dataclasses
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg import networks
from kdseg.data import loading
from kdseg.data import orientations
from kdseg.experiment import frozen
from kdseg.experiment import jobs
from kdseg.experiment.records import Run
from kdseg.experiment.records import TeacherConfig
from kdseg.experiment.records import TrainedNetwork
from kdseg.experiment.splits import Data
from kdseg.networks.teachers import ensemble
from kdseg.runtime import checkpoint
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.training import arms as arms_lib
from kdseg.training import stage

Tree = Any


@dataclasses.dataclass(frozen=True)
class Teacher(TrainedNetwork):
  """A finished teacher.

  Attributes:
    encoder_features: of the training images, by name, [8, N, ...], from its
      frozen blocks; None where the run does not need them.
  """

  encoder_features: Mapping[str, np.ndarray] | None = None


def train_teachers(run: Run, data: Data) -> dict[str, Teacher]:
  """Returns every teacher of the config by name, trained where it was not.

  Raises:
    StoppedError: if `run.stop` says so.
    CheckpointError: if a teacher's checkpoint is another network's.
    DivergedError: if a training diverges.
  """
  todo = {(job.kind, job.name) for job in jobs.list_jobs(run)}
  return {
    name: _make_teacher(
      run,
      data,
      name,
      encodes=(jobs.ENCODE, name) in todo,
      trains=(jobs.TEACHER, name) in todo,
    )
    for name in run.config.teachers
  }


def _make_teacher(
  run: Run, data: Data, name: str, *, encodes: bool, trains: bool
) -> Teacher:
  """Returns a teacher, encoded and trained first where that is to be done."""
  config = run.config.teachers[name]
  network = config.make()
  encoder_features = None
  if encodes:
    encoder_features = _encode(
      run, name, network, data.train, orientations.ORIENTATIONS
    )
  if trains and config.is_random:
    if hosts.is_first():
      variables = _initial_variables(run, network, config.seed)
      about = {**_about(name, config), "steps": 0, "diverged": ""}
      about["parameters"] = networks.count_parameters(variables)
      checkpoint.save_variables(run.teacher_folder(name), variables, about)
  elif trains:
    _train(run, data, name, encoder_features)
  variables = _load(run, name, network)
  return Teacher(network, variables, encoder_features)


def _train(
  run: Run,
  data: Data,
  name: str,
  encoder_features: Mapping[str, np.ndarray] | None,
) -> None:
  config = run.config.teachers[name]
  network = config.make()
  cached, validation_features = None, None
  if encoder_features is not None:
    cached = {"encoder_features": encoder_features}
    validation_features = _encode(run, name, network, data.validation, 1)
  spec = arms_lib.ArmSpec(
    kind=name,
    network=network,
    seed=config.seed,
    destination=run.teacher_folder(name),
    about=_about(name, config),
  )
  with enough_to_train(run, name, 1):
    stage.train_together(
      stage.Stage(name, run.workdir / "checkpoints" / name),
      {name: spec},
      run_config=run.config.run_config,
      training=config.training,
      inputs=stage.Inputs(
        data.train,
        data.validation,
        cached_outputs=cached,
        validation_features=validation_features,
      ),
      log=run.log,
      stop=run.stop,
    )


def _about(name: str, config: TeacherConfig) -> dict[str, Any]:
  about = {"arm": name, "network": config.network, "method": "none"}
  return about | ({"seed": config.seed} if config.is_random else {})


def _initial_variables(run: Run, network: nn.Module, seed: int) -> Tree:
  """Returns what the training of a teacher starts from."""
  return networks.make_variables(
    network,
    jax.random.fold_in(jax.random.key(seed), 0),
    size=run.config.data.size,
    weights=run.config.encoder_weights,
  )


def _load(run: Run, name: str, network: nn.Module) -> Tree:
  """Returns a teacher's weights; one of another run is copied to this one.

  Raises:
    CheckpointError: if they are another network's.
  """
  config, destination = run.config.teachers[name], run.teacher_folder(name)
  source = pathlib.Path(config.checkpoint or destination)
  expected = frozen.expected_variables(network, run.config.data.size)

  def load() -> Tree:
    variables, about = checkpoint.load_variables(source, expected)
    if source != destination and not checkpoint.is_finished(destination):
      about = {**about, "arm": name, "taken_from": config.checkpoint}
      checkpoint.save_variables(destination, variables, about)
    return variables

  return frozen.tree_of_first(load, expected)


def _encode(
  run: Run,
  name: str,
  network: nn.Module,
  arrays: loading.Arrays,
  count: int,
) -> dict[str, np.ndarray]:
  """Computes the outputs of a teacher's frozen blocks for one split.

  Args:
    run: the experiment.
    name: of the teacher.
    network: its module.
    arrays: the split.
    count: how many orientations of each image.
  """
  variables = _initial_variables(run, network, run.config.teachers[name].seed)

  def encode(variables: Tree, image: jax.Array) -> Tree:
    image = image.astype(jnp.float32) / 255.0
    return network.apply(variables, image, method="encode")

  return frozen.compute_outputs(
    run,
    encode,
    variables,
    arrays,
    what=f"{name}: encoding {arrays.split}",
    folder=f"{name}-{arrays.split}",
    key=frozen.content_key(
      loading.fingerprint(arrays),
      variables["params"].get("encoder", {}),
      repr(network),
    ),
    orientations=count,
  )


def join_teachers(teachers: Iterable[Teacher]) -> Teacher | None:
  """Returns the teacher that the students learn from: one, or the mean."""
  chosen = list(teachers)
  if len(chosen) < 2:
    return chosen[0] if chosen else None
  network = ensemble.Ensemble([teacher.network for teacher in chosen])
  variables = ensemble.join_variables([t.variables for t in chosen])
  encoder_features = {
    f"members_{i}/{name}": values
    for i, teacher in enumerate(chosen)
    for name, values in (teacher.encoder_features or {}).items()
  }
  return Teacher(network, variables, encoder_features or None)


def enough_to_train(
  run: Run, name: str, count: int, at_once: int = 1
) -> contextlib.AbstractContextManager[None]:
  """Says what to lower, if there is not enough memory for a stage.

  Args:
    run: the experiment.
    name: of the stage.
    count: of the networks that are trained together.
    at_once: how many of them one program updates, at most.
  """
  networks_ = "1 network" if count == 1 else f"{count} networks"
  free, lower = "Free some", "data.batch_size or data.size"
  if count > 1:
    lower = "data.batch_size, data.size or the number of arms"
  if at_once > 1:
    free += f", or set seeds_at_once to less than {at_once} (1: one by one)"
  return memory.enough(
    f"{name}: training {networks_} on batches of {run.config.data.batch_size}",
    f"{free}, then the same command continues; or lower {lower}, in another "
    "--workdir",
  )
