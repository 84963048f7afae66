"""Stage 3: scores every network on every test set, once.

The rows of the network and test set in work are noted batch by batch in
scoring.jsonl, so that a stopped run resumes within them.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import logging
import pathlib

import numpy as np
from PIL import Image

from kdseg.data import loading
from kdseg.evaluation import evaluate
from kdseg.experiment import frozen
from kdseg.experiment import jobs
from kdseg.experiment import teachers as teachers_lib
from kdseg.experiment.jobs import Job
from kdseg.experiment.records import JOINT
from kdseg.experiment.records import Run
from kdseg.experiment.records import TrainedNetwork
from kdseg.experiment.splits import Data
from kdseg.experiment.teachers import Teacher
from kdseg.report import scores as scores_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import devices
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import settings
from kdseg.training import step as step_lib

_LOG = logging.getLogger("kdseg")


def score(run: Run, data: Data, teachers: Mapping[str, Teacher]) -> None:
  """Scores what has no scores yet; rows go to scores.csv.

  Raises:
    StoppedError: if `run.stop` says so.
    OutOfMemoryError: if a batch does not fit into memory.
  """
  run = dataclasses.replace(run, stop=hosts.share_question(run.stop))
  ids = {test: arrays.ids for test, arrays in data.tests.items()}
  # Of many images, this takes a moment.
  fingerprint = functools.cache(
    lambda test: loading.fingerprint(data.tests[test])
  )
  predicts: dict[str, evaluate.Predict] = {}
  for job in jobs.list_jobs(run, ids):
    if job.kind != jobs.SCORE:
      continue
    trained = _load(run, job, teachers)
    kind = repr(trained.network)
    if kind not in predicts:
      predicts[kind] = step_lib.parallel_predict(
        trained.network, run.config.mapping
      )
    rows = _score(
      run,
      job,
      trained,
      predicts[kind],
      data.tests[job.test],
      fingerprint(job.test) if hosts.is_first() else "",
    )
    if hosts.is_first():
      names: evaluate.Row = {
        "arm": job.name,
        "seed": job.seed,
        "dataset": job.test,
      }
      scores_lib.append(
        run.workdir / "scores.csv", [{**names, **row} for row in rows], ids
      )
      _noted(run).unlink()
    _LOG.info(
      "scores: %s seed %d on %s: Dice %.4f",
      job.name, job.seed, job.test, np.mean([row["dice"] for row in rows]),
    )  # fmt: skip


def _load(
  run: Run, job: Job, teachers: Mapping[str, Teacher]
) -> TrainedNetwork:
  """Returns the network that a job scores."""
  config = run.config
  if job.name in teachers:
    return teachers[job.name]
  if job.name == JOINT:
    joint = teachers_lib.join_teachers(
      teachers[name] for name in config.distil_from
    )
    assert joint is not None
    return joint
  [arm_id] = [
    arm_id
    for arm_id in config.arms
    if (arm_id.arm, arm_id.seed) == (job.name, job.seed)
  ]
  network = config.students[arm_id.student]
  variables = frozen.tree_of_first(
    lambda: checkpoint.load_variables(run.arm_folder(arm_id))[0],
    frozen.expected_variables(network, config.data.size),
  )
  return TrainedNetwork(network, variables)


def _score(
  run: Run,
  job: Job,
  trained: TrainedNetwork,
  predict: evaluate.Predict,
  arrays: loading.Arrays,
  fingerprint: str,
) -> list[evaluate.Row]:
  """Scores one network on one test set, from where it was stopped.

  Raises:
    StoppedError: if `run.stop` says so.
  """
  config = run.config.evaluation
  tta = config.teacher_tta if job.name.startswith(JOINT) else config.tta
  who = f"{job.name} seed {job.seed}"

  def look() -> list[list[evaluate.Row]]:
    how = (job.name, str(job.seed), job.test, tta, str(config.batch_size))
    key = frozen.content_key(fingerprint, trained.variables, *how)
    return _read_noted(_noted(run), key)

  def note(rows: Sequence[evaluate.Row]) -> None:
    if hosts.is_first():
      checkpoint.append_json_line(_noted(run), rows)
    preemption.check(run.stop, f"{who} was scored on {job.test}")

  before = hosts.on_first(look)
  if before:
    _LOG.info(
      "scores: %s on %s resumes at image %d of %d",
      who, job.test, sum(map(len, before)), len(arrays),
    )  # fmt: skip
  what = f"scores: {who} on {job.test} in batches of {config.batch_size}"
  with memory.enough(what, settings.LOWER_EVALUATION):
    return evaluate.score(
      predict,
      devices.replicate(trained.variables),
      arrays,
      batch_size=config.batch_size,
      tta=tta,
      keep=functools.partial(_save_prediction, run.workdir, job[1:4]),
      before=before,
      note=note,
    )


def _noted(run: Run) -> pathlib.Path:
  return run.workdir / "scoring.jsonl"


def _read_noted(path: pathlib.Path, key: str) -> list[list[evaluate.Row]]:
  """Returns the batches that were noted under this key; begins with none."""
  if path.exists():
    with contextlib.suppress(ValueError):
      # A line without its end was cut off.
      lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
      head, *batches = [json.loads(line) for line in lines]
      if head == {"key": key}:
        return batches
    path.unlink()
  checkpoint.append_json_line(path, {"key": key})
  return []


def prediction_path(
  workdir: pathlib.Path, group: scores_lib.Group, image_id: str
) -> pathlib.Path:
  """Returns where the predicted mask of one image is kept.

  Args:
    workdir: of the run.
    group: (arm, seed, test set), as in scores.csv.
    image_id: of the image.
  """
  arm, seed, test = group
  name = image_id.replace("/", "_")
  return workdir / "predictions" / f"{arm}-seed{seed}" / test / f"{name}.png"


def _save_prediction(
  workdir: pathlib.Path,
  group: scores_lib.Group,
  image_id: str,
  mask: np.ndarray,
) -> None:
  path = prediction_path(workdir, group, image_id)
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as file:
    Image.fromarray(mask).save(file, "PNG")
