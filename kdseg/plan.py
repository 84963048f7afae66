"""What an experiment will cost, measured before it starts."""

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

from kdseg import cache
from kdseg import checkpoint
from kdseg import experiment
from kdseg import networks
from kdseg import own as own_lib
from kdseg import stage
from kdseg import step as step_lib
from kdseg import train

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

  Each compiled function runs on zeros, its compilation left out. What
  `workdir` holds already is not counted; a training that was stopped half-way
  counts whole. Reading data, writing files and the boundary metrics of the
  scores are left out.

  Args:
    config: see `configs/`.
    workdir: of the run; need not exist, and is left as it is.
    repeats: of each function; the median counts.

  Raises:
    ValueError: on a config that cannot be run.
    DataError: if the data are not as they should be.
  """
  workdir = pathlib.Path(workdir)
  plans, methods = experiment.check(config, own_lib.Own())
  untrained = experiment.list_untrained(workdir, plans)
  setting = experiment.make_setting(config)
  data = experiment.load_data(config)
  batch, evaluated = config.data.batch_size, config.evaluation.batch_size
  scoring = sum(-(-len(arrays) // evaluated) for arrays in data.tests.values())
  all_views = -(-len(data.train) // evaluated) * cache.ORIENTATIONS
  image = _zeros((evaluated, config.data.size, config.data.size, 3), np.uint8)

  def time_pass(network: nn.Module, variables: Tree) -> float:
    predict = stage.make_predict(network)
    held = step_lib.replicate(variables)
    given = step_lib.shard({"image": image})
    return _median(lambda: predict(held, given), repeats)

  def time_training(
    what: str,
    contender: stage.Contender,
    training: stage.Training,
    prepared: Tree,
    predict: float,
    count: int = 1,
  ) -> list[Item]:
    steps = training.steps(len(data.train), batch)
    # With one kind a call, the memory of one arm at a time.
    [arm] = stage.make_arms(
      {what: contender}, setting, training, steps
    ).values()

    def update() -> Tree:
      arm.state, metrics = arm.step(arm.state, prepared)
      return metrics

    seconds = _median(update, repeats)
    validations = -(-training.epochs // training.validate_epochs)
    passes = -(-len(data.validation) // evaluated)
    return [
      Item(f"{what}: steps of {batch}", count * steps, seconds),
      Item(
        f"{what}: validation, passes of {evaluated}",
        int(count * validations * passes),
        predict,
      ),
    ]

  side = config.data.size
  prepared = step_lib.shard(
    {
      "image": _zeros((batch, side, side, 3)),
      "mask": _zeros((batch, side, side)),
    }
  )
  items, teachers = [], {}
  for name, c in config.teachers.items():
    network = networks.make_network(
      c.network, axis_name=step_lib.AXIS, **dict(c.options)
    )
    variables = _initial(network, side)
    teachers[name] = experiment.Teacher(network, variables)
    seconds = time_pass(network, variables)
    averaged = config.evaluation.teacher_averaging == "dihedral"
    training = experiment.make_training(dict(c.training))
    ready = c.checkpoint or checkpoint.is_finished(workdir / "teachers" / name)
    if not ready and training.steps(len(data.train), batch):
      given = prepared
      if c.precompute:
        # Counted as a whole pass: the frozen blocks are most of it.
        items.append(
          Item(f"{name}: encoding, passes of {evaluated}", all_views, seconds)
        )
        shapes = jax.eval_shape(
          lambda v, x, n=network: n.apply(v, x, method="encode"),
          variables,
          _zeros((batch, side, side, 3)),
        )
        encoded = jax.tree.map(lambda x: _zeros(x.shape), shapes)
        given = prepared | {"encoded": step_lib.shard(encoded)}
      items += time_training(
        name,
        stage.Contender(name, network, 0, workdir, {}),
        training,
        given,
        seconds,
      )
    if untrained and config.precompute_teacher and name in config.distil_from:
      items.append(
        Item(f"{name}: answers, passes of {evaluated}", all_views, seconds)
      )
    items.append(
      Item(
        f"{name}: scoring, passes of {evaluated}",
        scoring * (cache.ORIENTATIONS if averaged else 1),
        seconds,
      )
    )

  training = experiment.make_training(dict(config.training))
  taught = {}
  teacher = experiment.join_teachers(config, teachers)
  if teacher is not None and untrained:
    teach = step_lib.make_teach(
      teacher.network,
      experiment.list_taps(methods[plan.method] for plan in untrained),
      channels=config.taught_channels,
    )
    held = step_lib.replicate(teacher.variables)
    ask = step_lib.parallel(teach, replicated=1, out_replicated=False)
    prepared["taught"] = ask(held, prepared["image"])
    taught = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((1, *x.shape[2:]), x.dtype),
      prepared["taught"],
    )
    if not config.precompute_teacher:
      items.append(
        Item(
          f"{'+'.join(config.distil_from)}: answers, batches of {batch}",
          training.steps(len(data.train), batch),
          _median(lambda: ask(held, prepared["image"]), repeats),
        )
      )
  by_arm: dict[str, list[experiment.Plan]] = {}
  for plan in untrained:
    by_arm.setdefault(plan.arm, []).append(plan)
  predicts: dict[str, float] = {}
  for arm, group in by_arm.items():
    contender = experiment.make_contender(
      group[0], config, workdir, methods, taught, own_lib.Own()
    )
    network = repr(contender.network)
    if network not in predicts:
      predicts[network] = time_pass(
        contender.network, _initial(contender.network, side)
      )
    items += time_training(
      f"{arm} x {len(group)}",
      contender,
      training,
      prepared,
      predicts[network],
      len(group),
    )
    averaged = config.evaluation.averaging == "dihedral"
    items.append(
      Item(
        f"{arm} x {len(group)}: scoring, passes of {evaluated}",
        scoring * len(group) * (cache.ORIENTATIONS if averaged else 1),
        predicts[network],
      )
    )
  return items


def format_items(items: Sequence[Item]) -> str:
  """Returns a table for a person, and what it adds up to."""
  width = max([len(item.what) for item in items], default=0)
  lines = [
    f"{item.what:{width}}  {item.count:>7} x {item.seconds:8.3f} s = "
    f"{train.duration(item.total):>7}"
    for item in items
  ]
  whole = sum(item.total for item in items)
  lines.append(
    f"About {train.duration(whole)} of training and scoring on this machine; "
    "compiling, reading and writing come on top."
  )
  return "\n".join(lines)


def _zeros(shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
  return np.zeros(shape, dtype)


def _initial(network: nn.Module, side: int) -> Tree:
  return networks.make_variables(
    network, jax.random.key(0), size=side, weights=False
  )


def _median(function: Callable[[], Tree], repeats: int) -> float:
  """Returns the median seconds of a call, the first and slowest left out."""
  jax.block_until_ready(function())
  taken = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    taken.append(time.perf_counter() - began)
  return statistics.median(taken)
