"""Losses against what the teacher's features have in common with each other.

Attention maps, cosines and similarities are the same for any number of
channels: the student's features need no alignment but the teacher's grid
(`grids.resize_features`), and nothing is trained beside the student.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from kdseg.losses import grids
from kdseg.losses import logits as logit_losses
from kdseg.losses import reduce

Array = jax.Array


def _both(student_feat: Array, teacher_feat: Array) -> tuple[Array, Array]:
  """Checks [B, h, w, C_s] and [B, h, w, C_t]; float32, the teacher's fixed."""
  chex.assert_rank([student_feat, teacher_feat], 4, exception_type=ValueError)
  chex.assert_equal_shape_prefix(
    [student_feat, teacher_feat], 3, exception_type=ValueError
  )
  return (
    student_feat.astype(jnp.float32),
    jax.lax.stop_gradient(teacher_feat).astype(jnp.float32),
  )


def _cells(feat: Array) -> Array:
  """Unit vectors of the cells, [B, h, w, C] to [B, h * w, C]."""
  return reduce.unit(feat.reshape(feat.shape[0], -1, feat.shape[-1]))


def _attention(feat: Array, power: int) -> Array:
  """Mean of |F|^p over the channels, of norm 1 in an image; [B, h * w]."""
  if power < 2 or power % 2:
    raise ValueError(f"power must be even and positive: {power}")
  # The map does not depend on the scale, and large powers need a good one.
  scale = jnp.max(jnp.abs(feat), (1, 2, 3), keepdims=True)
  scale = jax.lax.stop_gradient(jnp.where(scale > 0, scale, 1.0))
  activity = jnp.mean((feat / scale) ** power, -1)
  return reduce.unit(activity.reshape(feat.shape[0], -1))


def at(student_feat: Array, teacher_feat: Array, *, power: int = 2) -> Array:
  """Squared distance of where the two networks are active.

  Attention transfer (Zagoruyko and Komodakis, ICLR 2017, of activations):
  `a(F) = vec(mean_c |F|^p) / ||.||_2`, compared cell by cell. As a mean over
  the cells, which the usual weight of 1e4 goes with (that of CIRKD), where the
  paper has the norm of the difference.

  Args:
    student_feat: [B, h, w, C_s].
    teacher_feat: [B, h, w, C_t].
    power: p, even.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit, or `power` is not even and positive.
  """
  student, teacher = _both(student_feat, teacher_feat)
  return reduce.mean_per_image(
    jnp.square(_attention(student, power) - _attention(teacher, power))
  )


def skd_pa(
  student_feat: Array, teacher_feat: Array, *, patch: int = 2
) -> Array:
  """Squared difference of the cosines between all places of an image.

  The pair-wise term of structured distillation (Liu et al., CVPR 2019):
  cells are pooled to nodes by their maximum, a_ij is the cosine of the nodes i
  and j, and `(a_ij^S - a_ij^T)^2` is averaged over all pairs.

  Differences from the source: nodes are of `patch` x `patch` cells, where its
  code pools by a share of the map's side; and neither the pixel-wise term
  (which is `kd`) nor the holistic one, which trains a discriminator, is part
  of this.

  Args:
    student_feat: [B, h, w, C_s].
    teacher_feat: [B, h, w, C_t].
    patch: side of a node in cells.

  Returns:
    [B] float32; as a difference of sums it may be some 1e-7 from 0 for maps
    that differ by less than rounding.

  Raises:
    ValueError: if a shape does not fit, or `patch` is below 1.
  """
  student, teacher = (
    _cells(grids.pool(feat, patch, "max"))
    for feat in _both(student_feat, teacher_feat)
  )

  def products(first: Array, second: Array) -> Array:
    """sum_ij (first_i . first_j) (second_i . second_j), image by image."""
    moments = jnp.einsum(
      "bic,bid->bcd", first, second, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.sum(jnp.square(moments), (1, 2))

  # |SS' - TT'|^2 = |S'S|^2 - 2 |S'T|^2 + |T'T|^2: matrices of the channels,
  # not of the nodes.
  square = (
    products(student, student)
    - 2.0 * products(student, teacher)
    + products(teacher, teacher)
  )
  return square / student.shape[1] ** 2


def _class_means(feat: Array, labels: Array) -> tuple[Array, Array]:
  """Mean features of skin and lesion, [B, C] each; 0 where there is none."""
  weights = jnp.stack([1.0 - labels, labels])
  totals = jnp.einsum(
    "kbij,bijc->kbc", weights, feat, precision=jax.lax.Precision.HIGHEST
  )
  sizes = jnp.sum(weights, (2, 3))[..., None]
  means = totals / jnp.where(sizes > 0, sizes, 1.0)
  return means[0], means[1]


def ifvd(student_feat: Array, teacher_feat: Array, labels: Array) -> Array:
  """Squared difference of how close each cell is to its class's mean.

  Intra-class feature variation (Wang et al., ECCV 2020): mu_k is the
  mean of the features of class k in an image, skin or lesion,
  `m(p) = cos(F_p, mu_{y_p})`, and the two maps m are compared. Its pixel-wise
  and adversarial terms are not part of this.

  Args:
    student_feat: [B, h, w, C_s].
    teacher_feat: [B, h, w, C_t].
    labels: [B, H, W], 0 or 1; read at the cells' centres.

  Returns:
    [B] float32.
  """
  student, teacher = _both(student_feat, teacher_feat)
  labels = grids.labels_at(labels, student)

  def closeness(feat: Array) -> Array:
    means = jnp.stack([reduce.unit(m) for m in _class_means(feat, labels)])
    along = jnp.einsum(
      "bijc,kbc->kbij", feat, means, precision=jax.lax.Precision.HIGHEST
    )
    along = jnp.where(labels > 0.5, along[1], along[0])
    return along * reduce.inverse_norm(feat)

  return reduce.mean_per_image(
    jnp.square(closeness(student) - closeness(teacher))
  )


def cirkd_lite(
  student_feat: Array,
  teacher_feat: Array,
  *,
  temperature: float = 0.1,
  widest: int = 16,
) -> Array:
  """Divergence of how the cells of one image resemble those of another.

  The mini-batch part of cross-image relational distillation (Yang et al., CVPR
  2022): for images i and j, `S_ij = F_i F_j^T / t` of unit vectors,
  softmax along the rows, and `KL(teacher || student)` averaged over the rows
  and over all j, i itself among them.

  Differences from the source: its memory of pixels and regions of earlier
  batches is left out, hence "lite"; features are first averaged to at most
  `widest` cells a side, as the similarities take the square of their number;
  and with several devices the pairs are those of one device's batch, nothing
  is gathered. So this is the one loss whose value for an image depends on the
  images beside it, and on the number of devices.

  Args:
    student_feat: [B, h, w, C_s].
    teacher_feat: [B, h, w, C_t].
    temperature: t, positive.
    widest: cells a side, at least 1.

  Returns:
    [B] float32, in nats; for image i, the mean over the pairs (i, j).

  Raises:
    ValueError: if a shape does not fit, `temperature` is not positive, or
      `widest` is below 1.
  """
  if temperature <= 0:
    raise ValueError(f"temperature must be positive: {temperature}")
  if widest < 1:
    raise ValueError(f"widest must be at least 1: {widest}")
  both = _both(student_feat, teacher_feat)
  block = -(-max(student_feat.shape[1:3]) // widest)
  student, teacher = (_cells(grids.pool(x, block, "mean")) for x in both)

  def log_similarity(image: Array, batch: Array) -> Array:
    cosines = jnp.einsum(
      "pc,jqc->pjq", image, batch, precision=jax.lax.Precision.HIGHEST
    )
    return jax.nn.log_softmax(cosines / temperature, -1)

  # Image by image, and again in the backward pass: all pairs at once would not
  # fit into memory.
  @jax.checkpoint
  def against_all(pair: tuple[Array, Array]) -> Array:
    log_student = log_similarity(pair[0], student)
    log_teacher = log_similarity(pair[1], teacher)
    divergence = jnp.exp(log_teacher) * (log_teacher - log_student)
    return jnp.mean(jnp.sum(divergence, -1))

  return jax.lax.map(against_all, (student, teacher))


def imd(student_feat: Array, teacher_feat: Array, *, power: int = 4) -> Array:
  """Importance maps of EMKD: `at` with p = 4, summed over the cells.

  Qin et al., TMI 2021.

  Args:
    student_feat: [B, h, w, C_s].
    teacher_feat: [B, h, w, C_t].
    power: p, even.

  Returns:
    [B] float32.

  Raises:
    ValueError: as `at`.
  """
  cells = student_feat.shape[1] * student_feat.shape[2]
  return cells * at(student_feat, teacher_feat, power=power)


def rad(student_feat: Array, teacher_feat: Array, labels: Array) -> Array:
  """Region affinity of EMKD: how alike skin and lesion are.

  Qin et al., TMI 2021: r is the cosine of the mean features of the
  two regions, compared as `(r_S - r_T)^2`.

  Args:
    student_feat: [B, h, w, C_s].
    teacher_feat: [B, h, w, C_t].
    labels: [B, H, W], 0 or 1; read at the cells' centres.

  Returns:
    [B] float32; 0 for an image with one region only.
  """
  student, teacher = _both(student_feat, teacher_feat)
  labels = grids.labels_at(labels, student)

  def affinity(feat: Array) -> Array:
    skin, lesion = _class_means(feat, labels)
    return jnp.sum(reduce.unit(skin) * reduce.unit(lesion), -1)

  return jnp.square(affinity(student) - affinity(teacher))


def emkd(
  student_logits: Array,
  teacher_logits: Array,
  student_taps: Mapping[str, Array],
  teacher_taps: Mapping[str, Array],
  labels: Array,
  *,
  weights: Sequence[float] = (0.1, 0.9, 0.9),
  temperature: float = 4.0,
) -> Array:
  """Efficient medical image segmentation distillation: three parts in one.

  Qin et al., TMI 2021: `.1 PMD + .9 sum_taps IMD + .9 sum_taps RAD`,
  where PMD is `kd` at temperature 4, and the others `imd` and `rad`. Its task
  loss, .5 focal + .5 Dice, is a switch of the method (`segmentation`).

  Args:
    student_logits: [B, H, W].
    teacher_logits: [B, H, W].
    student_taps: {tap: [B, h, w, C_s]}, on the teacher's grids; the source has
      two.
    teacher_taps: {tap: [B, h, w, C_t]}, the same taps.
    labels: [B, H, W], 0 or 1.
    weights: of PMD, IMD and RAD.
    temperature: of PMD, positive.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape or the taps do not fit, or there are not three
      weights.
  """
  if len(weights) != 3:
    raise ValueError(f"weights must be three: {weights}")
  if set(student_taps) != set(teacher_taps):
    raise ValueError(
      f"the taps differ: {sorted(student_taps)}, {sorted(teacher_taps)}"
    )
  chex.assert_equal_shape([student_logits, labels], exception_type=ValueError)
  loss = weights[0] * logit_losses.kd(
    student_logits, teacher_logits, temperature=temperature
  )
  for tap, student_feat in student_taps.items():
    chex.assert_equal_shape_prefix(
      [student_feat, labels], 1, exception_type=ValueError
    )
    loss = loss + weights[1] * imd(student_feat, teacher_taps[tap])
    loss = loss + weights[2] * rad(student_feat, teacher_taps[tap], labels)
  return loss
