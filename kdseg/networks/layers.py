"""Layers that compute the same everywhere and are fast where they run.

XLA's CPU backend and its GPU and TPU backends want opposite forms of the same
arithmetic: a depthwise convolution as shifted multiplications against a
grouped convolution, a pooling as slices against `reduce_window`. Each helper
here takes `implementation`, "portable" (plain `lax` operators) or "cpu"; empty
means: chosen by the default backend when the function is traced. Parameters
have the same names and shapes in both, outputs are equal up to rounding, and
`layers_test` holds them to it.
"""

from collections.abc import Callable
from collections.abc import Iterator
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

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
  """[0, 1] RGB to about zero mean and unit deviation, with fixed numbers.

  One mean and one deviation for all channels: dermoscopic skin is bright and
  reddish, and BatchNorm follows at once.
  """
  return (image.astype(jnp.float32) - 0.5) / 0.25


def _means(*maps: Array) -> Array:
  """Means over all axes but the last, [maps, C]."""
  return jnp.stack([jnp.mean(x, tuple(range(x.ndim - 1))) for x in maps])


def _over_devices(means: Array, axis_name: str | None) -> Array:
  return means if axis_name is None else jax.lax.pmean(means, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize_batch(
  x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[Array, Array, Array]:
  """Returns x [..., C] normalised, its mean and its variance, all float32.

  Has its gradient written out (Ioffe and Szegedy, ICML 2015, section 3): what
  is derived from the statistics keeps and reads more maps, and took 1.2 to 2.7
  times as long on a CPU. The statistics pass no gradient on.
  """
  return _normalize_batch_forward(x, scale, bias, epsilon, axis_name)[0]


def _normalize_batch_forward(
  x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array, Array]]:
  wide = x.astype(jnp.float32)
  mean, square = _over_devices(_means(wide, jnp.square(wide)), axis_name)
  # Rounding can make it negative.
  variance = jnp.maximum(square - jnp.square(mean), 0.0)
  inverse = jax.lax.rsqrt(variance + epsilon)
  y = (wide - mean) * (inverse * scale) + bias
  return (y, mean, variance), (x, mean, inverse, scale)


def _normalize_batch_backward(
  epsilon: float,
  axis_name: str | None,
  saved: tuple[Array, Array, Array, Array],
  gradients: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
  del epsilon
  x, mean, inverse, scale = saved
  gradient = gradients[0]
  wide = x.astype(jnp.float32)
  means = _means(gradient, gradient * wide)
  # Not of `wide - mean`, which would be a map of its own, written and read.
  own = means.at[1].add(-mean * means[0])
  # Through the statistics, a pixel has a part in the pixels of all devices.
  shared = _over_devices(own, axis_name)
  x_gradient = (inverse * scale) * (
    gradient - shared[0] - (wide - mean) * (jnp.square(inverse) * shared[1])
  )
  count = x.size // x.shape[-1]
  return (
    x_gradient.astype(x.dtype),
    count * own[1] * inverse,
    count * own[0],
  )


_normalize_batch.defvjp(_normalize_batch_forward, _normalize_batch_backward)


class _CpuBatchNorm(nn.BatchNorm):
  """Flax's, in training and over the last axis: the same, sooner."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = x.shape[-1:]
    mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    variance = self.variable("batch_stats", "var", jnp.ones, shape)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    first = self.is_initializing()
    y, *now = _normalize_batch(
      x, scale, bias, self.epsilon, None if first else self.axis_name
    )
    if not first:
      for kept, new in zip((mean, variance), now):
        kept.value = self.momentum * kept.value + (1 - self.momentum) * new
    return y.astype(self.dtype)


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
  on_cpu = implementation_for_backend(implementation) == "cpu"
  return functools.partial(
    _CpuBatchNorm if train and on_cpu else nn.BatchNorm,
    use_running_average=not train,
    momentum=momentum,
    epsilon=epsilon,
    dtype=dtype,
    axis_name=axis_name,
  )


def _same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
  """TensorFlow's "SAME": the odd pixel goes to the end."""
  total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


class Conv(nn.Module):
  """A dense convolution, "SAME" padding; 1x1 runs as a product on the CPU."""

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
    by_product = implementation_for_backend(self.implementation) == "cpu"
    if sides == (1, 1) and by_product:
      if self.stride > 1:
        x = x[:, :: self.stride, :: self.stride]
      # Of two axes: the kernel's gradient of a product of four is preceded by
      # a turned copy of both maps, two to four times the time.
      y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
      y = y.reshape(*x.shape[:-1], self.features)
    else:
      few_to_many = x.shape[-1] <= 4 and self.features >= 32
      square = sides[0] == sides[1]
      convolve = (
        _convolve_few if by_product and few_to_many and square else _convolve
      )
      y = convolve(x, kernel, self.stride, self.dilation)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)
    return y


def _convolve(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    "SAME",
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_few(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
  """A convolution from few channels to many, as of an image.

  Its kernel's gradient is a product of patches: forward and gradient of a
  convolution of 8 x 256 x 256 x 3 to 32 channels took 1.8 (jax 0.12) to 3 times
  (0.10) as long otherwise. From 3 to 13 channels, or 16 to 16, patches are
  slower.
  """
  return _convolve(x, kernel, stride, dilation)


def _convolve_few_forward(
  x: Array, kernel: Array, stride: int, dilation: int
) -> tuple[Array, tuple[Array, Array]]:
  return _convolve(x, kernel, stride, dilation), (x, kernel)


def _convolve_few_backward(
  stride: int, dilation: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  _, to_x = jax.vjp(lambda x: _convolve(x, kernel, stride, dilation), x)
  padded, _, sides = _pad_same(x, kernel.shape[0], stride, dilation)
  patches = jnp.concatenate(
    list(_shifts(padded, kernel.shape[0], sides, stride, dilation)), -1
  )
  kernel_gradient = jnp.matmul(
    patches.reshape(-1, patches.shape[-1]).T,
    gradient.reshape(-1, gradient.shape[-1]),
    preferred_element_type=jnp.float32,
  )
  return (
    to_x(gradient)[0],
    kernel_gradient.reshape(kernel.shape).astype(kernel.dtype),
  )


_convolve_few.defvjp(_convolve_few_forward, _convolve_few_backward)


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
      return _shifted_depthwise(x, kernel[:, :, 0], self.stride, self.dilation)
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (self.stride, self.stride),
      "SAME",
      rhs_dilation=(self.dilation, self.dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=x.shape[-1],
    )


def _sum_of_shifts(
  padded: Array, kernel: Array, sides: tuple[int, int], stride: int, rate: int
) -> Array:
  """Adds up shifted copies of `padded`, each times its tap of `kernel`.

  Args:
    padded: [B, H, W, C].
    kernel: [k, k, C].
    sides: of the result.
    stride: between the pixels that are read.
    rate: between the taps, the dilation.
  """
  side, _, channels = kernel.shape
  total = 0.0
  for window, tap in zip(
    _shifts(padded, side, sides, stride, rate), kernel.reshape(-1, channels)
  ):
    total = total + window * tap
  return total


def _shifts(
  padded: Array, side: int, sides: tuple[int, int], stride: int, rate: int
) -> Iterator[Array]:
  """Yields what each tap of a kernel of `side` x `side` meets, row by row."""
  height, width = sides
  for i in range(side):
    for j in range(side):
      top, left = i * rate, j * rate
      yield padded[
        :,
        top : top + (height - 1) * stride + 1 : stride,
        left : left + (width - 1) * stride + 1 : stride,
      ]


def _pad_same(
  x: Array, kernel_size: int, stride: int, dilation: int
) -> tuple[Array, tuple[int, int], tuple[int, int]]:
  """Returns `x` padded, how many pixels before, and the sides of the result."""
  reach = (kernel_size - 1) * dilation + 1
  rows, columns = (_same_pads(side, reach, stride) for side in x.shape[1:3])
  padded = jnp.pad(x, ((0, 0), rows, columns, (0, 0)))
  sides = (-(-x.shape[1] // stride), -(-x.shape[2] // stride))
  return padded, (rows[0], columns[0]), sides


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted_depthwise(
  x: Array, kernel: Array, stride: int, dilation: int
) -> Array:
  """A depthwise convolution of [B, H, W, C] by [k, k, C]; no grouped one.

  Has its gradients written out: derived, each tap's is a copy of the map, which
  took 2.5 to 7 times as long (maps of 8 x 16 x 16 x 240, 8 x 64 x 64 x 144).
  """
  padded, _, sides = _pad_same(x, kernel.shape[0], stride, dilation)
  return _sum_of_shifts(padded, kernel, sides, stride, dilation)


def _shifted_depthwise_forward(
  x: Array, kernel: Array, stride: int, dilation: int
) -> tuple[Array, tuple[Array, Array]]:
  return _shifted_depthwise(x, kernel, stride, dilation), (x, kernel)


def _shifted_depthwise_backward(
  stride: int, dilation: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  k = kernel.shape[0]
  reach = (k - 1) * dilation
  padded, before, sides = _pad_same(x, k, stride, dilation)
  spread = [
    (
      reach - before[axis],
      x.shape[1 + axis] + before[axis] - (sides[axis] - 1) * stride - 1,
      stride - 1,
    )
    for axis in (0, 1)
  ]
  x_gradient = _sum_of_shifts(
    jax.lax.pad(
      gradient,
      jnp.zeros((), gradient.dtype),
      ((0, 0, 0), *spread, (0, 0, 0)),
    ),
    kernel[::-1, ::-1],
    x.shape[1:3],
    1,
    dilation,
  )
  return x_gradient, _tap_gradients(
    padded, gradient, k, stride, dilation
  ).astype(kernel.dtype)


def _tap_gradients(
  padded: Array, gradient: Array, k: int, stride: int, dilation: int
) -> Array:
  """Returns [k, k, C] float32: each tap's products, summed over all pixels.

  Row by row, so that a row is still in the cache for the next tap.
  """
  batch, height, width, channels = gradient.shape
  reach = (k - 1) * dilation
  taps = [(i * dilation, j * dilation) for i in range(k) for j in range(k)]

  def add_row(
    sums: tuple[Array, ...], number: Array
  ) -> tuple[tuple[Array, ...], None]:
    image, row = number // height, number % height
    above = jax.lax.dynamic_slice(
      padded,
      (image, row * stride, 0, 0),
      (1, reach + 1, padded.shape[2], channels),
    )[0].astype(jnp.float32)
    own = jax.lax.dynamic_slice(
      gradient, (image, row, 0, 0), (1, 1, width, channels)
    )[0, 0].astype(jnp.float32)
    added = [
      total + above[top, left : left + (width - 1) * stride + 1 : stride] * own
      for total, (top, left) in zip(sums, taps)
    ]
    return tuple(added), None

  zeros = tuple(jnp.zeros((width, channels), jnp.float32) for _ in taps)
  sums, _ = jax.lax.scan(add_row, zeros, jnp.arange(batch * height))
  return jnp.stack([jnp.sum(x, 0) for x in sums]).reshape(k, k, channels)


_shifted_depthwise.defvjp(
  _shifted_depthwise_forward, _shifted_depthwise_backward
)


def max_pool_2x(x: Array, implementation: str = "") -> Array:
  """Halves both sides of `x` [B, H, W, C], keeping each square's maximum.

  Raises:
    ValueError: if a side is odd.
  """
  if x.shape[1] % 2 or x.shape[2] % 2:
    raise ValueError(f"both sides must be even to be halved: {x.shape}")
  if implementation_for_backend(implementation) == "cpu":
    top = jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2])
    bottom = jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2])
    return jnp.maximum(top, bottom)
  return nn.max_pool(x, (2, 2), (2, 2))


def mean_pool_2x(x: Array, implementation: str = "") -> Array:
  """Halves both sides of `x` [B, H, W, C], keeping each square's mean.

  Raises:
    ValueError: if a side is odd.
  """
  if x.shape[1] % 2 or x.shape[2] % 2:
    raise ValueError(f"both sides must be even to be halved: {x.shape}")
  if implementation_for_backend(implementation) == "cpu":
    top = x[:, ::2, ::2] + x[:, ::2, 1::2]
    bottom = x[:, 1::2, ::2] + x[:, 1::2, 1::2]
    return (top + bottom) / 4
  return nn.avg_pool(x, (2, 2), (2, 2))


def _neighbours(
  before: Array, after: Array, first: Array, last: Array, axis: int
) -> tuple[Array, Array]:
  """Shifts `before` forth and `after` back by one, `first` and `last` put in.

  Both are of one side; `first` and `last` are taken at its two ends.
  """
  size = before.shape[axis]
  cut = functools.partial(jax.lax.slice_in_dim, axis=axis)
  forth = [cut(first, 0, 1), cut(before, 0, size - 1)]
  back = [cut(after, 1, size), cut(last, size - 1, size)]
  return jnp.concatenate(forth, axis), jnp.concatenate(back, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _lerp_2x(x: Array, axis: int) -> Array:
  """Doubles one axis: half-pixel centres, edges repeated.

  Has its gradient written out: derived from the concatenations, it took 1.6
  (jax 0.12) to 2 times (0.10) the CPU time on maps of 8 x 32 x 32 x 16.
  """
  before, after = _neighbours(x, x, x, x, axis)
  pair = jnp.stack(
    [0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1
  )
  shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
  return pair.reshape(shape)


def _lerp_2x_forward(x: Array, axis: int) -> tuple[Array, None]:
  return _lerp_2x(x, axis), None


def _lerp_2x_backward(axis: int, _: None, gradient: Array) -> tuple[Array]:
  cut = functools.partial(jax.lax.slice_in_dim, gradient, stride=2, axis=axis)
  even, odd = cut(0, None), cut(1, None)
  # The pixel before gave a quarter to its odd one, the one after to its even
  # one; the edges gave it to themselves.
  before, after = _neighbours(odd, even, even, odd, axis)
  gradient = 0.75 * (even + odd) + 0.25 * (before + after)
  # Unfused with what comes next, which would read it once an operand.
  return (jax.lax.optimization_barrier(gradient),)


_lerp_2x.defvjp(_lerp_2x_forward, _lerp_2x_backward)


@functools.partial(jax.jit, static_argnames=("implementation",), inline=False)
def upsample_2x(x: Array, implementation: str = "") -> Array:
  """Doubles both sides of `x` [B, H, W, C], bilinear, half-pixel centres.

  Its own jitted function, so that an exporter meets one call by this name and
  writes one resize operator for it.
  """
  if implementation_for_backend(implementation) == "cpu":
    return _lerp_2x(_lerp_2x(x, 1), 2)
  batch, height, width, channels = x.shape
  shape = (batch, 2 * height, 2 * width, channels)
  return jax.image.resize(x, shape, "bilinear").astype(x.dtype)


def upsample(x: Array, factor: int, implementation: str = "") -> Array:
  """Enlarges `x` [B, H, W, C] by a power of two, in bilinear doublings.

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

  Its own jitted function, as `upsample_2x`.
  """
  if x.shape[1:3] == (height, width):
    return x
  shape = (x.shape[0], height, width, x.shape[3])
  return jax.image.resize(x, shape, "bilinear", antialias=False).astype(x.dtype)


@functools.partial(jax.jit, inline=False)
def exact_gelu(x: Array) -> Array:
  """Returns x times the normal distribution function of x.

  Its own jitted function, as `upsample_2x`.
  """
  return jax.nn.gelu(x, approximate=False)


def space_to_depth(x: Array, block: int) -> Array:
  """[B, H, W, C] -> [B, H/block, W/block, block * block * C].

  Raises:
    ValueError: if a side is not divisible by `block`.
  """
  batch, height, width, channels = x.shape
  if height % block or width % block:
    raise ValueError(f"sides {height}x{width} must be divisible by {block}")
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

  Skin tone and vignette are beyond the reach of a small network's kernels.
  A mean and a 1x1 convolution with bias: one value a channel and image is too
  little for BatchNorm.
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

  One logit a cell, enlarged bilinearly, plus a linear correction of each of
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
    enlarged = upsample(cell, self.block)
    return (enlarged + depth_to_space(pixels, self.block))[..., 0]
