"""The quickstart in small: a config whose runs take seconds."""

import importlib.util
import pathlib

import ml_collections

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
