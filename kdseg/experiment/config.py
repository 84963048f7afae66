"""Reads and checks the config of an experiment: every refusal is here."""

import collections
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import ml_collections

from kdseg import networks
from kdseg.data import augment as augment_lib
from kdseg.data import sets
from kdseg.distill import extensions as extensions_lib
from kdseg.distill import method as method_lib
from kdseg.evaluation import evaluate
from kdseg.experiment import workdir as workdir_lib
from kdseg.runtime import devices
from kdseg.runtime import names as names_lib
from kdseg.training import settings

# What a data set's test split is called in scores.csv.
TEST_NAMES = {name: b.test_name for name, b in sets.BUILDERS.items()}

# Among the tests of a config: the images that choose, for a search of settings
# that leaves the test sets alone.
VALIDATION = "validation"

# The mean of several teachers, as an arm of its own.
JOINT = "teacher"

# What a config holds, a key that is optional in brackets.
_KEYS = (
  *("seed", "log_every", "data", "augment", "segmentation", "encoder_weights"),
  *("teachers", "distil_from", "precompute_teacher", "teacher_channels"),
  *("teacher_out_tta", "methods", "students", "arms", "training"),
  *("evaluation", "[primary]", "[seeds_at_once]", "[mapping]"),
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


def check(
  config: ml_collections.ConfigDict, extensions: extensions_lib.Extensions
) -> tuple[list[ArmId], dict[str, method_lib.Method]]:
  """Returns every arm of a config, and its methods by name.

  Raises:
    ConfigError: on a config that cannot be run.
  """
  try:
    _check_keys(config)
    _check_tests(config)
    settings.seeds_at_once(config.get("seeds_at_once", 0))
    names_lib.check_known(
      "mapping", [config.get("mapping", "pmap")], devices.MAPPINGS
    )
    method_lib.check_segmentation(config.segmentation)
    arm_ids = list_arms(config)
    methods = {
      name: method_lib.make_method(dict(options), extensions)
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
  names_lib.check_known(
    "augmentation", config.augment, augment_lib.Strengths._fields
  )
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
  extensions.check_names()
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
    shuffled = switches.get("teacher_out", "own") == "shuffled"
    if shuffled and config.data.batch_size // jax.device_count() < 2:
      raise ValueError(
        f'method "{name}" shuffles the teacher\'s outputs, which takes two '
        "images a device: raise data.batch_size"
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


def test_name(config: ml_collections.ConfigDict, name: str) -> str:
  """Returns what an entry of `data.tests` is called in scores.csv."""
  if name == VALIDATION:
    return f"{config.data.name}_{VALIDATION}"
  return TEST_NAMES[name]


def make_run_config(config: ml_collections.ConfigDict) -> settings.RunConfig:
  """Returns what all stages of the run have in common."""
  return settings.RunConfig(
    seed=config.seed,
    batch_size=config.data.batch_size,
    evaluation_batch_size=config.evaluation.batch_size,
    size=config.data.size,
    segmentation=dict(config.segmentation),
    augment=dict(config.augment),
    encoder_weights=config.encoder_weights,
    log_every=config.log_every,
    seeds_at_once=settings.seeds_at_once(config.get("seeds_at_once", 0)),
    mapping=config.get("mapping", "pmap"),
  )


def make_train_config(options: Mapping[str, Any]) -> settings.TrainConfig:
  """Returns the training that a config describes.

  Raises:
    ValueError: on an unknown key, with the nearest known one, or a missing one.
  """
  fields = dataclasses.fields(settings.TrainConfig)
  names_lib.check_known("key of a training", options, [f.name for f in fields])
  for field in fields:
    if field.default is dataclasses.MISSING and field.name not in options:
      raise ValueError(f"a training needs {field.name}: set it in the config")
  return settings.TrainConfig(**options)


def is_drawn(teacher: ml_collections.ConfigDict) -> bool:
  """Whether a teacher of a config is neither trained nor taken from a file."""
  training = make_train_config(dict(teacher.training))
  return not teacher.checkpoint and not training.steps(1, 1)


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


def list_taps(methods: Iterable[method_lib.Method]) -> tuple[str, ...]:
  """Returns the names of all features that the methods compare."""
  return tuple(sorted({tap for m in methods if m.needs_taps for tap in m.taps}))
