"""report.json: what a run states beside its scores.

All keys are optional; what is missing is printed as "not stated".

    {
      "train": {"name": "isic2016", "found": 751, "official": 900},
      "datasets": {"isic2016_test": {"found": 379, "official": 379}},
      "protocol": {
        "resolution": 256,            # side of the network's input, pixels
        "threshold": 0.5,             # lesion where p > threshold
        "interpolation": "bilinear",  # of the probabilities to native size
        "test_time_augmentation": "none",
        "checkpoint": "best validation Dice, every 2 epochs"
      },
      "arms": {"patch_unet_50k-none": {"parameters": 49532, "macs": 3.1e7}},
      "teacher": "teacher_unetpp",    # of the students, for the gate; "" if it
                                      # is a control that was not trained
      "baseline": "none",             # the method to compare the others with
      "primary": [                    # Holm's family; without it, all
        {"dataset": "isic2016_test", "arm": "patch_unet_50k-m2bf",
         "against": "patch_unet_50k-mgd"}  # without it, the baseline; of
      ],                                    # several, the best on validation
      "validation": {                 # Dice of every seed, for that choice
        "patch_unet_50k-mgd": {"0": 0.93}
      },
      "groups": {"upscaled from 224 px": ["ISIC_0000003"]},  # printed once
      "notes": ["one sentence each"],
      "bootstrap": {"resamples": 10000, "seed": 0, "level": 0.95}
    }

Arms are called `teacher...` or `<student>-<method>`; an arm is compared with
`<student>-none`, and with what the primary family names, over the seeds that
both have, on the same images.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdseg.report.cells import Row
from kdseg.report.cells import shown

Meta = Mapping[str, Any]

KEYS = (
  *("train", "datasets", "protocol", "arms", "teacher", "baseline"),
  *("primary", "validation", "groups", "notes", "bootstrap"),
)
_NOT_STATED = "not stated"


def check(meta: Meta) -> None:
  """Refuses unknown keys (ValueError)."""
  unknown = [key for key in meta if key not in KEYS]
  if unknown:
    raise ValueError(
      f"report.json: unknown keys {', '.join(unknown)}; known are "
      f"{', '.join(KEYS)}"
    )


def merge(metas: Sequence[Meta]) -> dict[str, Any]:
  """Joins the report.json of several folders.

  Raises:
    ValueError: when two of them state different things, since one protocol
      line could not be true for both.
  """
  merged: dict[str, Any] = {}
  for meta in metas:
    check(meta)
    _merge_into(merged, meta, "")
  return merged


def is_teacher(arm: str) -> bool:
  """Says whether an arm is a teacher, by its name."""
  return arm.startswith("teacher")


def baseline_of(arm: str, meta: Meta) -> str:
  """Returns the arm that an arm is compared with; of a teacher, itself."""
  if is_teacher(arm):
    return arm
  return f"{arm.partition('-')[0]}-{meta.get('baseline', 'none')}"


def is_baseline(arm: str, meta: Meta) -> bool:
  """Says whether an arm is a student that others are compared with."""
  return not is_teacher(arm) and arm == baseline_of(arm, meta)


def primary(meta: Meta) -> list[tuple[str, str, str]]:
  """Returns (data set, arm, against) of each entry of the primary family."""
  return [_named(entry, meta) for entry in meta.get("primary", ())]


def bootstrap(meta: Meta) -> dict[str, Any]:
  """Returns the arguments of `statistics.hierarchical_bootstrap`."""
  options = {"resamples": 10_000, "seed": 0, "level": 0.95}
  return options | meta.get("bootstrap", {})


def protocol_line(
  dataset: str, here: Mapping[str, Mapping[int, Sequence[Row]]], meta: Meta
) -> str:
  """Returns how the scores of a data set were made, to print above tables."""
  rows = [
    row
    for by_seed in here.values()
    for members in by_seed.values()
    for row in members
  ]
  count = len({row["id"] for row in rows})
  official = meta.get("datasets", {}).get(dataset, {}).get("official")
  train = meta.get("train", {})
  protocol = meta.get("protocol", {})
  resolution = protocol.get("resolution")
  sizes = sorted(
    {(int(row["height"]), int(row["width"])) for row in rows},
    key=lambda size: (size[0] * size[1], size),
  )
  native = f"{sizes[0][0]} x {sizes[0][1]}"
  if len(sizes) > 1:
    native += f" to {sizes[-1][0]} x {sizes[-1][1]}"
  parts = [
    f"{dataset}, n = {_coverage(count, official)}",
    f"trained on {train.get('name', _NOT_STATED)}, "
    f"{_coverage(train.get('found'), train.get('official'))}",
    "network input "
    + (f"{resolution} x {resolution}" if resolution else _NOT_STATED),
    f"scored at each image's own size ({native})",
    f"lesion where p > {protocol.get('threshold', _NOT_STATED)}",
    "one value an image, mean over images, then mean over seeds ± their "
    "standard deviation; pooled: over all pixels",
    f"probabilities resized: {protocol.get('interpolation', _NOT_STATED)}",
    "test-time augmentation: "
    f"{protocol.get('test_time_augmentation', _NOT_STATED)}",
    f"checkpoint: {protocol.get('checkpoint', _NOT_STATED)}",
  ]
  return "Protocol: " + "; ".join(parts) + "."


def _named(entry: Mapping[str, Any], meta: Meta) -> tuple[str, str, str]:
  """Returns (data set, arm, against) of an entry of the primary family.

  Of several rivals, it is the one with the best mean validation Dice over the
  seeds that all of them share (over its own where they share none): nothing is
  chosen on a test set. Where none of them was trained, all their names.
  """
  arm = entry.get("arm", "")
  against = entry.get("against") or baseline_of(arm, meta)
  if isinstance(against, str):
    return entry.get("dataset", ""), arm, against
  validation = meta.get("validation", {})
  known = {o: validation[o] for o in against if validation.get(o)}
  shared = set[str]().union(*known.values()).intersection(*known.values())
  means = {
    other: float(np.mean([dice[seed] for seed in sorted(shared or dice)]))
    for other, dice in known.items()
  }
  best = max(means, key=means.__getitem__) if means else " or ".join(against)
  return entry.get("dataset", ""), arm, best


def _merge_into(known: dict[str, Any], new: Meta, where: str) -> None:
  for key, value in new.items():
    place = f"{where}{key}"
    if isinstance(value, Mapping):
      _merge_into(known.setdefault(key, {}), value, f"{place}.")
    elif place in ("notes", "primary"):
      there = known.setdefault(key, [])
      there += [item for item in value if item not in there]
    elif place == "teacher" and not (value and known.get(key)):
      # A control's "" gives way to the teacher of another folder.
      known[key] = value or known.get(key, "")
    elif known.setdefault(key, value) != value:
      raise ValueError(
        f"the folders differ in {place}: {shown(repr(known[key]))} and "
        f"{shown(repr(value))}. Their scores do not belong in one table; make "
        "one for each"
      )


def _coverage(found: int | None, official: int | None) -> str:
  if found is None:
    return _NOT_STATED
  if official is None:
    return str(found)
  return f"{found} of {official}" + (" (a subset)" * (found < official))
