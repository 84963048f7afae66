"""Stage 4: report.json, tables and overlays from the scores."""

import hashlib
import json
import logging
import pathlib
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from kdseg import networks
from kdseg.distill import extensions as extensions_lib
from kdseg.evaluation import metrics
from kdseg.experiment import config as config_lib
from kdseg.experiment import scoring
from kdseg.experiment import splits
from kdseg.report import overlays
from kdseg.report import scores as scores_lib
from kdseg.report import tables
from kdseg.runtime import checkpoint
from kdseg.runtime import files

_LOG = logging.getLogger("kdseg")
# What the report was made of, written after it.
_REPORTED = ".reported"


def is_finished(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  arm_ids: list[config_lib.ArmId],
) -> bool:
  """Whether every arm is scored, and the report made of these scores."""
  scores, reported = workdir / "scores.csv", workdir / _REPORTED
  if not all(
    path.exists() for path in (scores, reported, workdir / "table.md")
  ):
    return False
  # By content: clocks go wrong, and copies have other times.
  if reported.read_bytes() != _name_sources(workdir):
    return False
  rows, _ = scores_lib.recover(scores)
  done = set(scores_lib.groups(rows))
  tests = [config_lib.test_name(config, name) for name in config.data.tests]
  wanted = {
    (arm_id.arm, arm_id.seed, test)
    for arm_id in arm_ids
    if not (workdir / "arms" / arm_id.key / "failed.json").exists()
    for test in tests
  }
  wanted |= {
    (name, int(config.teachers[name].seed), test)
    for name in config.teachers
    for test in tests
  }
  return wanted <= done


def write_report(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: splits.Data,
  arm_ids: list[config_lib.ArmId],
  extensions: extensions_lib.Extensions,
) -> None:
  """Writes report.json, the tables and overlays.png from what lies there."""
  rows = scores_lib.read(workdir / "scores.csv")
  meta = _describe_protocol(config, workdir, data, arm_ids, extensions)
  checkpoint.write_json(workdir / "report.json", meta)
  cases, title = _pick_cases(workdir, data, rows)
  if cases:
    with files.whole(workdir / "overlays.png") as file:
      overlays.overlays(cases, title=title).save(file, "PNG")
  for name, text in tables.make_tables(rows, meta).items():
    files.write_text(workdir / name, text)
  with files.whole(workdir / _REPORTED) as file:
    file.write(_name_sources(workdir))


def _name_sources(workdir: pathlib.Path) -> bytes:
  """Names the content of what a report is made from."""
  digest = hashlib.sha256()
  for name in ("config.json", "scores.csv"):
    digest.update(hashlib.sha256((workdir / name).read_bytes()).digest())
  return digest.hexdigest().encode() + b"\n"


def _describe_protocol(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  data: splits.Data,
  arm_ids: list[config_lib.ArmId],
  extensions: extensions_lib.Extensions,
) -> dict[str, Any]:
  """Returns what `report.meta` calls meta."""
  size = config.data.size
  arms, notes = {}, []
  folders = {name: workdir / "teachers" / name for name in config.teachers}
  for arm_id in arm_ids:
    folder = workdir / "arms" / arm_id.key
    if checkpoint.is_finished(folder):
      folders.setdefault(arm_id.arm, folder)
  macs: dict[str, float] = {}
  for arm, folder in folders.items():
    if not checkpoint.is_finished(folder):
      continue
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    if arm in config.teachers:
      network = networks.make_network(
        about["network"], **dict(config.teachers[arm].options)
      )
    else:
      network = config_lib.make_student(about["network"], config, extensions)
    if repr(network) not in macs:
      macs[repr(network)] = networks.count_macs(network, size=size)
    arms[arm] = {
      "parameters": about["parameters"],
      "macs": macs[repr(network)],
    }
  if len(config.distil_from) > 1:
    parts = [arms[name] for name in config.distil_from]
    arms[config_lib.JOINT] = {
      key: sum(part[key] for part in parts) for key in ("parameters", "macs")
    }
    notes.append(
      f"{config_lib.JOINT} is the mean probability of "
      f"{', '.join(config.distil_from)}"
    )
  for arm_id in arm_ids:
    for name in ("about.json", "failed.json"):
      path = workdir / "arms" / arm_id.key / name
      if path.exists():
        why = json.loads(path.read_text(encoding="utf-8"))["diverged"]
        if why:
          notes.append(f"{arm_id.arm}, seed {arm_id.seed}, diverged: {why}")
  excluded = ", ".join(data.train.excluded)
  if excluded:
    notes.append(
      f"kept out of training, as duplicates of test images: {excluded}"
    )
  training = config_lib.make_train_config(dict(config.training))
  if config.teacher_out_tta != "none":
    notes.append(
      "what the students are taught is the mean of the teacher's logits and "
      "features over eight orientations; a teacher's score is that of the mean "
      "of its probabilities"
      if config.evaluation.teacher_tta != "none"
      else "what the students are taught is the mean of the teacher's logits "
      "and features over eight orientations; its score is without averaging"
    )
  tta = config.evaluation.tta
  if config.evaluation.teacher_tta != tta:
    tta += f" (teachers: {config.evaluation.teacher_tta})"
  meta: dict[str, Any] = {
    "train": {
      "name": config.data.name,
      "found": data.train.found_count,
      "official": data.train.official_count,
    },
    "datasets": {
      # The images that choose are a part of the official training set.
      test: {"found": len(arrays)}
      if arrays is data.validation
      else {"found": arrays.found_count, "official": arrays.official_count}
      for test, arrays in data.tests.items()
    },
    "protocol": {
      "resolution": size,
      "threshold": metrics.THRESHOLD,
      "interpolation": "bilinear",
      "test_time_augmentation": tta,
      "checkpoint": (
        f"best validation Dice, every {training.validate_epochs:g} epochs"
      ),
    },
    "arms": arms,
    "baseline": "none",
    "notes": notes,
  }
  if config.distil_from:
    teacher = (
      config_lib.JOINT if len(config.distil_from) > 1 else config.distil_from[0]
    )
    # One that knows nothing is a control, which need not be ahead of students.
    drawn = all(
      config_lib.is_drawn(config.teachers[name]) for name in config.distil_from
    )
    meta["teacher"] = "" if drawn else teacher
  if "primary" in config:
    meta["primary"] = _primary_family(config, data)
    meta["validation"] = _validation_dice(workdir, arm_ids)
  groups = dict(config.evaluation.get("groups", {}))
  if groups:
    meta["groups"] = {name: list(ids) for name, ids in groups.items()}
  return meta


def _primary_family(
  config: ml_collections.ConfigDict, data: splits.Data
) -> list[dict[str, Any]]:
  """Returns the comparisons that `config.primary` names, for every student.

  It holds pairs of methods, (one, the other); of several others the report
  takes the best on validation.
  """
  family = []
  for student in config.arms:
    for method, others in config.primary:
      against: Any = f"{student}-{others}"
      if not isinstance(others, str):
        against = [f"{student}-{other}" for other in others]
      family += [
        {"dataset": test, "arm": f"{student}-{method}", "against": against}
        for test in data.tests
      ]
  return family


def _validation_dice(
  workdir: pathlib.Path, arm_ids: list[config_lib.ArmId]
) -> dict[str, dict[str, float]]:
  """Returns {arm: {seed: Dice of the weights that were kept}}."""
  found: dict[str, dict[str, float]] = {}
  for arm_id in arm_ids:
    path = workdir / "arms" / arm_id.key / "about.json"
    if path.exists():
      about = json.loads(path.read_text(encoding="utf-8"))
      by_seed = found.setdefault(arm_id.arm, {})
      by_seed[str(arm_id.seed)] = about["validation_dice"]
  return found


def _pick_cases(
  workdir: pathlib.Path, data: splits.Data, rows: list[scores_lib.Row]
) -> tuple[list[overlays.Case], str]:
  """Picks from the first seed of every arm on the first test set; a title."""
  test, arrays = next(iter(data.tests.items()))
  index = {identity: i for i, identity in enumerate(arrays.ids)}
  cases, seen = [], set()
  for (arm, seed, dataset), group in scores_lib.groups(rows).items():
    if dataset != test or arm in seen:
      continue
    seen.add(arm)
    dice = {str(row["id"]): float(row["dice"]) for row in group}
    for rank, identity in overlays.pick(group).items():
      i = index[identity]
      truth = arrays.native_mask(i)
      image = Image.fromarray(arrays.image[i]).resize(truth.shape[::-1])
      path = scoring.prediction_path(workdir, arm, seed, test, identity)
      if not path.exists():
        _LOG.warning("overlays.png goes without %s, which is not there", path)
        continue
      with Image.open(path) as prediction:
        cases.append(
          overlays.Case(
            arm=arm,
            rank=rank,
            id=identity,
            dice=dice[identity],
            image=np.asarray(image),
            truth=truth,
            prediction=np.asarray(prediction.convert("L")) > 0,
          )
        )
  return cases, f"{test}, first seed of each arm"
