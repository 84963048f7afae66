r"""Boundary distillation on ISIC-2016, scored on its test set and on PH2.

Command:
  python -m kdseg.main --config configs/isic2016.py --workdir runs/isic2016 \
  --config.data.manual_dir FOLDER_WITH_THE_OFFICIAL_ARCHIVES

Trains a ViT-S/14 teacher (its last three blocks fine-tuned, the outputs of the
frozen ones computed once) and two patchified U-Nets without distillation, with
MBF and with M2BF. Needs the extra `teacher-vit`.

Expected scores, hours and hardware: docs/results.md; one row an image:
results/isic2016/.

The students' learning rate was chosen on the validation images (variant
"search", the small student, seed 0): Dice .9096 at 1e-3, .9184 at 3e-3, .9115
at 1e-2.

Variants:
  --config configs/isic2016.py:search         the students without distillation
                                              and without a teacher, scored on
                                              the validation images alone
  --config configs/isic2016.py:comparison     every rival and control on the
                                              small student, five seeds
  --config configs/isic2016.py:why            MBF and M2BF at other weights,
                                              widths and taps, on the small
                                              student, scored on the validation
                                              images alone
  --config configs/isic2016.py:random         MBF and M2BF from a randomly
                                              initialised teacher; merge its
                                              scores with "comparison"
  --config.arms.patch_unet_50k.seeds='(0,)'   fewer seeds; more can follow in
                                              the same workdir
"""

import ml_collections

# A transformer has no features at strides 4 and 8, so those of the decoders are
# compared; at one tap, as generators cost far more than these students.
TAPS = ("decoder_high",)
BAND = {"terms": {"mbf": 1.0}, "taps": TAPS}
# The methods that boundary distillation is compared with; docs/methods.md says
# which question each answers. Weights are the published ones.
COMPARISON = {
  "none": {},
  "mbf": BAND,
  "m2bf": {"terms": {"m2bf": 1.0}, "heads": 3, "taps": TAPS},
  "mgd": {"terms": {"mgd": 1.0}, "taps": TAPS},
  "rolled_band": {**BAND, "region": "rolled_band"},
  "cwd": {"terms": {"cwd": 3.0}},
  "kd": {"terms": {"kd": 1.0}},
  # The ablation.
  "fitnet": {"terms": {"fitnet": 1.0}, "taps": TAPS},
  "generator": {**BAND, "mask_ratio": 0.0},
  # Hides as many cells as mbf: .75 of the 14.9 % in the band, the mean over the
  # training masks at stride 8.
  "mgd_matched": {"terms": {"mgd": 1.0}, "mask_ratio": 0.112, "taps": TAPS},
  "interior": {**BAND, "region": "interior"},
  "exterior": {**BAND, "region": "exterior"},
  "inv_band": {**BAND, "region": "inv_band"},
  "teacher_band": {**BAND, "region": "teacher_band"},
  "band_loss": {**BAND, "loss_region": "band"},
  "m2bf_2": {"terms": {"m2bf": 1.0}, "heads": 2, "taps": TAPS},
  "m2bf_4": {"terms": {"m2bf": 1.0}, "heads": 4, "taps": TAPS},
  "parallel": {
    "terms": {"m2bf": 1.0},
    "heads": 3,
    "topology": "parallel",
    "taps": TAPS,
  },
  # One head a tap, from the deep to the shallow one.
  "multiscale": {
    "terms": {"m2bf": 1.0},
    "topology": "multiscale",
    "taps": (*TAPS, "decoder_low"),
  },
  # One generator with as many parameters as a cascade of three.
  "wide": {**BAND, "generator_width": 96},
  "no_generator": {**BAND, "generator": "identity"},
  "no_region": {**BAND, "region": "none"},
  # The best on validation of the variant "why".
  "mbf_all_hidden": {**BAND, "mask_ratio": 1.0},
  "smoothing": {"segmentation": {"smoothed_bce": 1.0, "dice": 1.0}},
  "shuffled": {**BAND, "teacher_out": "shuffled"},
  # The rivals.
  "dist": {"terms": {"dist": 1.0}},
  "at": {"terms": {"at": 1e4}, "taps": TAPS},
  "skd_pa": {"terms": {"skd_pa": 10.0}, "taps": TAPS},
  "ifvd": {"terms": {"ifvd": 20.0}, "taps": TAPS},
  "cirkd_lite": {"terms": {"cirkd_lite": 1.0}, "taps": TAPS},
  "emkd": {"terms": {"emkd": 1.0}, "taps": TAPS},
  "fgd": {"terms": {"fgd": 1.0}, "taps": TAPS},
  "maskd": {"terms": {"maskd": 1.0}, "taps": TAPS},
  "bpkd": {"terms": {"bpkd": 1.0}},
  "ultralbm": {"terms": {"ultralbm": 1.0}},
}
# Does MBF gain more with other settings? Compared on the validation images.
WHY = {
  "none": {},
  "mbf": BAND,
  "mbf_weak": {**BAND, "terms": {"mbf": 0.3}},
  "mbf_strong": {**BAND, "terms": {"mbf": 3.0}},
  "mbf_narrow": {**BAND, "radius": 3.0},
  "mbf_broad": {**BAND, "radius": 8.0},
  "mbf_all_hidden": COMPARISON["mbf_all_hidden"],
  # The decoders' maps at stride 4, and at both strides.
  "mbf_low": {**BAND, "taps": ("decoder_low",)},
  "mbf_both": {**BAND, "taps": ("decoder_low", *TAPS)},
  # A hidden cell passes no gradient to the student at its own place, so the
  # boundary is learned less directly, unless its error alone counts.
  "band_loss": {**BAND, "loss_region": "band"},
  "m2bf": COMPARISON["m2bf"],
  "m2bf_weak": {**COMPARISON["m2bf"], "terms": {"m2bf": 0.3}},
  "m2bf_strong": {**COMPARISON["m2bf"], "terms": {"m2bf": 3.0}},
}
RIVALS = (
  "kd", "cwd", "dist", "at", "skd_pa", "ifvd", "cirkd_lite", "emkd", "fgd",
  "maskd", "bpkd", "ultralbm", "mgd", "fitnet",
)  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """Returns the config of a variant; see the head of this file."""
  if variant not in ("", "search", "comparison", "why", "random"):
    raise ValueError(
      'the variants are "search", "comparison", "why" and "random", not '
      f'"{variant}"'
    )
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.log_every = 20
  # Seeds of an arm that one program updates; 0 for what suits the backend.
  c.seeds_at_once = 0

  c.data = ml_collections.ConfigDict()
  c.data.name = "isic2016"
  c.data.tests = ("isic2016", "ph2")
  c.data.size = 256
  c.data.batch_size = 8
  c.data.manual_dir = ""
  c.data.data_dir = ""
  # Ids of images that may look like one of another split, joined by commas.
  c.data.allow_alike = ""
  c.data.options = {
    name: {"grey_masks": "error", "lesion": "white"}
    for name in ("isic2016", "ph2", "folder")
  }

  # The teacher's outputs are cached for flips and quarter turns alone, so no
  # other geometric augmentation is used.
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
        "ema_decay": 0.99,
        "validate_epochs": 1.0,
      },
    }
  )
  c.distil_from = ("teacher_vit",)
  c.precompute_teacher = True
  c.teacher_channels = 32
  c.teacher_out_tta = "dihedral"

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
      "ema_decay": 0.99,
    }
  )

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.batch_size = 16
  c.evaluation.tta = "none"
  c.evaluation.teacher_tta = "dihedral"

  if variant == "comparison":
    c.methods = ml_collections.ConfigDict(COMPARISON)
    c.arms = ml_collections.ConfigDict(
      {
        "patch_unet_12k": {
          "methods": tuple(COMPARISON),
          "seeds": (0, 1, 2, 3, 4),
        }
      }
    )
    c.primary = (
      ("m2bf", "none"),
      ("m2bf", "mgd"),
      ("mbf", "rolled_band"),
      ("m2bf", RIVALS),
    )
  if variant == "why":
    c.data.tests = ("validation",)
    c.methods = ml_collections.ConfigDict(WHY)
    c.arms = ml_collections.ConfigDict(
      {"patch_unet_12k": {"methods": tuple(WHY), "seeds": (0, 1)}}
    )
  if variant == "random":
    teacher = c.teachers.teacher_vit
    teacher.precompute = False
    teacher.training.epochs = 0.0
    c.teachers = ml_collections.ConfigDict({"teacher_random": teacher})
    c.encoder_weights = False
    c.distil_from = ("teacher_random",)
    c.methods = ml_collections.ConfigDict(
      {"mbf_random": BAND, "m2bf_random": COMPARISON["m2bf"]}
    )
    c.arms = ml_collections.ConfigDict(
      {
        "patch_unet_12k": {
          "methods": ("mbf_random", "m2bf_random"),
          "seeds": (0, 1, 2, 3, 4),
        }
      }
    )
  if variant == "search":
    c.data.tests = ("validation",)
    c.teachers = ml_collections.ConfigDict()
    c.distil_from = ()
    c.precompute_teacher = False
    c.teacher_out_tta = "none"
    for student in c.arms:
      c.arms[student].methods = ("none",)
  return c
