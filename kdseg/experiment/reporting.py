"""Stage 4: report.json, tables and overlays from the scores."""

import hashlib
import json
import logging
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from kdseg import networks
from kdseg.evaluation import metrics
from kdseg.experiment import scoring
from kdseg.experiment import students
from kdseg.experiment.records import JOINT
from kdseg.experiment.records import Run
from kdseg.experiment.splits import Data
from kdseg.report import overlays
from kdseg.report import scores as scores_lib
from kdseg.report import tables
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.training import loop

_LOG = logging.getLogger("kdseg")
# Digest of what the report was made of, written after it.
_REPORTED = ".reported"


def write_report(run: Run, data: Data) -> None:
  """Writes report.json, the tables and overlays.png from what lies there.

  Raises:
    DivergedError: if nothing was scored, as every arm diverged.
  """
  workdir = run.workdir
  if not (workdir / "scores.csv").exists():
    raise loop.DivergedError(
      "every arm diverged before its first validation, so nothing was scored; "
      f"{workdir}/arms/*/failed.json say why"
    )
  rows = scores_lib.read(workdir / "scores.csv")
  meta = _describe(run, data)
  checkpoint.write_json(workdir / "report.json", meta)
  cases, title = _pick_cases(workdir, data, rows, meta)
  if cases:
    with files.whole(workdir / "overlays.png") as file:
      overlays.overlays(cases, title=title).save(file, "PNG")
  for name, text in tables.make_tables(rows, meta).items():
    files.write_text(workdir / name, text)
  with files.whole(workdir / _REPORTED) as file:
    file.write(_digest_sources(workdir))


def is_reported(run: Run) -> bool:
  """Whether the report was made of the config and the scores that are there."""
  paths = [run.workdir / name for name in (_REPORTED, "scores.csv", "table.md")]
  # By content: clocks go wrong, and copies have other times.
  return all(path.exists() for path in paths) and (
    paths[0].read_bytes() == _digest_sources(run.workdir)
  )


def _digest_sources(workdir: pathlib.Path) -> bytes:
  digest = hashlib.sha256()
  for name in ("config.json", "scores.csv"):
    digest.update(hashlib.sha256((workdir / name).read_bytes()).digest())
  return digest.hexdigest().encode() + b"\n"


def _describe(run: Run, data: Data) -> dict[str, Any]:
  """Returns what `report.summary` calls meta."""
  config = run.config
  tta, teacher_tta = config.evaluation.tta, config.evaluation.teacher_tta
  meta: dict[str, Any] = {
    "train": {
      "name": config.data.name,
      "found": data.train.found_count,
      "official": data.train.official_count,
    },
    "datasets": {
      # The validation images are a part of the official training set.
      test: {"found": len(arrays)}
      if arrays is data.validation
      else {"found": arrays.found_count, "official": arrays.official_count}
      for test, arrays in data.tests.items()
    },
    "protocol": {
      "resolution": config.data.size,
      "threshold": metrics.THRESHOLD,
      "interpolation": "bilinear",
      "test_time_augmentation": (
        tta if teacher_tta == tta else f"{tta} (teachers: {teacher_tta})"
      ),
      "checkpoint": (
        "best validation Dice, every "
        f"{config.training.validate_epochs:g} epochs"
      ),
    },
    "arms": _describe_networks(run),
    "baseline": "none",
    "notes": _list_notes(run, data),
  }
  if config.distil_from:
    # A control that knows nothing need not be ahead of its students.
    is_control = all(config.teachers[n].is_random for n in config.distil_from)
    one = config.distil_from[0] if len(config.distil_from) == 1 else JOINT
    meta["teacher"] = "" if is_control else one
  if config.primary:
    meta["primary"] = _primary_family(run, data)
    meta["validation"] = _validation_dice(run)
  if config.evaluation.groups:
    meta["groups"] = {n: list(i) for n, i in config.evaluation.groups.items()}
  return meta


def _describe_networks(run: Run) -> dict[str, dict[str, float]]:
  """Returns {arm: {"parameters", "macs"}} of every finished network."""
  config = run.config
  networks_ = {
    name: (teacher.make(), run.teacher_folder(name))
    for name, teacher in config.teachers.items()
  }
  for arm_id in config.arms:
    folder = run.arm_folder(arm_id)
    if checkpoint.is_finished(folder):
      student = config.students[arm_id.student]
      networks_.setdefault(arm_id.arm, (student, folder))
  macs: dict[str, float] = {}
  found = {}
  for arm, (network, folder) in networks_.items():
    kind = repr(network)
    if kind not in macs:
      macs[kind] = networks.count_macs(network, size=config.data.size)
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    found[arm] = {"parameters": about["parameters"], "macs": macs[kind]}
  if len(config.distil_from) > 1:
    parts = [found[name] for name in config.distil_from]
    found[JOINT] = {
      key: sum(part[key] for part in parts) for key in ("parameters", "macs")
    }
  return found


def _list_notes(run: Run, data: Data) -> list[str]:
  """Returns sentences that stand below the tables."""
  config, notes = run.config, list(data.notes)
  if len(config.distil_from) > 1:
    notes.append(
      f"{JOINT} is the mean probability of {', '.join(config.distil_from)}"
    )
  for arm_id in config.arms:
    why = students.read_about(run, arm_id).get("diverged")
    if why:
      notes.append(f"{arm_id.arm}, seed {arm_id.seed}, diverged: {why}")
  if data.train.excluded:
    notes.append(
      "kept out of training, as duplicates of test images: "
      f"{', '.join(data.train.excluded)}"
    )
  if config.teacher_out_tta != "none":
    scored = (
      "a teacher's score is that of the mean of its probabilities"
      if config.evaluation.teacher_tta != "none"
      else "its score is without test-time augmentation"
    )
    notes.append(
      "the students learn from the mean of the teacher's logits and features "
      f"over eight orientations; {scored}"
    )
  return notes


def _primary_family(run: Run, data: Data) -> list[dict[str, Any]]:
  """Returns the comparisons that `config.primary` names, for every student.

  Of several others the report takes the best on validation.
  """
  family = []
  for student in run.config.students:
    for method, others in run.config.primary:
      against: Any = f"{student}-{others}"
      if not isinstance(others, str):
        against = [f"{student}-{other}" for other in others]
      family += [
        {"dataset": test, "arm": f"{student}-{method}", "against": against}
        for test in data.tests
      ]
  return family


def _validation_dice(run: Run) -> dict[str, dict[str, float]]:
  """Returns {arm: {seed: Dice of the weights that were kept}}."""
  found: dict[str, dict[str, float]] = {}
  for arm_id in run.config.arms:
    about = students.read_about(run, arm_id)
    if "validation_dice" in about:
      by_seed = found.setdefault(arm_id.arm, {})
      by_seed[str(arm_id.seed)] = about["validation_dice"]
  return found


def _pick_cases(
  workdir: pathlib.Path,
  data: Data,
  rows: list[scores_lib.Row],
  meta: dict[str, Any],
) -> tuple[list[overlays.Case], str]:
  """Picks from the first seed of some arms on the first test set; a title."""
  test, arrays = next(iter(data.tests.items()))
  groups: dict[str, tuple[scores_lib.Group, list[scores_lib.Row]]] = {}
  for group, members in scores_lib.groups(rows).items():
    if group[2] == test:
      groups.setdefault(group[0], (group, members))
  shown, baseline, arm = overlays.choose_columns(groups, meta)
  title = (
    f"{test}, first seed, {len(shown)} of {len(groups)} arms\n"
    f"worst, median and best of {baseline}"
  )
  if arm is not None:
    title += f"; most improved and worsened: {arm} against it"
  picked = overlays.pick(groups[baseline][1], groups[arm][1] if arm else None)
  index = {identity: i for i, identity in enumerate(arrays.ids)}
  cases = []
  for name in shown:
    group, members = groups[name]
    dice = {str(row["id"]): float(row["dice"]) for row in members}
    for rank, identity in picked.items():
      i = index[identity]
      truth = arrays.native_mask(i)
      image = Image.fromarray(arrays.image[i]).resize(truth.shape[::-1])
      path = scoring.prediction_path(workdir, group, identity)
      if not path.exists():
        _LOG.warning("overlays.png goes without %s, which is not there", path)
        continue
      with Image.open(path) as prediction:
        cases.append(
          overlays.Case(
            arm=name,
            rank=rank,
            id=identity,
            dice=dice[identity],
            image=np.asarray(image),
            truth=truth,
            prediction=np.asarray(prediction.convert("L")) > 0,
          )
        )
  return cases, title
