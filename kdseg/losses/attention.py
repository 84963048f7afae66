"""Squared distances of features, weighted by where the teacher attends.

Student features come in aligned, as for `features`.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from kdseg.losses import grids
from kdseg.losses import masking
from kdseg.losses import reduce
from kdseg.losses import segmentation

Array = jax.Array


def _both(student_feat: Array, teacher_feat: Array) -> tuple[Array, Array]:
  masking.check_features(student_feat, teacher_feat)
  return (
    student_feat.astype(jnp.float32),
    jax.lax.stop_gradient(teacher_feat).astype(jnp.float32),
  )


def _attention_maps(feat: Array, temperature: float) -> tuple[Array, Array]:
  """Attention to cells [B, h, w] and to channels [B, C]; both of mean 1."""
  batch, height, width, channels = feat.shape
  size = jnp.abs(feat)
  cells = jnp.mean(size, -1).reshape(batch, -1)
  spatial = height * width * jax.nn.softmax(cells / temperature, -1)
  channel = channels * jax.nn.softmax(jnp.mean(size, (1, 2)) / temperature, -1)
  return spatial.reshape(batch, height, width), channel


def fgd(
  student_feat: Array,
  teacher_feat: Array,
  labels: Array,
  *,
  temperature: float = 0.5,
  foreground: float = 1e-3,
  background: float = 5e-4,
  attention: float = 1e-3,
) -> Array:
  """Focal distillation: lesion and skin apart, where the teacher is active.

  The focal part of FGD (Yang et al., CVPR 2022). A_S is the softmax
  over the cells of `mean_c |F| / t`, times their number, A_C that over the
  channels of `mean_ij |F| / t`, times theirs, both the teacher's. The errors
  `A_S A_C (T - S)^2` are summed over cells and channels with 1 over the area of
  the region as weight, in the lesion and in the skin; and the two networks'
  attention maps are compared by their absolute differences, summed.

  Differences from the source: the regions are the lesion and the skin, not
  boxes; and the global part, a trained context block (GcBlock) on either side
  with weight 5e-6, is left out.

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C].
    labels: [B, H, W], 0 or 1; read at the cells' centres.
    temperature: t, positive.
    foreground: alpha, weight of the errors in the lesion.
    background: beta, of those in the skin.
    attention: gamma, of the difference of the attention maps.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit, or `temperature` is not positive.
  """
  if temperature <= 0:
    raise ValueError(f"temperature must be positive: {temperature}")
  student, teacher = _both(student_feat, teacher_feat)
  lesion = grids.labels_at(labels, student)
  spatial, channel = _attention_maps(teacher, temperature)
  errors = jnp.sum(jnp.square(student - teacher) * channel[:, None, None], -1)
  errors = spatial * errors
  loss = foreground * reduce.weighted_mean_per_image(errors, lesion)
  loss = loss + background * reduce.weighted_mean_per_image(
    errors, 1.0 - lesion
  )
  own_spatial, own_channel = _attention_maps(student, temperature)
  difference = jnp.sum(jnp.abs(own_spatial - spatial), (1, 2))
  difference = difference + jnp.sum(jnp.abs(own_channel - channel), -1)
  return loss + attention * difference


def token_masks(teacher_feat: Array, tokens: Array) -> Array:
  """Where each receptive token finds itself: `sigmoid(e_m . T_ij)`.

  MasKD (Huang et al., ICLR 2023).

  Args:
    teacher_feat: [B, h, w, C]; receives no gradient.
    tokens: [M, C], trained by `token_fit`.

  Returns:
    [B, h, w, M] float32.
  """
  chex.assert_rank(teacher_feat, 4, exception_type=ValueError)
  chex.assert_shape(
    tokens, (None, teacher_feat.shape[-1]), exception_type=ValueError
  )
  teacher = jax.lax.stop_gradient(teacher_feat).astype(jnp.float32)
  return jax.nn.sigmoid(teacher @ tokens.T)


def maskd(student_feat: Array, teacher_feat: Array, masks: Array) -> Array:
  """Squared distance under the masks of the receptive tokens.

  MasKD (Huang et al., ICLR 2023):
  `1/2 mean_{m,c} sum_ij (R_m (S - T))^2 / sum_ij R_m`. The masks have no
  gradient here: it would move them to where the student errs least.

  Difference from the source: it trains the tokens first, through the whole
  teacher, and then fixes them; here they are trained beside the student, see
  `token_fit`.

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C].
    masks: [B, h, w, M] from `token_masks`; no gradient.

  Returns:
    [B] float32.
  """
  student, teacher = _both(student_feat, teacher_feat)
  _check_masks(masks, student)
  masks = jax.lax.stop_gradient(masks).astype(jnp.float32)
  errors = jnp.mean(jnp.square(student - teacher), -1, keepdims=True)
  size = jnp.sum(masks, (1, 2))
  total = jnp.sum(jnp.square(masks) * errors, (1, 2))
  return 0.5 * jnp.mean(total / jnp.where(size > 0, size, 1.0), -1)


def _check_masks(masks: Array, feat: Array) -> None:
  chex.assert_rank(masks, 4, exception_type=ValueError)
  chex.assert_equal_shape_prefix([masks, feat], 3, exception_type=ValueError)


def token_fit(
  masks: Array,
  teacher_feat: Array,
  labels: Array,
  *,
  probe: Callable[[Array], Array],
) -> Array:
  """What trains the receptive tokens: the task on masked features, and order.

  MasKD (Huang et al., ICLR 2023): tokens must leave in the features
  what the task needs, and overlap little. The first is the cross-entropy of the
  labels given `probe(R_m * T)`, averaged over the tokens; the second the mean
  Dice coefficient of the masks' pairs, `2 sum(R R') / (sum(R^2) + sum(R'^2))`.

  Difference from the source: `probe`, an affine map trained along, stands in
  for the rest of the teacher. So `probe(R_m T) = R_m (probe(T) - probe(0)) +
  probe(0)`, and it is applied once for all tokens.

  Args:
    masks: [B, h, w, M] from `token_masks`.
    teacher_feat: [B, h, w, C]; receives no gradient.
    labels: [B, H, W], 0 or 1; read at the cells' centres.
    probe: maps [..., C] to logits [..., 1], with its parameters bound; affine.

  Returns:
    [B] float32. It does not depend on the student.
  """
  chex.assert_rank(teacher_feat, 4, exception_type=ValueError)
  _check_masks(masks, teacher_feat)
  teacher = jax.lax.stop_gradient(teacher_feat).astype(jnp.float32)
  labels = grids.labels_at(labels, teacher)
  masks = masks.astype(jnp.float32)
  count = masks.shape[-1]
  nothing = probe(jnp.zeros((1, 1, 1, teacher.shape[-1])))
  seen = masks * (probe(teacher) - nothing) + nothing
  each = [segmentation.bce(seen[..., m], labels) / count for m in range(count)]
  task = jnp.asarray(sum(each))
  overlap = jnp.einsum(
    "bijm,bijn->bmn", masks, masks, precision=jax.lax.Precision.HIGHEST
  )
  square = jnp.diagonal(overlap, axis1=1, axis2=2)
  dice = 2.0 * overlap / (square[:, :, None] + square[:, None, :] + 1e-12)
  pairs = jnp.triu_indices(count, 1)
  if count == 1:
    return task
  return task + jnp.mean(dice[:, pairs[0], pairs[1]], -1)
