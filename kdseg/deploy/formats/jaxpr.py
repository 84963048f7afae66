"""Walks a network's jaxpr on behalf of the writers of graphs (ONNX, LiteRT).

Everything that does not depend on the format is here: operations on weights
alone are computed, calls are entered, a BatchNorm is folded into the
convolution before it, and operations that a format does not have are refused.
"""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import Generic
from typing import NamedTuple
from typing import TypeVar
from unittest import mock

import jax
import numpy as np

# Stands for the batch size while a program is traced: no network has this side.
BATCH = 7919
# Calls that only wrap another program.
_CALLS = frozenset(
  {
    "jit", "pjit", "closed_call", "checkpoint", "remat2", "custom_jvp_call",
    "custom_vjp_call",
  }
)  # fmt: skip
# Operations that may take a constant that is narrower than its program says.
_ELEMENTWISE = frozenset(
  {
    "add", "sub", "mul", "div", "max", "min", "neg", "rsqrt", "sqrt", "exp",
    "log", "logistic", "tanh", "ge", "gt", "le", "lt", "select_n",
    "convert_element_type", "integer_pow", "stop_gradient", "square",
  }
)  # fmt: skip
TO_NCHW = (0, 3, 1, 2)

Shape = tuple[int, ...]
# Cells before and after, by axis.
Sides = Sequence[tuple[int, int]]


class Narrow(np.ndarray):
  """A constant whose first side is 1 where the program has the batch."""


class UnsupportedError(NotImplementedError):
  """An operation of the program that a writer cannot write."""


@dataclasses.dataclass
class Value:
  """A tensor of the graph; a writer's subclass adds how the graph names it.

  Attributes:
    shape: as JAX has it.
    convolution: index of the convolution that made it, as long as nothing else
      reads it, so that a norm behind it may change the convolution's weights.
    narrow: the value that this one repeats along its sides of 1.
  """

  shape: Shape
  convolution: int | None = dataclasses.field(default=None, kw_only=True)
  narrow: Any = dataclasses.field(default=None, kw_only=True)


V = TypeVar("V", bound=Value)
Operands = Sequence[V | np.ndarray]


class Window(NamedTuple):
  """A pooling window over the two sides of a map, in cells."""

  sides: tuple[int, int]
  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]


def trace(
  function: Callable[[jax.Array], jax.Array], shape: Sequence[int], dtype: Any
) -> Any:
  """Returns the closed jaxpr of a function of `[BATCH, *shape]`."""
  image = jax.ShapeDtypeStruct((BATCH, *shape), dtype)
  # A graph needs the layers' portable implementation, not the CPU's.
  with mock.patch.object(jax, "default_backend", return_value="portable"):
    # The lambda is new, so that JAX does not reuse a trace made for the CPU.
    return jax.make_jaxpr(lambda x: function(x))(image)


def check_convolution(params: Mapping[str, Any], kernel: Any) -> None:
  """Refuses anything but a convolution of [B, H, W, C] with constant weights.

  Raises:
    UnsupportedError: on any other.
  """
  numbers = params["dimension_numbers"]
  plain = (
    tuple(numbers.lhs_spec) == TO_NCHW
    and tuple(numbers.rhs_spec) == (3, 2, 0, 1)
    and tuple(numbers.out_spec) == TO_NCHW
    and set(params["lhs_dilation"]) == {1}
    and params["batch_group_count"] == 1
  )
  if not (plain and isinstance(kernel, np.ndarray)):
    raise UnsupportedError(f"a convolution with {numbers}")


def read_window(params: Mapping[str, Any]) -> Window:
  """Returns the window of a pooling over the two sides of [B, H, W, C].

  Raises:
    UnsupportedError: if it also pools over images or channels, or is dilated.
  """
  sides, strides = params["window_dimensions"], params["window_strides"]
  padding = [(int(low), int(high)) for low, high in params["padding"]]
  plain = (
    len(sides) == 4
    and set(params["base_dilation"]) | set(params["window_dilation"]) == {1}
    and all(
      sides[axis] == strides[axis] == 1 and padding[axis] == (0, 0)
      for axis in (0, 3)
    )
  )
  if not plain:
    raise UnsupportedError(f"pooling over {sides}")
  return Window(
    (int(sides[1]), int(sides[2])),
    (int(strides[1]), int(strides[2])),
    (padding[1], padding[2]),
  )


def is_zero(operand: Any) -> bool:
  """Whether an operand is the constant 0."""
  return (
    isinstance(operand, np.ndarray) and operand.size == 1 and not operand.any()
  )


def per_channel(constant: np.ndarray, channels: int) -> np.ndarray | None:
  """Returns [channels] numbers if a constant has one, or one a channel."""
  fits = constant.size in (1, channels) and (
    constant.ndim == 0 or constant.shape[-1] == constant.size
  )
  return np.broadcast_to(constant.reshape(-1), (channels,)) if fits else None


def narrow_shape(shape: Shape, params: Mapping[str, Any]) -> Shape:
  """Returns a shape with sides of 1 for axes that a broadcast adds."""
  sides = dict(zip(params["broadcast_dimensions"], shape))
  return tuple(sides.get(axis, 1) for axis in range(len(params["shape"])))


class Walker(Generic[V]):
  """Writes a program into a graph, one operation at a time.

  A subclass has two tables of operators, the hooks at the end of this class,
  and a method `_NAME(operands, params, out)` for each other operation NAME;
  operands are values of the graph, or arrays where constant, and `out` is the
  abstract result. A call of a function NAME of `networks.layers` is written as
  one operator where there is a method `_call_NAME(operand, out)`.
  """

  # As messages call the format.
  format = ""
  # By primitive: the format's operators.
  elementwise: Mapping[str, str] = {}
  reductions: Mapping[str, str] = {}

  def run(
    self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]
  ) -> list[Any]:
    """Writes a program; returns its results."""
    values: dict[Any, Any] = {}
    for variable, const in zip(jaxpr.constvars, consts):
      values[variable] = np.asarray(const)
    values.update(zip(jaxpr.invars, arguments))

    readers = [v for e in jaxpr.eqns for v in e.invars] + list(jaxpr.outvars)
    count = collections.Counter(v for v in readers if not hasattr(v, "val"))

    def read(variable: Any) -> Any:
      if hasattr(variable, "val"):  # a literal
        literal = np.asarray(variable.val)
        if (literal == BATCH).any():
          raise UnsupportedError("the program computes with the batch's size")
        return literal
      value = values[variable]
      if count[variable] > 1 and isinstance(value, Value):
        value.convolution = None
      return value

    for equation in jaxpr.eqns:
      operands = [read(variable) for variable in equation.invars]
      results = self._equation(equation, operands)
      values.update(zip(equation.outvars, results))
    return [read(variable) for variable in jaxpr.outvars]

  def _equation(self, equation: Any, operands: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    out = [variable.aval for variable in equation.outvars]
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if name in _CALLS and inner is not None:
      whole = getattr(self, f"_call_{params.get('name')}", None)
      if whole is not None and isinstance(operands[0], Value):
        return [whole(operands[0], out[0])]
      if not hasattr(inner, "consts"):
        return self.run(inner, (), operands)
      return self.run(inner.jaxpr, inner.consts, operands)
    narrow = any(isinstance(operand, Narrow) for operand in operands)
    if narrow and name not in _ELEMENTWISE:
      raise UnsupportedError(f"{name} of a constant as long as the batch")
    if all(isinstance(operand, np.ndarray) for operand in operands):
      constant = self._constant(equation, operands)
      return [constant.view(Narrow) if narrow else constant]
    if name in self.elementwise:
      return [self._elementwise(name, operands, out[0])]
    if name in self.reductions:
      axes = tuple(int(axis) for axis in params["axes"])
      return [self._reduced(name, operands[0], axes, out[0].shape)]
    method = getattr(self, f"_{name}", None)
    if method is None:
      raise UnsupportedError(
        f"the program has the operation {name}, which cannot be written as "
        f"{self.format}"
      )
    return [method(operands, params, out[0])]

  def _constant(self, equation: Any, operands: list[np.ndarray]) -> np.ndarray:
    primitive, params = equation.primitive, equation.params
    if primitive.name == "broadcast_in_dim" and BATCH in params["shape"]:
      # The graph's operators broadcast it over whatever batch there will be.
      narrow = narrow_shape(operands[0].shape, params)
      return np.asarray(operands[0]).reshape(narrow).view(Narrow)
    return np.asarray(primitive.bind(*map(np.asarray, operands), **params))

  # ------------------------------------------------------------ elementwise

  def _elementwise(self, name: str, operands: Operands[V], out: Any) -> V:
    if name == "select_n":
      which, no, yes = operands
      operands = [which, yes, no]
    if (
      name == "max" and is_zero(operands[1]) and isinstance(operands[0], Value)
    ):
      return self._relu(operands[0], out)
    if name in ("add", "sub", "mul", "div"):
      folded = self._fold(name, *operands)
      if folded is not None:
        return folded
    # The operator broadcasts a side of 1 by itself.
    narrow = [getattr(x, "narrow", None) or x for x in operands]
    repeated = sum(x is not y for x, y in zip(operands, narrow))
    if np.broadcast_shapes(*(x.shape for x in narrow)) == out.shape:
      operands = narrow if repeated == 1 else operands
    return self._operate(self.elementwise[name], operands, out)

  def _fold(
    self, name: str, left: V | np.ndarray, right: V | np.ndarray
  ) -> V | None:
    """Moves a per-channel scale or shift into the convolution before it."""
    if isinstance(left, np.ndarray) and name in ("add", "mul"):
      left, right = right, left
    if isinstance(left, np.ndarray) or not isinstance(right, np.ndarray):
      return None
    channel = per_channel(right, left.shape[-1])
    if left.convolution is None or channel is None:
      return None
    kernel, bias, axis = self._read_convolution(left.convolution)
    if name in ("mul", "div"):
      scale = channel if name == "mul" else 1.0 / channel
      sides = [-1 if a == axis else 1 for a in range(4)]
      kernel = kernel * scale.reshape(sides)
      bias = bias * scale
    else:
      bias = bias + (channel if name == "add" else -channel)
    self._write_convolution(
      left.convolution, kernel.astype(np.float32), bias.astype(np.float32)
    )
    return left

  def _square(self, operands: list[V], params: Any, out: Any) -> V:
    return self._elementwise("mul", [operands[0], operands[0]], out)

  def _stop_gradient(self, operands: list[V], params: Any, out: Any) -> V:
    [x] = operands
    x.convolution = None
    return x

  _copy = _stop_gradient

  # ------------------------------------------------------------------ shapes

  def _reshape(self, operands: list[V], params: Any, out: Any) -> V:
    return self._in_shape(operands[0], out.shape)

  _squeeze = _reshape

  def _in_shape(self, x: V, shape: Sequence[int]) -> V:
    """Returns a value in another shape, the batch still its first axis."""
    shape = tuple(shape)
    if x.shape == shape:
      return x
    if x.shape[:1] != shape[:1] or BATCH in shape[1:]:
      raise UnsupportedError(f"reshaping {x.shape} to {shape} moves the batch")
    return self._reshaped(x, shape)

  def _broadcast_in_dim(self, operands: list[V], params: Any, out: Any) -> V:
    narrow = narrow_shape(operands[0].shape, params)
    x = self._in_shape(operands[0], narrow)
    if narrow == out.shape:
      return x
    if narrow[0] != out.shape[0] or BATCH in out.shape[1:]:
      raise UnsupportedError(f"broadcasting {x.shape} to {out.shape}")
    made = self._repeated(x, out.shape)
    made.narrow = x
    return made

  def _transpose(self, operands: list[V], params: Any, out: Any) -> V:
    return self._permute(operands[0], params["permutation"])

  def _permute(self, x: V, axes: Sequence[int]) -> V:
    """Returns a value with its axes in that order."""
    axes = tuple(int(axis) for axis in axes)
    if axes == tuple(range(len(axes))):
      return x
    return self._permuted(x, axes)

  def _pad(self, operands: Operands[V], params: Any, out: Any) -> V:
    x, value = operands
    config = params["padding_config"]
    plain = all(low >= 0 and high >= 0 and not gap for low, high, gap in config)
    if isinstance(x, np.ndarray) or isinstance(value, Value) or not plain:
      raise UnsupportedError(f"padding of {x.shape} by {config}")
    sides = [(int(low), int(high)) for low, high, _ in config]
    return self._padded(x, sides, value)

  # --------------------------------------------------------------- over maps

  def _reduce_window_max(self, operands: list[V], params: Any, out: Any) -> V:
    return self._pooled("max", operands[0], read_window(params), out.shape)

  def _reduce_window_sum(self, operands: list[V], params: Any, out: Any) -> V:
    window = read_window(params)
    mean = self._pooled("mean", operands[0], window, out.shape)
    count = np.asarray(np.float32(np.prod(window.sides)))
    return self._elementwise("mul", [mean, count], out)

  def _dot_general(self, operands: list[Any], params: Any, out: Any) -> V:
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    x, y = operands
    if isinstance(y, np.ndarray):
      return self._times_weights(x, left, y, right, left_batch)
    if isinstance(x, np.ndarray):
      product = self._times_weights(y, right, x, left, left_batch)
      front = x.ndim - len(left)
      axes = range(len(product.shape))
      turned = [*axes[len(axes) - front :], *axes[: len(axes) - front]]
      return self._permute(product, turned)
    free = [
      [a for a in range(len(value.shape)) if a not in (*batch, *summed)]
      for value, batch, summed in (
        (x, left_batch, left),
        (y, right_batch, right),
      )
    ]
    if [len(axes) for axes in (*free, left)] != [1, 1, 1]:
      raise UnsupportedError(f"a product of {x.shape} and {y.shape}")
    x = self._permute(x, [*left_batch, *free[0], *left])
    y = self._permute(y, [*right_batch, *right, *free[1]])
    return self._matmul(x, y)

  def _times_weights(
    self,
    x: V,
    summed: Sequence[int],
    weights: np.ndarray,
    axes: Sequence[int],
    batch: Sequence[int],
  ) -> V:
    """Returns x times weights: its free axes, then the weights' free axes."""
    if batch:
      raise UnsupportedError("a product with different weights for each image")
    free = [a for a in range(len(x.shape)) if a not in summed]
    kept = [a for a in range(weights.ndim) if a not in axes]
    count = int(np.prod([x.shape[a] for a in summed]))
    matrix = weights.transpose(*axes, *kept).reshape(count, -1)
    x = self._permute(x, [*free, *summed])
    if len(summed) != 1:
      x = self._in_shape(x, (*x.shape[: len(free)], count))
    product = self._matmul(x, matrix)
    if len(kept) != 1:
      rest = [weights.shape[a] for a in kept]
      product = self._in_shape(product, (*product.shape[:-1], *rest))
    return product

  # ------------------------------------------------- hooks, one set a format

  def _operate(self, kind: str, operands: Operands[V], out: Any) -> V:
    """Writes the elementwise operator `kind`."""
    raise NotImplementedError

  def _relu(self, x: V, out: Any) -> V:
    raise NotImplementedError

  def _reduced(self, name: str, x: V, axes: Shape, shape: Shape) -> V:
    """Writes the operator of `reductions[name]`, which drops the axes."""
    raise NotImplementedError

  def _reshaped(self, x: V, shape: Shape) -> V:
    raise NotImplementedError

  def _repeated(self, x: V, shape: Shape) -> V:
    raise NotImplementedError

  def _permuted(self, x: V, axes: Shape) -> V:
    raise NotImplementedError

  def _padded(self, x: V, sides: Sides, value: np.ndarray) -> V:
    """Pads each axis by (before, after) cells of one value."""
    raise NotImplementedError

  def _pooled(self, kind: str, x: V, window: Window, shape: Shape) -> V:
    """Writes a pooling of kind "max" or "mean" (cells outside count as 0)."""
    raise NotImplementedError

  def _matmul(self, x: V, y: V | np.ndarray) -> V:
    """Writes x @ y, y a matrix of weights or a value of as many axes."""
    raise NotImplementedError

  def _read_convolution(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns (kernel, bias, axis of the kernel's output channels)."""
    raise NotImplementedError

  def _write_convolution(
    self, index: int, kernel: np.ndarray, bias: np.ndarray
  ) -> None:
    raise NotImplementedError
