"""Layers' arithmetic in the form that XLA's CPU backend runs fastest.

Each function equals a plain `lax` operator of `layers`, which chooses between
the two, up to rounding. Gradients are written out where the derived one was
slower; times are of two cores, forward and gradient together
(`benchmarks/layers.py` measures them).
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def convolve(
  x: Array, kernel: Array, stride: int, dilation: int, groups: int = 1
) -> Array:
  """Convolves by XLA's own operator, "SAME" padding; for every backend.

  Args:
    x: [B, H, W, C].
    kernel: [k, l, C / groups, features].
    stride: between the pixels that are read.
    dilation: between the taps of the kernel.
    groups: of channels that do not mix.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), features].
  """
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    "SAME",
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def convolve_1x1(x: Array, kernel: Array, stride: int) -> Array:
  """Convolves `x` [B, H, W, C] with [1, 1, C, features], as a product."""
  if stride > 1:
    x = x[:, ::stride, ::stride]
  # Of two axes: with four, the kernel's gradient transposes both maps first,
  # which takes two to four times as long.
  y = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_few(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
  """Convolves from few channels to many, as from an image; a square kernel.

  The kernel's gradient is a product of patches: from 8 x 256 x 256 x 3 to 32
  channels, the derived one took 1.8 (jax 0.12) to 3 times (0.10) as long. From
  3 to 13 channels, or 16 to 16, patches are slower.
  """
  return convolve(x, kernel, stride, dilation)


def _convolve_few_forward(
  x: Array, kernel: Array, stride: int, dilation: int
) -> tuple[Array, tuple[Array, Array]]:
  return convolve(x, kernel, stride, dilation), (x, kernel)


def _convolve_few_backward(
  stride: int, dilation: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  _, to_x = jax.vjp(lambda x: convolve(x, kernel, stride, dilation), x)
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


convolve_few.defvjp(_convolve_few_forward, _convolve_few_backward)


def _same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
  """Returns TensorFlow's "SAME" padding: the odd pixel goes to the end."""
  total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


def _pad_same(
  x: Array, kernel_size: int, stride: int, dilation: int
) -> tuple[Array, tuple[int, int], tuple[int, int]]:
  """Returns `x` padded, how many pixels before, and the sides of the result."""
  reach = (kernel_size - 1) * dilation + 1
  rows, columns = (_same_pads(side, reach, stride) for side in x.shape[1:3])
  padded = jnp.pad(x, ((0, 0), rows, columns, (0, 0)))
  sides = (-(-x.shape[1] // stride), -(-x.shape[2] // stride))
  return padded, (rows[0], columns[0]), sides


def _shifts(
  padded: Array, side: int, sides: tuple[int, int], stride: int, dilation: int
) -> Iterator[Array]:
  """Yields what each tap of a `side` x `side` kernel reads, row by row."""
  height, width = sides
  for i in range(side):
    for j in range(side):
      top, left = i * dilation, j * dilation
      yield padded[
        :,
        top : top + (height - 1) * stride + 1 : stride,
        left : left + (width - 1) * stride + 1 : stride,
      ]


def _sum_of_shifts(
  padded: Array,
  kernel: Array,
  sides: tuple[int, int],
  stride: int,
  dilation: int,
) -> Array:
  """Sums shifted copies of `padded` [B, H, W, C], each times its kernel tap.

  Args:
    padded: the map, see `_pad_same`.
    kernel: [k, k, C].
    sides: of the result.
    stride: between the pixels that are read.
    dilation: between the taps.
  """
  side, _, channels = kernel.shape
  total: Any = 0.0
  for window, tap in zip(
    _shifts(padded, side, sides, stride, dilation), kernel.reshape(-1, channels)
  ):
    total = total + window * tap
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
  """Convolves each channel of [B, H, W, C] alone with [k, k, C], by shifts.

  The derived gradient copies the map for each tap, which took 2.5 to 7 times as
  long (maps of 8 x 16 x 16 x 240 and 8 x 64 x 64 x 144).
  """
  padded, _, sides = _pad_same(x, kernel.shape[0], stride, dilation)
  return _sum_of_shifts(padded, kernel, sides, stride, dilation)


def _depthwise_forward(
  x: Array, kernel: Array, stride: int, dilation: int
) -> tuple[Array, tuple[Array, Array]]:
  return depthwise(x, kernel, stride, dilation), (x, kernel)


def _depthwise_backward(
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
    (x.shape[1], x.shape[2]),
    1,
    dilation,
  )
  taps = _tap_gradients(padded, gradient, k, stride, dilation)
  return x_gradient, taps.astype(kernel.dtype)


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


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def max_pool_2x(x: Array) -> Array:
  """Halves both sides of `x` [B, H, W, C], keeping each square's maximum."""
  top = jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2])
  bottom = jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2])
  return jnp.maximum(top, bottom)


def mean_pool_2x(x: Array) -> Array:
  """Halves both sides of `x` [B, H, W, C], keeping each square's mean."""
  top = x[:, ::2, ::2] + x[:, ::2, 1::2]
  bottom = x[:, 1::2, ::2] + x[:, 1::2, 1::2]
  return (top + bottom) / 4


def upsample_2x(x: Array) -> Array:
  """Doubles both sides of `x` [B, H, W, C], bilinear, half-pixel centres."""
  return _lerp_2x(_lerp_2x(x, 1), 2)


def _neighbours(
  before: Array, after: Array, first: Array, last: Array, axis: int
) -> tuple[Array, Array]:
  """Shifts `before` forth and `after` back by one cell along an axis.

  The cells that this leaves empty come from the ends of `first` and `last`.
  """
  size = before.shape[axis]
  cut = functools.partial(jax.lax.slice_in_dim, axis=axis)
  forth = [cut(first, 0, 1), cut(before, 0, size - 1)]
  back = [cut(after, 1, size), cut(last, size - 1, size)]
  return jnp.concatenate(forth, axis), jnp.concatenate(back, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _lerp_2x(x: Array, axis: int) -> Array:
  """Doubles one axis: half-pixel centres, edges repeated.

  The gradient derived from the concatenations took 1.6 (jax 0.12) to 2 times
  (0.10) as long on maps of 8 x 32 x 32 x 16.
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
  # A pixel got a quarter of the odd cell before it and of the even one after
  # it; at the edges, of its own two.
  before, after = _neighbours(odd, even, even, odd, axis)
  gradient = 0.75 * (even + odd) + 0.25 * (before + after)
  # Unfused with what comes next, which would compute it once an operand.
  return (jax.lax.optimization_barrier(gradient),)


_lerp_2x.defvjp(_lerp_2x_forward, _lerp_2x_backward)
