"""ONNX files: writes a network's jaxpr as a graph, and runs files.

JAX's maps are [B, H, W, C], ONNX's convolutions want [B, C, H, W]. Each value
stays in the order in which it was made and is transposed only where an operator
needs the other one, so that a chain of convolutions, norms and activations has
no Transpose in it. A call of `layers.upsample_2x` or `layers.resize_bilinear`
becomes one Resize.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import numpy as np

from kdseg.deploy.formats import jaxpr as jaxpr_lib
from kdseg.deploy.formats import record

OPSET = 18
BATCH = jaxpr_lib.BATCH
Shape = jaxpr_lib.Shape
Sides = jaxpr_lib.Sides
Window = jaxpr_lib.Window
UnsupportedError = jaxpr_lib.UnsupportedError
_TO_NCHW = jaxpr_lib.TO_NCHW
_TO_NHWC = (0, 2, 3, 1)


@dataclasses.dataclass
class _Value(jaxpr_lib.Value):
  """A tensor of the graph.

  Attributes:
    name: in the graph.
    channels_first: whether it is stored as [B, C, H, W].
  """

  name: str
  channels_first: bool = False


_Operands = Sequence[_Value | np.ndarray]


def write(
  function: record.Function, size: int, about: Mapping[str, Any]
) -> bytes:
  """Returns an ONNX file of any batch; its metadata say what `about` says.

  Raises:
    UnsupportedError: on an operation that cannot be written.
  """
  model = make_model(function, (size, size, 3), np.uint8, about)
  return model.SerializeToString()


def open_file(content: bytes, threads: int) -> record.Opened:
  """Opens an ONNX file of an export in ONNX Runtime."""
  session = open_session(content, threads)
  [image] = session.get_inputs()
  outputs = [output.name for output in session.get_outputs()]
  record.check_signature(
    image.type == "tensor(uint8)", image.shape, record.OUTPUT in outputs
  )
  return record.Opened(
    lambda batch: session.run([record.OUTPUT], {image.name: batch})[0],
    int(image.shape[1]),
    dict(session.get_modelmeta().custom_metadata_map),
  )


def open_session(content: bytes, threads: int) -> Any:
  """Opens any ONNX file in ONNX Runtime on the CPU.

  Args:
    content: of the file.
    threads: 0 for the runtime's own choice.
  """
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  return onnxruntime.InferenceSession(
    content, options, providers=["CPUExecutionProvider"]
  )


def make_model(
  function: record.Function,
  shape: Sequence[int],
  dtype: Any,
  about: Mapping[str, Any],
) -> Any:
  """Returns the ONNX model of a function of a batch of images.

  Args:
    function: maps `[B, *shape]` to [B, ...]; may close over weights, and must
      not compute with the size of the batch.
    shape: of one image.
    dtype: of the input.
    about: what the file says of itself.

  Returns:
    An `onnx.ModelProto`, checked in full, whose batch is of any size.

  Raises:
    UnsupportedError: on an operation that cannot be written.
  """
  import onnx

  program = jaxpr_lib.trace(function, shape, dtype)
  writer = _Writer(onnx)
  image = _Value((BATCH, *shape), record.INPUT)
  [out] = writer.run(program.jaxpr, program.consts, [image])
  writer.finish(out, record.OUTPUT)
  graph = onnx.helper.make_graph(
    writer.nodes,
    "kdseg",
    [_info(onnx, record.INPUT, image.shape, dtype)],
    [_info(onnx, record.OUTPUT, out.shape, np.float32)],
    writer.initializers,
  )
  model = onnx.helper.make_model(
    graph,
    opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    producer_name="kdseg",
    ir_version=9,
  )
  metadata = {
    key: value if isinstance(value, str) else json.dumps(value)
    for key, value in about.items()
  }
  onnx.helper.set_model_props(model, metadata)
  try:
    onnx.checker.check_model(model, full_check=True)
  except (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
  ) as error:
    raise UnsupportedError(f"the graph is not valid ONNX: {error}") from error
  return model


def _info(onnx: Any, name: str, shape: Shape, dtype: Any) -> Any:
  return onnx.helper.make_tensor_value_info(
    name,
    onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
    ["batch" if side == BATCH else side for side in shape],
  )


class _Writer(jaxpr_lib.Walker[_Value]):
  """Collects nodes and weights while it walks a program."""

  format = "ONNX"
  elementwise: Mapping[str, str] = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max",
    "min": "Min", "ge": "GreaterOrEqual", "select_n": "Where", "exp": "Exp",
    "neg": "Neg", "logistic": "Sigmoid",
  }  # fmt: skip
  reductions: Mapping[str, str] = {
    "reduce_max": "ReduceMax", "reduce_sum": "ReduceSum",
  }  # fmt: skip

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
    """Names the output, and drops nodes that it does not depend on."""
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

  def _plain(self, value: _Value | np.ndarray) -> str:
    """Returns the name of a value as [B, H, W, C]."""
    if isinstance(value, np.ndarray):
      return self._weight(value)
    value.convolution = None
    if not value.channels_first:
      return value.name
    return self._node("Transpose", [value.name], perm=_TO_NHWC)

  def _first(self, value: _Value | np.ndarray) -> str:
    """Returns the name of a value as [B, C, H, W]."""
    if isinstance(value, np.ndarray):
      if value.ndim == 4:
        value = value.transpose(_TO_NCHW)
      return self._weight(value)
    value.convolution = None
    if value.channels_first:
      return value.name
    return self._node("Transpose", [value.name], perm=_TO_NCHW)

  # ------------------------------------------------------------ elementwise

  def _operate(self, kind: str, operands: _Operands, out: Any) -> _Value:
    first = any(isinstance(x, _Value) and x.channels_first for x in operands)
    names = [self._first(x) if first else self._plain(x) for x in operands]
    return _Value(out.shape, self._node(kind, names), first)

  def _relu(self, x: _Value, out: Any) -> _Value:
    return self._operate("Relu", [x], out)

  def _rsqrt(self, operands: _Operands, params: Any, out: Any) -> _Value:
    root = self._operate("Sqrt", operands, out)
    return self._operate("Reciprocal", [root], out)

  def _erfc(self, operands: _Operands, params: Any, out: Any) -> _Value:
    erf = self._operate("Erf", operands, out)
    return self._operate("Sub", [np.ones((), np.float32), erf], out)

  def _convert_element_type(
    self, operands: list[_Value], params: Any, out: Any
  ) -> _Value:
    [x] = operands
    kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(out.dtype))
    x.convolution = None
    name = self._node("Cast", [x.name], to=kind)
    return _Value(out.shape, name, x.channels_first)

  def _read_convolution(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
    kernel, bias = (self._weights[name] for name in self.nodes[index].input[1:])
    return kernel, bias, 0

  def _write_convolution(
    self, index: int, kernel: np.ndarray, bias: np.ndarray
  ) -> None:
    self.nodes[index].input[1] = self._weight(kernel, "kernel")
    self.nodes[index].input[2] = self._weight(bias, "bias")

  # ------------------------------------------------------------------ shapes

  def _reshaped(self, x: _Value, shape: Shape) -> _Value:
    sides = np.array([0, *shape[1:]], np.int64)  # 0 keeps the batch.
    names = [self._plain(x), self._weight(sides, "shape")]
    return _Value(shape, self._node("Reshape", names))

  def _repeated(self, x: _Value, shape: Shape) -> _Value:
    sides = np.array([1, *shape[1:]], np.int64)  # 1 keeps the batch.
    names = [self._plain(x), self._weight(sides, "shape")]
    return _Value(shape, self._node("Expand", names))

  def _permuted(self, x: _Value, axes: Shape) -> _Value:
    name = self._node("Transpose", [self._plain(x)], perm=axes)
    return _Value(tuple(x.shape[axis] for axis in axes), name)

  def _slice(self, operands: list[_Value], params: Any, out: Any) -> _Value:
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
    return _Value(out.shape, self._node("Slice", [self._plain(x), *names]))

  def _concatenate(self, operands: _Operands, params: Any, out: Any) -> _Value:
    axis = params["dimension"]
    first = len(out.shape) == 4 and any(
      isinstance(x, _Value) and x.channels_first for x in operands
    )
    if first:
      axis = _TO_NCHW.index(axis)
    names = [self._first(x) if first else self._plain(x) for x in operands]
    return _Value(out.shape, self._node("Concat", names, axis=axis), first)

  def _padded(self, x: _Value, sides: Sides, value: np.ndarray) -> _Value:
    first = len(x.shape) == 4
    order = _TO_NCHW if first else range(len(x.shape))
    ends = [sides[axis][end] for end in (0, 1) for axis in order]
    names = [
      self._first(x) if first else self._plain(x),
      self._weight(np.array(ends, np.int64), "pads"),
      self._weight(np.asarray(value, np.float32), "value"),
    ]
    shape = tuple(side + sum(pad) for side, pad in zip(x.shape, sides))
    return _Value(shape, self._node("Pad", names), first)

  # --------------------------------------------------------------- over maps

  def _reduced(self, name: str, x: _Value, axes: Shape, shape: Shape) -> _Value:
    names = [self._plain(x), self._weight(np.array(axes, np.int64), "axes")]
    return _Value(shape, self._node(self.reductions[name], names, keepdims=0))

  def _matmul(self, x: _Value, y: _Value | np.ndarray) -> _Value:
    name = self._node("MatMul", [self._plain(x), self._plain(y)])
    return _Value((*x.shape[:-1], y.shape[-1]), name)

  def _conv_general_dilated(
    self, operands: list[Any], params: Any, out: Any
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
    return _Value(out.shape, name, True, convolution=len(self.nodes) - 1)

  def _pooled(
    self, kind: str, x: _Value, window: Window, shape: Shape
  ) -> _Value:
    operator = {"max": "MaxPool", "mean": "AveragePool"}[kind]
    attributes = {"count_include_pad": 1} if kind == "mean" else {}
    name = self._node(
      operator,
      [self._first(x)],
      kernel_shape=window.sides,
      strides=window.strides,
      pads=[pad for side in zip(*window.padding) for pad in side],
      **attributes,
    )
    return _Value(shape, name, True)

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

  def _resize(self, x: _Value, shape: Shape, inputs: list[str]) -> _Value:
    name = self._node(
      "Resize",
      [self._first(x), *inputs],
      mode="linear",
      coordinate_transformation_mode="half_pixel",
    )
    return _Value(shape, name, True)
