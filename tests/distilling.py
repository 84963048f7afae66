"""A student, a teacher and two images, to compute distillation terms on."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import tiny

from kdseg.distill import method as method_lib
from kdseg.distill import objective
from kdseg.training import arms as arms_lib

BATCH = 2
# The functions of docs/tables.py, by name.
TABLES = runpy.run_path(
  str(pathlib.Path(__file__).parents[1] / "docs" / "tables.py")
)


def make_method(term="mbf", **switches):
  return method_lib.Method(terms={term: 1.0}, **switches)


@functools.cache
def make_outputs():
  """What a student and a teacher make of two images; the labels."""
  images, masks = tiny.draw_lesions(BATCH)
  image = jnp.asarray(images) / 255.0
  outs = []
  for seed, channels in ((0, 3), (1, 5)):
    network = tiny.Network(channels)
    variables = network.init(jax.random.key(seed), image)
    outs.append(network.apply(variables, image))
  out, teacher_out = outs
  labels = jnp.asarray(masks, jnp.float32)
  # A teacher that sees the lesions, and sees them to the right of the truth.
  teacher_out["logits"] = 8.0 * (jnp.roll(labels, 6, axis=2) - 0.5)
  return out, teacher_out, labels


@functools.cache
def _shapes():
  _, teacher_out, _ = make_outputs()
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), teacher_out
  )


def make_distiller(method):
  """As a run makes it; None and no parameters where none is needed."""
  module, (features, grids) = arms_lib.make_distiller(
    tiny.Network(3), _shapes(), method, size=tiny.SIDE
  )
  if module is None:
    return None, {}
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), features)
  variables = module.init(jax.random.key(5), zeros, grids)
  return module, variables.get("params", {})


def distil(method, *, seed=0, module=None, params=None, **changes):
  """The terms of `method`, with its own distiller unless one is given."""
  out, teacher_out, labels = make_outputs()
  if module is None:
    module, params = make_distiller(method)
  given = {"out": out, "teacher_out": teacher_out, "labels": labels, **changes}
  return objective.distillation_terms(
    given["out"],
    given["teacher_out"],
    given["labels"],
    jax.random.key(seed),
    method=method,
    distiller=(
      functools.partial(module.apply, {"params": params}) if module else None
    ),
    teacher_std=given.get("teacher_std"),
  )
