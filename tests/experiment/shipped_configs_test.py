"""Every config that is shipped can be run, down to its last name."""

import ast
import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from kdseg import networks
from kdseg.distill import method as method_lib
from kdseg.distill import terms as terms_lib
from kdseg.experiment import config as config_lib
from kdseg.experiment import run
from kdseg.experiment import students
from kdseg.experiment import workdir as workdir_lib
from kdseg.networks.teachers import ensemble
from kdseg.training import arms as arms_lib
from kdseg.training import prepare as prepare_lib

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
PATHS = sorted(FOLDER.glob("*.py"))

pytestmark = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@functools.cache
def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def variants(path):
  """Configs of a file by variant, those that its head names."""
  module = load(path)
  names = re.findall(rf"--config configs/{path.name}:(\w+)", module.__doc__)
  return {"": module.get_config()} | {n: module.get_config(n) for n in names}


def shapes(network, size):
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), image)


def test_the_head_names_its_command(path):
  command = f"python -m kdseg.main --config configs/{path.name} --workdir "
  # Lines may be continued with a backslash.
  assert command in " ".join(load(path).__doc__.replace("\\", " ").split())


def test_imports_nothing_of_the_package(path):
  imported = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      imported |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      imported.add(node.module)
  assert imported == {"ml_collections"}


def test_every_name_in_it_exists(path, tmp_path):
  # Stops at the lock, after every name was looked up and before any work.
  for config in variants(path).values():
    refusal = pytest.raises(workdir_lib.WorkdirError, match="another process")
    with workdir_lib.locked(tmp_path), refusal:
      run.run(config, tmp_path)


def test_terms_have_their_published_weights(path):
  published = {term.name: term.weight for term in terms_lib.TERMS}
  for variant, config in variants(path).items():
    if variant == "why":  # There the weight is what is compared.
      continue
    for method in config.methods.values():
      for term, weight in method.get("terms", {}).items():
        assert weight == published[term]


def test_a_variant_that_is_not_there_is_answered_with_those_that_are(path):
  names = set(variants(path)) - {""}
  if names:
    with pytest.raises(ValueError, match='not "serach"') as error:
      load(path).get_config("serach")
    assert all(f'"{name}"' in str(error.value) for name in names)


def test_can_be_locked_and_written_down(path):
  config = load(path).get_config().lock()
  assert '"arms"' in config.to_json_best_effort()
  with pytest.raises(AttributeError, match=r'Did you mean "training"'):
    config.trainig = 1


def test_nothing_of_it_is_shared_between_calls(path):
  first, second = load(path).get_config(), load(path).get_config()
  first.data.size = 1
  first.methods.none.terms = {"kd": 1.0}
  assert second.data.size != 1
  assert "terms" not in second.methods.none


def test_has_a_student_that_is_not_taught(path):
  config = load(path).get_config()
  methods = {name: method_lib.make_method(dict(options))
             for name, options in config.methods.items()}  # fmt: skip
  assert not methods["none"].terms
  for arm in config.arms.values():
    assert "none" in arm.methods


def test_teacher_and_students_have_the_taps_that_are_compared(path):
  for variant, config in variants(path).items():
    wanted = _check_taps(config)
    assert wanted or variant == "search"


def _check_taps(config):
  size = config.data.size
  teachers = [
    networks.make_network(
      config.teachers[name].network, **dict(config.teachers[name].options)
    )
    for name in config.distil_from
  ]
  wanted = {}
  if not teachers:
    return wanted
  parsed = config_lib.parse(config)
  for arm_id in parsed.arms:
    method = parsed.methods[arm_id.method]
    if method.needs_taps:
      wanted[arm_id.student, arm_id.method] = method
  teacher = teachers[0] if len(teachers) == 1 else ensemble.Ensemble(teachers)
  teach = prepare_lib.make_teach(
    teacher,
    students.list_taps(wanted.values()),
    channels=config.teacher_channels,
  )
  teacher_out = jax.eval_shape(
    teach,
    shapes(teacher, size),
    jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
  )
  for (student, _), method in wanted.items():
    _, (features, _) = arms_lib.make_distiller(
      parsed.students[student], teacher_out, method, size=size
    )
    assert set(features) == (set(method.taps) if method.aligns else set())
  return wanted


def test_batches_split_over_eight_devices(path):
  config = load(path).get_config()
  assert config.data.batch_size % 8 == 0
  assert config.evaluation.batch_size % 8 == 0
