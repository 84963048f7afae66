"""Made-up rows of scores.csv, for the tests of the report."""

import numpy as np

from kdseg.evaluation import metrics

FAST = {"bootstrap": {"resamples": 400}}
NONE, M2BF = "patch_unet_50k-none", "patch_unet_50k-m2bf"
TEACHER = "teacher-unetpp"


def make_row(arm, seed, dataset, identity, dice):
  """One row whose every score follows from its Dice."""
  hit = round(1000 * dice)
  jaccard = dice / (2 - dice)
  row = dict.fromkeys(metrics.COLUMNS, dice)
  row |= {
    "jaccard": jaccard,
    "thresholded_jaccard": jaccard * (jaccard >= 0.65),
    "hd95": 100 * (1 - dice),
    "assd": 40 * (1 - dice),
    "true_positive": hit,
    "false_positive": 1000 - hit,
    "false_negative": 1000 - hit,
    "true_negative": 60_000,
    "height": 256,
    "width": 256,
    "empty_prediction": int(dice == 0),
  }
  return {
    "arm": arm, "seed": seed, "dataset": dataset, "id": identity, **row,
  }  # fmt: skip


def make_rows(arm, dices, *, seed=0, dataset="isic2016_test"):
  return [
    make_row(arm, seed, dataset, f"ISIC_{i:07d}", float(dice))
    for i, dice in enumerate(dices)
  ]


def make_arm(arm, mean, *, seeds=3, images=60, seed_sd=0.001, dataset=None):
  """Rows of an arm; arms share their images' difficulty and their seeds."""
  rng = np.random.default_rng(0)
  image = 0.05 * rng.normal(size=images)
  own = np.random.default_rng(sum(map(ord, arm)))
  luck = own.normal(size=seeds)
  luck = seed_sd * (luck - luck.mean())
  rows = []
  for seed in range(seeds):
    noise = 0.005 * own.normal(size=images)
    dices = np.clip(mean + image - image.mean() + luck[seed] + noise, 0, 1)
    dices += mean + luck[seed] - dices.mean()
    rows += make_rows(arm, dices, seed=seed, dataset=dataset or "isic2016_test")
  return rows
