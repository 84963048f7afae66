"""What an experiment will cost, measured before it starts."""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import pathlib
import statistics
import time
from typing import Any

from flax import linen as nn
import jax
import ml_collections
import numpy as np

from kdseg import networks
from kdseg.data import orientations
from kdseg.distill import method as method_lib
from kdseg.experiment import config as config_lib
from kdseg.experiment import jobs
from kdseg.experiment import splits
from kdseg.experiment import students
from kdseg.experiment import teachers as teachers_lib
from kdseg.experiment import workdir as workdir_lib
from kdseg.experiment.jobs import Job
from kdseg.experiment.records import JOINT
from kdseg.experiment.records import ExperimentConfig
from kdseg.experiment.records import Run
from kdseg.runtime import devices
from kdseg.runtime import memory
from kdseg.training import arms as arms_lib
from kdseg.training import loop
from kdseg.training import prepare as prepare_lib
from kdseg.training import settings
from kdseg.training import step as step_lib

Tree = Any


@dataclasses.dataclass(frozen=True)
class Item:
  """One kind of work: what it is, how often, and the seconds of one."""

  what: str
  count: int
  seconds: float

  @property
  def total(self) -> float:
    """Seconds of all of it."""
    return self.count * self.seconds


@dataclasses.dataclass(frozen=True)
class _Bench:
  """What is timed, and with what.

  Attributes:
    run: the experiment.
    data: its images; only their number matters.
    repeats: of each function; the median counts.
    passes: seconds of a forward pass by network; filled as they are measured.
  """

  run: Run
  data: splits.Data
  repeats: int
  passes: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def config(self) -> ExperimentConfig:
    return self.run.config

  def batch(self) -> dict[str, np.ndarray]:
    """Returns a batch of zeros, as the arms are given it."""
    size, count = self.config.data.size, self.config.data.batch_size
    image = np.zeros((count, size, size, 3), np.float32)
    return devices.shard({"image": image, "mask": image[..., 0]})

  def initial(self, network: nn.Module) -> Tree:
    """Returns a network's variables, randomly initialised."""
    return networks.make_variables(
      network, jax.random.key(0), size=self.config.data.size, weights=False
    )


def estimate(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  repeats: int = 5,
) -> list[Item]:
  """Measures every job that is left to do, on this machine.

  Compiled functions run on zeros. A training that was stopped counts whole, and
  so do passes that a cache may hold. Compiling, reading, augmenting, writing
  and boundary metrics are left out.

  Args:
    config: see `configs/`.
    workdir: of the run; need not exist, and is left as it is.
    repeats: of each function; the median counts.

  Raises:
    ConfigError, WorkdirError: as `run.run`.
    DataError: if images are missing or damaged.
    OutOfMemoryError: if something takes more memory than there is.
  """
  parsed = config_lib.parse(config)
  parsed = dataclasses.replace(parsed, encoder_weights=False)
  run = Run(parsed, pathlib.Path(workdir))
  workdir_lib.check_config(parsed.tree, run.workdir)
  students.check_trained(run)
  config_lib.check_taps(parsed)
  bench = _Bench(run, splits.load(parsed.data), repeats)
  items: dict[str, Item] = {}
  for job in jobs.list_jobs(run):
    for item in _TIMERS[job.kind](bench, job):
      before = items.get(item.what)
      count = item.count + (before.count if before else 0)
      items[item.what] = dataclasses.replace(item, count=count)
  return [item for item in items.values() if item.count]


def _time_encoding(bench: _Bench, job: Job) -> list[Item]:
  return [_all_views(bench, job.name, "encoding")]


def _all_views(bench: _Bench, name: str, what: str) -> Item:
  """Times passes of a teacher over all orientations of the training images."""
  size = bench.config.evaluation.batch_size
  batches = -(-len(bench.data.train) // size)
  network = bench.config.teachers[name].make()
  return Item(
    f"{name}: {what}, passes of {size}",
    batches * orientations.ORIENTATIONS,
    _time_pass(bench, name, network),
  )


def _time_teacher(bench: _Bench, job: Job) -> list[Item]:
  config = bench.config.teachers[job.name]
  if config.is_random:
    return []
  network, batch = config.make(), bench.batch()
  if config.precompute:
    shapes = jax.eval_shape(
      lambda v, x: network.apply(v, x, method="encode"),
      bench.initial(network),
      batch["image"].reshape(-1, *batch["image"].shape[2:]),
    )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    batch["encoder_features"] = devices.shard(zeros)
  spec = arms_lib.ArmSpec(job.name, network, 0, bench.run.workdir, {})
  return _time_training(bench, job.name, spec, 1, config.training, batch)


def _time_students(bench: _Bench, job: Job) -> list[Item]:
  config, batch = bench.config, bench.batch()
  group = [arm_id for arm_id in config.arms if arm_id.key in job.arms]
  items, teacher_out = _time_teacher_out(
    bench, [config.methods[arm_id.method] for arm_id in group], batch
  )
  counts = collections.Counter(arm_id.arm for arm_id in group)
  for arm_id in group:
    count = counts.pop(arm_id.arm, 0)
    if count:
      spec = students.make_spec(bench.run, arm_id, teacher_out)
      what = f"{arm_id.arm} x {count}"
      items += _time_training(bench, what, spec, count, config.training, batch)
  return items


def _time_teacher_out(
  bench: _Bench, methods: Sequence[method_lib.Method], batch: Tree
) -> tuple[list[Item], Mapping[str, jax.ShapeDtypeStruct]]:
  """Times the teacher's outputs for a group, and puts them into the batch.

  Returns:
    The items, and the shapes of the outputs for one image.
  """
  config = bench.config
  networks_ = {
    name: config.teachers[name].make() for name in config.distil_from
  }
  teacher = teachers_lib.join_teachers(
    teachers_lib.Teacher(network, bench.initial(network))
    for network in networks_.values()
  )
  is_needed = any(method.terms for method in methods)
  if teacher is None or not (is_needed or config.precompute_teacher):
    return [], {}
  teach = prepare_lib.make_teach(
    teacher.network,
    students.list_taps(methods),
    channels=config.teacher_channels,
  )
  variables = devices.replicate(teacher.variables)
  mapped = devices.parallel(teach, replicated=1, out_replicated=False)
  batch["teacher_out"] = mapped(variables, batch["image"])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype),
    batch["teacher_out"],
  )
  if config.precompute_teacher:
    return [_all_views(bench, name, "outputs") for name in networks_], shapes
  size = config.data.batch_size
  item = Item(
    f"{'+'.join(networks_)}: outputs, batches of {size}",
    config.training.steps(len(bench.data.train), size),
    _median(lambda: mapped(variables, batch["image"]), bench.repeats),
  )
  return [item], shapes


def _time_score(bench: _Bench, job: Job) -> list[Item]:
  config, size = bench.config, bench.config.evaluation.batch_size
  if job.name == JOINT:
    names, tta = config.distil_from, config.evaluation.teacher_tta
  elif job.name in config.teachers:
    names, tta = (job.name,), config.evaluation.teacher_tta
  else:
    names, tta = (), config.evaluation.tta
  used = [(name, config.teachers[name].make()) for name in names]
  if not used:
    student = next(a.student for a in config.arms if a.arm == job.name)
    used = [(job.name, config.students[student])]
  views = orientations.ORIENTATIONS if tta == "dihedral" else 1
  return [
    Item(
      f"{job.name}: scoring, passes of {size}",
      views * -(-len(bench.data.tests[job.test]) // size),
      sum(_time_pass(bench, name, network) for name, network in used),
    )
  ]


_TIMERS: Mapping[str, Callable[[_Bench, Job], list[Item]]] = {
  jobs.ENCODE: _time_encoding,
  jobs.TEACHER: _time_teacher,
  jobs.STUDENTS: _time_students,
  jobs.SCORE: _time_score,
}


def _time_pass(bench: _Bench, what: str, network: nn.Module) -> float:
  """Returns the seconds of a forward pass of an evaluation batch."""
  kind = repr(network)
  if kind not in bench.passes:
    size, count = bench.config.data.size, bench.config.evaluation.batch_size
    image = np.zeros((count, size, size, 3), np.uint8)
    predict = step_lib.parallel_predict(network, bench.config.mapping)
    with memory.enough(f"{what}: passes of {count}", settings.LOWER_EVALUATION):
      variables = devices.replicate(bench.initial(network))
      batch = devices.shard({"image": image})
      bench.passes[kind] = _median(
        lambda: predict(variables, batch), bench.repeats
      )
  return bench.passes[kind]


def _time_training(
  bench: _Bench,
  what: str,
  spec: arms_lib.ArmSpec,
  count: int,
  training: settings.TrainConfig,
  batch: Tree,
) -> list[Item]:
  """Times the training of so many seeds of an arm, and its validations."""
  config, data = bench.config, bench.data
  size, evaluated = config.data.batch_size, config.evaluation.batch_size
  steps = training.steps(len(data.train), size)
  at_once = min(count, config.run_config.seeds_at_once)
  stacks = collections.Counter([at_once] * (count // at_once))
  if count % at_once:
    stacks[count % at_once] += 1
  seconds = sum(
    number * _time_update(bench, what, spec, seeds, training, batch)
    for seeds, number in stacks.items()
  )
  every = max(1, round(training.validate_epochs * len(data.train) / size))
  validations = -(-steps // every)
  passes = -(-len(data.validation) // evaluated)
  return [
    Item(f"{what}: steps of {size}", count * steps, seconds / count),
    Item(
      f"{what}: validation, passes of {evaluated}",
      count * validations * passes,
      _time_pass(bench, spec.kind, spec.network),
    ),
  ]


def _time_update(
  bench: _Bench,
  what: str,
  spec: arms_lib.ArmSpec,
  seeds: int,
  training: settings.TrainConfig,
  batch: Tree,
) -> float:
  """Returns the seconds of an update of so many seeds by one program."""
  teacher_std = None
  if spec.method.normalise == "std":
    teacher_std = {
      tap: np.ones(x.shape[-1], np.float32)
      for tap, x in batch["teacher_out"].items()
    }
  steps = training.steps(len(bench.data.train), bench.config.data.batch_size)
  with teachers_lib.enough_to_train(bench.run, what, seeds, seeds):
    # Arms of one kind alone, so that no other program takes memory.
    arms = arms_lib.make_arms(
      {str(s): dataclasses.replace(spec, seed=s) for s in range(seeds)},
      bench.config.run_config,
      training,
      steps,
      teacher_std,
    )
    [group] = arms_lib.make_groups(arms, seeds)
    return _median(lambda: group.update(batch), bench.repeats)


def format_items(items: Sequence[Item]) -> str:
  """Returns a table for a person, and what it adds up to."""
  width = max([len(item.what) for item in items], default=0)
  lines = [
    f"{item.what:{width}}  {item.count:>7} x {item.seconds:8.3f} s = "
    f"{loop.duration(item.total):>7}"
    for item in items
  ]
  whole = sum(item.total for item in items)
  lines.append(
    f"About {loop.duration(whole)} of training and scoring on this machine; "
    "compiling, reading, augmenting and writing come on top."
  )
  return "\n".join(lines)


def _median(function: Callable[[], Tree], repeats: int) -> float:
  """Returns the median seconds of a call, the first, compiling one left out."""
  jax.block_until_ready(function())
  taken = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    taken.append(time.perf_counter() - began)
  return statistics.median(taken)
