"""Writes a network's program, a jaxpr, as an ONNX graph.

JAX's maps are [B, H, W, C], ONNX's convolutions want [B, C, H, W]. Values are
kept in the order in which they were made and turned where an operator needs
the other, so that a chain of convolutions, norms and activations has no turn
in it. What depends on weights alone is computed here; a per-channel scale and
shift behind a convolution (BatchNorm) go into its weights. A call of
`layers.upsample_2x` or `layers.resize_bilinear` becomes one Resize.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from kdseg.deploy.formats import jaxpr as jaxpr_lib

OPSET = 18
_TO_NCHW = jaxpr_lib.TO_NCHW
_TO_NHWC = (0, 2, 3, 1)


BATCH = jaxpr_lib.BATCH
UnsupportedError = jaxpr_lib.UnsupportedError


@dataclasses.dataclass
class _Value:
  """A tensor of the graph.

  Attributes:
    name: in the graph.
    shape: as JAX has it.
    channels_first: whether it is kept as [B, C, H, W].
    convolution: index of the node that made it, while no other reads it.
    narrow: the value that this one repeats along its sides of 1.
  """

  name: str
  shape: tuple[int, ...]
  channels_first: bool = False
  convolution: int | None = None
  narrow: "_Value | None" = None


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
  program = jaxpr_lib.trace(function, shape, dtype)
  writer = _Writer(onnx)
  image = _Value(input_name, (BATCH, *shape))
  [out] = writer.run(program.jaxpr, program.consts, [image])
  writer.finish(out, output_name)
  graph = onnx.helper.make_graph(
    writer.nodes,
    "kdseg",
    [_info(onnx, input_name, image.shape, np.dtype(dtype))],
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


def _info(onnx: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
  return onnx.helper.make_tensor_value_info(
    name,
    onnx.helper.np_dtype_to_tensor_dtype(dtype),
    ["batch" if side == BATCH else side for side in shape],
  )


class _Writer(jaxpr_lib.Walker):
  """Collects nodes and weights while it walks a program."""

  form = "ONNX"

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
    """Names the output, and drops what it does not depend on."""
    self.nodes.append(
      self.onnx.helper.make_node(
        "Identity", [self._plain(out)], [name], "output"
      )
    )
    read, kept = {name}, []
    for node in reversed(self.nodes):
      if read.intersection(node.output):
        read.update(node.input)
        kept.append(node)
    self.nodes = kept[::-1]
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

  # ------------------------------------------------------------ elementwise

  def _binary(self, kind: str, operands: list[_Operand], out: Any) -> _Value:
    folded = self._fold(kind, operands, out)
    if folded is not None:
      return folded
    # The operator repeats a side of 1 by itself; not where both have one.
    if (
      sum(isinstance(x, _Value) and x.narrow is not None for x in operands) < 2
    ):
      operands = [getattr(x, "narrow", None) or x for x in operands]
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
    channel = jaxpr_lib.per_channel(right, left.shape[-1])
    if left.convolution is None or channel is None or kind == "Max":
      return None
    node = self.nodes[left.convolution]
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
    if jaxpr_lib.is_zero(bound):
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

  def _exp(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._unary("Exp", operands, out)

  def _square(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("Mul", [operands[0], operands[0]], out)

  def _rsqrt(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._unary("Reciprocal", [self._unary("Sqrt", operands, out)], out)

  def _erfc(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    erf = self._unary("Erf", operands, out)
    return self._binary("Sub", [np.ones((), np.float32), erf], out)

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
    narrow = [1] * len(out.shape)
    for axis, side in zip(params["broadcast_dimensions"], operands[0].shape):
      narrow[axis] = side
    x = self._in_shape(operands[0], narrow)
    if tuple(narrow) == tuple(out.shape):
      return x
    if narrow[0] != out.shape[0] or BATCH in out.shape[1:]:
      raise UnsupportedError(f"broadcasting {x.shape} to {out.shape}")
    # 1 keeps a side.
    shape = np.array([1, *out.shape[1:]], np.int64)
    name = self._node("Expand", [self._plain(x), self._weight(shape, "shape")])
    return _Value(name, out.shape, narrow=x)

  def _transpose(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    return self._permute(operands[0], params["permutation"])

  def _permute(self, x: _Value, axes: Sequence[int]) -> _Value:
    """See the base class."""
    axes = [int(axis) for axis in axes]
    if axes == sorted(axes):
      return x
    name = self._node("Transpose", [self._plain(x)], perm=axes)
    return _Value(name, tuple(x.shape[axis] for axis in axes))

  def _in_shape(self, x: _Value, shape: Sequence[int]) -> _Value:
    """See the base class."""
    if tuple(x.shape) == tuple(shape):
      return x
    out = jax.ShapeDtypeStruct(tuple(shape), np.float32)
    return self._reshape([x], {}, out)

  def _slice(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    [x] = operands
    axes = [a for a, side in enumerate(out.shape) if side != x.shape[a]]
    if 0 in axes:
      raise UnsupportedError("cutting the batch")
    strides = params["strides"] or (1,) * len(out.shape)
    numbers = (
      [int(of[axis]) for axis in axes]
      for of in (params["start_indices"], params["limit_indices"])
    )
    names = [
      self._weight(np.array(n, np.int64), "cut")
      for n in (*numbers, axes, [int(strides[axis]) for axis in axes])
    ]
    return _Value(self._node("Slice", [self._plain(x), *names]), out.shape)

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
    if not isinstance(x, _Value):
      raise UnsupportedError(f"padding of {out.shape}")
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
      raise UnsupportedError(f"padding by {config}")
    first = len(out.shape) == 4
    if first:
      config = [config[axis] for axis in _TO_NCHW]
    sides = [low for low, _, _ in config] + [high for _, high, _ in config]
    names = [
      self._first(x) if first else self._plain(x),
      self._weight(np.array(sides, np.int64), "pads"),
      self._weight(np.asarray(value, np.float32), "value"),
    ]
    return _Value(self._node("Pad", names), out.shape, first)

  # --------------------------------------------------------------- over maps

  def _reduce_sum(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    return self._reduce("ReduceSum", operands, params, out)

  def _reduce_max(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    return self._reduce("ReduceMax", operands, params, out)

  def _reduce(
    self, kind: str, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    axes = np.array(params["axes"], np.int64)
    names = [self._plain(operands[0]), self._weight(axes, "axes")]
    return _Value(self._node(kind, names, keepdims=0), out.shape)

  def _matmul(self, x: _Value, y: _Operand) -> _Value:
    """See the base class."""
    name = self._node("MatMul", [self._plain(x), self._plain(y)])
    return _Value(name, (*x.shape[:-1], y.shape[-1]))

  def _conv_general_dilated(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    x, kernel = operands
    jaxpr_lib.check_convolution(params, kernel)
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
    jaxpr_lib.check_pooling(params)
    window = params["window_dimensions"]
    strides = params["window_strides"]
    padding = params["padding"]
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

  def _call_upsample_2x(self, x: _Value, out: Any) -> _Value:
    scales = np.array([1, 1, 2, 2], np.float32)
    return self._resize(x, out.shape, ["", self._weight(scales, "scales")])

  def _call_resize_bilinear(self, x: _Value, out: Any) -> _Value:
    _, height, width, channels = out.shape
    # Sizes, as ONNX would round a scale; the batch is put in as it comes.
    sizes = self._weight(np.array([channels, height, width], np.int64), "sizes")
    shape = self._node("Shape", [self._first(x)], start=0, end=1)
    sizes = self._node("Concat", [shape, sizes], axis=0)
    return self._resize(x, out.shape, ["", "", sizes])

  def _resize(
    self, x: _Value, shape: tuple[int, ...], inputs: list[str]
  ) -> _Value:
    name = self._node(
      "Resize",
      [self._first(x), *inputs],
      mode="linear",
      coordinate_transformation_mode="half_pixel",
    )
    return _Value(name, shape, True)
