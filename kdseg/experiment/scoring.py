"""Stage 3: scores every arm on every test set."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import functools
import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from kdseg.data import loading
from kdseg.distill import extensions as extensions_lib
from kdseg.evaluation import evaluate
from kdseg.experiment import config as config_lib
from kdseg.experiment import splits
from kdseg.experiment import teachers as teachers_lib
from kdseg.report import scores as scores_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import devices
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import settings
from kdseg.training import step as step_lib

Tree = Any
_LOG = logging.getLogger("kdseg")
# The rows of the group that is being scored, a batch a line.
_NOTED = "scoring.jsonl"


def score(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: splits.Data,
  arm_ids: list[config_lib.ArmId],
  teachers: Mapping[str, teachers_lib.Teacher],
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
  joint = teachers_lib.join_teachers(config, teachers)
  entries: list[tuple[str, int, Callable[[], teachers_lib.Teacher]]] = [
    (name, int(config.teachers[name].seed), lambda t=teacher: t)
    for name, teacher in teachers.items()
  ]
  if joint is not None and len(config.distil_from) > 1:
    entries.append((config_lib.JOINT, config.seed, lambda: joint))
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
    lambda test: loading.fingerprint(data.tests[test])
  )
  for arm, seed, finished in entries:
    for test, arrays in data.tests.items():
      if (arm, seed, test) in done:
        continue
      network = finished()
      if repr(network.network) not in predicts:
        predicts[repr(network.network)] = step_lib.parallel_predict(
          network.network, config.get("mapping", "pmap")
        )
      is_teacher = arm.startswith(config_lib.JOINT)
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
  teacher: teachers_lib.Teacher,
  predict: Callable[..., Any],
  arrays: loading.Arrays,
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
    key = teachers_lib.content_key(fingerprint(test), teacher.variables, *how)
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
  with memory.enough(what, settings.LOWER_EVALUATION):
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
  arm_id: config_lib.ArmId,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  extensions: extensions_lib.Extensions,
) -> teachers_lib.Teacher:
  network = config_lib.make_student(arm_id.student, config, extensions)

  def load() -> Tree:
    return checkpoint.load_variables(workdir / "arms" / arm_id.key)[0]

  if not hosts.are_many():
    return teachers_lib.Teacher(network, load())
  size = config.data.size
  expected = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, size, size, 3))
  )
  return teachers_lib.Teacher(
    network, teachers_lib.tree_of_first(load, expected)
  )


def prediction_path(
  workdir: pathlib.Path, arm: str, seed: int, test: str, identity: str
) -> pathlib.Path:
  """Returns where the predicted mask of one image is kept."""
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
  path = prediction_path(workdir, arm, seed, test, identity)
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as file:
    Image.fromarray(mask).save(file, "PNG")
