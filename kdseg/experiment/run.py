"""One experiment, whole: data, teachers, students, scores, report.

Every stage leaves a finished artefact in the workdir and is passed over when
it is there; a training that was stopped resumes from its last checkpoint. So a
second start continues the first, and a third finds nothing to do.
"""

import contextlib
import functools
import logging
import pathlib
import time

import ml_collections

from kdseg.distill import extensions as extensions_lib
from kdseg.experiment import config as config_lib
from kdseg.experiment import jobs
from kdseg.experiment import splits
from kdseg.experiment import workdir as workdir_lib
from kdseg.experiment.records import Log
from kdseg.experiment.records import Run
from kdseg.experiment.reporting import is_reported
from kdseg.experiment.reporting import write_report
from kdseg.experiment.scoring import score
from kdseg.experiment.students import check_trained
from kdseg.experiment.students import train_students
from kdseg.experiment.teachers import train_teachers
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import preemption
from kdseg.training import loop

_LOG = logging.getLogger("kdseg")


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
    stop: polled after each step; if true, the run saves and raises
      StoppedError.

  Returns:
    Whether anything was left to do.

  Raises:
    StoppedError: if `stop` says so; the same call continues.
    WorkdirError: if another process uses the workdir, or it holds a run of
      another config.
    DataError: if images are missing or damaged.
    ConfigError: on a config that cannot be run.
    WriteError: if the disk is full or may not be written to; the same call
      continues.
    OutOfMemoryError: if there is not enough memory; the same call continues.
  """
  parsed = config_lib.parse(config, extensions)
  this = Run(parsed, pathlib.Path(workdir), _make_log(workdir), stop)
  with files.writing(this.workdir):
    this.workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if hosts.on_first(lambda: _enter(this, stack)) and not jobs.list_jobs(this):
      _LOG.info("%s is finished; nothing to do", workdir)
      return False
    config_lib.check_taps(parsed)
    started = time.monotonic()
    data = splits.load(parsed.data)
    hosts.on_first(lambda: _adopt(this, data))
    teachers = train_teachers(this, data)
    train_students(this, data, teachers)
    score(this, data, teachers)
    hosts.on_first(lambda: write_report(this, data))
    seconds = time.monotonic() - started
    this.log({"stage": "run", "seconds": round(seconds, 1)})
    _LOG.info(
      "finished after %s; results in %s",
      loop.duration(seconds),
      this.workdir / "table.md",
    )
  return True


def _make_log(workdir: str | pathlib.Path) -> Log:
  """Returns what writes log.jsonl; nothing on any host but the first."""
  if not hosts.is_first():
    return lambda record: None
  path = pathlib.Path(workdir) / "log.jsonl"
  return functools.partial(checkpoint.append_json_line, path)


def _enter(run: Run, stack: contextlib.ExitStack) -> bool:
  """Locks the workdir until `stack` ends; whether its report is up to date."""
  stack.enter_context(workdir_lib.locked(run.workdir))
  is_same = workdir_lib.check_config(run.config.tree, run.workdir)
  check_trained(run)
  return is_same and is_reported(run)


def _adopt(run: Run, data: splits.Data) -> None:
  """Makes the workdir that of this config and these images."""
  facts = data.describe()
  workdir_lib.check_data(run.workdir, facts)
  # Not before the data are there: a slip in a first command costs nothing.
  workdir_lib.adopt_config(run.config.tree, run.workdir)
  workdir_lib.write_environment(run.workdir, facts)
