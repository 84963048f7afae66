"""The record of a distillation term: its function, and what it needs."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import Literal

import jax

from kdseg.losses import boundary
from kdseg.losses import mbf
from kdseg.runtime import rng as rng_lib

Array = jax.Array
# `distill.method.Method`, which is made of terms and cannot be imported here.
Method = Any

LOGITS: Literal["logits"] = "logits"
FEATURES: Literal["features"] = "features"
ALIGNED: Literal["aligned features"] = "aligned features"
OUTPUTS: Literal["outputs"] = "outputs"
Compared = Literal["logits", "features", "aligned features", "outputs"]
Trained = Literal["generator", "generators", "tokens", "probe"]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The arguments of a term's function: one device's batch, and the switches.

  Attributes:
    out: named outputs of the student, as the network makes them.
    teacher_out: named outputs of the teacher, wide taps projected; they get no
      gradient.
    student: {tap: the student's features as the term compares them}; see
      `Term.compares`.
    labels: [B, H, W] in {0, 1}, after augmentation.
    rng: [B], one key an image, the only source of a term's random draws.
    method: the switches.
    layers: `layers.Distiller.apply` with its parameters bound, called as
      `layers(tap, ..., method="generate")`; None where no term aligns features.
    teacher_std: {tap: [C]}, for `normalise="std"`.
  """

  out: Mapping[str, Array]
  teacher_out: Mapping[str, Array]
  student: Mapping[str, Array]
  labels: Array
  rng: Array
  method: Method
  layers: Callable[..., Array] | None = None
  teacher_std: Mapping[str, Array] | None = None

  @property
  def logits(self) -> tuple[Array, Array]:
    """The student's and the teacher's logits, [B, H, W] each."""
    return self.out["logits"], self.teacher_out["logits"]

  def features(self, tap: str) -> tuple[Array, Array]:
    """Returns the student's features as compared, and the teacher's."""
    return self.student[tap], self.teacher_out[tap]

  def layer(self, kind: str, *arguments: Any) -> Callable[..., Array]:
    """Returns a layer that is trained along; see `layers.Distiller`."""
    if self.layers is None:
      raise ValueError(f"no term of the method has layers: no {kind!r}")
    return functools.partial(self.layers, *arguments, method=kind)

  @functools.cached_property
  def regions(self) -> list[Array]:
    """Where each head hides features, [B, H, W] each; the same for all taps."""
    m, side = self.method, self.labels.shape[1]
    radii = mbf.band_radii(m.radius, m.head_count, m.band_schedule)
    return [self._region(boundary.radius_at(side, radius)) for radius in radii]

  def _region(self, radius: int) -> Array:
    name, own = self.method.region, self.method.extensions.regions
    if name in own:
      return own[name](self.labels, radius)
    student, teacher = self.logits
    return boundary.region(
      name,
      self.labels,
      radius=radius,
      teacher_logits=teacher,
      student_logits=student,
      rng=rng_lib.fold_in(self.rng, 0x0FF5E7),
    )


@dataclasses.dataclass(frozen=True)
class Term:
  """One term: its function, and the facts that the rest of the code needs.

  Attributes:
    name: in configs and in the log, there followed by a tap if `per_tap`.
    loss: (inputs, tap) -> [B], one value an image, or one [B] for each of
      `parts`; called for every tap of the method where the term is `per_tap`,
      once with the tap "" otherwise.
    compares: which of the student's features `Inputs.student` holds; "logits",
      none; "features", on the teacher's grid; "aligned features", with the
      teacher's channels too, by a 1x1 convolution that is trained along;
      "outputs", as they are.
    per_tap: whether each tap gives a value, which is balanced and logged apart.
    weight: the published one, converted to a mean over the map; 1 where the
      source weighs its parts inside of the term, or where it is calibrated.
    calibrated: whether the weight is relative to the segmentation loss, for
      terms without a published weight that fits a mean over the map; see
      `Method.balance`. Otherwise it is taken as it is.
    labels: whether it reads the labels.
    trains: layers trained along, besides the alignment: "generator", one a tap;
      "generators", one a head, see `Method.topology`; "tokens", "probe".
    parts: suffixes of the values that are logged apart; "" for the main one.
    taps: our names of the features that its source compares.
    source: authors, venue, year.
    is_rival: whether a comparison holds the reconstruction against it.
  """

  name: str
  loss: Callable[[Inputs, str], Array | Sequence[Array]]
  compares: Compared = LOGITS
  per_tap: bool = False
  weight: float = 1.0
  calibrated: bool = False
  labels: bool = False
  trains: tuple[Trained, ...] = ()
  parts: tuple[str, ...] = ("",)
  taps: tuple[str, ...] = ()
  source: str = ""
  is_rival: bool = True

  def taps_of(self, method: Method) -> tuple[str, ...]:
    """Returns the taps that `loss` is called for; ("",) for one call."""
    # The heads of a multiscale topology run from tap to tap.
    across = method.topology == "multiscale" and "generators" in self.trains
    return method.taps if self.per_tap and not across else ("",)

  def names(self, method: Method) -> tuple[str, ...]:
    """Returns the names that the term is measured and logged under."""
    return tuple(
      "_".join(filter(None, (self.name, part, tap)))
      for part in self.parts
      for tap in self.taps_of(method)
    )

  def values(self, inputs: Inputs) -> dict[str, Array]:
    """Computes the term; [B] by the names that `names` returns.

    Raises:
      ValueError: if its function does not give one value an image.
    """
    batch = inputs.labels.shape[:1]
    columns = []
    for tap in self.taps_of(inputs.method):
      value = self.loss(inputs, tap)
      columns.append([value] if isinstance(value, Array) else list(value))
      for each in columns[-1]:
        if each.shape != batch:
          raise ValueError(
            f"the term {self.name} gives {each.shape}, not one value an image, "
            f"{batch}"
          )
    flat = [value for part in zip(*columns, strict=True) for value in part]
    return dict(zip(self.names(inputs.method), flat, strict=True))


def from_function(
  name: str, function: Callable[[Any, Any, Array, Array], Array]
) -> Term:
  """Makes a term of (out, teacher_out, labels, rng) -> [B]."""

  def loss(inputs: Inputs, tap: str) -> Array:
    return function(inputs.out, inputs.teacher_out, inputs.labels, inputs.rng)

  return Term(name, loss, compares=OUTPUTS, labels=True, is_rival=False)
