r"""The whole pipeline on drawn lesions, offline, in 3 minutes on 2 cores.

Command:
  python -m kdseg.main --config configs/quickstart.py --workdir runs/quickstart

Trains a teacher and a small student on 256 drawn lesions of 96 x 96 pixels:
the student without distillation, with MBF and with M2BF; scores all of them
and writes table.md and overlays.png.

Expected scores: any. Drawn lesions show that everything works, they are no
result: see configs/isic2016.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.log_every = 20
  # Seeds of an arm that one program updates; 0 for what suits the backend.
  c.seeds_at_once = 0

  c.data = ml_collections.ConfigDict()
  c.data.name = "synthetic"
  c.data.tests = ("synthetic",)
  c.data.size = 96
  c.data.batch_size = 16
  c.data.manual_dir = ""
  c.data.data_dir = ""
  # Ids of images that may look like one of another split, joined by commas.
  c.data.allow_alike = ""
  c.data.options = {
    "synthetic": {"train": 256, "validation": 32, "test": 64, "seed": 0},
    "folder": {"grey_masks": "error", "lesion": "white"},
  }

  c.augment = ml_collections.ConfigDict()
  c.segmentation = ml_collections.ConfigDict({"bce": 1.0, "dice": 1.0})
  # Published encoder weights need an extra.
  c.encoder_weights = False

  c.teachers = ml_collections.ConfigDict()
  c.teachers.teacher_unet = ml_collections.ConfigDict(
    {
      "network": "patch_unet",
      "options": {"widths": (32, 64, 96, 128), "depths": (2, 2, 2, 2)},
      "seed": 0,
      "checkpoint": "",
      "precompute": False,
      "training": {"epochs": 14.0, "learning_rate": 3e-3},
    }
  )
  c.distil_from = ("teacher_unet",)
  c.precompute_teacher = False
  c.teacher_channels = 0
  c.teacher_out_tta = "none"

  c.methods = ml_collections.ConfigDict(
    {
      "none": {},
      "mbf": {"terms": {"mbf": 1.0}},
      "m2bf": {"terms": {"m2bf": 1.0}, "heads": 3},
    }
  )
  c.students = ml_collections.ConfigDict()
  c.arms = ml_collections.ConfigDict(
    {
      "patch_unet_12k": {"methods": ("none", "mbf", "m2bf"), "seeds": (0,)},
    }
  )
  c.training = ml_collections.ConfigDict(
    {
      "epochs": 14.0,
      "learning_rate": 5e-3,
    }
  )

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.batch_size = 16
  c.evaluation.tta = "none"
  c.evaluation.teacher_tta = "none"
  return c
