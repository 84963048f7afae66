"""The quickstart in small: a config whose runs take seconds."""

import csv
import importlib.util
import pathlib
import shutil

import jax.numpy as jnp
import ml_collections

from kdseg.experiment import config as config_lib
from kdseg.experiment import records
from kdseg.runtime import checkpoint

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
TEACHER = {
  "network": "patch_unet",
  "options": {"widths": (4, 4, 4), "depths": (1, 1, 1)},
  "seed": 0,
  "checkpoint": "",
  "precompute": False,
  "training": {"epochs": 1.0, "learning_rate": 1e-2},
}
FROZEN = {
  "network": "vit_unet",
  "options": {
    "side": 28,
    "taps": (1, 2),
    "trained_from": 1,
    "widths": (4, 4, 4),
  },
  "seed": 0,
  "checkpoint": "",
  "precompute": True,
  "training": {
    "epochs": 1.0,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "encoder_scale": 0.5,
  },
}


def make_config(data_dir, **changes):
  """The quickstart, shrunk; `changes` replace whole entries."""
  spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  entries = module.get_config().to_dict()
  entries["data"] |= {
    "size": 32,
    "batch_size": 8,
    "data_dir": str(data_dir),
    "options": {
      "synthetic": {"train": 24, "validation": 8, "test": 6, "image_size": 40}
    },
  }
  entries |= {
    "log_every": 2,
    "teachers": {"teacher_unet": TEACHER},
    "methods": {
      "none": {},
      "mbf": {"terms": {"mbf": 1.0}, "taps": ("low",), "generator": "1x1"},
      # Overflows in its first step.
      "boom": {"terms": {"kd": 1e38}, "distill_ramp": 0.0},
    },
    "students": {"patch_unet": {"widths": (2, 2, 2), "depths": (1, 1, 1)}},
    "arms": {"patch_unet": {"methods": ("none", "mbf", "boom"), "seeds": (0,)}},
    "training": {
      "epochs": 2.0,
      "learning_rate": 1e-2,
      "ema_decay": 0.5,
      "validate_epochs": 1.0,
      "save_epochs": 1.0,
    },
  }
  entries["evaluation"]["batch_size"] = 8
  return ml_collections.ConfigDict(entries | changes)


def make_run(config, workdir):
  """What the stages of a run are given."""
  return records.Run(config_lib.parse(config), pathlib.Path(workdir))


def copy(finished, workdir, *parts):
  """Starts a workdir with some of what a finished one holds; all without."""
  if not parts:
    return shutil.copytree(finished.workdir, workdir)
  workdir.mkdir()
  for part in parts:
    source = finished.workdir / part
    if source.is_dir():
      shutil.copytree(source, workdir / part)
    else:
      shutil.copy2(source, workdir / part)
  return workdir


def snapshot(workdir):
  """Returns {file: (its time, its content)} of a workdir."""
  return {
    str(path.relative_to(workdir)): (path.stat().st_mtime_ns, path.read_bytes())
    for path in sorted(workdir.rglob("*"))
    if path.is_file()
  }


def read_rows(workdir):
  """Returns the rows of scores.csv as text."""
  with open(workdir / "scores.csv", newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def variables_of(workdir, arm):
  """Returns an arm's best weights."""
  return checkpoint.load_variables(workdir / "arms" / arm)[0]


# What is said then.
TOO_MUCH = r"not enough memory \(RESOURCE_EXHAUSTED: Out of memory .*\d bytes\)"


def allocate_too_much(*arguments, **options):
  """Stands in for a function that takes more memory than there is."""
  jnp.zeros(2**45, jnp.uint8).block_until_ready()
