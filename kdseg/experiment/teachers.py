"""Stage 1: teachers, trained or loaded, and what they compute in advance."""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import hashlib
import logging
import pathlib
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kdseg import networks
from kdseg.data import loading
from kdseg.data import orientations
from kdseg.experiment import config as config_lib
from kdseg.experiment import splits
from kdseg.experiment import workdir as workdir_lib
from kdseg.networks.teachers import ensemble
from kdseg.runtime import checkpoint
from kdseg.runtime import devices
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import arms as arms_lib
from kdseg.training import cached_outputs as cached_outputs_lib
from kdseg.training import loop
from kdseg.training import settings
from kdseg.training import stage

Tree = Any
_LOG = logging.getLogger("kdseg")


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A finished teacher.

  Attributes:
    network: the module.
    variables: its weights, host arrays.
    encoder_features: of the training images, by name, [8, N, ...], from its
      frozen encoder; None unless they were computed before.
  """

  network: nn.Module
  variables: Tree
  encoder_features: Mapping[str, np.ndarray] | None = None


def make_teacher(
  name: str,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: splits.Data,
  log: workdir_lib.Log,
  stop: preemption.Stop = preemption.never,
) -> Teacher:
  """Returns a teacher: from its checkpoint, finished here before, or trained.

  Raises:
    StoppedError: if `stop` says so.
    CheckpointError: if the checkpoint is another network's.
    DivergedError: if its training diverges.
  """
  c = config.teachers[name]
  network = networks.make_network(
    c.network, axis_name=devices.AXIS, **dict(c.options)
  )
  destination = workdir / "teachers" / name
  source = pathlib.Path(c.checkpoint) if c.checkpoint else destination
  expected = jax.eval_shape(
    functools.partial(network.init, jax.random.key(0)),
    jnp.zeros((1, config.data.size, config.data.size, 3)),
  )
  encoder_features, validation_encoded = None, None
  untrained = not hosts.on_first(lambda: checkpoint.is_finished(source))
  # A finished teacher's answers are had from its encoder's, too.
  wanted = untrained or (
    config.precompute_teacher and name in config.distil_from
  )
  training = config_lib.make_train_config(dict(c.training))
  drawn = config_lib.is_drawn(c)
  if c.precompute and wanted and not drawn and not c.checkpoint:
    encoder_features, validation_encoded = _encode(
      name, network, config, workdir, data, c.seed, stop
    )
  if untrained and drawn:
    # A control: what is learned from a network that knows nothing.
    variables = networks.make_variables(
      network,
      jax.random.fold_in(jax.random.key(int(c.seed)), 0),
      size=config.data.size,
      weights=config.encoder_weights,
    )
    about = {"arm": name, "network": c.network, "method": "none"}
    about |= {"seed": int(c.seed), "steps": 0, "diverged": ""}
    about["parameters"] = networks.count_parameters(variables)
    if hosts.is_first():
      checkpoint.save_variables(destination, variables, about)
  elif untrained and not c.checkpoint:
    spec = arms_lib.ArmSpec(
      kind=name,
      network=network,
      seed=int(c.seed),
      destination=destination,
      about={"arm": name, "network": c.network, "method": "none"},
    )
    with enough_to_train(name, 1, config):
      stage.train_together(
        stage.Stage(name, workdir / "checkpoints" / name),
        {name: spec},
        run_config=config_lib.make_run_config(config),
        training=training,
        inputs=stage.Inputs(
          data.train,
          data.validation,
          cached_outputs={"encoder_features": encoder_features}
          if encoder_features
          else None,
          validation_features=validation_encoded,
        ),
        log=log,
        stop=stop,
      )

  def load() -> Tree:
    variables, about = checkpoint.load_variables(source, expected)
    if source != destination and not checkpoint.is_finished(destination):
      about = {**about, "arm": name, "taken_from": c.checkpoint}
      checkpoint.save_variables(destination, variables, about)
    return variables

  return Teacher(network, tree_of_first(load, expected), encoder_features)


def tree_of_first(load: Callable[[], Tree], expected: Tree) -> Tree:
  """Returns what the first host loads, a tree like `expected`, on all hosts.

  Raises:
    HostError: if the first host cannot load it, on the others.
  """
  if not hosts.are_many():
    return load()
  loaded: Tree = None

  def remember() -> bool:
    nonlocal loaded
    loaded = load()
    return True

  hosts.on_first(remember)
  flat = hosts.arrays_of_first(lambda: checkpoint.flatten(loaded))
  return checkpoint.unflatten(flat, expected, "the first host's tree")


def _encode(
  name: str,
  network: nn.Module,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: splits.Data,
  seed: int,
  stop: preemption.Stop,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Computes a frozen encoder's answers for training and validation."""
  rng = jax.random.fold_in(jax.random.key(seed), 0)
  variables = networks.make_variables(
    network, rng, size=config.data.size, weights=config.encoder_weights
  )

  def encode(variables: Tree, image: jax.Array) -> dict[str, jax.Array]:
    image = image.astype(jnp.float32) / 255.0
    return network.apply(variables, image, method="encode")

  function = within_memory(
    map_over_devices(encode, variables), f"{name}: encoding", config
  )
  found = []
  for split, arrays, count in (
    ("train", data.train, orientations.ORIENTATIONS),
    ("validation", data.validation, 1),
  ):
    found.append(
      cached_outputs_lib.compute(
        function,
        arrays.image,
        cache_folder(workdir) / f"{name}-{split}",
        batch_size=config.evaluation.batch_size,
        key=content_key(
          loading.fingerprint(arrays),
          variables["params"].get("encoder", {}),
          repr(network),
        ),
        orientations=count,
        progress=log_progress(f"{name}: encoding {split}", stop),
      )
    )
  return found[0], found[1]


def cache_folder(workdir: pathlib.Path) -> pathlib.Path:
  """Returns where this host keeps the answers of frozen networks.

  Each host has its own, as each reads all of them.
  """
  if hosts.is_first():
    return workdir / "cache"
  return workdir / "cache" / f"host{jax.process_index()}"


def map_over_devices(
  function: Callable[..., Any], variables: Tree
) -> Callable[..., dict[str, np.ndarray]]:
  """Maps function(variables, image, ...) over this host's devices.

  It takes numpy and gives numpy.
  """
  mapped = devices.parallel(
    lambda variables, arguments: function(variables, *arguments),
    replicated=1,
    out_replicated=False,
    local=True,
  )
  held = devices.replicate(variables, local=True)

  def call(*arguments: Tree) -> dict[str, np.ndarray]:
    answers = mapped(held, devices.shard(arguments))
    return jax.tree.map(
      lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), dict(answers)
    )

  return call


def within_memory(
  function: Callable[..., Any],
  what: str,
  config: ml_collections.ConfigDict,
) -> Callable[..., Any]:
  """Says what to lower, if a call of `function` takes too much memory."""
  what = f"{what} in batches of {config.evaluation.batch_size}"
  return memory.enough(what, settings.LOWER_EVALUATION)(function)


def content_key(data: str, tree: Tree, *more: str) -> str:
  """Names data, weights and whatever else decides what is kept."""
  digest = hashlib.sha256(data.encode())
  for leaf in jax.tree.leaves(tree):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  for text in more:
    digest.update(text.encode())
  return digest.hexdigest()


def log_progress(
  what: str, stop: preemption.Stop
) -> Callable[[int, int], None]:
  """Returns a reporter of (done, total) that logs every tenth, with an ETA.

  It raises StoppedError where `stop` says so.
  """
  began: tuple[float, int] | None = None
  shown = 0

  def show(done: int, total: int) -> None:
    nonlocal began, shown
    # Hosts do not keep step here, and one that left would leave the others.
    if not hosts.are_many():
      preemption.check(stop, what)
    now = time.monotonic()
    if began is None:
      # The first call compiles, and a resumed run has not done the rest now.
      began, shown = (now, done), 10 * done // total
    elif 10 * done // total > shown:
      shown = 10 * done // total
      left = (now - began[0]) * (total - done) / (done - began[1])
      _LOG.info("%s: %d/%d  ETA %s", what, done, total, loop.duration(left))

  return show


def join_teachers(
  config: ml_collections.ConfigDict, teachers: Mapping[str, Teacher]
) -> Teacher | None:
  """Returns the teacher that the students learn from: one, or the mean."""
  chosen = [teachers[name] for name in config.distil_from]
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
  name: str, count: int, config: ml_collections.ConfigDict, at_once: int = 1
) -> contextlib.AbstractContextManager[None]:
  """Says what to lower, if there is not enough memory for a stage.

  Args:
    name: of the stage.
    count: of the networks that are trained together.
    config: see `configs/`.
    at_once: how many of them one program updates, at most.
  """
  networks_ = "1 network" if count == 1 else f"{count} networks"
  free, lower = "Free some", "data.batch_size or data.size"
  if count > 1:
    lower = "data.batch_size, data.size or the number of arms"
  if at_once > 1:
    free += f", or set seeds_at_once to less than {at_once} (1: one by one)"
  return memory.enough(
    f"{name}: training {networks_} on batches of {config.data.batch_size}",
    f"{free}, then the same command continues; or lower {lower}, in another "
    "--workdir",
  )
