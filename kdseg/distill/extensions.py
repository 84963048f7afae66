"""What a user adds to an experiment, without a change to the package."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from kdseg.data import builder

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Extensions:
  """Functions by the names that a config calls them by.

  Passed to `experiment.run`, beside the config: nothing is registered, and
  nothing outlives the call.

  Attributes:
    terms: (out, taught, labels, rng) -> [B], one value an image: the named
      outputs of the student and of the teacher, labels [B, H, W] in {0, 1}, and
      one key an image. The teacher's outputs are its logits and the method's
      `taps` (an empty tuple for none), and get no gradient. The weight is taken
      as it is.
    regions: (labels, radius) -> [B, H, W] in {0, 1}, where mbf and m2bf hide
      features; `radius` in pixels.
    students: (axis_name=..., **options) -> Flax module with the contract of
      `kdseg.networks`.
    data_sets: subclasses of `data.builder.PairBuilder`, by their `name`.
  """

  terms: Mapping[str, Callable[[Any, Any, Array, Array], Array]] = (
    dataclasses.field(default_factory=dict)
  )
  regions: Mapping[str, Callable[[Array, int], Array]] = dataclasses.field(
    default_factory=dict
  )
  students: Mapping[str, Callable[..., Any]] = dataclasses.field(
    default_factory=dict
  )
  data_sets: Mapping[str, type[builder.PairBuilder]] = dataclasses.field(
    default_factory=dict
  )
