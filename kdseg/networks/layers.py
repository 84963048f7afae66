"""Layers that compute the same on every backend, in the form it runs fastest.

XLA's CPU backend and its GPU and TPU backends want opposite forms of the same
arithmetic: a depthwise convolution as shifted multiplications or as a grouped
convolution, a pooling as slices or as `reduce_window`. `implementation` is
"portable" (plain `lax` operators) or "cpu" (`cpu_kernels`); empty chooses by
the default backend when the function is traced. Both have parameters of the
same names and shapes, and outputs that are equal up to rounding.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import cpu_batch_norm
from kdseg.networks import cpu_kernels

Array = jax.Array

# He initialisation over fan-out, as for most ReLU segmentation networks.
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def implementation_for_backend(implementation: str = "") -> str:
  """Returns `implementation`, or the one that suits the default backend.

  Raises:
    ValueError: if the name is neither "", "cpu" nor "portable".
  """
  if implementation not in ("", "cpu", "portable"):
    raise ValueError(
      f'implementation must be "", "cpu" or "portable": {implementation!r}'
    )
  if implementation:
    return implementation
  return "cpu" if jax.default_backend() == "cpu" else "portable"


def normalize(image: Array) -> Array:
  """Brings [0, 1] RGB to about zero mean and unit deviation, by fixed numbers.

  One mean and one deviation for all channels: dermoscopic skin is bright and
  reddish, and BatchNorm follows at once.
  """
  return (image.astype(jnp.float32) - 0.5) / 0.25


def require_divisible(x: Array, divisor: int) -> None:
  """Checks the sides of `x` [B, H, W, C].

  Raises:
    ValueError: if `divisor` does not divide both.
  """
  if x.shape[1] % divisor or x.shape[2] % divisor:
    raise ValueError(f"both sides must be divisible by {divisor}: {x.shape}")


def batch_norm(
  train: bool,
  *,
  dtype: Any = jnp.float32,
  axis_name: str | None = None,
  epsilon: float = 1e-3,
  momentum: float = 0.9,
  implementation: str = "",
) -> Callable[..., nn.Module]:
  """Returns a BatchNorm factory, statistics shared over `axis_name`."""
  if train and implementation_for_backend(implementation) == "cpu":
    norm: Callable[..., nn.Module] = cpu_batch_norm.CpuBatchNorm
  else:
    norm = functools.partial(nn.BatchNorm, use_running_average=not train)
  return functools.partial(
    norm, momentum=momentum, epsilon=epsilon, dtype=dtype, axis_name=axis_name
  )


class Conv(nn.Module):
  """A dense convolution, "SAME" padding."""

  features: int
  kernel_size: int | tuple[int, int] = 3
  stride: int = 1
  dilation: int = 1
  use_bias: bool = False
  dtype: Any = jnp.float32
  implementation: str = ""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    sides = self.kernel_size
    if isinstance(sides, int):
      sides = (sides, sides)
    kernel = self.param(
      "kernel", kernel_init, (*sides, x.shape[-1], self.features)
    )
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    on_cpu = implementation_for_backend(self.implementation) == "cpu"
    few_to_many = x.shape[-1] <= 4 and self.features >= 32
    if on_cpu and sides == (1, 1):
      y = cpu_kernels.convolve_1x1(x, kernel, self.stride)
    elif on_cpu and few_to_many and sides[0] == sides[1]:
      y = cpu_kernels.convolve_few(x, kernel, self.stride, self.dilation)
    else:
      y = cpu_kernels.convolve(x, kernel, self.stride, self.dilation)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)
    return y


class DepthwiseConv(nn.Module):
  """One kernel a channel, "SAME" padding, no bias."""

  kernel_size: int = 3
  stride: int = 1
  dilation: int = 1
  dtype: Any = jnp.float32
  implementation: str = ""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    k = self.kernel_size
    kernel = self.param("kernel", kernel_init, (k, k, 1, x.shape[-1]))
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if implementation_for_backend(self.implementation) == "cpu":
      return cpu_kernels.depthwise(
        x, kernel[:, :, 0], self.stride, self.dilation
      )
    return cpu_kernels.convolve(
      x, kernel, self.stride, self.dilation, groups=x.shape[-1]
    )


def max_pool_2x(x: Array, implementation: str = "") -> Array:
  """Halves both sides of `x` [B, H, W, C], keeping each square's maximum.

  Raises:
    ValueError: if a side is odd.
  """
  require_divisible(x, 2)
  if implementation_for_backend(implementation) == "cpu":
    return cpu_kernels.max_pool_2x(x)
  return nn.max_pool(x, (2, 2), (2, 2))


def mean_pool_2x(x: Array, implementation: str = "") -> Array:
  """Halves both sides of `x` [B, H, W, C], keeping each square's mean.

  Raises:
    ValueError: if a side is odd.
  """
  require_divisible(x, 2)
  if implementation_for_backend(implementation) == "cpu":
    return cpu_kernels.mean_pool_2x(x)
  return nn.avg_pool(x, (2, 2), (2, 2))


@functools.partial(jax.jit, static_argnames=("implementation",), inline=False)
def upsample_2x(x: Array, implementation: str = "") -> Array:
  """Doubles both sides of `x` [B, H, W, C], bilinear, half-pixel centres.

  A jitted function, so that an exporter meets one call by this name and writes
  one resize operator for it.
  """
  if implementation_for_backend(implementation) == "cpu":
    return cpu_kernels.upsample_2x(x)
  batch, height, width, channels = x.shape
  shape = (batch, 2 * height, 2 * width, channels)
  return jax.image.resize(x, shape, "bilinear").astype(x.dtype)


def upsample(x: Array, factor: int, implementation: str = "") -> Array:
  """Upsamples `x` [B, H, W, C] by a power of two, in bilinear doublings.

  Raises:
    ValueError: if `factor` is not a power of two.
  """
  if factor < 1 or factor & (factor - 1):
    raise ValueError(f"factor must be a power of two: {factor}")
  while factor > 1:
    x = upsample_2x(x, implementation=implementation)
    factor //= 2
  return x


@functools.partial(jax.jit, static_argnums=(1, 2), inline=False)
def resize_bilinear(x: Array, height: int, width: int) -> Array:
  """Resizes `x` [B, h, w, C] to [B, height, width, C], half-pixel centres.

  A jitted function for the reason of `upsample_2x`.
  """
  if x.shape[1:3] == (height, width):
    return x
  shape = (x.shape[0], height, width, x.shape[3])
  return jax.image.resize(x, shape, "bilinear", antialias=False).astype(x.dtype)


@functools.partial(jax.jit, inline=False)
def exact_gelu(x: Array) -> Array:
  """Returns x times the normal distribution function of x.

  A jitted function for the reason of `upsample_2x`.
  """
  return jax.nn.gelu(x, approximate=False)


def space_to_depth(x: Array, block: int) -> Array:
  """[B, H, W, C] -> [B, H/block, W/block, block * block * C].

  Raises:
    ValueError: if a side is not divisible by `block`.
  """
  require_divisible(x, block)
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // block, block, width // block, block, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(
    batch, height // block, width // block, block * block * channels
  )


def depth_to_space(x: Array, block: int) -> Array:
  """[B, H, W, block * block * C] -> [B, H * block, W * block, C].

  The inverse of `space_to_depth`.

  Raises:
    ValueError: if the channels are not divisible by `block` squared.
  """
  batch, height, width, channels = x.shape
  if channels % block**2:
    raise ValueError(f"{channels} channels must be divisible by {block**2}")
  rest = channels // block**2
  x = x.reshape(batch, height, width, block, block, rest)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height * block, width * block, rest)


class ConvBlock(nn.Module):
  """Convolution, BatchNorm, activation; the building block of most networks.

  No bias in the convolution: before BatchNorm it has no gradient, and Adam
  makes full steps out of its rounding noise.
  """

  features: int
  norm: Callable[..., nn.Module]
  kernel_size: int | tuple[int, int] = 3
  stride: int = 1
  dilation: int = 1
  activation: Callable[[Array], Array] = nn.relu
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = Conv(
      self.features,
      self.kernel_size,
      self.stride,
      self.dilation,
      dtype=self.dtype,
      name="conv",
    )(x)
    return self.activation(self.norm(name="norm")(x))


class WholeImage(nn.Module):
  """Adds the projected mean of a map to each of its cells.

  Skin tone and vignette are wider than what a small network's kernels see. The
  projection has a bias and no BatchNorm: one value a channel and image is too
  little for statistics.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    return x + Conv(
      x.shape[-1], 1, use_bias=True, dtype=self.dtype, name="project"
    )(mean)


class PixelHead(nn.Module):
  """One logit a pixel from a map at stride `block`, without a map at full size.

  One logit a cell, upsampled bilinearly, plus a linear correction of each of
  the cell's pixels.
  """

  block: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    cell = Conv(1, 1, use_bias=True, dtype=self.dtype, name="cell")(x)
    pixels = Conv(
      self.block**2, 1, use_bias=False, dtype=self.dtype, name="pixels"
    )(x)
    cell, pixels = cell.astype(jnp.float32), pixels.astype(jnp.float32)
    logits = upsample(cell, self.block) + depth_to_space(pixels, self.block)
    return logits[..., 0]
