r"""ISIC-2016 with teachers that are fine-tuned whole: for a GPU.

Command:
  python -m kdseg.main --config configs/isic2016_full.py \
  --workdir runs/isic2016_full \
  --config.data.manual_dir FOLDER_WITH_THE_OFFICIAL_ARCHIVES

Students of four sizes learn from three teachers together (a ViT-S/14, U-Net++
and DeepLabV3+ on EfficientNet-Lite2): from the mean of their probabilities and
from their features side by side. The teachers run on every batch, so that all
of the augmentation is used. Needs the extras `pretrained` and `teacher-vit`.

Expected scores: not known, as it has not been run to its end.
"""

import ml_collections

TAPS = ("decoder_low", "decoder_high")


def _teacher(network: str, **options) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      "network": network,
      "options": options,
      "seed": 0,
      "checkpoint": "",
      "precompute": False,
      "training": {
        "epochs": 40.0,
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "encoder_scale": 0.1,
        "ema_decay": 0.995,
      },
    }
  )


def get_config() -> ml_collections.ConfigDict:
  """Returns the config."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.log_every = 50
  # Seeds of an arm that one program updates; 0 for what suits the backend.
  c.seeds_at_once = 0

  c.data = ml_collections.ConfigDict()
  c.data.name = "isic2016"
  c.data.tests = ("isic2016", "ph2")
  c.data.size = 256
  c.data.batch_size = 16
  c.data.manual_dir = ""
  c.data.data_dir = ""
  # Ids of images that may look like one of another split, joined by commas.
  c.data.allow_alike = ""
  c.data.options = {
    name: {"grey_masks": "error", "lesion": "white"}
    for name in ("isic2016", "ph2", "folder")
  }

  c.augment = ml_collections.ConfigDict()
  c.segmentation = ml_collections.ConfigDict({"bce": 1.0, "dice": 1.0})
  c.encoder_weights = True

  c.teachers = ml_collections.ConfigDict(
    {
      "teacher_vit": _teacher("vit_unet", trained_from=0, dropout=0.1),
      "teacher_unetpp": _teacher("unetpp"),
      "teacher_deeplab": _teacher("deeplab"),
    }
  )
  c.distil_from = ("teacher_vit", "teacher_unetpp", "teacher_deeplab")
  c.precompute_teacher = False
  c.teacher_channels = 64
  c.teacher_out_tta = "none"

  c.methods = ml_collections.ConfigDict(
    {
      "none": {},
      "mbf": {"terms": {"mbf": 1.0}, "taps": TAPS},
      "m2bf": {"terms": {"m2bf": 1.0}, "heads": 3, "taps": TAPS},
    }
  )
  c.students = ml_collections.ConfigDict({"lite_unet": {"stages": 4}})
  every = {"methods": ("none", "mbf", "m2bf"), "seeds": (0, 1, 2)}
  c.arms = ml_collections.ConfigDict(
    {
      "patch_unet_50k": every,
      "patch_unet_12k": every,
      "lite_unet": every,
      "enet": every,
    }
  )
  c.training = ml_collections.ConfigDict(
    {
      "epochs": 100.0,
      "learning_rate": 3e-3,
      "weight_decay": 1e-3,
      "ema_decay": 0.995,
    }
  )

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.batch_size = 16
  c.evaluation.tta = "none"
  c.evaluation.teacher_tta = "none"
  return c
