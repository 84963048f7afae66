r"""Boundary distillation on ISIC-2016, scored on its test set and on PH2.

Command:
  python -m kdseg.main --config configs/isic2016.py --workdir runs/isic2016 \
  --config.data.manual_dir FOLDER_WITH_THE_OFFICIAL_ARCHIVES

Trains a ViT-S/14 teacher (its last three blocks fine-tuned, the others
computed once) and two patchified U-Nets without distillation, with MBF and
with M2BF. Needs the extra `teacher-vit`. Scores, hours and hardware are in
README.md, per-image scores under results/.

Variants:
  --config configs/isic2016.py:search         the students without distillation
                                              and without a teacher, scored on
                                              the validation images alone
  --config.arms.patch_unet_50k.seeds='(0,)'   fewer seeds; more can follow in
                                              the same workdir
"""

import ml_collections

# A transformer has no maps of its own at strides 4 and 8, so the decoders are
# compared; one tap, as generators cost far more than these students.
TAPS = ("decoder_high",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the config, or that of the variant "search"."""
  if variant not in ("", "search"):
    raise ValueError(f'the variants are "" and "search", not "{variant}"')
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.log_every = 20

  c.data = ml_collections.ConfigDict()
  c.data.name = "isic2016"
  c.data.tests = ("isic2016", "ph2")
  c.data.size = 256
  c.data.batch_size = 8
  c.data.manual_dir = ""
  c.data.data_dir = ""
  c.data.options = {}

  # A frozen teacher answers for flips and quarter turns, once; so no other
  # geometric augmentation reaches any network of this config.
  c.augment = ml_collections.ConfigDict(
    {"rotate": 0.0, "scale": 0.0, "translate": 0.0}
  )
  c.segmentation = ml_collections.ConfigDict({"bce": 1.0, "dice": 1.0})
  c.encoder_weights = True

  c.teachers = ml_collections.ConfigDict()
  c.teachers.teacher_vit = ml_collections.ConfigDict(
    {
      "network": "vit_unet",
      "options": {
        "widths": (64, 32, 16),
        "dropout": 0.1,
        "trained_from": 8,
      },
      "seed": 0,
      "checkpoint": "",
      "precompute": True,
      "training": {
        "epochs": 12.0,
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "encoder_scale": 0.05,
        "average_decay": 0.99,
        "validate_epochs": 1.0,
      },
    }
  )
  c.distil_from = ("teacher_vit",)
  c.precompute_teacher = True
  c.taught_channels = 32
  c.taught_averaging = "dihedral"

  c.methods = ml_collections.ConfigDict(
    {
      "none": {},
      "mbf": {"terms": {"mbf": 1.0}, "taps": TAPS},
      "m2bf": {"terms": {"m2bf": 1.0}, "heads": 3, "taps": TAPS},
    }
  )
  c.students = ml_collections.ConfigDict()
  c.arms = ml_collections.ConfigDict(
    {
      "patch_unet_50k": {
        "methods": ("none", "mbf", "m2bf"),
        "seeds": (0, 1, 2),
      },
      "patch_unet_12k": {
        "methods": ("none", "mbf", "m2bf"),
        "seeds": (0, 1, 2),
      },
    }
  )
  c.training = ml_collections.ConfigDict(
    {
      "epochs": 32.0,
      "learning_rate": 3e-3,
      "weight_decay": 1e-3,
      "average_decay": 0.99,
    }
  )

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.batch_size = 16
  c.evaluation.averaging = "none"
  c.evaluation.teacher_averaging = "dihedral"

  if variant == "search":
    c.data.tests = ("validation",)
    c.teachers = ml_collections.ConfigDict()
    c.distil_from = ()
    c.precompute_teacher = False
    c.taught_averaging = "none"
    for student in c.arms:
      c.arms[student].methods = ("none",)
  return c
