"""Writes a network's program, a jaxpr, as an ONNX graph.

JAX's maps are [B, H, W, C], ONNX's convolutions want [B, C, H, W]. Values are
kept in the order in which they were made and turned where an operator needs
the other, so that a chain of convolutions, norms and activations has no turn
in it. What depends on weights alone is computed here; a per-channel scale and
shift behind a convolution (BatchNorm) go into its weights. A call of
`layers.upsample_2x` becomes one Resize.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
from typing import Any
from unittest import mock

import jax
import numpy as np

OPSET = 18
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
    "convert_element_type", "integer_pow", "stop_gradient",
  }
)  # fmt: skip
_TO_NCHW = (0, 3, 1, 2)
_TO_NHWC = (0, 2, 3, 1)


class _Narrow(np.ndarray):
  """A constant with a side of 1 where the program has the batch."""


class UnsupportedError(NotImplementedError):
  """An operation of the program that has no ONNX form here."""


@dataclasses.dataclass
class _Value:
  """A tensor of the graph.

  Attributes:
    name: in the graph.
    shape: as JAX has it.
    channels_first: whether it is kept as [B, C, H, W].
    convolution: index of the node that made it, while no other reads it.
  """

  name: str
  shape: tuple[int, ...]
  channels_first: bool = False
  convolution: int | None = None


_Operand = _Value | np.ndarray


def export(
  function: Callable[[jax.Array], jax.Array],
  shape: Sequence[int],
  dtype: Any,
  *,
  input_name: str,
  output_name: str,
  metadata: dict[str, str] | None = None,
) -> Any:
  """Returns the ONNX model of a function of one batch of images.

  Args:
    function: maps [B, *shape] to [B, ...]; may close over weights, and must
      not compute with the size of the batch.
    shape: of one image.
    dtype: of the input.
    input_name: in the graph.
    output_name: in the graph.
    metadata: what the file says of itself.

  Returns:
    An `onnx.ModelProto`, checked in full, whose batch is of any size.

  Raises:
    ImportError: if `onnx` is not installed.
    UnsupportedError: on an operation that has no form here.
  """
  try:
    import onnx
  except ModuleNotFoundError as error:
    raise ImportError(
      "writing ONNX needs the package onnx: pip install 'kdseg[export]'"
    ) from error
  given = jax.ShapeDtypeStruct((BATCH, *shape), dtype)
  with _portable():
    # A new function: a program traced before for this CPU is no use here.
    program = jax.make_jaxpr(lambda x: function(x))(given)
  writer = _Writer(onnx)
  image = _Value(input_name, given.shape)
  [out] = writer.run(program.jaxpr, program.consts, [image])
  writer.finish(out, output_name)
  graph = onnx.helper.make_graph(
    writer.nodes,
    "kdseg",
    [_info(onnx, input_name, given.shape, np.dtype(dtype))],
    [_info(onnx, output_name, out.shape, np.dtype(np.float32))],
    writer.initializers,
  )
  model = onnx.helper.make_model(
    graph,
    opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    producer_name="kdseg",
    ir_version=9,
  )
  onnx.helper.set_model_props(model, metadata or {})
  try:
    onnx.checker.check_model(model, full_check=True)
  except (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
  ) as error:
    raise UnsupportedError(f"the graph is not valid ONNX: {error}") from error
  return model


@contextlib.contextmanager
def _portable() -> Any:
  """Lets layers choose the form they have for every backend but the CPU."""
  with mock.patch.object(jax, "default_backend", return_value="portable"):
    yield


def _info(onnx: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
  return onnx.helper.make_tensor_value_info(
    name,
    onnx.helper.np_dtype_to_tensor_dtype(dtype),
    ["batch" if side == BATCH else side for side in shape],
  )


class _Writer:
  """Collects nodes and weights while it walks a program."""

  def __init__(self, onnx: Any) -> None:
    self.onnx = onnx
    self.nodes: list[Any] = []
    self.initializers: list[Any] = []
    self._weights: dict[str, np.ndarray] = {}
    self._count = 0

  # ------------------------------------------------------------------ graph

  def _name(self, what: str) -> str:
    self._count += 1
    return f"{what.lower()}_{self._count}"

  def _weight(self, array: np.ndarray, what: str = "weight") -> str:
    name = self._name(what)
    self._weights[name] = np.ascontiguousarray(array)
    return name

  def _node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
    name = self._name(kind)
    self.nodes.append(
      self.onnx.helper.make_node(kind, list(inputs), [name], name, **attributes)
    )
    return name

  def finish(self, out: _Value, name: str) -> None:
    """Names the output, and writes down the weights that are read."""
    self.nodes.append(
      self.onnx.helper.make_node(
        "Identity", [self._plain(out)], [name], "output"
      )
    )
    read = {name for node in self.nodes for name in node.input}
    self.initializers = [
      self.onnx.numpy_helper.from_array(array, name)
      for name, array in self._weights.items()
      if name in read
    ]

  def _plain(self, value: _Operand) -> str:
    """Returns the name of a value in JAX's order."""
    if isinstance(value, np.ndarray):
      return self._weight(value)
    value.convolution = None
    if not value.channels_first:
      return value.name
    return self._node("Transpose", [value.name], perm=_TO_NHWC)

  def _first(self, value: _Operand) -> str:
    """Returns the name of a four-sided value with its channels first."""
    if isinstance(value, np.ndarray):
      if value.ndim == 4:
        value = value.transpose(_TO_NCHW)
      return self._weight(value)
    value.convolution = None
    if value.channels_first:
      return value.name
    return self._node("Transpose", [value.name], perm=_TO_NCHW)

  # ---------------------------------------------------------------- program

  def run(
    self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[_Operand]
  ) -> list[_Operand]:
    """Walks a program; returns its results."""
    values: dict[Any, _Operand] = {}
    for variable, const in zip(jaxpr.constvars, consts):
      values[variable] = np.asarray(const)
    values.update(zip(jaxpr.invars, arguments))

    readers = [v for e in jaxpr.eqns for v in e.invars] + list(jaxpr.outvars)
    readers = [v for v in readers if not hasattr(v, "val")]
    count = collections.Counter(readers)

    def read(variable: Any) -> _Operand:
      if hasattr(variable, "val"):  # a literal
        literal = np.asarray(variable.val)
        if (literal == BATCH).any():
          raise UnsupportedError("the program computes with the batch's size")
        return literal
      value = values[variable]
      if count[variable] > 1 and isinstance(value, _Value):
        # Somebody else reads it as it is now.
        value.convolution = None
      return value

    for equation in jaxpr.eqns:
      operands = [read(variable) for variable in equation.invars]
      results = self._equation(equation, operands)
      values.update(zip(equation.outvars, results))
    return [read(variable) for variable in jaxpr.outvars]

  def _equation(
    self, equation: Any, operands: list[_Operand]
  ) -> list[_Operand]:
    name, params = equation.primitive.name, equation.params
    out = [variable.aval for variable in equation.outvars]
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if name in _CALLS and inner is not None:
      if params.get("name") == "upsample_2x":
        return [self._upsample(operands[0], out[0].shape)]
      if not hasattr(inner, "consts"):
        return self.run(inner, (), operands)
      return self.run(inner.jaxpr, inner.consts, operands)
    narrow = any(isinstance(operand, _Narrow) for operand in operands)
    if narrow and name not in _ELEMENTWISE:
      raise UnsupportedError(f"{name} of a constant as long as the batch")
    if all(isinstance(operand, np.ndarray) for operand in operands):
      constant = self._constant(equation, operands)
      return [constant.view(_Narrow) if narrow else constant]
    method = getattr(self, f"_{name}", None)
    if method is None:
      raise UnsupportedError(
        f"the program has the operation {name}, which has no ONNX form here"
      )
    return [method(operands, params, out[0])]

  def _constant(self, equation: Any, operands: list[np.ndarray]) -> np.ndarray:
    shape = equation.params.get("shape", ())
    if equation.primitive.name == "broadcast_in_dim" and BATCH in shape:
      # Left narrow, as ONNX broadcasts by itself: no constant of a batch.
      shape = [1] * len(equation.params["shape"])
      for axis, side in zip(
        equation.params["broadcast_dimensions"], operands[0].shape
      ):
        shape[axis] = side
      return np.asarray(operands[0]).reshape(shape).view(_Narrow)
    return np.asarray(
      equation.primitive.bind(*map(np.asarray, operands), **equation.params)
    )

  # ------------------------------------------------------------ elementwise

  def _binary(self, kind: str, operands: list[_Operand], out: Any) -> _Value:
    folded = self._fold(kind, operands, out)
    if folded is not None:
      return folded
    first = any(
      isinstance(x, _Value) and x.channels_first and len(x.shape) == 4
      for x in operands
    )
    names = [self._first(x) if first else self._plain(x) for x in operands]
    return _Value(self._node(kind, names), out.shape, first)

  def _fold(
    self, kind: str, operands: list[_Operand], out: Any
  ) -> _Value | None:
    """Moves a per-channel scale or shift into the convolution before it."""
    left, right = operands
    if isinstance(left, np.ndarray) and kind in ("Add", "Mul"):
      left, right = right, left
    if not (isinstance(left, _Value) and isinstance(right, np.ndarray)):
      return None
    per_channel = right.size in (1, left.shape[-1]) and (
      right.ndim == 0 or right.shape[-1] == right.size
    )
    if left.convolution is None or not per_channel or kind == "Max":
      return None
    node = self.nodes[left.convolution]
    channel = np.broadcast_to(right.reshape(-1), (left.shape[-1],))
    kernel, bias = (self._weights[name] for name in node.input[1:])
    if kind in ("Mul", "Div"):
      scale = channel if kind == "Mul" else 1.0 / channel
      kernel = kernel * scale[:, None, None, None]
      bias = bias * scale
    elif kind in ("Add", "Sub"):
      bias = bias + (channel if kind == "Add" else -channel)
    else:
      return None
    node.input[1] = self._weight(kernel.astype(np.float32), "kernel")
    node.input[2] = self._weight(bias.astype(np.float32), "bias")
    return _Value(left.name, out.shape, True, left.convolution)

  def _unary(self, kind: str, operands: list[_Operand], out: Any) -> _Value:
    [x] = operands
    x.convolution = None
    return _Value(self._node(kind, [x.name]), out.shape, x.channels_first)

  def _add(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("Add", operands, out)

  def _sub(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("Sub", operands, out)

  def _mul(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("Mul", operands, out)

  def _div(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("Div", operands, out)

  def _max(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    value, bound = operands
    if isinstance(bound, np.ndarray) and bound.size == 1 and not bound.any():
      return self._unary("Relu", [value], out)
    return self._binary("Max", operands, out)

  def _min(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("Min", operands, out)

  def _ge(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("GreaterOrEqual", operands, out)

  def _select_n(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    which, no, yes = operands
    first = any(isinstance(x, _Value) and x.channels_first for x in operands)
    turn = self._first if first else self._plain
    names = [turn(which), turn(yes), turn(no)]
    return _Value(self._node("Where", names), out.shape, first)

  def _logistic(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    return self._unary("Sigmoid", operands, out)

  def _neg(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._unary("Neg", operands, out)

  def _convert_element_type(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    [x] = operands
    kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(out.dtype))
    x.convolution = None
    name = self._node("Cast", [x.name], to=kind)
    return _Value(name, out.shape, x.channels_first)

  # ------------------------------------------------------------------ shapes

  def _reshape(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    x = operands[0]
    if x.shape[:1] != out.shape[:1] or BATCH in out.shape[1:]:
      raise UnsupportedError(
        f"reshaping {x.shape} to {out.shape} moves the batch"
      )
    shape = np.array([0, *out.shape[1:]], np.int64)
    names = [self._plain(x), self._weight(shape, "shape")]
    return _Value(self._node("Reshape", names), out.shape)

  _squeeze = _reshape

  def _broadcast_in_dim(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    x = operands[0]
    if int(np.prod(x.shape)) != int(np.prod(out.shape)):
      raise UnsupportedError(f"broadcasting {x.shape} to {out.shape}")
    return self._reshape(operands, params, out)

  def _transpose(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    permutation = [int(axis) for axis in params["permutation"]]
    name = self._node("Transpose", [self._plain(operands[0])], perm=permutation)
    return _Value(name, out.shape)

  def _concatenate(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    axis = params["dimension"]
    first = len(out.shape) == 4 and any(
      isinstance(x, _Value) and x.channels_first for x in operands
    )
    if first:
      axis = _TO_NCHW.index(axis)
    names = [self._first(x) if first else self._plain(x) for x in operands]
    return _Value(self._node("Concat", names, axis=axis), out.shape, first)

  def _pad(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    x, value = operands
    config = params["padding_config"]
    if len(out.shape) != 4 or not isinstance(x, _Value):
      raise UnsupportedError(f"padding of {out.shape}")
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
      raise UnsupportedError(f"padding by {config}")
    if not x.channels_first:
      x = _Value(self._first(x), x.shape, True)
    config = [config[axis] for axis in _TO_NCHW]
    sides = [low for low, _, _ in config] + [high for _, high, _ in config]
    names = [
      self._first(x),
      self._weight(np.array(sides, np.int64), "pads"),
      self._weight(np.asarray(value, np.float32), "value"),
    ]
    return _Value(self._node("Pad", names), out.shape, True)

  # --------------------------------------------------------------- over maps

  def _reduce_sum(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    [x] = operands
    axes = np.array(params["axes"], np.int64)
    names = [self._plain(x), self._weight(axes, "axes")]
    return _Value(self._node("ReduceSum", names, keepdims=0), out.shape)

  def _conv_general_dilated(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    x, kernel = operands
    numbers = params["dimension_numbers"]
    plain = (
      tuple(numbers.lhs_spec) == _TO_NCHW
      and tuple(numbers.rhs_spec) == (3, 2, 0, 1)
      and tuple(numbers.out_spec) == _TO_NCHW
      and set(params["lhs_dilation"]) == {1}
      and params["batch_group_count"] == 1
    )
    if not (plain and isinstance(kernel, np.ndarray)):
      raise UnsupportedError(f"a convolution with {numbers}")
    kernel = kernel.transpose(3, 2, 0, 1)  # HWIO to OIHW
    pads = [int(p) for side in zip(*params["padding"]) for p in side]
    name = self._node(
      "Conv",
      [
        self._first(x),
        self._weight(kernel.astype(np.float32), "kernel"),
        self._weight(np.zeros(kernel.shape[0], np.float32), "bias"),
      ],
      kernel_shape=list(kernel.shape[2:]),
      strides=[int(s) for s in params["window_strides"]],
      dilations=[int(d) for d in params["rhs_dilation"]],
      pads=pads,
      group=int(params["feature_group_count"]),
    )
    return _Value(name, out.shape, True, len(self.nodes) - 1)

  def _pool(
    self, kind: str, x: _Value, params: Any, out: Any, **attributes: Any
  ) -> _Value:
    window = params["window_dimensions"]
    strides = params["window_strides"]
    padding = params["padding"]
    plain = (
      len(window) == 4
      and set(params["base_dilation"]) | set(params["window_dilation"]) == {1}
      and all(
        window[axis] == strides[axis] == 1 and tuple(padding[axis]) == (0, 0)
        for axis in (0, 3)
      )
    )
    if not plain:
      raise UnsupportedError(f"pooling over {window}")
    name = self._node(
      kind,
      [self._first(x)],
      kernel_shape=[int(w) for w in window[1:3]],
      strides=[int(s) for s in strides[1:3]],
      pads=[int(p) for side in zip(*padding[1:3]) for p in side],
      **attributes,
    )
    return _Value(name, out.shape, True)

  def _reduce_window_max(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    return self._pool("MaxPool", operands[0], params, out)

  def _reduce_window_sum(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    mean = self._pool(
      "AveragePool", operands[0], params, out, count_include_pad=1
    )
    count = np.float32(np.prod(params["window_dimensions"]))
    return self._binary("Mul", [mean, np.asarray(count)], out)

  def _upsample(self, x: _Operand, shape: tuple[int, ...]) -> _Value:
    scales = np.array([1, 1, 2, 2], np.float32)
    name = self._node(
      "Resize",
      [self._first(x), "", self._weight(scales, "scales")],
      mode="linear",
      coordinate_transformation_mode="half_pixel",
    )
    return _Value(name, shape, True)
