"""One experiment, whole: data, teachers, students, scores, report.

Every stage leaves a finished artefact in the workdir and is passed over when
it is there; a training that was stopped goes on from its last checkpoint. So
a second start continues the first, and a third finds nothing to do.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import pathlib
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from kdseg import networks
from kdseg.data import archives
from kdseg.data import augment as augment_lib
from kdseg.data import orientations
from kdseg.data import pipeline
from kdseg.distill import extensions as extensions_lib
from kdseg.distill import objective
from kdseg.evaluation import evaluate
from kdseg.evaluation import metrics
from kdseg.experiment import workdir as workdir_lib
from kdseg.losses import boundary
from kdseg.networks.teachers import ensemble
from kdseg.report import overlays
from kdseg.report import scores as scores_lib
from kdseg.report import tables
from kdseg.runtime import checkpoint
from kdseg.runtime import devices
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import names as names_lib
from kdseg.runtime import preemption
from kdseg.training import cache
from kdseg.training import loop
from kdseg.training import stage
from kdseg.training import step as step_lib

_LOG = logging.getLogger("kdseg")

Tree = Any
Log = Callable[[Mapping[str, Any]], None]

# What a data set's test split is called in scores.csv.
TEST_NAMES = {
  "isic2016": "isic2016_test",
  "ph2": "ph2",
  "synthetic": "synthetic_test",
  "folder": "folder",
}
# Among the tests of a config: the images that choose, for a search of settings
# that leaves the test sets alone.
VALIDATION = "validation"
# The mean of several teachers, as an arm of its own.
JOINT = "teacher"
# What the report was made of, written after it.
_REPORTED = ".reported"
# The rows of the group that is being scored, a batch a line.
_NOTED = "scoring.jsonl"


# What a config holds, a key that is optional in brackets.
_KEYS = (
  *("seed", "log_every", "data", "augment", "segmentation", "encoder_weights"),
  *("teachers", "distil_from", "precompute_teacher", "teacher_channels"),
  *("teacher_out_tta", "methods", "students", "arms", "training"),
  *("evaluation", "[primary]", "[seeds_at_once]"),
)
_DATA_KEYS = (
  *("name", "tests", "size", "batch_size", "manual_dir", "data_dir", "options"),
)
_EVALUATION_KEYS = ("batch_size", "tta", "teacher_tta", "[groups]")
_TEACHER_KEYS = (
  *("network", "options", "seed", "checkpoint", "precompute", "training"),
)
_ARM_KEYS = ("methods", "seeds")


class ConfigError(ValueError):
  """A config that cannot be run; says which key and why."""


@dataclasses.dataclass(frozen=True)
class ArmId:
  """A student to train: its arm in the tables, its method and its seed."""

  arm: str
  student: str
  method: str
  seed: int

  @property
  def key(self) -> str:
    """Names the arm and the seed in logs and folders."""
    return f"{self.arm}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Data:
  """The arrays of an experiment; test sets by their name in scores.csv."""

  train: pipeline.Arrays
  validation: pipeline.Arrays
  tests: Mapping[str, pipeline.Arrays]


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


def run(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  extensions: extensions_lib.Extensions | None = None,
  *,
  stop: preemption.Stop = preemption.never,
) -> bool:
  """Runs what is not finished of an experiment.

  Args:
    config: see `configs/`.
    workdir: made if it is missing.
    extensions: losses, regions and students that the config names and the
      package does not have. A workdir does not store them: pass them again.
    stop: asked now and then whether to save and stop; see `stopping`.

  Returns:
    Whether anything was left to do.

  Raises:
    StoppedError: if `stop` says so; the same call continues.
    WorkdirError: if another process uses the workdir, or it holds a run of
      another config.
    DataError: if the data are not as they should be.
    ConfigError: on a config that cannot be run.
    WriteError: if the disk is full or may not be written to; the same call
      continues.
    OutOfMemoryError: if there is not enough memory; the same call continues.
  """
  workdir = pathlib.Path(workdir)
  extensions = extensions or extensions_lib.Extensions()
  arm_ids, methods = check(config, extensions)
  with files.writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:

    def enter() -> bool:
      stack.enter_context(workdir_lib.locked(workdir))
      same = workdir_lib.check_config(config, workdir)
      _check_trained(config, workdir, arm_ids)
      return same and is_finished(config, workdir, arm_ids)

    if hosts.on_first(enter):
      _LOG.info("%s is finished; nothing to do", workdir)
      return False
    _check_taps(config, arm_ids, methods, extensions)
    started = time.monotonic()
    log = make_log(workdir)
    with memory.enough(
      f"data: images of {config.data.size} x {config.data.size}",
      "Free some, then the same command continues; or lower data.size, in "
      "another --workdir",
    ):
      data = load_data(config)
    _check_data_agree(data)

    def adopt() -> None:
      facts = describe_data(data)
      workdir_lib.check_data(workdir, facts)
      # Not before the data are there: a slip in a first command costs nothing.
      workdir_lib.adopt_config(config, workdir)
      workdir_lib.write_environment(workdir, facts)

    hosts.on_first(adopt)
    teachers = {
      name: make_teacher(name, config, workdir, data, log, stop)
      for name in config.teachers
    }
    train_arms(
      config, workdir, data, log, arm_ids, methods, teachers, extensions, stop
    )
    score_arms(config, workdir, data, arm_ids, teachers, extensions, stop)
    hosts.on_first(
      lambda: write_report(config, workdir, data, arm_ids, extensions)
    )
    seconds = time.monotonic() - started
    log({"stage": "run", "seconds": round(seconds, 1)})
    _LOG.info(
      "finished after %s; results in %s",
      loop.duration(seconds),
      workdir / "table.md",
    )
  return True


def make_log(workdir: pathlib.Path) -> Log:
  """Returns what writes log.jsonl; nothing on any host but the first."""
  if not hosts.is_first():
    return lambda record: None
  return functools.partial(checkpoint.append_json_line, workdir / "log.jsonl")


def _check_trained(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, arm_ids: list[ArmId]
) -> None:
  """Refuses methods that are not what arms of that name were trained with.

  A method that was taken out of a config and put back is not compared by
  `workdir.check_config`.

  Raises:
    WorkdirError: that names the switch.
  """
  trained: dict[str, Any] = {}
  for path in _list_groups(workdir):
    begun = json.loads(path.read_text(encoding="utf-8"))
    # Earlier versions wrote the names of the arms alone.
    trained |= begun if isinstance(begun, dict) else {}
  for arm_id in arm_ids:
    for name in ("about.json", "failed.json"):
      path = workdir / "arms" / arm_id.key / name
      if path.exists():
        about = json.loads(path.read_text(encoding="utf-8"))
        trained[arm_id.key] = about.get("switches", {})
  for arm_id in arm_ids:
    if arm_id.key not in trained:
      continue
    now = json.loads(json.dumps(config.methods[arm_id.method].to_dict()))
    for key, before, after in workdir_lib.differences(trained[arm_id.key], now):
      what, way_out = workdir_lib.say_change(
        f"methods.{arm_id.method}.{key}", before, after
      )
      raise workdir_lib.WorkdirError(
        f"{workdir} holds {arm_id.key} of another method of that name: {what}; "
        f"choose another name for it, another --workdir, or {way_out}"
      )


def _check_taps(
  config: ml_collections.ConfigDict,
  arm_ids: list[ArmId],
  methods: Mapping[str, objective.Method],
  extensions: extensions_lib.Extensions,
) -> None:
  """Refuses methods that compare what a network does not have.

  Apart from `check`, as it traces the networks.

  Raises:
    ConfigError: that names the method and the tap.
  """
  image = jnp.zeros((1, config.data.size, config.data.size, 3))

  def outputs(network: nn.Module) -> list[str]:
    shapes = jax.eval_shape(
      lambda rng: network.init_with_output(rng, image)[0], jax.random.key(0)
    )
    return list(shapes)

  wanted: dict[str, list[str]] = {}
  for arm_id in arm_ids:
    if methods[arm_id.method].needs_taps:
      wanted.setdefault(arm_id.student, []).append(arm_id.method)
  if not wanted:
    return
  networks_ = [
    networks.make_network(c.network, **dict(c.options))
    for c in (config.teachers[name] for name in config.distil_from)
  ]
  of_teachers = [outputs(network) for network in networks_]
  for student, names in wanted.items():
    of_student = outputs(make_student(student, config, extensions))
    for name in dict.fromkeys(names):
      for of_teacher in of_teachers:
        try:
          stage.check_taps(methods[name].taps, of_student, of_teacher)
        except ValueError as error:
          raise ConfigError(
            f'method "{name}" of arms.{student}: {error}'
          ) from error


def _check_data_agree(data: Data) -> None:
  """Refuses hosts that would train on different images.

  Raises:
    DataError: that names the split.
  """
  if not hosts.are_many():
    return
  splits = {"train": data.train, "validation": data.validation, **data.tests}
  found = hosts.gather(
    {name: pipeline.fingerprint(arrays) for name, arrays in splits.items()}
  )
  for name in splits:
    if len({host[name] for host in found}) > 1:
      raise archives.DataError(
        f"the hosts do not have the same {name} images; give each of them the "
        "same archives"
      )


def check(
  config: ml_collections.ConfigDict, extensions: extensions_lib.Extensions
) -> tuple[list[ArmId], dict[str, objective.Method]]:
  """Returns every arm of a config, and its methods by name.

  Raises:
    ConfigError: on a config that cannot be run.
  """
  try:
    _check_keys(config)
    _check_tests(config)
    stage.seeds_at_once(config.get("seeds_at_once", 0))
    objective.check_segmentation(config.segmentation)
    arm_ids = list_arms(config)
    methods = {
      name: objective.make_method(dict(options), extensions)
      for name, options in config.methods.items()
    }
    _check_teachers(config)
    _check_names(config, arm_ids, extensions)
  except names_lib.UnknownNameError:
    raise
  except ValueError as error:
    raise ConfigError(str(error)) from error
  except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
    # None in the place of a number, a text in the place of a dict, ...
    raise ConfigError(
      f"a value is of another kind than it has to be ({error}); compare the "
      "config with those in configs/"
    ) from error
  return arm_ids, methods


def _check_keys(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError on keys that are missing, or that nothing reads."""
  parts = [
    ("", config, _KEYS),
    ("data.", config.get("data"), _DATA_KEYS),
    ("evaluation.", config.get("evaluation"), _EVALUATION_KEYS),
  ]
  for group, keys in (("teachers", _TEACHER_KEYS), ("arms", _ARM_KEYS)):
    entries = dict(config.get(group) or {})
    parts += [(f"{group}.{n}.", entry, keys) for n, entry in entries.items()]
  for prefix, part, keys in parts:
    for key in keys:
      if key not in part and not key.startswith("["):
        raise ValueError(
          f"the config has no {prefix}{key}, which kdseg "
          f"{workdir_lib.version()} reads: it may be for another version; "
          "compare it with those in configs/"
        )
    known = [prefix + key.strip("[]") for key in keys]
    names_lib.check_known(
      f"key of a config in kdseg {workdir_lib.version()}",
      [prefix + key for key in part],
      known,
    )


def _check_tests(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError on data that the config cannot name."""
  c = config.data
  names_lib.check_known("data set", [c.name], TEST_NAMES)
  names_lib.check_known("data set", c.tests, (*TEST_NAMES, VALIDATION))
  if not c.tests:
    raise ValueError(
      f'data.tests names nothing to score on; "{VALIDATION}" are the images '
      "that choose"
    )
  if c.size % 32:
    raise ValueError(f"data.size must be divisible by 32, not {c.size}")


def list_arms(config: ml_collections.ConfigDict) -> list[ArmId]:
  """Returns every arm that the config names, the first seeds first.

  Raises:
    ValueError: on a method that `config.methods` does not define, or an arm
      that is named twice.
  """
  arm_ids = []
  for student, arm in config.arms.items():
    for key in ("methods", "seeds"):
      twice = [v for v, n in collections.Counter(arm[key]).items() if n > 1]
      if twice:
        raise ValueError(f"arms.{student}.{key} has {twice[0]!r} twice")
    for method in arm.methods:
      if method not in config.methods:
        raise ValueError(
          f'arms.{student}: unknown method "{method}"; config.methods defines '
          f"{', '.join(config.methods)}"
        )
      arm_ids += [
        ArmId(f"{student}-{method}", student, method, int(seed))
        for seed in arm.seeds
      ]
  return sorted(arm_ids, key=lambda arm_id: arm_id.seed)


def _check_teachers(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError on teachers that cannot be told from students."""
  for name in config.teachers:
    if not name.startswith("teacher_"):
      raise ValueError(
        f'teachers.{name}: call it "teacher_{name}", so that tables tell '
        "teachers from students"
      )
  for name in config.distil_from:
    if name not in config.teachers:
      raise ValueError(
        f'distil_from names "{name}"; config.teachers defines '
        f"{', '.join(config.teachers) or 'none'}"
      )


def _check_names(
  config: ml_collections.ConfigDict,
  arm_ids: list[ArmId],
  extensions: extensions_lib.Extensions,
) -> None:
  """Raises ValueError on a value that would only fail after hours."""
  options = inspect.signature(augment_lib.augment).parameters.values()
  known = [o.name for o in options if o.kind is o.KEYWORD_ONLY]
  names_lib.check_known("augmentation", config.augment, known)
  names_lib.check_known(
    "tta",
    [
      config.evaluation.tta,
      config.evaluation.teacher_tta,
      config.teacher_out_tta,
    ],
    evaluate.TTA_MODES,
  )
  if config.teacher_out_tta != "none" and not config.precompute_teacher:
    raise ValueError(
      f'teacher_out_tta is "{config.teacher_out_tta}": eight passes of the '
      "teacher a batch are only affordable with precompute_teacher"
    )
  for key, mine, shipped in (
    ("terms", extensions.terms, (*objective.TERMS, *objective.RESERVED)),
    ("regions", extensions.regions, boundary.REGIONS),
    ("students", extensions.students, networks.NETWORKS),
  ):
    taken = sorted(set(mine) & set(shipped))
    if taken:
      raise ValueError(
        f'extensions.{key}: the name "{taken[0]}" is taken; choose another'
      )
  for key, size in (
    ("data.batch_size", config.data.batch_size),
    ("evaluation.batch_size", config.evaluation.batch_size),
  ):
    if size < 1 or size % jax.device_count():
      raise ValueError(
        f"{key} is {size}; it must be a multiple of the number of devices, "
        f"{jax.device_count()}"
      )
  for method, others in config.get("primary", ()):
    for name in (method, *([others] if isinstance(others, str) else others)):
      if name not in config.methods:
        raise ValueError(
          f'primary names the method "{name}"; config.methods defines '
          f"{', '.join(config.methods)}"
        )
  for name in dict.fromkeys(arm_id.method for arm_id in arm_ids):
    switches = config.methods[name]
    if switches.get("terms") and not config.distil_from:
      raise ValueError(
        f'method "{name}" has terms, which need a teacher: set distil_from'
      )
    shuffled = switches.get("answers", "own") == "shuffled"
    if shuffled and config.data.batch_size // jax.device_count() < 2:
      raise ValueError(
        f'method "{name}" shuffles answers, which takes two images a device: '
        "raise data.batch_size"
      )
  for name in dict.fromkeys(arm_id.student for arm_id in arm_ids):
    # A table tells arms apart by "<student>-<method>", and teachers by name.
    if "-" in name or name.startswith(JOINT):
      raise ValueError(
        f'arms.{name}: the name of a student has no "-" and does not begin '
        f'with "{JOINT}"; choose another'
      )
  training = make_train_config(dict(config.training))
  training.check()
  if arm_ids and training.max_steps <= 0 and training.epochs <= 0:
    raise ValueError(f"training.epochs is {training.epochs}; take more than 0")
  for name, teacher in config.teachers.items():
    make_train_config(dict(teacher.training)).check()
    network = networks.make_network(teacher.network, **dict(teacher.options))
    if teacher.precompute and getattr(network, "trained_from", 0) < 1:
      raise ValueError(
        f"teachers.{name}.precompute: this network has no frozen block, so "
        "there is nothing to compute before; set precompute to False, or "
        "trained_from above 0"
      )
  for student in dict.fromkeys(arm_id.student for arm_id in arm_ids):
    make_student(student, config, extensions)


def load_data(config: ml_collections.ConfigDict) -> Data:
  """Reads every split that the config names.

  Raises:
    ValueError: if a split is empty.
    DataError: see `data.pipeline.load`.
  """
  c = config.data

  def load(name: str, split: str) -> pipeline.Arrays:
    arrays = pipeline.load(
      name,
      split,
      size=c.size,
      data_dir=c.data_dir or None,
      manual_dir=c.manual_dir or None,
      **dict(c.options.get(name, {})),
    )
    if not len(arrays):
      raise ValueError(f"{name}: the {split} split holds no image")
    _LOG.info(
      "data: %s %s, %d images (%s)", name, split, len(arrays), arrays.coverage
    )
    return arrays

  validation = load(c.name, "validation")
  return Data(
    train=load(c.name, "train"),
    validation=validation,
    tests={
      test_name(config, name): (
        validation if name == VALIDATION else load(name, "test")
      )
      for name in c.tests
    },
  )


def test_name(config: ml_collections.ConfigDict, name: str) -> str:
  """Returns what an entry of `data.tests` is called in scores.csv."""
  if name == VALIDATION:
    return f"{config.data.name}_{VALIDATION}"
  return TEST_NAMES[name]


def describe_data(data: Data) -> dict[str, dict[str, Any]]:
  """Returns facts about each split, for environment.json."""
  every = {"train": data.train, "validation": data.validation, **data.tests}
  return {
    name: {
      "name": arrays.name,
      "images": len(arrays),
      "coverage": arrays.coverage,
      "excluded": list(arrays.excluded),
      "sha256": pipeline.fingerprint(arrays),
    }
    for name, arrays in every.items()
  }


def is_finished(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  arm_ids: list[ArmId],
) -> bool:
  """Whether every arm is scored, and the report made of these scores."""
  scores, reported = workdir / "scores.csv", workdir / _REPORTED
  if not all(
    path.exists() for path in (scores, reported, workdir / "table.md")
  ):
    return False
  # By content: clocks go wrong, and copies have other times.
  if reported.read_bytes() != _name_sources(workdir):
    return False
  rows, _ = scores_lib.recover(scores)
  done = set(scores_lib.groups(rows))
  tests = [test_name(config, name) for name in config.data.tests]
  wanted = {
    (arm_id.arm, arm_id.seed, test)
    for arm_id in arm_ids
    if not (workdir / "arms" / arm_id.key / "failed.json").exists()
    for test in tests
  }
  wanted |= {
    (name, int(config.teachers[name].seed), test)
    for name in config.teachers
    for test in tests
  }
  return wanted <= done


def make_run_config(config: ml_collections.ConfigDict) -> stage.RunConfig:
  """Returns what all stages of the run have in common."""
  return stage.RunConfig(
    seed=config.seed,
    batch_size=config.data.batch_size,
    evaluation_batch_size=config.evaluation.batch_size,
    size=config.data.size,
    segmentation=dict(config.segmentation),
    augment=dict(config.augment),
    encoder_weights=config.encoder_weights,
    log_every=config.log_every,
    seeds_at_once=stage.seeds_at_once(config.get("seeds_at_once", 0)),
  )


def make_train_config(options: Mapping[str, Any]) -> stage.TrainConfig:
  """Returns the training that a config describes.

  Raises:
    ValueError: on an unknown key, with the nearest known one, or a missing one.
  """
  fields = dataclasses.fields(stage.TrainConfig)
  names_lib.check_known("key of a training", options, [f.name for f in fields])
  for field in fields:
    if field.default is dataclasses.MISSING and field.name not in options:
      raise ValueError(f"a training needs {field.name}: set it in the config")
  return stage.TrainConfig(**options)


# ------------------------------------------------------------------- teachers


def make_teacher(
  name: str,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: Data,
  log: Log,
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
  training = make_train_config(dict(c.training))
  drawn = is_drawn(c)
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
    spec = stage.ArmSpec(
      kind=name,
      network=network,
      seed=int(c.seed),
      destination=destination,
      about={"arm": name, "network": c.network, "method": "none"},
    )
    with enough_to_train(name, 1, config):
      stage.train_together(
        name,
        {name: spec},
        run_config=make_run_config(config),
        training=training,
        folder=workdir / "checkpoints" / name,
        arrays=data.train,
        validation=data.validation,
        log=log,
        cached_outputs={"encoder_features": encoder_features}
        if encoder_features
        else None,
        validation_encoded=validation_encoded,
        stop=stop,
      )

  def load() -> Tree:
    variables, about = checkpoint.load_variables(source, expected)
    if source != destination and not checkpoint.is_finished(destination):
      about = {**about, "arm": name, "taken_from": c.checkpoint}
      checkpoint.save_variables(destination, variables, about)
    return variables

  return Teacher(network, _tree_of_first(load, expected), encoder_features)


def is_drawn(teacher: ml_collections.ConfigDict) -> bool:
  """Whether a teacher of a config is neither trained nor taken from a file."""
  training = make_train_config(dict(teacher.training))
  return not teacher.checkpoint and not training.steps(1, 1)


def _tree_of_first(load: Callable[[], Tree], expected: Tree) -> Tree:
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
  data: Data,
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

  function = _within_memory(
    _mapped(encode, variables), f"{name}: encoding", config
  )
  found = []
  for split, arrays, count in (
    ("train", data.train, orientations.ORIENTATIONS),
    ("validation", data.validation, 1),
  ):
    found.append(
      cache.compute(
        function,
        arrays.image,
        cache_folder(workdir) / f"{name}-{split}",
        batch_size=config.evaluation.batch_size,
        key=_key(
          pipeline.fingerprint(arrays),
          variables["params"].get("encoder", {}),
          repr(network),
        ),
        orientations=count,
        progress=_progress(f"{name}: encoding {split}", stop),
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


def _mapped(
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


def _within_memory(
  function: Callable[..., Any],
  what: str,
  config: ml_collections.ConfigDict,
) -> Callable[..., Any]:
  """Says what to lower, if a call of `function` takes too much memory."""
  what = f"{what} in batches of {config.evaluation.batch_size}"
  return memory.enough(what, stage.LOWER_EVALUATION)(function)


def _key(data: str, tree: Tree, *more: str) -> str:
  """Names data, weights and whatever else decides what is kept."""
  digest = hashlib.sha256(data.encode())
  for leaf in jax.tree.leaves(tree):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  for text in more:
    digest.update(text.encode())
  return digest.hexdigest()


def _progress(what: str, stop: preemption.Stop) -> Callable[[int, int], None]:
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


# ------------------------------------------------------------------- students


def train_arms(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: Data,
  log: Log,
  arm_ids: list[ArmId],
  methods: Mapping[str, objective.Method],
  teachers: Mapping[str, Teacher],
  extensions: extensions_lib.Extensions,
  stop: preemption.Stop,
) -> None:
  """Trains every arm that has no result yet, all of them together.

  Arms that were stopped half-way are finished first, by themselves: arms that
  came later have seen nothing yet, and the batches are counted from 0.
  """
  run_config = make_run_config(config)
  training = make_train_config(dict(config.training))
  teacher = join_teachers(config, teachers)
  while True:
    by_key = {arm_id.key: arm_id for arm_id in arm_ids}
    keys, number = hosts.on_first(lambda: _next_group(config, arm_ids, workdir))
    if not keys:
      return
    group = [by_key[key] for key in keys]
    folder = workdir / "checkpoints" / "arms" / number / "steps"
    teaching = _make_teaching(
      config, workdir, data, teacher, [methods[p.method] for p in group], stop
    )
    specs = {
      arm_id.key: make_spec(
        arm_id, config, workdir, methods, teaching.shapes, extensions
      )
      for arm_id in group
    }
    alike = max(collections.Counter(arm_id.arm for arm_id in group).values())
    at_once = min(run_config.seeds_at_once, alike)
    with enough_to_train("students", len(group), config, at_once):
      stage.train_together(
        "students",
        specs,
        run_config=run_config,
        training=training,
        folder=folder,
        arrays=data.train,
        validation=data.validation,
        log=log,
        all_may_diverge=True,
        teach=teaching.teach,
        teacher_variables=teaching.variables,
        cached_outputs=teaching.cached_outputs,
        stop=stop,
      )


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


def list_untrained(workdir: pathlib.Path, arm_ids: list[ArmId]) -> list[ArmId]:
  """Returns the arms that have neither weights nor a reason for having none."""
  return [
    arm_id
    for arm_id in arm_ids
    if not checkpoint.is_finished(workdir / "arms" / arm_id.key)
    and not (workdir / "arms" / arm_id.key / "failed.json").exists()
  ]


def make_student(
  name: str,
  config: ml_collections.ConfigDict,
  extensions: extensions_lib.Extensions,
) -> nn.Module:
  """Returns the student of that name, with the options that the config has.

  Raises:
    ValueError: on an unknown name or option.
  """
  options = dict(config.students.get(name, {}))
  if name in extensions.students:
    return extensions.students[name](axis_name=devices.AXIS, **options)
  return networks.make_network(name, axis_name=devices.AXIS, **options)


def make_spec(
  arm_id: ArmId,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  methods: Mapping[str, objective.Method],
  teacher_out: Mapping[str, jax.ShapeDtypeStruct],
  extensions: extensions_lib.Extensions,
) -> stage.ArmSpec:
  """Returns the student of a plan, ready to be trained.

  Args:
    arm_id: which one.
    config: of the experiment.
    workdir: where its weights will go.
    methods: by name.
    teacher_out: shapes of the teacher's outputs for one image.
    extensions: students that a user adds.

  Raises:
    ValueError: if the student or the teacher lacks a tap of the method.
  """
  method = methods[arm_id.method]
  student = make_student(arm_id.student, config, extensions)
  distiller, inputs = stage.make_distiller(
    student, teacher_out, method, size=config.data.size
  )
  return stage.ArmSpec(
    kind=arm_id.arm,
    network=student,
    seed=arm_id.seed,
    destination=workdir / "arms" / arm_id.key,
    about={
      "arm": arm_id.arm,
      "network": arm_id.student,
      "method": arm_id.method,
      "switches": config.methods[arm_id.method].to_dict(),
    },
    method=method,
    distiller=distiller,
    distiller_inputs=inputs,
  )


def _next_group(
  config: ml_collections.ConfigDict, arm_ids: list[ArmId], workdir: pathlib.Path
) -> tuple[list[str], str]:
  """Returns the arms to train together next, and their number; or none.

  Raises:
    WorkdirError: if a training was begun with arms that are not in the plan.
  """
  open_keys = [arm_id.key for arm_id in list_untrained(workdir, arm_ids)]
  if not open_keys:
    return [], ""
  folder = workdir / "checkpoints" / "arms"
  with files.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
  switches = {p.key: config.methods[p.method].to_dict() for p in arm_ids}
  groups = _list_groups(workdir)
  for path in groups:
    keys = json.loads(path.read_text(encoding="utf-8"))
    if set(open_keys) & set(keys):
      missing = [key for key in keys if key not in switches]
      if missing:
        raise workdir_lib.WorkdirError(
          f"{path.parent} is a training of arms that the config has no more "
          f"({', '.join(missing)}); put them back, or delete that folder to "
          "start its other arms again"
        )
      return list(keys), path.parent.name
  # One may have been deleted: not by their count.
  number = max((int(path.parent.name) for path in groups), default=-1) + 1
  path = folder / f"{number:03d}" / "group.json"
  with files.writing(path):
    path.parent.mkdir(exist_ok=True)
  checkpoint.write_json(path, {key: switches[key] for key in open_keys})
  return open_keys, path.parent.name


def _list_groups(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the group.json of every group of arms that was begun."""
  found = (workdir / "checkpoints" / "arms").glob("*/group.json")
  return sorted(path for path in found if path.parent.name.isdigit())


def list_taps(methods: Iterable[objective.Method]) -> tuple[str, ...]:
  """Returns the names of all features that the methods compare."""
  return tuple(sorted({tap for m in methods if m.needs_taps for tap in m.taps}))


@dataclasses.dataclass(frozen=True)
class Teaching:
  """What the students of a group are given; all None without a teacher.

  Attributes:
    teach: asks the teacher for every batch; see `step.make_prepare`.
    variables: of the teacher, for `teach`.
    cached_outputs: the teacher's answers, computed before, in place of `teach`.
    shapes: of the teacher's outputs for one image.
  """

  teach: Callable[..., Mapping[str, jax.Array]] | None = None
  variables: Tree = None
  cached_outputs: Mapping[str, Mapping[str, np.ndarray]] | None = None
  shapes: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(
    default_factory=dict
  )


def _make_teaching(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: Data,
  teacher: Teacher | None,
  methods: list[objective.Method],
  stop: preemption.Stop = preemption.never,
) -> Teaching:
  """Prepares what a group's methods need of the teacher, and no more.

  Raises:
    ValueError: if a method needs a teacher and there is none.
  """
  needing = [method for method in methods if method.terms]
  if teacher is None:
    if needing:
      raise ValueError("methods with terms need a teacher: set distil_from")
    return Teaching()
  taps = list_taps(methods)
  teach = step_lib.make_teach(
    teacher.network, taps, channels=config.teacher_channels
  )
  image = jax.ShapeDtypeStruct(
    (1, config.data.size, config.data.size, 3), jnp.float32
  )
  shapes = jax.eval_shape(teach, teacher.variables, image)
  if not config.precompute_teacher:
    if not needing:
      return Teaching()
    return Teaching(teach, teacher.variables, None, shapes)

  def answer(
    variables: Tree, image: jax.Array, encoder_features: Tree = None
  ) -> dict[str, jax.Array]:
    encoder_features = _nested(encoder_features) if encoder_features else None
    return teach(variables, image.astype(jnp.float32) / 255.0, encoder_features)

  name = "+".join(config.distil_from)
  key = _key(
    pipeline.fingerprint(data.train),
    teacher.variables,
    repr(teacher.network),
    str(config.teacher_channels),
    *taps,
  )
  cached_outputs = cache.compute(
    _within_memory(
      _mapped(answer, teacher.variables), f"{name}: answers", config
    ),
    data.train.image,
    cache_folder(workdir) / f"taught-{key[:12]}",
    batch_size=config.evaluation.batch_size,
    key=key,
    extra=teacher.encoder_features,
    progress=_progress(f"{name}: answers for the training images", stop),
  )
  if config.teacher_out_tta == "dihedral":
    cached_outputs = cache.average(cached_outputs)
  return Teaching(None, None, {"teacher_out": cached_outputs}, shapes)


def _nested(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Turns {"members_0/grids": x} into {"members_0": {"grids": x}}."""
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    *outer, last = name.split("/")
    inner = nested
    for part in outer:
      inner = inner.setdefault(part, {})
    inner[last] = value
  return nested


# --------------------------------------------------------------------- scores


def score_arms(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: Data,
  arm_ids: list[ArmId],
  teachers: Mapping[str, Teacher],
  extensions: extensions_lib.Extensions,
  stop: preemption.Stop,
) -> None:
  """Scores every arm on every test set, once; rows go to scores.csv.

  The rows of the group that is being scored are noted, for the case that it is
  stopped.

  Raises:
    StoppedError: if `stop` says so.
  """
  path = workdir / "scores.csv"
  asked = hosts.share_question(stop)
  expected = {test: arrays.ids for test, arrays in data.tests.items()}

  def look() -> tuple[list[Any], list[bool]]:
    rows, dropped = scores_lib.recover(path, expected)
    if dropped:
      _LOG.warning("scores.csv: scored again, as cut off: %s", dropped)
    return list(scores_lib.groups(rows)), [
      checkpoint.is_finished(workdir / "arms" / arm_id.key)
      for arm_id in arm_ids
    ]

  found, finished_plans = hosts.on_first(look)
  done = {tuple(group) for group in found}
  joint = join_teachers(config, teachers)
  entries: list[tuple[str, int, Callable[[], Teacher]]] = [
    (name, int(config.teachers[name].seed), lambda t=teacher: t)
    for name, teacher in teachers.items()
  ]
  if joint is not None and len(config.distil_from) > 1:
    entries.append((JOINT, config.seed, lambda: joint))
  for arm_id, is_there in zip(arm_ids, finished_plans):
    if is_there:
      entries.append(
        (
          arm_id.arm,
          arm_id.seed,
          functools.partial(_student, arm_id, config, workdir, extensions),
        )
      )
  predicts: dict[str, Callable[..., Any]] = {}
  # Of as many images as there are, this takes a moment.
  fingerprint = functools.cache(
    lambda test: pipeline.fingerprint(data.tests[test])
  )
  for arm, seed, finished in entries:
    for test, arrays in data.tests.items():
      if (arm, seed, test) in done:
        continue
      network = finished()
      if repr(network.network) not in predicts:
        predicts[repr(network.network)] = stage.make_predict(network.network)
      is_teacher = arm.startswith(JOINT)
      tta = (
        config.evaluation.teacher_tta if is_teacher else config.evaluation.tta
      )
      scored = _score_group(
        (arm, seed, test),
        network,
        predicts[repr(network.network)],
        arrays,
        workdir,
        batch_size=config.evaluation.batch_size,
        tta=tta,
        fingerprint=fingerprint,
        stop=asked,
      )
      if hosts.is_first():
        scores_lib.append(
          path,
          [
            {"arm": arm, "seed": seed, "dataset": test, **row} for row in scored
          ],
          expected,
        )
        (workdir / _NOTED).unlink()
      _LOG.info(
        "scores: %s seed %d on %s: Dice %.4f",
        arm, seed, test, np.mean([row["dice"] for row in scored]),
      )  # fmt: skip


def _score_group(
  group: scores_lib.Group,
  teacher: Teacher,
  predict: Callable[..., Any],
  arrays: pipeline.Arrays,
  workdir: pathlib.Path,
  *,
  batch_size: int,
  tta: str,
  fingerprint: Callable[[str], str],
  stop: preemption.Stop,
) -> list[evaluate.Row]:
  """Scores one network on one test set, from where it was stopped.

  Raises:
    StoppedError: if `stop` says so.
  """
  arm, seed, test = group
  noted = workdir / _NOTED

  def look() -> list[list[evaluate.Row]]:
    how = (arm, str(seed), test, tta, str(batch_size))
    key = _key(fingerprint(test), teacher.variables, *how)
    return _read_noted(noted, key)

  def note(rows: Sequence[evaluate.Row]) -> None:
    if hosts.is_first():
      checkpoint.append_json_line(noted, rows)
    preemption.check(stop, f"{arm} seed {seed} was scored on {test}")

  before = hosts.on_first(look)
  if before:
    _LOG.info(
      "scores: %s seed %d on %s goes on from image %d of %d",
      arm, seed, test, sum(map(len, before)), len(arrays),
    )  # fmt: skip
  what = f"scores: {arm} seed {seed} on {test} in batches of {batch_size}"
  with memory.enough(what, stage.LOWER_EVALUATION):
    return evaluate.score(
      predict,
      devices.replicate(teacher.variables),
      arrays,
      batch_size=batch_size,
      tta=tta,
      keep=functools.partial(_save_prediction, workdir, arm, seed, test),
      before=before,
      note=note,
    )


def _read_noted(path: pathlib.Path, key: str) -> list[list[evaluate.Row]]:
  """Returns the batches that were noted under this key; begins with none."""
  if path.exists():
    with contextlib.suppress(ValueError):
      # A line that was cut off is none.
      lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
      head, *batches = [json.loads(line) for line in lines]
      if head == {"key": key}:
        return batches
    path.unlink()
  checkpoint.append_json_line(path, {"key": key})
  return []


def _student(
  arm_id: ArmId,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  extensions: extensions_lib.Extensions,
) -> Teacher:
  network = make_student(arm_id.student, config, extensions)

  def load() -> Tree:
    return checkpoint.load_variables(workdir / "arms" / arm_id.key)[0]

  if not hosts.are_many():
    return Teacher(network, load())
  size = config.data.size
  expected = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, size, size, 3))
  )
  return Teacher(network, _tree_of_first(load, expected))


# --------------------------------------------------------------------- report


def write_report(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: Data,
  arm_ids: list[ArmId],
  extensions: extensions_lib.Extensions,
) -> None:
  """Writes report.json, the tables and overlays.png from what lies there."""
  rows = scores_lib.read(workdir / "scores.csv")
  meta = _describe_protocol(config, workdir, data, arm_ids, extensions)
  checkpoint.write_json(workdir / "report.json", meta)
  cases, title = _pick_cases(workdir, data, rows)
  if cases:
    with files.whole(workdir / "overlays.png") as file:
      overlays.overlays(cases, title=title).save(file, "PNG")
  for name, text in tables.make_tables(rows, meta).items():
    files.write_text(workdir / name, text)
  with files.whole(workdir / _REPORTED) as file:
    file.write(_name_sources(workdir))


def _name_sources(workdir: pathlib.Path) -> bytes:
  """Names the content of what a report is made from."""
  digest = hashlib.sha256()
  for name in ("config.json", "scores.csv"):
    digest.update(hashlib.sha256((workdir / name).read_bytes()).digest())
  return digest.hexdigest().encode() + b"\n"


def _describe_protocol(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: Data,
  arm_ids: list[ArmId],
  extensions: extensions_lib.Extensions,
) -> dict[str, Any]:
  """Returns what `report.summary` calls meta."""
  size = config.data.size
  arms, notes = {}, []
  folders = {name: workdir / "teachers" / name for name in config.teachers}
  for arm_id in arm_ids:
    folder = workdir / "arms" / arm_id.key
    if checkpoint.is_finished(folder):
      folders.setdefault(arm_id.arm, folder)
  macs: dict[str, float] = {}
  for arm, folder in folders.items():
    if not checkpoint.is_finished(folder):
      continue
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    if arm in config.teachers:
      network = networks.make_network(
        about["network"], **dict(config.teachers[arm].options)
      )
    else:
      network = make_student(about["network"], config, extensions)
    if repr(network) not in macs:
      macs[repr(network)] = networks.count_macs(network, size=size)
    arms[arm] = {
      "parameters": about["parameters"],
      "macs": macs[repr(network)],
    }
  if len(config.distil_from) > 1:
    parts = [arms[name] for name in config.distil_from]
    arms[JOINT] = {
      key: sum(part[key] for part in parts) for key in ("parameters", "macs")
    }
    notes.append(
      f"{JOINT} is the mean probability of {', '.join(config.distil_from)}"
    )
  for arm_id in arm_ids:
    for name in ("about.json", "failed.json"):
      path = workdir / "arms" / arm_id.key / name
      if path.exists():
        why = json.loads(path.read_text(encoding="utf-8"))["diverged"]
        if why:
          notes.append(f"{arm_id.arm}, seed {arm_id.seed}, diverged: {why}")
  excluded = ", ".join(data.train.excluded)
  if excluded:
    notes.append(
      f"kept out of training, as duplicates of test images: {excluded}"
    )
  training = make_train_config(dict(config.training))
  if config.teacher_out_tta != "none":
    notes.append(
      "what the students are taught is the mean of the teacher's logits and "
      "features over eight orientations; a teacher's score is that of the mean "
      "of its probabilities"
      if config.evaluation.teacher_tta != "none"
      else "what the students are taught is the mean of the teacher's logits "
      "and features over eight orientations; its score is without averaging"
    )
  tta = config.evaluation.tta
  if config.evaluation.teacher_tta != tta:
    tta += f" (teachers: {config.evaluation.teacher_tta})"
  meta: dict[str, Any] = {
    "train": {
      "name": config.data.name,
      "found": data.train.found_count,
      "official": data.train.official_count,
    },
    "datasets": {
      # The images that choose are a part of the official training set.
      test: {"found": len(arrays)}
      if arrays is data.validation
      else {"found": arrays.found_count, "official": arrays.official_count}
      for test, arrays in data.tests.items()
    },
    "protocol": {
      "resolution": size,
      "threshold": metrics.THRESHOLD,
      "interpolation": "bilinear",
      "test_time_augmentation": tta,
      "checkpoint": (
        f"best validation Dice, every {training.validate_epochs:g} epochs"
      ),
    },
    "arms": arms,
    "baseline": "none",
    "notes": notes,
  }
  if config.distil_from:
    teacher = JOINT if len(config.distil_from) > 1 else config.distil_from[0]
    # One that knows nothing is a control, which need not be ahead of students.
    drawn = all(is_drawn(config.teachers[name]) for name in config.distil_from)
    meta["teacher"] = "" if drawn else teacher
  if "primary" in config:
    meta["primary"] = _primary_family(config, data)
    meta["validation"] = _validation_dice(workdir, arm_ids)
  groups = dict(config.evaluation.get("groups", {}))
  if groups:
    meta["groups"] = {name: list(ids) for name, ids in groups.items()}
  return meta


def _primary_family(
  config: ml_collections.ConfigDict, data: Data
) -> list[dict[str, Any]]:
  """Returns the comparisons that `config.primary` names, for every student.

  It holds pairs of methods, (one, the other); of several others the report
  takes the best on validation.
  """
  family = []
  for student in config.arms:
    for method, others in config.primary:
      against: Any = f"{student}-{others}"
      if not isinstance(others, str):
        against = [f"{student}-{other}" for other in others]
      family += [
        {"dataset": test, "arm": f"{student}-{method}", "against": against}
        for test in data.tests
      ]
  return family


def _validation_dice(
  workdir: pathlib.Path, arm_ids: list[ArmId]
) -> dict[str, dict[str, float]]:
  """Returns {arm: {seed: Dice of the weights that were kept}}."""
  found: dict[str, dict[str, float]] = {}
  for arm_id in arm_ids:
    path = workdir / "arms" / arm_id.key / "about.json"
    if path.exists():
      about = json.loads(path.read_text(encoding="utf-8"))
      by_seed = found.setdefault(arm_id.arm, {})
      by_seed[str(arm_id.seed)] = about["validation_dice"]
  return found


def _pick_cases(
  workdir: pathlib.Path, data: Data, rows: list[scores_lib.Row]
) -> tuple[list[overlays.Case], str]:
  """Picks from the first seed of every arm on the first test set; a title."""
  test, arrays = next(iter(data.tests.items()))
  index = {identity: i for i, identity in enumerate(arrays.ids)}
  cases, seen = [], set()
  for (arm, seed, dataset), group in scores_lib.groups(rows).items():
    if dataset != test or arm in seen:
      continue
    seen.add(arm)
    dice = {str(row["id"]): float(row["dice"]) for row in group}
    for rank, identity in overlays.pick(group).items():
      i = index[identity]
      truth = arrays.native_mask(i)
      image = Image.fromarray(arrays.image[i]).resize(truth.shape[::-1])
      path = _prediction_path(workdir, arm, seed, test, identity)
      if not path.exists():
        _LOG.warning("overlays.png goes without %s, which is not there", path)
        continue
      with Image.open(path) as prediction:
        cases.append(
          overlays.Case(
            arm=arm,
            rank=rank,
            id=identity,
            dice=dice[identity],
            image=np.asarray(image),
            truth=truth,
            prediction=np.asarray(prediction.convert("L")) > 0,
          )
        )
  return cases, f"{test}, first seed of each arm"


def _prediction_path(
  workdir: pathlib.Path, arm: str, seed: int, test: str, identity: str
) -> pathlib.Path:
  name = identity.replace("/", "_")
  return workdir / "predictions" / f"{arm}-seed{seed}" / test / f"{name}.png"


def _save_prediction(
  workdir: pathlib.Path,
  arm: str,
  seed: int,
  test: str,
  identity: str,
  mask: np.ndarray,
) -> None:
  path = _prediction_path(workdir, arm, seed, test, identity)
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as file:
    Image.fromarray(mask).save(file, "PNG")
