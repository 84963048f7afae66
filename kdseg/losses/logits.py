"""Losses against the teacher's logits.

Each network gives one logit z a pixel. Two-class forms take it as [0, z]: a
softmax over a single channel would be 1 everywhere, and its loss 0.
"""

import chex
import jax
import jax.numpy as jnp

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
  lesion = jax.nn.sigmoid(teacher) * (
    jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student)
  )
  skin = jax.nn.sigmoid(-teacher) * (
    jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student)
  )
  return temperature**2 * reduce.mean_per_image(lesion + skin)


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
  log_student = jax.nn.log_softmax(student, (1, 2))
  log_teacher = jax.nn.log_softmax(teacher, (1, 2))
  divergence = jnp.exp(log_teacher) * (log_teacher - log_student)
  return temperature**2 * jnp.sum(divergence, (1, 2))
