"""From a config file to typed records: every refusal of a config is here.

`parse` turns the `ml_collections.ConfigDict` of a file in `configs/` into a
`records.ExperimentConfig`, once; below it values are passed.
"""

import collections
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import json
from typing import Any
from typing import TypeVar

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from kdseg import networks
from kdseg.data import augment as augment_lib
from kdseg.data import sets
from kdseg.distill import extensions as extensions_lib
from kdseg.distill import method as method_lib
from kdseg.evaluation import evaluate
from kdseg.experiment.records import JOINT
from kdseg.experiment.records import VALIDATION
from kdseg.experiment.records import ArmId
from kdseg.experiment.records import DataConfig
from kdseg.experiment.records import EvaluationConfig
from kdseg.experiment.records import ExperimentConfig
from kdseg.experiment.records import TeacherConfig
from kdseg.runtime import devices
from kdseg.runtime import names as names_lib
from kdseg.training import arms as arms_lib
from kdseg.training import settings

T = TypeVar("T")

# Fields of the records that are no keys of a config.
_MADE = ("tree", "builders")


class ConfigError(ValueError):
  """A config that cannot be run; says which key and why."""


def parse(
  config: ml_collections.ConfigDict,
  extensions: extensions_lib.Extensions | None = None,
) -> ExperimentConfig:
  """Returns a config as records, checked but for the taps of its networks.

  Args:
    config: see `configs/`.
    extensions: what a user adds and the config names.

  Raises:
    ConfigError: on a config that cannot be run.
    UnknownNameError: on an unknown name, with the nearest known one.
  """
  try:
    parsed = _parse(config, extensions or extensions_lib.Extensions())
    for check in (_check_data, _check_teachers, _check_methods, _check_rest):
      check(parsed)
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
  return parsed


def _parse(
  config: ml_collections.ConfigDict, extensions: extensions_lib.Extensions
) -> ExperimentConfig:
  """Makes the records."""
  values = config.to_dict()
  _check_keys(ExperimentConfig, values, "")
  extensions.check_names()
  teachers = {
    name: _read(
      TeacherConfig,
      {**teacher, "training": _read_training(teacher, f"teachers.{name}.")},
      f"teachers.{name}.",
    )
    for name, teacher in values["teachers"].items()
  }
  known = {**method_lib.shipped_methods(), **values["methods"]}
  arms = _list_arms(values["arms"], known)
  names_lib.check_known(
    "student in students",
    values["students"],
    (*networks.NETWORKS, *extensions.students),
  )
  named = (*values["methods"], *(arm_id.method for arm_id in arms))
  methods = {name: known[name] for name in named}
  parts = {
    "data": dataclasses.replace(
      _read(DataConfig, values["data"], "data."),
      builders={**sets.BUILDERS, **extensions.data_sets},
    ),
    "teachers": teachers,
    "methods": {
      name: method_lib.make_method(options, extensions)
      for name, options in methods.items()
    },
    "students": {
      name: _make_student(name, values["students"].get(name, {}), extensions)
      for name in dict.fromkeys(arm_id.student for arm_id in arms)
    },
    "arms": arms,
    "training": _read_training(values, ""),
    "evaluation": _read(EvaluationConfig, values["evaluation"], "evaluation."),
    "tree": {
      **json.loads(config.to_json_best_effort()),
      "methods": json.loads(json.dumps(methods)),
    },
  }
  return ExperimentConfig(**{**values, **parts})


def _read(record: type[T], values: Mapping[str, Any], prefix: str) -> T:
  """Makes a record of a config's values; `prefix` names them in messages."""
  _check_keys(record, values, prefix)
  return record(**values)


def _read_training(
  values: Mapping[str, Any], prefix: str
) -> settings.TrainConfig:
  """Makes the record of a `training` and checks it."""
  prefix += "training"
  training = _read(settings.TrainConfig, values["training"], f"{prefix}.")
  try:
    training.check()
  except ValueError as error:
    raise ValueError(f"{prefix}: {error}") from error
  return training


def _check_keys(record: Any, values: Mapping[str, Any], prefix: str) -> None:
  """Raises ValueError on keys that are missing, or that nothing reads."""
  fields = [f for f in dataclasses.fields(record) if f.name not in _MADE]
  names_lib.check_known(
    "key of a config",
    [prefix + key for key in values],
    [prefix + field.name for field in fields],
  )
  for field in fields:
    optional = not (
      field.default is field.default_factory is dataclasses.MISSING
    )
    if field.name not in values and not optional:
      raise ValueError(
        f"the config has no {prefix}{field.name}: it may be for another "
        "version; compare it with those in configs/"
      )


def _list_arms(
  arms: Mapping[str, Any], methods: Iterable[str]
) -> tuple[ArmId, ...]:
  """Returns every arm, the first seeds first.

  Raises:
    ValueError: on a method that is not defined, or an arm that is named twice.
  """
  arm_ids = []
  for student, arm in arms.items():
    names_lib.check_known(
      "key of a config",
      [f"arms.{student}.{key}" for key in arm],
      [f"arms.{student}.{key}" for key in ("methods", "seeds")],
    )
    for key in ("methods", "seeds"):
      twice = [v for v, n in collections.Counter(arm[key]).items() if n > 1]
      if twice:
        raise ValueError(f"arms.{student}.{key} has {twice[0]!r} twice")
    names_lib.check_known(f"method of arms.{student}", arm["methods"], methods)
    # A table tells arms apart by "<student>-<method>", and teachers by name.
    if "-" in student or student.startswith(JOINT):
      raise ValueError(
        f'arms.{student}: the name of a student has no "-" and does not begin '
        f'with "{JOINT}"; choose another'
      )
    arm_ids += [
      ArmId(f"{student}-{method}", student, method, int(seed))
      for method in arm["methods"]
      for seed in arm["seeds"]
    ]
  return tuple(sorted(arm_ids, key=lambda arm_id: arm_id.seed))


def _make_student(
  name: str, options: Mapping[str, Any], extensions: extensions_lib.Extensions
) -> nn.Module:
  """Returns a student of the package, or one that a user adds."""
  if name in extensions.students:
    return extensions.students[name](axis_name=devices.AXIS, **options)
  return networks.make_network(name, axis_name=devices.AXIS, **options)


def _check_data(config: ExperimentConfig) -> None:
  """Raises ValueError on data, batches or augmentations that cannot be."""
  c = config.data
  names_lib.check_known("data set", [c.name], c.builders)
  names_lib.check_known("data set", c.tests, (*c.builders, VALIDATION))
  names_lib.check_known("data set in data.options", c.options, c.builders)
  if not c.tests:
    raise ValueError(
      "data.tests names nothing to score on; for the validation images write "
      f'"{VALIDATION}"'
    )
  scored = [c.builders[test] for test in c.tests if test != VALIDATION]
  is_own = not all(b.official for b in (c.builders[c.name], *scored))
  if is_own and c.name not in c.tests and VALIDATION not in c.tests:
    raise ValueError(
      f'data.name is "{c.name}", but data.tests scores {", ".join(c.tests)} '
      f"alone; pass --config.data.tests=\"('{c.name}',)\" too, with more names "
      f'if more are to be scored, or with "{VALIDATION}"'
    )
  if c.size % 32:
    raise ValueError(f"data.size must be divisible by 32, not {c.size}")
  count = jax.device_count()
  for key, size in (
    ("data", c.batch_size),
    ("evaluation", config.evaluation.batch_size),
  ):
    if size < 1 or size % count:
      raise ValueError(
        f"{key}.batch_size is {size}; it must be a multiple of the number of "
        f"devices, {count}"
      )
  names_lib.check_known(
    "augmentation", config.augment, augment_lib.Strengths._fields
  )


def _check_teachers(config: ExperimentConfig) -> None:
  """Raises ValueError on teachers that cannot be trained, or told apart."""
  for name, teacher in config.teachers.items():
    if not name.startswith("teacher_"):
      raise ValueError(
        f'teachers.{name}: call it "teacher_{name}", so that tables tell '
        "teachers from students"
      )
    network = teacher.make()
    if teacher.precompute and getattr(network, "trained_from", 0) < 1:
      raise ValueError(
        f"teachers.{name}.precompute: this network has no frozen block whose "
        "outputs could be computed once; set precompute to False, or "
        "trained_from above 0"
      )
  names_lib.check_known(
    "teacher in distil_from", config.distil_from, config.teachers
  )
  if config.teacher_out_tta != "none" and not config.precompute_teacher:
    raise ValueError(
      f'teacher_out_tta is "{config.teacher_out_tta}": eight passes of the '
      "teacher a batch are only affordable with precompute_teacher"
    )


def _check_methods(config: ExperimentConfig) -> None:
  """Raises ValueError on methods that the run cannot train or compare."""
  for one, others in config.primary:
    names = (others,) if isinstance(others, str) else others
    names_lib.check_known("method in primary", (one, *names), config.methods)
  for name in dict.fromkeys(arm_id.method for arm_id in config.arms):
    method = config.methods[name]
    if method.terms and not config.distil_from:
      raise ValueError(
        f'method "{name}" has terms, which need a teacher: set distil_from'
      )
    per_device = config.data.batch_size // jax.device_count()
    if method.teacher_out == "shuffled" and per_device < 2:
      raise ValueError(
        f'method "{name}" shuffles the teacher\'s outputs, which takes two '
        "images a device: raise data.batch_size"
      )


def _check_rest(config: ExperimentConfig) -> None:
  """Raises ValueError on other values that would only fail after hours."""
  settings.seeds_at_once(config.seeds_at_once)
  names_lib.check_known("mapping", [config.mapping], devices.MAPPINGS)
  method_lib.check_segmentation(config.segmentation)
  evaluation = config.evaluation
  modes = [evaluation.tta, evaluation.teacher_tta, config.teacher_out_tta]
  names_lib.check_known("tta", modes, evaluate.TTA_MODES)
  if config.arms and config.training.steps(1, 1) < 1:
    raise ValueError(
      f"training.epochs is {config.training.epochs}; take more than 0"
    )


def check_taps(config: ExperimentConfig) -> None:
  """Refuses methods that compare features which a network does not have.

  Apart from `parse`, as it traces the networks.

  Raises:
    ConfigError: that names the method and the tap.
  """
  compared: dict[str, list[str]] = {}
  for arm_id in config.arms:
    if config.methods[arm_id.method].needs_taps:
      compared.setdefault(arm_id.student, []).append(arm_id.method)
  if not compared:
    return
  teachers = [
    _outputs(config.teachers[name].make(), config.data.size)
    for name in config.distil_from
  ]
  for student, methods in compared.items():
    outputs = _outputs(config.students[student], config.data.size)
    for name in dict.fromkeys(methods):
      for teacher in teachers:
        try:
          arms_lib.check_taps(config.methods[name].taps, outputs, teacher)
        except ValueError as error:
          raise ConfigError(
            f'method "{name}" of arms.{student}: {error}'
          ) from error


def _outputs(network: nn.Module, size: int) -> list[str]:
  """Returns the names of a network's outputs."""
  image = jnp.zeros((1, size, size, 3))
  shapes = jax.eval_shape(
    lambda rng: network.init_with_output(rng, image)[0], jax.random.key(0)
  )
  return list(shapes)
