"""Losses against the teacher's logits.

Each network gives one logit z a pixel. Two-class forms take it as [0, z]: a
softmax over a single channel would be 1 everywhere, and its loss 0.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from kdseg.losses import boundary
from kdseg.losses import reduce

Array = jax.Array


def _scaled(
  student_logits: Array, teacher_logits: Array, temperature: float
) -> tuple[Array, Array]:
  chex.assert_rank(student_logits, 3, exception_type=ValueError)
  chex.assert_equal_shape(
    [student_logits, teacher_logits], exception_type=ValueError
  )
  if temperature <= 0:
    raise ValueError(f"temperature must be positive: {temperature}")
  teacher_logits = jax.lax.stop_gradient(teacher_logits)
  return (
    student_logits.astype(jnp.float32) / temperature,
    teacher_logits.astype(jnp.float32) / temperature,
  )


def _log_sigmoids(logits: Array) -> tuple[Array, Array]:
  """Logarithms of sigmoid(z) and of sigmoid(-z), from one exponential.

  Each keeps its small tail; two calls of `log_sigmoid` take three times as
  long on a CPU.
  """
  tail = jnp.log1p(jnp.exp(-jnp.abs(logits)))
  return jnp.minimum(logits, 0.0) - tail, -jnp.maximum(logits, 0.0) - tail


def _pixel_divergence(student: Array, teacher: Array) -> Array:
  """KL of the two-class softmax of each pixel, teacher first; elementwise."""
  student_lesion, student_skin = _log_sigmoids(student)
  lesion, skin = _log_sigmoids(teacher)
  return jnp.exp(lesion) * (lesion - student_lesion) + jnp.exp(skin) * (
    skin - student_skin
  )


def _spatial_divergence(student: Array, teacher: Array) -> Array:
  """KL of the softmax over an image's positions; [B, H, W] to [B]."""
  log_student = jax.nn.log_softmax(student, (1, 2))
  log_teacher = jax.nn.log_softmax(teacher, (1, 2))
  divergence = jnp.exp(log_teacher) * (log_teacher - log_student)
  return jnp.sum(divergence, (1, 2))


def kd(
  student_logits: Array, teacher_logits: Array, *, temperature: float = 4.0
) -> Array:
  """Divergence of the student's class probabilities from the teacher's.

  `t^2 KL(softmax([0, z_T] / t) || softmax([0, z_S] / t))`, averaged over the
  pixels (Hinton et al., 2015, section 2, pixel by pixel; 4 is the temperature
  of EMKD). The factor t^2 keeps the gradient's size whatever the temperature.

  Args:
    student_logits: [B, H, W].
    teacher_logits: [B, H, W].
    temperature: t, positive.

  Returns:
    [B] float32, in nats.

  Raises:
    ValueError: if a shape does not fit, or `temperature` is not positive.
  """
  student, teacher = _scaled(student_logits, teacher_logits, temperature)
  return temperature**2 * reduce.mean_per_image(
    _pixel_divergence(student, teacher)
  )


def cwd(
  student_logits: Array, teacher_logits: Array, *, temperature: float = 4.0
) -> Array:
  """Divergence of where the student looks from where the teacher does.

  Channel-wise distillation (Shu et al., ICCV 2021, eq. 5) with one channel:
  the logits of an image become a distribution over its positions, and
  `t^2 KL(softmax_ij(z_T / t) || softmax_ij(z_S / t))` compares the two. A
  constant added to all logits of an image changes nothing.

  Args:
    student_logits: [B, H, W].
    teacher_logits: [B, H, W].
    temperature: t, positive.

  Returns:
    [B] float32, in nats.

  Raises:
    ValueError: if a shape does not fit, or `temperature` is not positive.
  """
  student, teacher = _scaled(student_logits, teacher_logits, temperature)
  return temperature**2 * _spatial_divergence(student, teacher)


def _standardise(values: Array, axes: tuple[int, ...]) -> Array:
  """Zero mean and unit variance along `axes`; constants become 0."""
  values = values - jnp.mean(values, axes, keepdims=True)
  variance = jnp.mean(jnp.square(values), axes, keepdims=True)
  return values * jax.lax.rsqrt(variance + 1e-8)


def dist(
  student_logits: Array,
  teacher_logits: Array,
  *,
  inter_weight: float = 0.0,
  temperature: float = 1.0,
) -> Array:
  """How little the student's probabilities correlate with the teacher's.

  DIST (Huang et al., NeurIPS 2022): one minus the correlation of
  Pearson, along the positions for each class (intra) and along the classes for
  each position (inter). A linear change of the probabilities costs nothing.

  Differences from the source: the intra term is taken image by image, not over
  the pixels of the batch; both classes have the same one, so it is computed
  once; and inter is off, as two numbers that sum to 1 always correlate by 1 or
  -1, and have no gradient. One minus the correlation is computed as half the
  squared distance of the standardised values, which rounding keeps from being
  negative; so a constant map costs 1/2 beside one that is not.

  Args:
    student_logits: [B, H, W].
    teacher_logits: [B, H, W].
    inter_weight: weight of the inter term, published 1.
    temperature: t, positive; logits are divided by it, the loss multiplied by
      its square.

  Returns:
    [B] float32, from 0 to 2 times `1 + inter_weight`.

  Raises:
    ValueError: if a shape does not fit, or `temperature` is not positive.
  """
  student, teacher = (
    jax.nn.sigmoid(z)
    for z in _scaled(student_logits, teacher_logits, temperature)
  )

  def distance(student: Array, teacher: Array, along: tuple[int, ...]) -> Array:
    difference = _standardise(student, along) - _standardise(teacher, along)
    return 0.5 * reduce.mean_per_image(jnp.square(difference))

  def classes(lesion: Array) -> Array:
    return jnp.stack([1.0 - lesion, lesion], -1)

  loss = distance(student, teacher, (1, 2))
  if inter_weight:
    loss = loss + inter_weight * distance(
      classes(student), classes(teacher), (3,)
    )
  return temperature**2 * loss


def bpkd(
  student_logits: Array,
  teacher_logits: Array,
  labels: Array,
  *,
  radius: int = 3,
  edge_weight: float = 50.0,
  body_weight: float = 20.0,
  class_weight: float = 2.0,
  temperature: float = 1.0,
) -> Array:
  """Boundary-privileged distillation: the edge by pixels, the rest as a shape.

  BPKD (Liu et al., WACV 2024, arXiv 2306.08075). E is where the labels change
  within a window of 7 pixels. Along E the divergence of `kd`, averaged over E;
  elsewhere that of `cwd`, of logits that are 0 along E.

  Differences from the source: E is not averaged to a coarser grid, as the
  logits have the labels' size, so it is 0 or 1; the two classes have the same
  edge, so the class weight of the source multiplies all of it; and the body
  has one channel, the lesion's log-odds, where the source takes the mean over
  the classes.

  Args:
    student_logits: [B, H, W].
    teacher_logits: [B, H, W].
    labels: [B, H, W], 0 or 1.
    radius: of the window, in pixels; it has `2 * radius + 1` of them a side.
    edge_weight: of the edge term.
    body_weight: of the body term.
    class_weight: of the classes in the edge term.
    temperature: of both terms, positive.

  Returns:
    [B] float32; without an edge, the body term alone.

  Raises:
    ValueError: if a shape does not fit, `radius` is negative, or `temperature`
      is not positive.
  """
  student, teacher = _scaled(student_logits, teacher_logits, temperature)
  chex.assert_equal_shape([labels, student], exception_type=ValueError)
  edge = boundary.boundary_band(labels, radius=radius)
  body = 1.0 - edge
  at_edge = reduce.weighted_mean_per_image(
    _pixel_divergence(student, teacher), edge
  )
  elsewhere = _spatial_divergence(student * body, teacher * body)
  return temperature**2 * (
    edge_weight * class_weight * at_edge + body_weight * elsewhere
  )


def _sobel_magnitude(maps: Array) -> Array:
  """Length of the Sobel gradient of [B, H, W]; the outermost pixels repeat."""
  padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
  # Barriers, as XLA's CPU backend would compute each sum again wherever it is
  # read.
  smooth_rows, smooth_columns = jax.lax.optimization_barrier(
    (
      padded[:, :-2] + 2.0 * padded[:, 1:-1] + padded[:, 2:],
      padded[:, :, :-2] + 2.0 * padded[:, :, 1:-1] + padded[:, :, 2:],
    )
  )
  across = smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2]
  down = smooth_columns[:, 2:] - smooth_columns[:, :-2]
  # The small number gives a flat place a gradient of 0, not one of 0 / 0.
  length = jnp.sqrt(jnp.square(across) + jnp.square(down) + 1e-12)
  return jax.lax.optimization_barrier(length)


def ultralbm(
  student_logits: Array,
  teacher_logits: Array,
  *,
  weights: Sequence[float] = (0.5, 0.3, 0.2),
  pixel_scale: float = 8.0,
  temperature: float = 0.5,
) -> Array:
  """Pixels, edges and layout of the teacher's probability map.

  The distillation of UltraLBM-UNet-T (Fan et al., 2025, arXiv 2512.21584), made
  for skin lesions: 8 times the divergence of the pixels' probabilities, the
  squared difference of the lengths of their Sobel gradients, and the divergence
  of the softmax over the positions of `probability / t`, weighted and added.

  Differences from the source, which is known from its formulas: the Sobel
  windows repeat the outermost pixels, so the frame is no edge; and its task
  loss, BCE + Dice of weight 1, is the segmentation loss of the run.

  Args:
    student_logits: [B, H, W].
    teacher_logits: [B, H, W].
    weights: of the three parts.
    pixel_scale: what the first part is multiplied with.
    temperature: t of the third part, positive.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit, there are not three weights, or
      `temperature` is not positive.
  """
  if len(weights) != 3:
    raise ValueError(f"weights must be three: {weights}")
  if temperature <= 0:
    raise ValueError(f"temperature must be positive: {temperature}")
  student, teacher = _scaled(student_logits, teacher_logits, 1.0)
  # Read nine times by a Sobel window, and again by the softmax: computed once.
  seen, wanted = jax.lax.optimization_barrier(
    (jax.nn.sigmoid(student), jax.nn.sigmoid(teacher))
  )
  parts = (
    pixel_scale * reduce.mean_per_image(_pixel_divergence(student, teacher)),
    reduce.mean_per_image(
      jnp.square(_sobel_magnitude(seen) - _sobel_magnitude(wanted))
    ),
    _spatial_divergence(seen / temperature, wanted / temperature),
  )
  return jnp.asarray(sum(w * part for w, part in zip(weights, parts)))
