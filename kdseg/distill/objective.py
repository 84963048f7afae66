"""From named terms to one scalar: the only place that weighs and averages."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp

from kdseg.distill import method as method_lib
from kdseg.distill import term as term_lib
from kdseg.distill import terms as terms_lib
from kdseg.losses import grids
from kdseg.runtime import rng as rng_lib

Array = jax.Array


def segmentation_loss(
  logits: Array, labels: Array, weights: Mapping[str, float]
) -> tuple[Array, dict[str, Array]]:
  """Returns the weighted segmentation loss [] and its parts, batch means.

  Args:
    logits: [B, H, W] of the network that is trained.
    labels: [B, H, W] in {0, 1}.
    weights: by term of `terms.SEGMENTATION`.

  Raises:
    ValueError: on an unknown term.
  """
  method_lib.check_segmentation(weights)
  parts = {
    name: jnp.mean(terms_lib.SEGMENTATION[name](logits, labels))
    for name in weights
  }
  total = jnp.asarray(sum(weights[name] * parts[name] for name in weights))
  return total, parts


def distillation_terms(
  out: Mapping[str, Array],
  teacher_out: Mapping[str, Array],
  labels: Array,
  rng: Array,
  *,
  method: method_lib.Method,
  distiller: Callable[..., Array] | None,
  teacher_std: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
  """Returns every distillation term of `method`, unweighted batch means, [].

  Args:
    out: named outputs of the student.
    teacher_out: named outputs of the teacher for the same pixels, wide taps
      projected already; they get no gradient.
    labels: [B, H, W] in {0, 1}, after augmentation.
    rng: one key, or one an image; the masks depend on nothing else.
    method: which terms, and their switches.
    distiller: `layers.Distiller.apply` with its parameters bound; called as
      `distiller(*args, method="align" | "generate" | ...)`; None if no term
      aligns features.
    teacher_std: by tap, [C], for `normalise="std"`.

  Returns:
    {name: []}; the names are those of `method.term_names`.

  Raises:
    ValueError: if the teacher's outputs are to be shuffled in a batch of one
      image, or a term does not give one value an image.
  """
  batch = labels.shape[0]
  teacher_out = jax.tree.map(jax.lax.stop_gradient, dict(teacher_out))
  if method.teacher_out == "shuffled":
    if batch < 2:
      raise ValueError(
        'teacher_out="shuffled" needs at least two images a device; raise '
        "data.batch_size"
      )
    teacher_out = {name: jnp.roll(x, 1, 0) for name, x in teacher_out.items()}
  inputs = term_lib.Inputs(
    out=out,
    teacher_out=teacher_out,
    student={},
    labels=labels,
    rng=rng_lib.per_image(rng, batch),
    method=method,
    layers=distiller,
    teacher_std=teacher_std,
  )
  compared = {
    kind: dataclasses.replace(inputs, student=_student_taps(kind, inputs))
    for kind in dict.fromkeys(term.compares for term in method.records)
  }
  return {
    name: jnp.mean(value)
    for term in method.records
    for name, value in term.values(compared[term.compares]).items()
  }


def _student_taps(
  compares: term_lib.Compared, inputs: term_lib.Inputs
) -> dict[str, Array]:
  """Returns the student's features, by tap, as terms compare them."""
  if compares == term_lib.LOGITS:
    return {}
  taps = {tap: inputs.out[tap] for tap in inputs.method.taps}
  if compares == term_lib.OUTPUTS:
    return taps
  of_teacher = {tap: inputs.teacher_out[tap].shape[1:3] for tap in taps}
  if compares == term_lib.FEATURES:
    return {
      tap: grids.resize_features(x, *of_teacher[tap]) for tap, x in taps.items()
    }
  return {
    tap: inputs.layer("align", tap)(x, *of_teacher[tap])
    for tap, x in taps.items()
  }


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
  calibrating = (step < calibration_steps).astype(jnp.float32)
  return {
    name: total + calibrating * jax.lax.stop_gradient(measured[name])
    for name, total in balance.items()
  }


def total_loss(
  task: Array,
  terms: Mapping[str, Array],
  balance: Mapping[str, Array],
  step: Array,
  *,
  method: method_lib.Method,
  steps: int,
) -> tuple[Array, dict[str, Array | float]]:
  """Returns the scalar to minimise, and the weight each term had.

  `L = task + ramp(step) * sum_t weight_t alpha_t term_t`: alpha_t is 1, or,
  for a calibrated term, the ratio of the mean losses of the task and of the
  term over the steps measured so far, this one included.

  Args:
    task: [] segmentation loss.
    terms: by name, [], as `distillation_terms` returns them.
    balance: sums after `update_balance` with this step's losses.
    step: [] updates made before this one.
    method: weights and schedule.
    steps: of the whole training; the ramp is a share of it.
  """
  ramp: Array | float = 1.0
  if method.distill_ramp > 0:
    ramp = jnp.clip((step + 1) / (method.distill_ramp * steps), 0.0, 1.0)
  weights: dict[str, Array | float] = {}
  for term, names in method.term_names.items():
    for name in names:
      alpha: Array | float = 1.0
      if name in balance:
        alpha = balance["task"] / jnp.maximum(balance[name], 1e-12)
      weights[name] = ramp * method.terms[term] * alpha
  total = task + sum(weights[name] * terms[name] for name in weights)
  return total, weights
