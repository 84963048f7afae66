"""From named terms to one scalar: the only place that weighs and averages."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdseg import choices
from kdseg import keys
from kdseg.losses import boundary
from kdseg.losses import features
from kdseg.losses import logits as logit_losses
from kdseg.losses import segmentation

Array = jax.Array

FEATURE_TERMS = ("mbf", "m2bf", "mgd", "fitnet")
LOGIT_TERMS = ("kd", "cwd")


@dataclasses.dataclass(frozen=True)
class Method:
  """How a student is taught: every switch of the reconstruction, with names.

  The defaults are the literal reading of the paper's abstract (see README,
  "What is reconstructed"); lengths are pixels of a 256 x 256 image and scale
  with the side.

  Attributes:
    terms: weight by term. Feature terms (mbf, m2bf, mgd, fitnet) are first
      brought to the size of the segmentation loss (see `balance`); logit
      terms (kd, cwd) are taken as they are. Empty: no distillation.
    taps: which named features of the networks the feature terms compare.
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
    balance: "calibrate" divides a feature term by its mean over the first
      `calibration_steps` steps and multiplies it with the segmentation
      loss's; "fixed" takes it as it is.
    calibration_steps: after which the balance is frozen.
    warmup: share of the training over which distillation is faded in.
    kd_temperature: of kd.
    cwd_temperature: of cwd.
  """

  terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
  taps: tuple[str, ...] = ("low", "high")
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

  def __post_init__(self) -> None:
    for name, weight in self.terms.items():
      if name not in FEATURE_TERMS + LOGIT_TERMS:
        raise ValueError(
          f"unknown distillation term {name!r}; known: "
          f"{', '.join(FEATURE_TERMS + LOGIT_TERMS)}"
        )
      if not weight > 0:
        raise ValueError(
          f"weight of {name} must be positive, not {weight}; leave the term "
          "out to switch it off"
        )
    for name, known in _CHOICES.items():
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

  @property
  def feature_terms(self) -> tuple[str, ...]:
    """Names of the terms that need aligned features."""
    return tuple(name for name in self.terms if name in FEATURE_TERMS)

  @property
  def generator_heads(self) -> int:
    """How many generators a tap has; 0 where none is needed."""
    if "m2bf" in self.terms:
      return self.heads
    return 1 if {"mbf", "mgd"} & set(self.terms) else 0


_CHOICES = {
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


def make_method(options: Mapping[str, Any]) -> Method:
  """Returns the method that a config names by its switches.

  Raises:
    ValueError: on an unknown switch, with the nearest known one.
  """
  known = [field.name for field in dataclasses.fields(Method)]
  choices.check_known("switch of a method", options, known)
  return Method(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in options.items()
    }
  )


def segmentation_loss(
  logits: Array, labels: Array, weights: Mapping[str, float]
) -> tuple[Array, dict[str, Array]]:
  """Returns the weighted segmentation loss [] and its parts, batch means.

  Args:
    logits: [B, H, W] of the network that is trained.
    labels: [B, H, W] in {0, 1}.
    weights: by term: bce, dice, focal.

  Raises:
    ValueError: on an unknown term.
  """
  known = {
    "bce": segmentation.bce,
    "dice": segmentation.soft_dice,
    "focal": segmentation.focal,
  }
  unknown = set(weights) - set(known)
  if unknown or not weights:
    raise ValueError(
      f"segmentation loss takes weights of {sorted(known)}, not "
      f"{sorted(weights)}"
    )
  parts = {name: jnp.mean(known[name](logits, labels)) for name in weights}
  return sum(weights[name] * parts[name] for name in weights), parts


def distillation_terms(
  out: Mapping[str, Array],
  taught: Mapping[str, Array],
  labels: Array,
  rng: Array,
  *,
  method: Method,
  distiller: Callable[..., Array],
  teacher_std: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
  """Returns every distillation term of `method`, unweighted batch means, [].

  Args:
    out: named outputs of the student.
    taught: named outputs of the teacher for the same pixels, wide taps
      projected already.
    labels: [B, H, W] in {0, 1}, after augmentation.
    rng: one key, or one an image; the masks depend on nothing else.
    method: which terms, and their switches.
    distiller: `networks.distiller.Distiller.apply` with its parameters bound;
      called as `distiller(*args, method="align" | "generate" | "carry")`.
    teacher_std: by tap, [C], for `normalise="std"`.

  Returns:
    {term or term_tap: []}; the names are `term_names(method)`.
  """
  per_image = {}
  if method.feature_terms:
    per_image |= _feature_terms(
      out,
      taught,
      labels,
      rng,
      method=method,
      distiller=distiller,
      teacher_std=teacher_std,
    )
  if "kd" in method.terms:
    per_image["kd"] = logit_losses.kd(
      out["logits"], taught["logits"], temperature=method.kd_temperature
    )
  if "cwd" in method.terms:
    per_image["cwd"] = logit_losses.cwd(
      out["logits"], taught["logits"], temperature=method.cwd_temperature
    )
  return {name: jnp.mean(value) for name, value in per_image.items()}


def _feature_terms(
  out: Mapping[str, Array],
  taught: Mapping[str, Array],
  labels: Array,
  rng: Array,
  *,
  method: Method,
  distiller: Callable[..., Array],
  teacher_std: Mapping[str, Array] | None,
) -> dict[str, Array]:
  """Aligns each tap once and hands it to the losses; {term_tap: [B]}."""
  taps = method.taps
  target = {tap: taught[tap] for tap in taps}
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
  name = next((t for t in ("mbf", "m2bf") if t in method.terms), "")
  if not name:
    return terms

  multiscale = name == "m2bf" and method.topology == "multiscale"
  heads = len(taps) if multiscale else method.generator_heads
  side = labels.shape[1]
  regions = [
    boundary.region(
      method.region,
      labels,
      radius=boundary.radius_at(side, radius),
      teacher_logits=taught["logits"],
      student_logits=out["logits"],
      rng=keys.fold_in(rng, 0x0FF5E7),
    )
    for radius in features.band_radii(
      method.radius, heads, method.band_schedule
    )
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

  A feature term is measured, balanced and logged tap by tap.
  """
  names = {}
  for term in method.terms:
    whole = term in LOGIT_TERMS or (
      term == "m2bf" and method.topology == "multiscale"
    )
    names[term] = (
      (term,) if whole else tuple(f"{term}_{tap}" for tap in method.taps)
    )
  return names


def balanced_names(method: Method) -> tuple[str, ...]:
  """Returns the names whose weight is calibrated against the task's loss."""
  if method.balance != "calibrate":
    return ()
  names = term_names(method)
  return tuple(n for term in method.feature_terms for n in names[term])


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
