"""Small features, a region and generators for tests of losses on features."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (2, 6, 8, 3)
KEY = jax.random.key(7)


def draw(seed, shape=SHAPE):
  return jax.random.normal(jax.random.key(seed), shape)


STUDENT, TEACHER = draw(1), draw(2)


def _region():
  region = np.zeros(SHAPE[:3], np.float32)
  region[0, 1:4, 2:7] = 1
  region[1, :, 3] = 1
  return jnp.asarray(region)


REGION = _region()


def identity(x):
  return x


def conv(seed, size=3):
  """A generator: convolution, ReLU, convolution, with fixed weights."""
  first, second = 0.3 * draw(seed, (2, size, size, 3, 3))

  def apply(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  return lambda x: apply(jax.nn.relu(apply(x, first)), second)


class Spy:
  """A generator that remembers what it was given."""

  def __init__(self, generate=identity):
    self.seen = []
    self.generate = generate

  def __call__(self, x):
    self.seen.append(x)
    return self.generate(x)


def mean_squares(x, y):
  return np.mean(np.square(np.asarray(x) - np.asarray(y)), (1, 2, 3))
