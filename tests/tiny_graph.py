"""What the tests of every writer of graphs draw and compute."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.networks import layers


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_network(network, side):
  """Variables of a network, drawn: no norm of it does nothing."""
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, side, side, 3))
  )
  generator = np.random.default_rng(1)

  def fill(path, x):
    if path[-1].key == "kernel":
      size = np.sqrt(2.0 / np.prod(x.shape[:-1]))
      return (size * generator.normal(size=x.shape)).astype(np.float32)
    return generator.uniform(0.5, 1.5, x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def make_case(network, side, answer):
  """A network with drawn weights: (function of uint8, images, its answers)."""
  variables = draw_network(network, side)

  def function(x):
    return answer(network.apply(variables, x.astype(jnp.float32) / 255.0))

  image = np.random.default_rng(0).integers(
    0, 256, (2, side, side, 3), np.uint8
  )
  return function, image, np.asarray(jax.jit(function)(image))


def conv(x, kernel, **options):
  options = {"window_strides": (1, 1), "padding": "SAME"} | options
  return jax.lax.conv_general_dilated(
    x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
  )


def attention(x):
  """Two heads of two channels over the 64 cells of [B, 8, 8, 4]."""
  x = x.reshape(-1, 64, 2, 2)
  shares = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", x, 0.5 * x))
  return jnp.einsum("bhqk,bkhd->bqhd", shares, x)


# What teachers are made of and students are not, of [B, 8, 8, 4].
OPERATIONS_OF_TEACHERS = {
  "weights behind": lambda x: jnp.einsum("bhwc,cd->bhwd", x, draw(4, 5)),
  "weights turned": lambda x: jnp.einsum("bhwc,dc->bhwd", x, draw(5, 4)),
  "weights before": lambda x: jnp.einsum("ih,bhwc->biwc", draw(3, 8), x),
  "weights of two axes": lambda x: jnp.einsum(
    "ijhw,bhwc->bijc", draw(3, 5, 8, 8), x
  ),
  "rows and columns": lambda x: jnp.einsum(
    "ih,jw,bhwc->bijc", draw(3, 8), draw(5, 8), x
  ),
  "attention": attention,
  "layer norm": lambda x: nn.LayerNorm().apply(
    {"params": {"scale": draw(4), "bias": draw(4, seed=1)}}, x
  ),
  "gelu": lambda x: layers.exact_gelu(3.0 * x),
  "enlarged": lambda x: layers.resize_bilinear(x, 18, 11),
  "made smaller": lambda x: layers.resize_bilinear(x, 5, 3),
  "repeated": lambda x: jnp.concatenate(
    [x, jnp.broadcast_to(jnp.mean(x, (1, 2), keepdims=True), x.shape)], -1
  ),
  "repeated twice": lambda x: (
    jnp.broadcast_to(jnp.sum(x, 1, keepdims=True), x.shape)
    + jnp.broadcast_to(jnp.sum(x, 2, keepdims=True), x.shape)
  ),
  "cut": lambda x: x[:, 1:, :3, 1],
  "padded rows": lambda x: jnp.pad(x[..., 0], ((0, 0), (1, 0), (0, 0))),
  "largest": lambda x: jnp.max(x, (1, 3)),
  "stopped": lambda x: jax.lax.stop_gradient(jnp.square(x)) + jnp.exp(x),
  "root": lambda x: jax.lax.rsqrt(1.0 + jnp.square(x)),
}
