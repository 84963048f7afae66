"""What is left to do of an experiment, as one list.

Each stage of a run works through its part of the list, and `estimate` times the
same list.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
from typing import Any
from typing import NamedTuple

from kdseg.experiment.records import JOINT
from kdseg.experiment.records import ArmId
from kdseg.experiment.records import Run
from kdseg.experiment.workdir import WorkdirError
from kdseg.report import scores as scores_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import hosts

# Kinds of jobs, in the order in which a run does them.
ENCODE = "encode"  # computes what a teacher's frozen blocks give
TEACHER = "teacher"  # trains a teacher
STUDENTS = "students"  # trains arms together
SCORE = "score"  # scores one network on one test set


class Job(NamedTuple):
  """One piece of work.

  Attributes:
    kind: one of the constants above.
    name: of the teacher, of the group of arms, or of the arm that is scored.
    seed: of what is scored.
    test: what it is scored on, as in scores.csv.
    arms: keys of the arms of a group.
  """

  kind: str
  name: str
  seed: int = 0
  test: str = ""
  arms: tuple[str, ...] = ()


def list_jobs(
  run: Run, ids: Mapping[str, Sequence[str]] | None = None
) -> list[Job]:
  """Lists what is left to do, in order; the same on every host.

  Arms that are still to be trained are listed to be scored too, though some of
  them may diverge: a stage lists anew when it begins.

  Args:
    run: the experiment; its workdir need not exist.
    ids: of the images of each test set, where they are known; scores of a part
      of them are left out, and taken anew.

  Raises:
    WorkdirError: if a training was begun with arms that the config no longer
      has.
  """

  def look() -> list[Job]:
    groups = _list_groups(run)
    return _list_teachers(run, bool(groups)) + groups + _list_scores(run, ids)

  return [Job(*job[:4], tuple(job[4])) for job in hosts.on_first(look)]


def group_folder(run: Run) -> pathlib.Path:
  """Returns where the checkpoints of all groups of arms lie."""
  return run.workdir / "checkpoints" / "arms"


def read_groups(run: Run) -> dict[str, dict[str, Any]]:
  """Returns {group: {arm: switches of its method}} of the begun groups."""
  found = group_folder(run).glob("*/group.json")
  return {
    path.parent.name: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(found)
    if path.parent.name.isdigit()
  }


def _list_teachers(run: Run, is_asked: bool) -> list[Job]:
  config, jobs = run.config, []
  for name, teacher in config.teachers.items():
    is_trained = bool(teacher.checkpoint) or checkpoint.is_finished(
      run.teacher_folder(name)
    )
    # Frozen blocks give the same outputs whether the others are trained or not.
    is_read = (
      is_asked and config.precompute_teacher and name in config.distil_from
    )
    if (
      teacher.precompute
      and not (teacher.checkpoint or teacher.is_random)
      and (is_read or not is_trained)
    ):
      jobs.append(Job(ENCODE, name))
    if not is_trained:
      jobs.append(Job(TEACHER, name))
  return jobs


def _list_groups(run: Run) -> list[Job]:
  """Lists groups that were stopped, then one of all arms that are new.

  Arms that came later have seen no batch yet, and batches are counted from 0:
  so they do not join a group that was begun.
  """
  untrained = [
    arm_id.key for arm_id in run.config.arms if not _has_result(run, arm_id)
  ]
  known = [arm_id.key for arm_id in run.config.arms]
  jobs, begun = [], read_groups(run)
  for number, keys in begun.items():
    if not set(untrained) & keys.keys():
      continue
    missing = [key for key in keys if key not in known]
    if missing:
      raise WorkdirError(
        f"{group_folder(run) / number} is a training of arms that the config "
        f"no longer has ({', '.join(missing)}); put them back, or delete that "
        "folder to start its other arms again"
      )
    arms = tuple(key for key in known if key in keys)
    jobs.append(Job(STUDENTS, number, arms=arms))
    untrained = [key for key in untrained if key not in keys]
  if untrained:
    # One may have been deleted: not by their count.
    number = f"{max(map(int, begun), default=-1) + 1:03d}"
    jobs.append(Job(STUDENTS, number, arms=tuple(untrained)))
  return jobs


def _list_scores(
  run: Run, ids: Mapping[str, Sequence[str]] | None
) -> list[Job]:
  config = run.config
  networks = [(name, teacher.seed) for name, teacher in config.teachers.items()]
  if len(config.distil_from) > 1:
    networks.append((JOINT, config.seed))
  networks += [
    (arm_id.arm, arm_id.seed)
    for arm_id in config.arms
    if not (run.arm_folder(arm_id) / "failed.json").exists()
  ]
  rows, _ = scores_lib.recover(run.workdir / "scores.csv", ids)
  done = scores_lib.groups(rows)
  return [
    Job(SCORE, arm, seed, test)
    for arm, seed in networks
    for test in map(config.data.test_name, config.data.tests)
    if (arm, seed, test) not in done
  ]


def _has_result(run: Run, arm_id: ArmId) -> bool:
  """Whether an arm has weights, or a reason for having none."""
  folder = run.arm_folder(arm_id)
  return checkpoint.is_finished(folder) or (folder / "failed.json").exists()
