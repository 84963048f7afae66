"""How a student is distilled: its terms, and the switches of a config."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from kdseg.distill import extensions as extensions_lib
from kdseg.distill import layers
from kdseg.distill import term as term_lib
from kdseg.distill import terms as terms_lib
from kdseg.losses import boundary
from kdseg.losses import masking
from kdseg.losses import mbf
from kdseg.runtime import names as names_lib


@dataclasses.dataclass(frozen=True)
class Method:
  """How a student is distilled: every switch of the reconstruction.

  The defaults are the literal reading of the paper's abstract (see
  docs/methods.md, "This reconstruction"); lengths are pixels of a 256 x 256
  image and scale with the side.

  Attributes:
    terms: weight by term; empty for no distillation. A calibrated term is first
      brought to the size of the segmentation loss, see `balance`.
    segmentation: weights of the segmentation terms, where this method has a
      task loss of its own; empty for that of the run. With "smoothed_bce" in
      place of "bce" and no terms it is label smoothing, the control that needs
      no teacher.
    taps: which named features of the networks are compared.
    teacher_out: own, the teacher's outputs for the image itself; shuffled,
      those for another image of the device's batch, a control.
    region: where mbf and m2bf hide features.
    radius: half width of the boundary band.
    mask_ratio: probability that a cell of the region is hidden.
    ratio_outside: the same outside of the region.
    granularity: side of the hidden blocks, in cells.
    loss_region: where the squared error counts.
    band_weight: beta of "band_weighted", which weighs 1 + beta inside the band.
    normalise: scale of the features, of mbf, m2bf, mgd and fitnet.
    generator: what restores hidden features.
    generator_width: hidden channels of a generator; 0 for the teacher's.
    heads: of m2bf; 1 is mbf.
    topology: of the heads of m2bf.
    head_input: what a later head reads.
    share_generators: whether the heads of a tap share one generator.
    head_weights: of the heads in the loss.
    band_schedule: of the radius over the heads.
    ratio_schedule: of the mask ratio over the heads.
    balance: calibrate multiplies a calibrated term with the ratio of the mean
      segmentation loss to its own mean, over the first `calibration_steps`
      steps; fixed takes it as it is.
    calibration_steps: after which the balance is frozen.
    distill_ramp: share of the training over which distillation is faded in.
    kd_temperature: of kd.
    cwd_temperature: of cwd.
    dist_inter_weight: of the part of dist that two classes make degenerate.
    maskd_tokens: receptive tokens a tap, of maskd.
    extensions: terms and regions that a user adds; not set by a config.
  """

  terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
  segmentation: Mapping[str, float] = dataclasses.field(default_factory=dict)
  taps: tuple[str, ...] = ("low", "high")
  teacher_out: str = "own"
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
  distill_ramp: float = 0.05
  kd_temperature: float = 4.0
  cwd_temperature: float = 4.0
  dist_inter_weight: float = 0.0
  maskd_tokens: int = 8
  extensions: extensions_lib.Extensions = dataclasses.field(
    default_factory=extensions_lib.Extensions
  )

  def __post_init__(self) -> None:
    self._check_terms()
    for name, known in CHOICES.items():
      if name == "region":
        known = (*known, *self.extensions.regions)
      masking.check_choice(name, getattr(self, name), known)
    for name, first in _LEAST.items():
      if not getattr(self, name) >= first:
        raise ValueError(
          f"{name} must be at least {first}: {getattr(self, name)}"
        )
    for name in ("mask_ratio", "ratio_outside", "distill_ramp"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f"{name} must be a share in [0, 1]: {getattr(self, name)}"
        )
    for name in ("kd_temperature", "cwd_temperature"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name} must be above 0: {getattr(self, name)}")

  def _check_terms(self) -> None:
    """Raises ValueError on terms that do not exist or do not go together."""
    for name, weight in self.terms.items():
      if not weight > 0:
        raise ValueError(
          f"weight of {name} must be positive, not {weight}; leave the term "
          "out to switch it off"
        )
    if self.segmentation:
      check_segmentation(self.segmentation)
    restoring = [t.name for t in self.records if _GENERATORS & set(t.trains)]
    if len(restoring) > 1:
      raise ValueError(
        f"{' and '.join(restoring)} would share their generators: choose one "
        "of them"
      )
    if self.topology == "multiscale" and not self._trains("generators"):
      raise ValueError(
        'topology="multiscale" is one of several heads: it needs the term m2bf'
      )
    for term in self.records:
      if not self.taps and term.compares in (
        term_lib.FEATURES,
        term_lib.ALIGNED,
      ):
        raise ValueError(f"{term.name} compares features: name some taps")

  @property
  def records(self) -> tuple[term_lib.Term, ...]:
    """The records of the method's terms.

    Raises:
      ValueError: on a term that does not exist.
    """
    every = (*terms_lib.TERMS, *self.extensions.records())
    known = {term.name: term for term in every}
    for name in self.terms:
      if name not in known:
        raise ValueError(
          f"unknown distillation term {name!r}; known: {', '.join(known)}"
        )
    return tuple(known[name] for name in self.terms)

  @property
  def term_names(self) -> dict[str, tuple[str, ...]]:
    """For each term, the names that it is measured and logged under."""
    return {term.name: term.names(self) for term in self.records}

  @property
  def balanced_names(self) -> tuple[str, ...]:
    """The names whose weight is calibrated against the segmentation loss."""
    if self.balance != "calibrate":
      return ()
    calibrated = [term for term in self.records if term.calibrated]
    return tuple(name for term in calibrated for name in term.names(self))

  @property
  def needs_taps(self) -> bool:
    """Whether features are needed, or the logits will do."""
    compared = {term.compares for term in self.records}
    return bool(self.taps) and not compared <= {term_lib.LOGITS}

  @property
  def aligns(self) -> bool:
    """Whether layers are trained along that align features."""
    return any(term.compares == term_lib.ALIGNED for term in self.records)

  @property
  def token_count(self) -> int:
    """How many receptive tokens a tap has; 0 where none is needed."""
    return self.maskd_tokens if self._trains("tokens") else 0

  @property
  def generator_heads(self) -> int:
    """How many generators a tap has; 0 where none is needed."""
    if self._trains("generators"):
      return self.heads
    return int(self._trains("generator"))

  @property
  def head_count(self) -> int:
    """How many heads run: one a generator, or one a tap if multiscale."""
    if self.topology == "multiscale":
      return len(self.taps)
    return self.generator_heads

  def _trains(self, what: str) -> bool:
    return any(what in term.trains for term in self.records)


_GENERATORS = {"generator", "generators"}
CHOICES: Mapping[str, tuple[str, ...]] = {
  "teacher_out": ("own", "shuffled"),
  "generator": layers.GENERATORS,
  "region": boundary.REGIONS,
  "loss_region": masking.LOSS_REGIONS,
  "normalise": masking.NORMALISATIONS,
  "topology": mbf.TOPOLOGIES,
  "head_input": mbf.HEAD_INPUTS,
  "head_weights": mbf.HEAD_WEIGHTS,
  "band_schedule": mbf.BAND_SCHEDULES,
  "ratio_schedule": mbf.RATIO_SCHEDULES,
  "balance": ("calibrate", "fixed"),
}
_LEAST: Mapping[str, int] = {
  "heads": 1,
  "granularity": 1,
  "radius": 0,
  "maskd_tokens": 1,
  "dist_inter_weight": 0,
  "generator_width": 0,
  "calibration_steps": 1,
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
  values: dict[str, Any] = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in options.items()
  }
  return Method(**values, extensions=extensions or extensions_lib.Extensions())


def shipped_methods() -> dict[str, dict[str, Any]]:
  """Returns the methods that a config may name without defining them.

  "none" is no distillation. The name of a term of the package is that term at
  its published weight, on the taps that its source compares.
  """
  methods: dict[str, dict[str, Any]] = {"none": {}}
  for term in terms_lib.TERMS:
    methods[term.name] = {"terms": {term.name: term.weight}}
    if term.taps:
      methods[term.name]["taps"] = term.taps
  return methods


def check_segmentation(weights: Mapping[str, float]) -> None:
  """Raises ValueError on weights of terms that do not exist, or on none."""
  unknown = set(weights) - set(terms_lib.SEGMENTATION)
  if unknown or not weights:
    raise ValueError(
      f"segmentation loss takes weights of {sorted(terms_lib.SEGMENTATION)}, "
      f"not {sorted(weights)}"
    )
