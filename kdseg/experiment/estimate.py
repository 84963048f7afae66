"""What an experiment will cost, measured before it starts."""

import collections
from collections.abc import Callable
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
from kdseg.distill import extensions as extensions_lib
from kdseg.experiment import config as config_lib
from kdseg.experiment import splits
from kdseg.experiment import students
from kdseg.experiment import teachers as teachers_lib
from kdseg.report import scores as scores_lib
from kdseg.runtime import checkpoint
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


def estimate(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  *,
  repeats: int = 5,
) -> list[Item]:
  """Measures every kind of work that is left to do, on this machine.

  Each compiled function runs on zeros, its compilation left out. Networks
  that `workdir` holds already are not trained again, and scores not taken
  again; a training that was stopped half-way counts whole, and so do passes of
  a frozen teacher that a cache may hold. Reading and augmenting data, writing
  files and the boundary metrics of the scores are left out.

  Args:
    config: see `configs/`.
    workdir: of the run; need not exist, and is left as it is.
    repeats: of each function; the median counts.

  Raises:
    ValueError: on a config that cannot be run.
    DataError: if the data are not as they should be.
    OutOfMemoryError: if something takes more memory than there is.
  """
  workdir = pathlib.Path(workdir)
  arm_ids, methods = config_lib.check(config, extensions_lib.Extensions())
  untrained = students.list_untrained(workdir, arm_ids)
  run_config = dataclasses.replace(
    config_lib.make_run_config(config), encoder_weights=False
  )
  data = splits.load(config)
  batch, evaluated = config.data.batch_size, config.evaluation.batch_size
  scored, _ = scores_lib.recover(workdir / "scores.csv")
  done = set(scores_lib.groups(scored))
  all_views = -(-len(data.train) // evaluated) * orientations.ORIENTATIONS
  image = _zeros((evaluated, config.data.size, config.data.size, 3), np.uint8)

  def passes_left(arm: str, seed: int, tta: str) -> int:
    views = orientations.ORIENTATIONS if tta == "dihedral" else 1
    return views * sum(
      -(-len(arrays) // evaluated)
      for test, arrays in data.tests.items()
      if (arm, seed, test) not in done
    )

  def time_pass(what: str, network: nn.Module, variables: Tree) -> float:
    predict = step_lib.parallel_predict(network, run_config.mapping)
    with memory.enough(
      f"{what}: passes of {evaluated}", settings.LOWER_EVALUATION
    ):
      held = devices.replicate(variables)
      given = devices.shard({"image": image})
      return _median(lambda: predict(held, given), repeats)

  def time_updates(
    what: str,
    spec: arms_lib.ArmSpec,
    training: settings.TrainConfig,
    prepared: Tree,
    steps: int,
    seeds: int,
  ) -> float:
    """Returns the seconds of an update of so many seeds by one program."""
    teacher_std = None
    if spec.method.normalise == "std":
      teacher_std = {
        tap: np.ones(x.shape[-1], np.float32)
        for tap, x in prepared["teacher_out"].items()
      }
    with teachers_lib.enough_to_train(what, seeds, config, seeds):
      # One kind a call, so that no more than one program takes memory.
      arms = arms_lib.make_arms(
        {
          str(seed): dataclasses.replace(spec, seed=seed)
          for seed in range(seeds)
        },
        run_config,
        training,
        steps,
        teacher_std,
      )
      [group] = arms_lib.make_groups(arms, seeds)
      return _median(lambda: group.update(prepared), repeats)

  def time_training(
    what: str,
    spec: arms_lib.ArmSpec,
    training: settings.TrainConfig,
    prepared: Tree,
    predict: float,
    count: int = 1,
  ) -> list[Item]:
    steps = training.steps(len(data.train), batch)
    at_once = min(count, run_config.seeds_at_once)
    stacks = collections.Counter([at_once] * (count // at_once))
    if count % at_once:
      stacks[count % at_once] += 1
    seconds = sum(
      number * time_updates(what, spec, training, prepared, steps, seeds)
      for seeds, number in stacks.items()
    )
    per_epoch = len(data.train) / batch
    validations = -(
      -steps // max(1, round(training.validate_epochs * per_epoch))
    )
    passes = -(-len(data.validation) // evaluated)
    return [
      Item(f"{what}: steps of {batch}", count * steps, seconds / count),
      Item(
        f"{what}: validation, passes of {evaluated}",
        count * validations * passes,
        predict,
      ),
    ]

  side = config.data.size
  prepared = devices.shard(
    {
      "image": _zeros((batch, side, side, 3)),
      "mask": _zeros((batch, side, side)),
    }
  )
  taught_arms = [p for p in untrained if methods[p.method].terms]
  items, teachers, seconds = [], {}, {}
  tta = config.evaluation.teacher_tta
  for name, c in config.teachers.items():
    network = networks.make_network(
      c.network, axis_name=devices.AXIS, **dict(c.options)
    )
    variables = _initial(network, side)
    teachers[name] = teachers_lib.Teacher(network, variables)
    training = config_lib.make_train_config(dict(c.training))
    ready = c.checkpoint or checkpoint.is_finished(workdir / "teachers" / name)
    trains = not ready and training.steps(len(data.train), batch) > 0
    teaches = bool(taught_arms) and name in config.distil_from
    left = passes_left(name, int(c.seed), tta)
    if not (trains or teaches or left):
      continue
    seconds[name] = time_pass(name, network, variables)
    if trains:
      given = prepared
      if c.precompute:
        # Counted as a whole pass: the frozen blocks are most of it.
        items.append(
          Item(
            f"{name}: encoding, passes of {evaluated}",
            all_views,
            seconds[name],
          )
        )
        shapes = jax.eval_shape(
          lambda v, x, n=network: n.apply(v, x, method="encode"),
          variables,
          _zeros((batch, side, side, 3)),
        )
        encoder_features = jax.tree.map(lambda x: _zeros(x.shape), shapes)
        given = prepared | {"encoder_features": devices.shard(encoder_features)}
      items += time_training(
        name,
        arms_lib.ArmSpec(name, network, 0, workdir, {}),
        training,
        given,
        seconds[name],
      )
    if teaches and config.precompute_teacher:
      items.append(
        Item(
          f"{name}: answers, passes of {evaluated}", all_views, seconds[name]
        )
      )
    items.append(
      Item(f"{name}: scoring, passes of {evaluated}", left, seconds[name])
    )
  if len(config.distil_from) > 1:
    left = passes_left(config_lib.JOINT, int(config.seed), tta)
    each = sum(seconds.get(name, 0.0) for name in config.distil_from)
    items.append(
      Item(f"{config_lib.JOINT}: scoring, passes of {evaluated}", left, each)
    )

  training = config_lib.make_train_config(dict(config.training))
  teacher_out = {}
  teacher = teachers_lib.join_teachers(config, teachers)
  if teacher is not None and taught_arms:
    teach = prepare_lib.make_teach(
      teacher.network,
      config_lib.list_taps(methods[arm_id.method] for arm_id in untrained),
      channels=config.teacher_channels,
    )
    held = devices.replicate(teacher.variables)
    ask = devices.parallel(teach, replicated=1, out_replicated=False)
    prepared["teacher_out"] = ask(held, prepared["image"])
    teacher_out = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype),
      prepared["teacher_out"],
    )
    if not config.precompute_teacher:
      items.append(
        Item(
          f"{'+'.join(config.distil_from)}: answers, batches of {batch}",
          training.steps(len(data.train), batch),
          _median(lambda: ask(held, prepared["image"]), repeats),
        )
      )
  predicts: dict[str, float] = {}
  for arm in dict.fromkeys(arm_id.arm for arm_id in arm_ids):
    group = [arm_id for arm_id in untrained if arm_id.arm == arm]
    left = sum(
      passes_left(arm, arm_id.seed, config.evaluation.tta)
      for arm_id in arm_ids
      if arm_id.arm == arm
      and not (workdir / "arms" / arm_id.key / "failed.json").exists()
    )
    if not (group or left):
      continue
    student = next(arm_id.student for arm_id in arm_ids if arm_id.arm == arm)
    network = config_lib.make_student(
      student, config, extensions_lib.Extensions()
    )
    if repr(network) not in predicts:
      predicts[repr(network)] = time_pass(arm, network, _initial(network, side))
    if group:
      items += time_training(
        f"{arm} x {len(group)}",
        students.make_spec(
          group[0],
          config,
          workdir,
          methods,
          teacher_out,
          extensions_lib.Extensions(),
        ),
        training,
        prepared,
        predicts[repr(network)],
        len(group),
      )
    items.append(
      Item(
        f"{arm}: scoring, passes of {evaluated}",
        left,
        predicts[repr(network)],
      )
    )
  return [item for item in items if item.count]


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


def _zeros(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
  return np.zeros(shape, dtype)


def _initial(network: nn.Module, side: int) -> Tree:
  return networks.make_variables(
    network, jax.random.key(0), size=side, weights=False
  )


def _median(function: Callable[[], Tree], repeats: int) -> float:
  """Returns the median seconds of a call, the first, compiling one left out."""
  jax.block_until_ready(function())
  taken = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    taken.append(time.perf_counter() - began)
  return statistics.median(taken)
