"""What the scores of several arms add up to: numbers, verdicts, warnings.

`summarize` takes the rows of scores.csv and the contents of report.json
(`meta`), and nothing else, so that every table can be made again. All keys of
`meta` are optional; what is missing is printed as "not stated".

    {
      "train": {"name": "isic2016_train", "found": 751, "official": 900},
      "datasets": {"isic2016_test": {"found": 379, "official": 379}},
      "protocol": {
        "resolution": 256,            # side of the network's input, pixels
        "threshold": 0.5,             # lesion where p > threshold
        "interpolation": "bilinear",  # of the probabilities to native size
        "test_time_augmentation": "none",
        "checkpoint": "best validation Dice, every 2 epochs"
      },
      "arms": {"patch_unet_50k-none": {"parameters": 49532, "macs": 3.1e7}},
      "teacher": "teacher-unetpp",    # the one that taught, for the gate; ""
                                      # if it knows nothing: there is none
      "baseline": "none",             # the method the others are set against
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
`<student>-none`, and with what the primary family sets it against, over the
seeds that both have, on the same images.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from kdseg.evaluation import metrics
from kdseg.evaluation import statistics
from kdseg.report import scores

Meta = Mapping[str, Any]

META_KEYS = (
  "train",
  "datasets",
  "protocol",
  "arms",
  "teacher",
  "baseline",
  "primary",
  "validation",
  "groups",
  "notes",
  "bootstrap",
)
# Compared arm by arm with an interval; the first one is tested, too.
MEANS = tuple(
  name
  for name in metrics.METRICS
  if name not in (*metrics.COUNTS, "height", "width", "empty_prediction")
)
COMPARED = ("dice", "jaccard", "hd95", "assd", "nsd", "boundary_iou")
GATE = 0.02  # Dice between teacher and untaught student (PROTOCOL 3)
ALPHA = 0.05
_NOT_STATED = "not stated"


@dataclasses.dataclass(frozen=True)
class ArmScores:
  """One arm on one data set.

  `by_seed[seed][metric]` is the mean over images, `pooled` the mean over
  seeds of what all pixels of a seed give together, `empty` how many of
  `images * len(by_seed)` predictions were empty.
  """

  dataset: str
  arm: str
  images: int
  by_seed: dict[int, dict[str, float]]
  pooled: dict[str, float]
  empty: int
  groups: dict[str, tuple[int, float]]  # name -> images, mean Dice
  parameters: int | None
  macs: float | None

  def mean(self, metric: str) -> float:
    """Averages over the seeds."""
    return float(np.mean([seed[metric] for seed in self.by_seed.values()]))

  def deviation(self, metric: str) -> float:
    """Gives the seeds' standard deviation (n - 1); NaN for one seed."""
    if len(self.by_seed) < 2:
      return math.nan
    return float(
      np.std([seed[metric] for seed in self.by_seed.values()], ddof=1)
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One arm against another of the same student, on one data set."""

  dataset: str
  arm: str
  baseline: str
  seeds: tuple[int, ...]  # those that both have
  intervals: dict[str, statistics.Interval]  # bootstrap, by COMPARED
  random_effects: statistics.Interval  # of Dice
  wilcoxon: statistics.Wilcoxon  # of Dice
  holm: float | None  # None outside the primary family
  verdict: str


@dataclasses.dataclass(frozen=True)
class Summary:
  """Everything the tables say, as numbers."""

  arms: tuple[ArmScores, ...]
  comparisons: tuple[Comparison, ...]
  gates: dict[str, tuple[str, ...]]  # data set -> a line for each student
  warnings: tuple[str, ...]
  protocol: dict[str, str]  # data set -> line
  notes: tuple[str, ...]
  level: float


def merge_meta(metas: Sequence[Meta]) -> dict[str, Any]:
  """Joins the report.json of several folders.

  Args:
    metas: what each of them holds.

  Returns:
    The union of all.

  Raises:
    ValueError: when two of them state different things, since one protocol
      line could not be true for both.
  """
  merged: dict[str, Any] = {}
  for meta in metas:
    _check_meta(meta)
    for key, value in meta.items():
      if key in ("notes", "primary"):
        known = merged.setdefault(key, [])
        known += [item for item in value if item not in known]
      elif isinstance(value, Mapping):
        _merge_into(merged.setdefault(key, {}), value, key)
      elif key == "teacher" and not (value and merged.get(key)):
        # A folder with a control's, which says nothing, takes the others'.
        merged[key] = value or merged.get(key, "")
      elif merged.setdefault(key, value) != value:
        raise ValueError(_conflict(key, merged[key], value))
  return merged


def summarize(rows: Iterable[scores.Row], meta: Meta) -> Summary:
  """Computes what the tables show.

  Args:
    rows: of scores.csv, whole groups.
    meta: of report.json; see the module.

  Returns:
    The numbers, verdicts and warnings.

  Raises:
    ValueError: as `make_tables`.
  """
  _check_meta(meta)
  grouped = scores.groups(rows)
  if not grouped:
    raise ValueError("there are no scores to make a table of")
  datasets = list(dict.fromkeys(dataset for _, _, dataset in grouped))
  # Teachers first, then as they come.
  names = sorted(
    dict.fromkeys(arm for arm, _, _ in grouped), key=lambda a: not _teacher(a)
  )
  arms: list[ArmScores] = []
  compared: list[Comparison] = []
  gates: dict[str, tuple[str, ...]] = {}
  warnings: list[str] = []
  for dataset in datasets:
    ids = _common_ids(grouped, dataset)
    here = {
      arm: {
        seed: members
        for (name, seed, where), members in grouped.items()
        if (name, where) == (arm, dataset)
      }
      for arm in names
    }
    here = {arm: by_seed for arm, by_seed in here.items() if by_seed}
    scored = [
      _arm_scores(dataset, arm, by_seed, meta) for arm, by_seed in here.items()
    ]
    arms += scored
    stated = meta.get("datasets", {}).get(dataset, {}).get("found", len(ids))
    if stated != len(ids):
      warnings.append(
        f"{dataset}: {len(ids)} images were scored, report.json states {stated}"
      )
    for arm, baseline in _pairs(dataset, here, meta):
      if baseline not in here:
        warnings.append(
          f"{dataset}: {arm} has no {baseline} beside it, so that nothing "
          "can be said of its method"
        )
        continue
      seeds = tuple(sorted(here[arm].keys() & here[baseline].keys()))
      if not seeds:
        warnings.append(
          f"{dataset}: {arm} and {baseline} share no seed; not compared"
        )
        continue
      compared.append(_compare(dataset, arm, baseline, seeds, ids, here, meta))
    gates[dataset], failed = _gates(dataset, scored, meta)
    warnings += failed
  there = {(c.dataset, c.arm, c.baseline) for c in compared}
  warnings += [
    f"report.json: the primary family names {entry}, which was not compared"
    for entry in meta.get("primary", ())
    if _named(entry, meta) not in there
  ]
  compared = _with_verdicts(compared, meta)
  return Summary(
    arms=tuple(arms),
    comparisons=tuple(compared),
    gates=gates,
    warnings=(*warnings, *_alarms(arms, compared, meta)),
    protocol={
      dataset: _protocol_line(dataset, grouped, meta) for dataset in datasets
    },
    notes=tuple(meta.get("notes", ())),
    level=_bootstrap(meta)["level"],
  )


def _teacher(arm: str) -> bool:
  return arm.startswith("teacher")


def _student(arm: str) -> str:
  return arm.partition("-")[0]


def _baseline_of(arm: str, meta: Meta) -> str:
  if _teacher(arm):
    return arm
  return f"{_student(arm)}-{meta.get('baseline', 'none')}"


def _named(entry: Mapping[str, Any], meta: Meta) -> tuple[str, str, str]:
  """Returns (data set, arm, against) of an entry of the primary family.

  Of several to be set against, it is the one with the best mean validation
  Dice over the seeds that all of them share (where they share none, over its
  own): nothing is chosen on a test set. None of them trained: all their names.
  """
  arm = entry.get("arm", "")
  against = entry.get("against") or _baseline_of(arm, meta)
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


def _pairs(
  dataset: str, here: Mapping[str, Any], meta: Meta
) -> list[tuple[str, str]]:
  """Returns (arm, what it is compared with), the baselines first."""
  pairs = [
    (arm, _baseline_of(arm, meta))
    for arm in here
    if arm != _baseline_of(arm, meta)
  ]
  for entry in meta.get("primary", ()):
    where, arm, against = _named(entry, meta)
    if where == dataset and arm in here and (arm, against) not in pairs:
      pairs.append((arm, against))
  return pairs


def _bootstrap(meta: Meta) -> dict[str, Any]:
  return {
    "resamples": 10_000,
    "seed": 0,
    "level": 0.95,
    **meta.get("bootstrap", {}),
  }


def _check_meta(meta: Meta) -> None:
  unknown = [key for key in meta if key not in META_KEYS]
  if unknown:
    raise ValueError(
      f"report.json: unknown keys {', '.join(unknown)}; known are "
      f"{', '.join(META_KEYS)}"
    )


def _merge_into(
  known: dict[str, Any], new: Mapping[str, Any], where: str
) -> None:
  for key, value in new.items():
    place = f"{where}.{key}"
    if isinstance(value, Mapping):
      _merge_into(known.setdefault(key, {}), value, place)
    elif known.setdefault(key, value) != value:
      raise ValueError(_conflict(place, known[key], value))


def _conflict(key: str, one: object, other: object) -> str:
  return (
    f"the folders differ in {key}: {_short(one)} and {_short(other)}. Their "
    "scores do not belong in one table; make one for each"
  )


def _short(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _common_ids(
  grouped: Mapping[scores.Group, Sequence[scores.Row]], dataset: str
) -> list[str]:
  first: set[str] = set()
  origin = None
  for group, members in grouped.items():
    if group[2] != dataset:
      continue
    ids = {str(row["id"]) for row in members}
    if origin is None:
      first, origin = ids, group
    elif ids != first:
      one = min(ids ^ first)
      raise ValueError(
        f"{dataset}: {group[0]}, seed {group[1]}, has {len(ids)} images and "
        f"{origin[0]}, seed {origin[1]}, {len(first)}; {one!r} is in only one "
        "of them. Arms can be compared on the same images only"
      )
  return sorted(first)


def _arm_scores(
  dataset: str,
  arm: str,
  by_seed: Mapping[int, Sequence[scores.Row]],
  meta: Meta,
) -> ArmScores:
  rows = [row for members in by_seed.values() for row in members]
  pools = [metrics.pooled(members) for members in by_seed.values()]
  size = meta.get("arms", {}).get(arm, {})
  return ArmScores(
    dataset=dataset,
    arm=arm,
    images=len(rows) // len(by_seed),
    by_seed={
      seed: {
        name: float(np.mean([row[name] for row in by_seed[seed]]))
        for name in MEANS
      }
      for seed in sorted(by_seed)
    },
    pooled={
      name: float(np.mean([pool[name] for pool in pools])) for name in pools[0]
    },
    empty=sum(int(row["empty_prediction"]) for row in rows),
    groups=_group_means(rows, len(by_seed), meta),
    parameters=size.get("parameters"),
    macs=size.get("macs"),
  )


def _group_means(
  rows: Sequence[scores.Row], seeds: int, meta: Meta
) -> dict[str, tuple[int, float]]:
  wanted = {name: set(ids) for name, ids in meta.get("groups", {}).items()}
  named = set().union(*wanted.values())
  parts = {
    name: [row["dice"] for row in rows if row["id"] in ids]
    for name, ids in wanted.items()
  }
  if not any(parts.values()):
    return {}
  parts["the others"] = [row["dice"] for row in rows if row["id"] not in named]
  return {
    name: (len(values) // seeds, float(np.mean(values)))
    for name, values in parts.items()
    if values
  }


def _compare(
  dataset: str,
  arm: str,
  baseline: str,
  seeds: tuple[int, ...],
  ids: Sequence[str],
  here: Mapping[str, Mapping[int, Sequence[scores.Row]]],
  meta: Meta,
) -> Comparison:
  def values(name: str) -> np.ndarray:  # [seeds, images, metrics]
    by_id = [{str(row["id"]): row for row in here[name][s]} for s in seeds]
    return np.array(
      [[[rows[i][m] for m in COMPARED] for i in ids] for rows in by_id], float
    )

  one, other = values(baseline), values(arm)
  interval = statistics.hierarchical_bootstrap(one, other, **_bootstrap(meta))
  dice = one[..., 0], other[..., 0]
  return Comparison(
    dataset=dataset,
    arm=arm,
    baseline=baseline,
    seeds=seeds,
    intervals={
      metric: statistics.Interval(
        float(interval.value[k]),
        float(interval.low[k]),
        float(interval.high[k]),
        interval.over,
      )
      for k, metric in enumerate(COMPARED)
    },
    random_effects=statistics.random_effects_interval(
      *dice, level=_bootstrap(meta)["level"]
    ),
    wilcoxon=statistics.wilcoxon(*dice),
    holm=None,
    verdict="",
  )


def _with_verdicts(
  comparisons: Sequence[Comparison], meta: Meta
) -> list[Comparison]:
  primary = meta.get("primary")
  named = [_named(entry, meta) for entry in primary or ()]
  family = [
    number
    for number, c in enumerate(comparisons)
    if primary is None or (c.dataset, c.arm, c.baseline) in named
  ]
  adjusted = dict(
    zip(
      family,
      statistics.holm([comparisons[n].wilcoxon.p_value for n in family]),
    )
  )
  return [
    dataclasses.replace(
      c,
      holm=float(adjusted[number]) if number in adjusted else None,
      verdict=_verdict(c, adjusted.get(number)),
    )
    for number, c in enumerate(comparisons)
  ]


def _verdict(comparison: Comparison, holm: float | None) -> str:
  """Says in words what the numbers allow to say.

  Better or worse takes a corrected p below .05 over the images, a bootstrap
  interval and a random-effects interval that leave out 0. Where only the last
  one fails, these runs differ and new ones may not.
  """
  prefix = "" if holm is not None else "exploratory: "
  p_value = comparison.wilcoxon.p_value if holm is None else holm
  interval = comparison.intervals["dice"]
  if p_value >= ALPHA or interval.low <= 0 <= interval.high:
    return prefix + "not significant"
  sign = 1 if interval.value > 0 else -1
  if comparison.wilcoxon.leaning == -sign:
    return prefix + "mixed: the mean and most images go opposite ways"
  word = "better" if sign > 0 else "worse"
  seeds = len(comparison.seeds)
  if seeds == 1:
    return prefix + f"{word} in this run; one seed says nothing of other runs"
  if comparison.random_effects.low <= 0 <= comparison.random_effects.high:
    return prefix + (
      f"{word} in these {seeds} runs, not significant for new ones"
    )
  return prefix + word


def _gates(
  dataset: str, scored: Sequence[ArmScores], meta: Meta
) -> tuple[tuple[str, ...], list[str]]:
  """Gives the gate's lines, and a warning for each student that fails it."""
  teachers = [arm for arm in scored if _teacher(arm.arm)]
  if "teacher" in meta:
    teachers = [arm for arm in teachers if arm.arm == meta["teacher"]]
  lines, failed = [], []
  for student in scored:
    if _teacher(student.arm) or student.arm != _baseline_of(student.arm, meta):
      continue
    if not teachers:
      lines.append(
        f"Gate: unknown for {student.arm}; no teacher was scored that knows "
        "anything."
        if meta.get("teacher") == ""
        else f"Gate: unknown for {student.arm}; no teacher was scored."
      )
    for teacher in teachers:
      gap = teacher.mean("dice") - student.mean("dice")
      # The difference of two means of decimals: .02 must count as .02.
      passed = gap >= GATE - 1e-9
      lines.append(
        f"Gate: {teacher.arm} minus {student.arm} is {gap:+.4f} Dice; "
        f"{GATE} is needed: {'passed' if passed else 'NOT passed'}."
      )
      if not passed:
        failed.append(
          f"on {dataset}, {teacher.arm} is {gap:+.4f} Dice from "
          f"{student.arm}, and {GATE} is needed: no comparison of this "
          "student can show anything. Make the teacher stronger or the "
          "student smaller first"
        )
  return tuple(lines), failed


def _alarms(
  arms: Sequence[ArmScores], comparisons: Sequence[Comparison], meta: Meta
) -> list[str]:
  """Checks the alarm levels of the protocol, for the two real test sets."""
  warnings = []
  for arm in arms:
    if arm.dataset != "isic2016_test":
      continue
    dice = arm.mean("dice")
    if dice > 0.945:
      warnings.append(
        f"{arm.arm} has Dice {dice:.4f} on {arm.dataset}, above what a "
        "perfect mean expert would reach (0.945): look for a leak, a subset "
        "or a pooled metric"
      )
    elif _teacher(arm.arm) and dice > 0.935:
      warnings.append(
        f"{arm.arm} has Dice {dice:.4f} on {arm.dataset}, above 0.935: look "
        "for a bug or a leak"
      )
    if _teacher(arm.arm) or arm.arm != _baseline_of(arm.arm, meta):
      continue
    for low, high, level in ((0, 5e4, 0.885), (1e5, 4e5, 0.88)):
      if low < (arm.parameters or 0) <= high and dice < level:
        warnings.append(
          f"{arm.arm} has Dice {dice:.4f} on {arm.dataset}, below {level}: "
          "the student without distillation is too weak; look for a bug, or "
          "tune it"
        )
  for comparison in comparisons:
    gain = comparison.intervals["dice"].value
    untaught = comparison.baseline == _baseline_of(comparison.arm, meta)
    real = comparison.dataset in ("isic2016_test", "ph2")
    if untaught and real and gain > 0.03:
      warnings.append(
        f"{comparison.arm} gains {gain:.4f} Dice over {comparison.baseline} "
        f"on {comparison.dataset}, more than 0.03: the baseline is too weak"
      )
  return warnings


def _protocol_line(
  dataset: str,
  grouped: Mapping[scores.Group, Sequence[scores.Row]],
  meta: Meta,
) -> str:
  rows = [
    row
    for group, members in grouped.items()
    if group[2] == dataset
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
    f"{dataset}, n = {_of(count, official)}",
    f"trained on {train.get('name', _NOT_STATED)}, "
    f"{_of(train.get('found'), train.get('official'))}",
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


def _of(found: int | None, official: int | None) -> str:
  if found is None:
    return _NOT_STATED
  if official is None:
    return str(found)
  return f"{found} of {official}" + (" (a subset)" * (found < official))
