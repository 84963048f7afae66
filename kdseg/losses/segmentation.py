"""Losses against the labels, from one logit a pixel."""

import chex
import jax
import jax.numpy as jnp

from kdseg.losses import reduce

Array = jax.Array


def _check(logits: Array, labels: Array) -> None:
  chex.assert_rank(logits, 3, exception_type=ValueError)
  chex.assert_equal_shape([logits, labels], exception_type=ValueError)


@jax.custom_jvp
def _cross_entropy(logits: Array, labels: Array) -> Array:
  """Elementwise; the tail of a pixel that is right is kept.

  Has its slope written out: the probability, which a Dice term computes
  anyway, in place of two more exponentials a pixel.
  """
  tail = jnp.log1p(jnp.exp(-jnp.abs(logits)))
  return jnp.maximum(logits, 0.0) - labels * logits + tail


@_cross_entropy.defjvp
def _cross_entropy_jvp(
  primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
  logits, labels = primals
  slope = jax.nn.sigmoid(logits) - labels
  return (
    _cross_entropy(logits, labels),
    slope * tangents[0] - logits * tangents[1],
  )


def bce(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Array:
  """Binary cross-entropy, averaged over the pixels.

  Args:
    logits: [B, H, W].
    labels: [B, H, W] in [0, 1].
    label_smoothing: s in [0, 1); labels become `(1 - s) * labels + s / 2`
      (Szegedy et al., CVPR 2016, with two classes; there s is .1).

  Returns:
    [B] float32, in nats.

  Raises:
    ValueError: if a shape does not fit, or `label_smoothing` is out of range.
  """
  _check(logits, labels)
  if not 0.0 <= label_smoothing < 1.0:
    raise ValueError(f"label_smoothing must be in [0, 1): {label_smoothing}")
  labels = labels.astype(jnp.float32)
  labels = (1.0 - label_smoothing) * labels + 0.5 * label_smoothing
  return reduce.mean_per_image(
    _cross_entropy(logits.astype(jnp.float32), labels)
  )


def soft_dice(logits: Array, labels: Array, *, smooth: float = 1.0) -> Array:
  """One minus the Dice coefficient of the probabilities.

  `1 - (2 sum(p y) + s) / (sum(p) + sum(y) + s)`, sums over one image's pixels
  (Milletari et al., 3DV 2016, but without squares in the denominator).

  Args:
    logits: [B, H, W].
    labels: [B, H, W] in [0, 1].
    smooth: s, in pixels; positive, it makes an empty prediction of an empty
      mask perfect.

  Returns:
    [B] float32 in [0, 1].

  Raises:
    ValueError: if a shape does not fit, or `smooth` is not positive.
  """
  _check(logits, labels)
  if smooth <= 0:
    raise ValueError(f"smooth must be positive: {smooth}")
  probability = jax.nn.sigmoid(logits.astype(jnp.float32))
  labels = labels.astype(jnp.float32)
  overlap = jnp.sum(probability * labels, (1, 2))
  size = jnp.sum(probability, (1, 2)) + jnp.sum(labels, (1, 2))
  return 1.0 - (2.0 * overlap + smooth) / (size + smooth)


def focal(logits: Array, labels: Array, *, gamma: float = 2.0) -> Array:
  """Cross-entropy that fades where the network is already right.

  `(1 - p_t) ** gamma * -log(p_t)`, p_t the probability of the label (Lin et
  al., ICCV 2017, eq. 4); without their class weight alpha.

  Args:
    logits: [B, H, W].
    labels: [B, H, W], 0 or 1.
    gamma: not negative; 0 gives `bce`.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit, or `gamma` is negative.
  """
  _check(logits, labels)
  if gamma < 0:
    raise ValueError(f"gamma must not be negative: {gamma}")
  logits = logits.astype(jnp.float32)
  labels = labels.astype(jnp.float32)
  # 1 - p_t is the probability of the other label, so its logarithm is minus
  # that label's cross-entropy: no power of a number that rounds to 0.
  log_miss = -_cross_entropy(logits, 1.0 - labels)
  return reduce.mean_per_image(
    jnp.exp(gamma * log_miss) * _cross_entropy(logits, labels)
  )
