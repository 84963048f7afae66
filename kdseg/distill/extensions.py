"""What a user adds to an experiment, without a change to the package."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from kdseg import networks
from kdseg.data import builder
from kdseg.data import sets
from kdseg.distill import term as term_lib
from kdseg.distill import terms as terms_lib
from kdseg.losses import boundary

Array = jax.Array
TermFunction = Callable[[Any, Any, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Extensions:
  """Functions by the names that a config calls them by.

  Passed to `experiment.run`, beside the config: nothing is registered, and
  nothing outlives the call.

  Attributes:
    terms: records (`distill.term.Term`), or plain functions
      (out, teacher_out, labels, rng) -> [B], one value an image: the named
      outputs of the student and of the teacher, labels [B, H, W] in {0, 1}, and
      one key an image. The teacher's outputs are its logits and the method's
      `taps` (an empty tuple for none), and get no gradient. The weight of a
      plain function is taken as it is.
    regions: (labels, radius) -> [B, H, W] in {0, 1}, where mbf and m2bf hide
      features; `radius` in pixels.
    students: `(axis_name=..., **options)` -> Flax module with the contract of
      `kdseg.networks`.
    data_sets: subclasses of `data.builder.PairBuilder`, by their `name`.
  """

  terms: Mapping[str, term_lib.Term | TermFunction] = dataclasses.field(
    default_factory=dict
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

  def records(self) -> tuple[term_lib.Term, ...]:
    """Returns the terms as records, each with the name that it is given."""
    return tuple(
      dataclasses.replace(term, name=name)
      if isinstance(term, term_lib.Term)
      else term_lib.from_function(name, term)
      for name, term in self.terms.items()
    )

  def check_names(self) -> None:
    """Raises ValueError on a name that the package has already."""
    shipped = [term.name for term in terms_lib.TERMS]
    for key, mine, taken in (
      ("terms", self.terms, (*shipped, *terms_lib.RESERVED)),
      ("regions", self.regions, boundary.REGIONS),
      ("students", self.students, networks.NETWORKS),
      ("data_sets", self.data_sets, sets.BUILDERS),
    ):
      for name in sorted(set(mine) & set(taken)):
        raise ValueError(
          f'extensions.{key}: the name "{name}" is taken; choose another'
        )
