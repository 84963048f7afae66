"""From named terms to one scalar: the only place that weighs and averages."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdseg.distill import extensions as extensions_lib
from kdseg.losses import attention
from kdseg.losses import boundary
from kdseg.losses import features
from kdseg.losses import grids
from kdseg.losses import logits as logit_losses
from kdseg.losses import relations
from kdseg.losses import segmentation
from kdseg.runtime import names as names_lib
from kdseg.runtime import rng as rng_lib

Array = jax.Array

# Compare features tap by tap, the student's aligned by layers that are trained
# along.
FEATURE_TERMS = ("mbf", "m2bf", "mgd", "fitnet", "fgd", "maskd")
# Compare what features of any width have in common; nothing is trained along.
RELATION_TERMS = ("at", "skd_pa", "ifvd", "cirkd_lite", "emkd")
# Compare logits.
LOGIT_TERMS = ("kd", "cwd", "dist", "bpkd", "ultralbm")
TERMS = FEATURE_TERMS + RELATION_TERMS + LOGIT_TERMS
# One number for all taps together.
_WHOLE_TERMS = (*LOGIT_TERMS, "emkd")

# Terms without a published weight that fits a mean over the map, or any size
# of features: "calibrate" brings them to the size of the segmentation loss.
CALIBRATED_TERMS = ("mbf", "m2bf", "mgd", "fitnet", "fgd")
# With which weight each term starts: that of its source, where features are
# averaged; 1 where the source's parts have their weights inside of the term,
# or where the term is calibrated. docs/methods.md has the sources.
PUBLISHED_WEIGHTS: Mapping[str, float] = {
  "mbf": 1.0,
  "m2bf": 1.0,
  "mgd": 1.0,
  "fitnet": 1.0,
  "fgd": 1.0,
  "maskd": 1.0,
  "at": 1e4,
  "skd_pa": 10.0,
  "ifvd": 20.0,
  "cirkd_lite": 1.0,
  "emkd": 1.0,
  "kd": 1.0,
  "cwd": 3.0,
  "dist": 1.0,
  "bpkd": 1.0,
  "ultralbm": 1.0,
}

# Names in the log that a term of a user's own must leave alone.
RESERVED = (
  "loss", "task", "finite", "gradient_norm", "bce", "smoothed_bce", "dice",
  "focal",
)  # fmt: skip

SEGMENTATION_TERMS: Mapping[str, Callable[[Array, Array], Array]] = {
  "bce": segmentation.bce,
  "smoothed_bce": functools.partial(segmentation.bce, label_smoothing=0.1),
  "dice": segmentation.soft_dice,
  "focal": segmentation.focal,
}


@dataclasses.dataclass(frozen=True)
class Method:
  """How a student is taught: every switch of the reconstruction, with names.

  The defaults are the literal reading of the paper's abstract (see README,
  "What is reconstructed"); lengths are pixels of a 256 x 256 image and scale
  with the side.

  Attributes:
    terms: weight by term; see `PUBLISHED_WEIGHTS` for the usual ones. Those of
      `CALIBRATED_TERMS` are first brought to the size of the segmentation loss
      (see `balance`), the others are taken as they are. Empty: no distillation.
    segmentation: weights of the segmentation terms, where this method has a
      task loss of its own; empty for that of the run. With "smoothed_bce" in
      place of "bce" and no terms it is label smoothing, the control that needs
      no teacher.
    taps: which named features of the networks are compared.
    answers: whose the teacher's answers are: own, the image's own; shuffled,
      those for another image of the device's batch, a control.
    region: where features are hidden; see `boundary.region`.
    radius: half width of the boundary band.
    mask_ratio: probability that a cell of the region is hidden.
    ratio_outside: the same outside of the region.
    granularity: side of the hidden blocks, in cells.
    loss_region: where the squared error counts: all, band, band_weighted.
    band_weight: beta of `band_weighted`, 1 + beta inside the band.
    normalise: scale of the teacher's features: none, std, l2.
    generator: c3rc3, c3rc3_norm, dwconv, 1x1, identity.
    generator_width: hidden channels of a generator; 0 for the teacher's.
    heads: of m2bf; 1 is mbf.
    topology: of the heads: cascade, parallel, multiscale.
    head_input: what a later head reads: generated, residual.
    share_generators: whether the heads of a tap share one generator.
    head_weights: uniform, last, geometric.
    band_schedule: of the radius over heads: const, narrowing, widening.
    ratio_schedule: of the mask ratio over heads: const, increasing.
    balance: "calibrate" divides a term of `CALIBRATED_TERMS` by its mean over
      the first `calibration_steps` steps and multiplies it with the
      segmentation loss's; "fixed" takes it as it is.
    calibration_steps: after which the balance is frozen.
    warmup: share of the training over which distillation is faded in.
    kd_temperature: of kd.
    cwd_temperature: of cwd.
    dist_inter_weight: of the part of dist that two classes make degenerate.
    maskd_tokens: receptive tokens a tap, of maskd.
    extensions: terms and regions that a user adds.
  """

  terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
  segmentation: Mapping[str, float] = dataclasses.field(default_factory=dict)
  taps: tuple[str, ...] = ("low", "high")
  answers: str = "own"
  region: str = "gt_band"
  radius: float = 5.0
  mask_ratio: float = 0.75
  ratio_outside: float = 0.0
  granularity: int = 1
  loss_region: str = "all"
  band_weight: float = 1.0
  normalise: str = "none"
  generator: str = "c3rc3"
  generator_width: int = 0
  heads: int = 3
  topology: str = "cascade"
  head_input: str = "generated"
  share_generators: bool = False
  head_weights: str = "uniform"
  band_schedule: str = "const"
  ratio_schedule: str = "const"
  balance: str = "calibrate"
  calibration_steps: int = 100
  warmup: float = 0.05
  kd_temperature: float = 4.0
  cwd_temperature: float = 4.0
  dist_inter_weight: float = 0.0
  maskd_tokens: int = 8
  extensions: extensions_lib.Extensions = dataclasses.field(
    default_factory=extensions_lib.Extensions
  )

  def __post_init__(self) -> None:
    known_terms = (*TERMS, *self.extensions.terms)
    for name, weight in self.terms.items():
      if name not in known_terms:
        raise ValueError(
          f"unknown distillation term {name!r}; known: {', '.join(known_terms)}"
        )
      if not weight > 0:
        raise ValueError(
          f"weight of {name} must be positive, not {weight}; leave the term "
          "out to switch it off"
        )
    if self.segmentation:
      check_segmentation(self.segmentation)
    for name, known in _CHOICES.items():
      if name == "region":
        known = (*known, *self.extensions.regions)
      if getattr(self, name) not in known:
        raise ValueError(
          f"{name} must be one of {', '.join(known)}: {getattr(self, name)!r}"
        )
    if not 0 <= self.mask_ratio <= 1 or not 0 <= self.ratio_outside <= 1:
      raise ValueError("mask_ratio and ratio_outside are shares in [0, 1]")
    if len({"mbf", "m2bf", "mgd"} & set(self.terms)) > 1:
      raise ValueError(
        "mbf, m2bf and mgd would share their generators: choose one of them"
      )
    if self.heads < 1 or self.granularity < 1 or self.radius < 0:
      raise ValueError("heads and granularity start at 1, radius at 0")
    if self.maskd_tokens < 1 or self.dist_inter_weight < 0:
      raise ValueError("maskd_tokens start at 1, dist_inter_weight at 0")
    if not self.kd_temperature > 0 or not self.cwd_temperature > 0:
      raise ValueError("kd_temperature and cwd_temperature are above 0")
    if self.generator_width < 0 or not 0 <= self.warmup <= 1:
      raise ValueError(
        "generator_width starts at 0, warmup is a share in [0, 1]"
      )
    if self.calibration_steps < 1:
      raise ValueError(
        'calibration_steps start at 1; balance="fixed" takes terms as they are'
      )
    if self.topology == "multiscale" and "m2bf" not in self.terms:
      raise ValueError("the topology multiscale is one of m2bf's heads")
    compared = [t for t in self.terms if t in FEATURE_TERMS + RELATION_TERMS]
    if compared and not self.taps:
      raise ValueError(f"{compared[0]} compares features: name some taps")

  @property
  def feature_terms(self) -> tuple[str, ...]:
    """Names of the terms that need aligned features."""
    return tuple(name for name in self.terms if name in FEATURE_TERMS)

  @property
  def needs_taps(self) -> bool:
    """Whether the teacher's features are needed, or its logits will do."""
    return not set(self.terms) <= set(LOGIT_TERMS)

  @property
  def token_count(self) -> int:
    """How many receptive tokens a tap has; 0 where none is needed."""
    return self.maskd_tokens if "maskd" in self.terms else 0

  @property
  def generator_heads(self) -> int:
    """How many generators a tap has; 0 where none is needed."""
    if "m2bf" in self.terms:
      return self.heads
    return 1 if {"mbf", "mgd"} & set(self.terms) else 0


_CHOICES = {
  "answers": ("own", "shuffled"),
  "generator": ("c3rc3", "c3rc3_norm", "dwconv", "1x1", "identity"),
  "region": boundary.REGIONS,
  "loss_region": ("all", "band", "band_weighted"),
  "normalise": ("none", "std", "l2"),
  "topology": ("cascade", "parallel", "multiscale"),
  "head_input": ("generated", "residual"),
  "head_weights": ("uniform", "last", "geometric"),
  "band_schedule": ("const", "narrowing", "widening"),
  "ratio_schedule": ("const", "increasing"),
  "balance": ("calibrate", "fixed"),
}


def make_method(
  options: Mapping[str, Any],
  extensions: extensions_lib.Extensions | None = None,
) -> Method:
  """Returns the method that a config names by its switches.

  Args:
    options: by switch.
    extensions: terms and regions that a user adds.

  Raises:
    ValueError: on an unknown switch, with the nearest known one.
  """
  known = [f.name for f in dataclasses.fields(Method) if f.name != "extensions"]
  names_lib.check_known("switch of a method", options, known)
  return Method(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in options.items()
    },
    extensions=extensions or extensions_lib.Extensions(),
  )


def check_segmentation(weights: Mapping[str, float]) -> None:
  """Raises ValueError on weights of terms that do not exist, or on none."""
  unknown = set(weights) - set(SEGMENTATION_TERMS)
  if unknown or not weights:
    raise ValueError(
      f"segmentation loss takes weights of {sorted(SEGMENTATION_TERMS)}, not "
      f"{sorted(weights)}"
    )


def segmentation_loss(
  logits: Array, labels: Array, weights: Mapping[str, float]
) -> tuple[Array, dict[str, Array]]:
  """Returns the weighted segmentation loss [] and its parts, batch means.

  Args:
    logits: [B, H, W] of the network that is trained.
    labels: [B, H, W] in {0, 1}.
    weights: by term of `SEGMENTATION_TERMS`.

  Raises:
    ValueError: on an unknown term.
  """
  check_segmentation(weights)
  parts = {
    name: jnp.mean(SEGMENTATION_TERMS[name](logits, labels)) for name in weights
  }
  return sum(weights[name] * parts[name] for name in weights), parts


def distillation_terms(
  out: Mapping[str, Array],
  teacher_out: Mapping[str, Array],
  labels: Array,
  rng: Array,
  *,
  method: Method,
  distiller: Callable[..., Array] | None,
  teacher_std: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
  """Returns every distillation term of `method`, unweighted batch means, [].

  Args:
    out: named outputs of the student.
    teacher_out: named outputs of the teacher for the same pixels, wide taps
      projected already.
    labels: [B, H, W] in {0, 1}, after augmentation.
    rng: one key, or one an image; the masks depend on nothing else.
    method: which terms, and their switches.
    distiller: `networks.distiller.Distiller.apply` with its parameters bound;
      called as `distiller(*args, method="align" | "generate" | ...)`; None
      without feature terms.
    teacher_std: by tap, [C], for `normalise="std"`.

  Returns:
    {term or term_tap: []}; the names are `term_names(method)`.

  Raises:
    ValueError: if answers are to be shuffled in a batch of one image.
  """
  if method.answers == "shuffled":
    if labels.shape[0] < 2:
      raise ValueError(
        'answers="shuffled" needs at least two images a device; raise '
        "data.batch_size"
      )
    teacher_out = {name: jnp.roll(x, 1, 0) for name, x in teacher_out.items()}
  per_image = {}
  if method.feature_terms:
    per_image |= _feature_terms(
      out,
      teacher_out,
      labels,
      rng,
      method=method,
      distiller=distiller,
      teacher_std=teacher_std,
    )
  per_image |= _relation_terms(out, teacher_out, labels, method=method)
  per_image |= _logit_terms(
    out["logits"], teacher_out["logits"], labels, method=method
  )
  for name, loss in method.extensions.terms.items():
    if name in method.terms:
      still = jax.tree.map(jax.lax.stop_gradient, dict(teacher_out))
      each = rng_lib.per_image(rng, labels.shape[0])
      per_image[name] = loss(out, still, labels, each)
      if per_image[name].shape != labels.shape[:1]:
        raise ValueError(
          f"the term {name} gives {per_image[name].shape}, not one value an "
          f"image, {labels.shape[:1]}"
        )
  return {name: jnp.mean(value) for name, value in per_image.items()}


def _logit_terms(
  student: Array, teacher: Array, labels: Array, *, method: Method
) -> dict[str, Array]:
  """Returns the terms that compare logits; {term: [B]}."""
  losses = {
    "kd": lambda: logit_losses.kd(
      student, teacher, temperature=method.kd_temperature
    ),
    "cwd": lambda: logit_losses.cwd(
      student, teacher, temperature=method.cwd_temperature
    ),
    "dist": lambda: logit_losses.dist(
      student, teacher, inter_weight=method.dist_inter_weight
    ),
    "bpkd": lambda: logit_losses.bpkd(
      student,
      teacher,
      labels,
      radius=boundary.radius_at(labels.shape[1], 3.0),
    ),
    "ultralbm": lambda: logit_losses.ultralbm(student, teacher),
  }
  return {name: loss() for name, loss in losses.items() if name in method.terms}


def _relation_terms(
  out: Mapping[str, Array],
  teacher_out: Mapping[str, Array],
  labels: Array,
  *,
  method: Method,
) -> dict[str, Array]:
  """Returns the terms that need no alignment but the grid; {name: [B]}."""
  wanted = [name for name in method.terms if name in RELATION_TERMS]
  if not wanted:
    return {}
  target = {tap: teacher_out[tap] for tap in method.taps}
  seen = {
    tap: grids.resize_features(out[tap], *target[tap].shape[1:3])
    for tap in method.taps
  }
  losses = {
    "at": relations.at,
    "skd_pa": relations.skd_pa,
    "ifvd": functools.partial(relations.ifvd, labels=labels),
    "cirkd_lite": relations.cirkd_lite,
  }
  terms = {
    f"{name}_{tap}": losses[name](seen[tap], target[tap])
    for name in wanted
    if name in losses
    for tap in method.taps
  }
  if "emkd" in wanted:
    terms["emkd"] = relations.emkd(
      out["logits"], teacher_out["logits"], seen, target, labels
    )
  return terms


def _feature_terms(
  out: Mapping[str, Array],
  teacher_out: Mapping[str, Array],
  labels: Array,
  rng: Array,
  *,
  method: Method,
  distiller: Callable[..., Array],
  teacher_std: Mapping[str, Array] | None,
) -> dict[str, Array]:
  """Aligns each tap once and hands it to the losses; {term_tap: [B]}."""
  taps = method.taps
  target = {tap: teacher_out[tap] for tap in taps}
  aligned = {
    tap: distiller(tap, out[tap], *target[tap].shape[1:3], method="align")
    for tap in taps
  }
  generate = functools.partial(distiller, method="generate")
  std = teacher_std or {}
  common = {"normalise": method.normalise}
  hiding = {"granularity": method.granularity, **common}
  terms = {}
  if "fitnet" in method.terms:
    for tap in taps:
      terms[f"fitnet_{tap}"] = features.fitnet(
        aligned[tap], target[tap], teacher_std=std.get(tap), **common
      )
  if "mgd" in method.terms:
    for tap in taps:
      terms[f"mgd_{tap}"] = features.mgd(
        aligned[tap],
        target[tap],
        features.tap_key(rng, tap),
        generate=functools.partial(generate, tap, 0),
        mask_ratio=method.mask_ratio,
        teacher_std=std.get(tap),
        **hiding,
      )
  if "fgd" in method.terms:
    for tap in taps:
      terms[f"fgd_{tap}"] = attention.fgd(aligned[tap], target[tap], labels)
  if "maskd" in method.terms:
    for tap in taps:
      tokens = distiller(tap, method="receptive_tokens")
      masks = attention.token_masks(target[tap], tokens)
      terms[f"maskd_{tap}"] = attention.maskd(aligned[tap], target[tap], masks)
      terms[f"maskd_tokens_{tap}"] = attention.token_fit(
        masks,
        target[tap],
        labels,
        probe=functools.partial(distiller, tap, method="probe"),
      )
  name = next((t for t in ("mbf", "m2bf") if t in method.terms), "")
  if not name:
    return terms

  multiscale = name == "m2bf" and method.topology == "multiscale"
  heads = len(taps) if multiscale else method.generator_heads
  side = labels.shape[1]
  radii = [
    boundary.radius_at(side, radius)
    for radius in features.band_radii(
      method.radius, heads, method.band_schedule
    )
  ]
  regions = [
    method.extensions.regions[method.region](labels, radius)
    if method.region in method.extensions.regions
    else boundary.region(
      method.region,
      labels,
      radius=radius,
      teacher_logits=teacher_out["logits"],
      student_logits=out["logits"],
      rng=rng_lib.fold_in(rng, 0x0FF5E7),
    )
    for radius in radii
  ]
  ratios = features.mask_ratios(method.mask_ratio, heads, method.ratio_schedule)
  hiding |= {
    "ratio_outside": method.ratio_outside,
    "loss_region": method.loss_region,
    "band_weight": method.band_weight,
  }
  if multiscale:
    grids = [target[tap].shape[1:3] for tap in taps]
    terms["m2bf"] = features.m2bf_multiscale(
      [aligned[tap] for tap in taps],
      [target[tap] for tap in taps],
      [boundary.to_grid(r, *g) for r, g in zip(regions, grids)],
      rng,
      generate=[functools.partial(generate, tap, 0) for tap in taps],
      carry=[
        lambda x, tap=tap, grid=grid: distiller(tap, x, *grid, method="carry")
        for tap, grid in zip(taps[1:], grids[1:])
      ],
      mask_ratios=ratios,
      weights=method.head_weights,
      teacher_std=[std[tap] for tap in taps] if std else None,
      **hiding,
    )
    return terms
  by_tap = features.boundary_distillation(
    aligned,
    target,
    regions,
    rng,
    generate=generate,
    mask_ratios=ratios,
    teacher_std=teacher_std,
    topology=method.topology,
    head_input=method.head_input,
    weights=method.head_weights,
    **hiding,
  )
  return terms | {f"{name}_{tap}": value for tap, value in by_tap.items()}


def term_names(method: Method) -> dict[str, tuple[str, ...]]:
  """Returns, for each of the method's terms, the names it is measured under.

  A term that compares features is measured, balanced and logged tap by tap,
  and so is what trains the tokens of maskd.
  """
  names = {}
  for term in method.terms:
    whole = term in (*_WHOLE_TERMS, *method.extensions.terms) or (
      term == "m2bf" and method.topology == "multiscale"
    )
    parts = ("maskd", "maskd_tokens") if term == "maskd" else (term,)
    names[term] = (
      (term,)
      if whole
      else tuple(f"{part}_{tap}" for part in parts for tap in method.taps)
    )
  return names


def balanced_names(method: Method) -> tuple[str, ...]:
  """Returns the names whose weight is calibrated against the task's loss."""
  if method.balance != "calibrate":
    return ()
  names = term_names(method)
  return tuple(
    name for term in names if term in CALIBRATED_TERMS for name in names[term]
  )


def update_balance(
  balance: Mapping[str, Array],
  task: Array,
  terms: Mapping[str, Array],
  step: Array,
  *,
  calibration_steps: int,
) -> dict[str, Array]:
  """Adds one step's losses to the sums, while they are being calibrated."""
  measured = {"task": task, "count": jnp.ones_like(task), **terms}
  open_still = (step < calibration_steps).astype(jnp.float32)
  return {
    name: total + open_still * jax.lax.stop_gradient(measured[name])
    for name, total in balance.items()
  }


def total_loss(
  task: Array,
  terms: Mapping[str, Array],
  balance: Mapping[str, Array],
  step: Array,
  *,
  method: Method,
  steps: int,
) -> tuple[Array, dict[str, Array]]:
  """Returns the scalar to minimise, and the weight each term had.

  `L = task + fade(step) * sum_t weight_t alpha_t term_t`: alpha_t is 1, or,
  for a calibrated term, the ratio of the mean losses of the task and of the
  term over the steps measured so far, this one included.

  Args:
    task: [] segmentation loss.
    terms: by name, [], as `distillation_terms` returns them.
    balance: sums after `update_balance` with this step's losses.
    step: [] updates made before this one.
    method: weights and schedule.
    steps: of the whole training; the fade is a share of it.
  """
  fade = 1.0
  if method.warmup > 0:
    fade = jnp.clip((step + 1) / (method.warmup * steps), 0.0, 1.0)
  weights = {}
  for term, names in term_names(method).items():
    for name in names:
      alpha = 1.0
      if name in balance:
        alpha = balance["task"] / jnp.maximum(balance[name], 1e-12)
      weights[name] = fade * method.terms[term] * alpha
  total = task + sum(weights[name] * terms[name] for name in weights)
  return total, weights
