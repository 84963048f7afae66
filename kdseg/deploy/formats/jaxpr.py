"""Reads a network's program, a jaxpr, on behalf of those that write graphs.

What depends on weights alone is computed here, calls are entered, and each
operation that is left goes to the writer's method of its name.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
from typing import Any
from unittest import mock

import jax
import numpy as np

# Of the batch while a program is read: a side that no network has.
BATCH = 7919
# Calls that are nothing but the program within.
_CALLS = frozenset(
  {
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
  }
)  # fmt: skip
# What may be done to a constant that is narrower than it says.
_ELEMENTWISE = frozenset(
  {
    "add", "sub", "mul", "div", "max", "min", "neg", "rsqrt", "sqrt", "exp",
    "log", "logistic", "tanh", "ge", "gt", "le", "lt", "select_n",
    "convert_element_type", "integer_pow", "stop_gradient", "square",
  }
)  # fmt: skip
TO_NCHW = (0, 3, 1, 2)


class Narrow(np.ndarray):
  """A constant with a side of 1 where the program has the batch."""


class UnsupportedError(NotImplementedError):
  """An operation of the program that a format has no form for here."""


def trace(
  function: Callable[[jax.Array], jax.Array], shape: Sequence[int], dtype: Any
) -> Any:
  """Returns the closed jaxpr of a function of [BATCH, *shape]."""
  given = jax.ShapeDtypeStruct((BATCH, *shape), dtype)
  with _portable():
    # A new function: a program traced before for this CPU is no use here.
    return jax.make_jaxpr(lambda x: function(x))(given)


@contextlib.contextmanager
def _portable() -> Any:
  """Lets layers choose the form they have for every backend but the CPU."""
  with mock.patch.object(jax, "default_backend", return_value="portable"):
    yield


def check_convolution(params: Any, kernel: Any) -> None:
  """Refuses what is no convolution of [B, H, W, C] with constant weights.

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


def check_pooling(params: Any) -> None:
  """Refuses what does not pool over the two sides of [B, H, W, C].

  Raises:
    UnsupportedError: on any other.
  """
  window, padding = params["window_dimensions"], params["padding"]
  plain = (
    len(window) == 4
    and set(params["base_dilation"]) | set(params["window_dilation"]) == {1}
    and all(
      window[axis] == params["window_strides"][axis] == 1
      and tuple(padding[axis]) == (0, 0)
      for axis in (0, 3)
    )
  )
  if not plain:
    raise UnsupportedError(f"pooling over {window}")


def is_zero(operand: Any) -> bool:
  """Whether an operand is the constant 0."""
  return (
    isinstance(operand, np.ndarray) and operand.size == 1 and not operand.any()
  )


def per_channel(constant: np.ndarray, channels: int) -> np.ndarray | None:
  """Returns [channels] numbers, if a constant has one a channel or one."""
  fits = constant.size in (1, channels) and (
    constant.ndim == 0 or constant.shape[-1] == constant.size
  )
  return np.broadcast_to(constant.reshape(-1), (channels,)) if fits else None


class Walker:
  """Walks a program; a subclass has a method `_NAME` for each operation.

  It is called with (operands, parameters, abstract result) and returns the
  result; operands are the subclass's values, or arrays where constant. Values
  have a `shape`, and `convolution`, set while a convolution's result has no
  other reader, so that a norm behind it may change its weights. A call of a
  function NAME of `layers` is written as a whole where there is a method
  `_call_NAME`, called with (operand, abstract result).
  """

  # What messages call the format.
  form = ""

  def run(
    self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]
  ) -> list[Any]:
    """Walks a program; returns its results."""
    values: dict[Any, Any] = {}
    for variable, const in zip(jaxpr.constvars, consts):
      values[variable] = np.asarray(const)
    values.update(zip(jaxpr.invars, arguments))

    readers = [v for e in jaxpr.eqns for v in e.invars] + list(jaxpr.outvars)
    readers = [v for v in readers if not hasattr(v, "val")]
    count = collections.Counter(readers)

    def read(variable: Any) -> Any:
      if hasattr(variable, "val"):  # a literal
        literal = np.asarray(variable.val)
        if (literal == BATCH).any():
          raise UnsupportedError("the program computes with the batch's size")
        return literal
      value = values[variable]
      if count[variable] > 1 and not isinstance(value, np.ndarray):
        # Somebody else reads it as it is now.
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
      if whole is not None and not isinstance(operands[0], np.ndarray):
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
    method = getattr(self, f"_{name}", None)
    if method is None:
      raise UnsupportedError(
        f"the program has the operation {name}, which has no {self.form} form "
        "here"
      )
    return [method(operands, params, out[0])]

  def _constant(self, equation: Any, operands: list[np.ndarray]) -> np.ndarray:
    shape = equation.params.get("shape", ())
    if equation.primitive.name == "broadcast_in_dim" and BATCH in shape:
      # Left narrow, as graphs broadcast by themselves: no constant of a batch.
      shape = [1] * len(equation.params["shape"])
      for axis, side in zip(
        equation.params["broadcast_dimensions"], operands[0].shape
      ):
        shape[axis] = side
      return np.asarray(operands[0]).reshape(shape).view(Narrow)
    return np.asarray(
      equation.primitive.bind(*map(np.asarray, operands), **equation.params)
    )

  def _permute(self, x: Any, axes: Sequence[int]) -> Any:
    """Returns a value with its axes in that order."""
    raise NotImplementedError

  def _in_shape(self, x: Any, shape: Sequence[int]) -> Any:
    """Returns a value in another shape, the batch still its first axis."""
    raise NotImplementedError

  def _matmul(self, x: Any, y: Any) -> Any:
    """Returns x @ y, y a matrix of weights or a value of as many axes."""
    raise NotImplementedError

  def _keep(self, operands: list[Any], params: Any, out: Any) -> Any:
    [x] = operands
    x.convolution = None
    return x

  _copy = _stop_gradient = _keep

  def _dot_general(self, operands: list[Any], params: Any, out: Any) -> Any:
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
    x: Any,
    summed: Sequence[int],
    weights: np.ndarray,
    axes: Sequence[int],
    batch: Sequence[int],
  ) -> Any:
    """Returns x times weights: its free axes, then the weights' free axes."""
    if batch:
      raise UnsupportedError("a product with weights of each image's own")
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
