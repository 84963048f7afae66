"""LiteRT (TensorFlow Lite) files: writes a network's jaxpr, and runs files.

Maps stay [B, H, W, C], as in JAX, and only built-in operators are used. A ReLU
behind a convolution goes into the convolution. A call of `layers.upsample_2x`
or `layers.resize_bilinear` becomes one ResizeBilinear; folds of pixels into
channels become SpaceToDepth, and back.

Google's converter is not used, as its package cannot be installed beside chex
(litert-converter 0.5 pins xdsl 0.28, which wants typing-extensions below 4.13).
The format's definition comes with LiteRT itself.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import os
from typing import Any

import jax
import numpy as np

from kdseg.deploy.formats import jaxpr as jaxpr_lib
from kdseg.deploy.formats import litert_graph
from kdseg.deploy.formats import record

BATCH = jaxpr_lib.BATCH
Shape = jaxpr_lib.Shape
Sides = jaxpr_lib.Sides
Window = jaxpr_lib.Window
UnsupportedError = jaxpr_lib.UnsupportedError
# The transposition in a fold of pixels into channels, and back.
_FOLD = (0, 1, 3, 2, 4, 5)


_Value = litert_graph.Value
_Operands = Sequence[_Value | np.ndarray]


def write(
  function: record.Function, size: int, about: Mapping[str, Any]
) -> bytes:
  """Returns a LiteRT file, whose description is `about` as JSON.

  Raises:
    UnsupportedError: on an operation that cannot be written.
  """
  return make_model(function, (size, size, 3), np.uint8, about)


def open_file(content: bytes, threads: int) -> record.Opened:
  """Opens a LiteRT file of an export."""
  from ai_edge_litert import interpreter as litert
  from ai_edge_litert import schema_py_generated as schema

  description = schema.Model.GetRootAs(content).Description() or b"{}"
  runner = litert.Interpreter(
    model_content=content, num_threads=threads or os.cpu_count()
  )
  [image], [output] = runner.get_input_details(), runner.get_output_details()
  record.check_signature(image["dtype"] is np.uint8, image["shape"], True)
  ready = 0

  def run(batch: np.ndarray) -> np.ndarray:
    nonlocal ready
    if len(batch) != ready:
      runner.resize_tensor_input(image["index"], batch.shape)
      runner.allocate_tensors()
      ready = len(batch)
    runner.set_tensor(image["index"], batch)
    runner.invoke()
    return np.asarray(runner.get_tensor(output["index"]))

  return record.Opened(run, int(image["shape"][1]), json.loads(description))


def make_model(
  function: record.Function,
  shape: Sequence[int],
  dtype: Any,
  about: Mapping[str, Any],
) -> bytes:
  """Returns the LiteRT file of a function of a batch of images.

  Args:
    function: maps `[B, *shape]` to [B, ...]; may close over weights, and must
      not compute with the size of the batch.
    shape: of one image.
    dtype: of the input.
    about: what the file says of itself.

  Returns:
    The file. Its batch is 1, and can be resized to any.

  Raises:
    UnsupportedError: on an operation that cannot be written.
  """
  from ai_edge_litert import schema_py_generated as schema
  import flatbuffers

  program = jaxpr_lib.trace(function, shape, dtype)
  graph = litert_graph.Graph(schema)
  image = graph.tensor((BATCH, *shape), dtype, record.INPUT)
  [out] = _Writer(graph).run(program.jaxpr, program.consts, [image])
  model = graph.finish(image, out, record.OUTPUT, json.dumps(about))
  builder = flatbuffers.Builder(1 << 16)
  builder.Finish(model.Pack(builder), file_identifier=litert_graph.IDENTIFIER)
  return bytes(builder.Output())


class _Writer(jaxpr_lib.Walker[_Value]):
  """Collects operators and weights while it walks a program."""

  format = "LiteRT"
  # Kinds of an operator and of its options, if it has some.
  elementwise: Mapping[str, str] = {
    "add": "ADD AddOptions",
    "div": "DIV DivOptions",
    "exp": "EXP ExpOptions",
    "ge": "GREATER_EQUAL GreaterEqualOptions",
    "logistic": "LOGISTIC",
    "max": "MAXIMUM MaximumMinimumOptions",
    "min": "MINIMUM MaximumMinimumOptions",
    "mul": "MUL MulOptions",
    "neg": "NEG NegOptions",
    "rsqrt": "RSQRT",
    "select_n": "SELECT_V2 SelectV2Options",
    "sub": "SUB SubOptions",
  }
  reductions: Mapping[str, str] = {
    "reduce_max": "REDUCE_MAX ReducerOptions",
    "reduce_sum": "SUM ReducerOptions",
  }

  def __init__(self, graph: litert_graph.Graph) -> None:
    self.graph = graph

  # ------------------------------------------------------------ elementwise

  def _elementwise(self, name: str, operands: _Operands, out: Any) -> _Value:
    if name == "div" and isinstance(operands[0], _Value):
      x, by = operands[0].summed, operands[1]
      if x and isinstance(by, np.ndarray) and by.size == 1 and by == x[1]:
        return self.graph.operator(
          "MEAN ReducerOptions",
          [x[0], [1, 2]],
          out.shape,
          keepDims=len(out.shape) == 4,
        )
    return super()._elementwise(name, operands, out)

  def _operate(self, kind: str, operands: _Operands, out: Any) -> _Value:
    return self.graph.operator(kind, operands, out.shape, out.dtype)

  def _relu(self, x: _Value, out: Any) -> _Value:
    if x.convolution is None:
      return self._operate("RELU", [x], out)
    *_, options = self.graph.operators[x.convolution]
    kinds = self.graph.schema.ActivationFunctionType
    options.fusedActivationFunction = kinds.RELU
    return _Value(x.shape, x.index, x.dtype)

  def _convert_element_type(
    self, operands: list[_Value], params: Any, out: Any
  ) -> _Value:
    [x] = operands
    have, want = map(self.graph.type_of, (x.dtype, out.dtype))
    if have == want:
      return x
    return self.graph.operator(
      "CAST CastOptions",
      [x],
      out.shape,
      out.dtype,
      inDataType=have,
      outDataType=want,
    )

  def _read_convolution(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
    operator, inputs, *_ = self.graph.operators[index]
    kernel, bias = (self.graph.constants[i] for i in inputs[1:])
    # Of [O, H, W, I], or [1, H, W, O] where it is depthwise.
    return kernel, bias, 0 if operator == "CONV_2D" else 3

  def _write_convolution(
    self, index: int, kernel: np.ndarray, bias: np.ndarray
  ) -> None:
    inputs = self.graph.operators[index][1]
    inputs[1:] = self.graph.weight(kernel), self.graph.weight(bias)

  # ------------------------------------------------------------------ shapes

  def _reshaped(self, x: _Value, shape: Shape) -> _Value:
    if x.folded is not None and shape[1:] == x.folded[1]:
      return self._refolded(x.folded[0], shape)
    sides = [-1, *shape[1:]]
    made = self.graph.operator(
      "RESHAPE ReshapeOptions",
      [x, sides],
      shape,
      x.dtype,
      newShape=sides,
    )
    made.reshaped, made.summed = x, x.summed
    return made

  def _refolded(self, x: _Value, shape: Shape) -> _Value:
    """Writes a whole fold of pixels into channels, or back, as one operator."""
    if shape[1] < x.shape[1]:
      kind = "SPACE_TO_DEPTH SpaceToDepthOptions"
      block = x.shape[1] // shape[1]
    else:
      kind = "DEPTH_TO_SPACE DepthToSpaceOptions"
      block = shape[1] // x.shape[1]
    return self.graph.operator(kind, [x], shape, x.dtype, blockSize=block)

  def _repeated(self, x: _Value, shape: Shape) -> _Value:
    # BroadcastTo would have to know the batch.
    zeros = np.zeros((1, *shape[1:]), np.float32)
    return self.graph.operator("ADD AddOptions", [x, zeros], shape)

  def _permuted(self, x: _Value, axes: Shape) -> _Value:
    made = self.graph.operator(
      "TRANSPOSE TransposeOptions",
      [x, axes],
      [x.shape[axis] for axis in axes],
      x.dtype,
    )
    whole = x.reshaped
    if axes == _FOLD and whole is not None:
      _, height, a, width, b, rest = x.shape
      if a == b and whole.shape[1:] == (height * a, width * b, rest):
        made.folded = (whole, (height, width, a * b * rest))
      elif width == b and whole.shape[1:] == (height, a, width * b * rest):
        made.folded = (whole, (height * width, a * b, rest))
    return made

  def _slice(self, operands: list[Any], params: Any, out: Any) -> _Value:
    [x] = operands
    if out.shape[0] != x.shape[0] or set(params["strides"] or (1,)) != {1}:
      raise UnsupportedError(f"cutting {out.shape} out of {x.shape}")
    # -1 takes all that is left, as the batch is not known.
    sizes = [-1 if a == b else a for a, b in zip(out.shape, x.shape)]
    operands = [x, params["start_indices"], sizes]
    kind = "SLICE SliceOptions"
    return self.graph.operator(kind, operands, out.shape, x.dtype)

  def _concatenate(self, operands: _Operands, params: Any, out: Any) -> _Value:
    kind, axis = "CONCATENATION ConcatenationOptions", params["dimension"]
    return self.graph.operator(kind, operands, out.shape, out.dtype, axis=axis)

  def _padded(self, x: _Value, sides: Sides, value: np.ndarray) -> _Value:
    shape = [side + sum(pad) for side, pad in zip(x.shape, sides)]
    kind = "PAD PadOptions"
    operands: list[Any] = [x, sides]
    if not jaxpr_lib.is_zero(value):
      kind, operands = "PADV2 PadV2Options", [*operands, value.reshape(1)]
    return self.graph.operator(kind, operands, shape, x.dtype)

  # --------------------------------------------------------------- over maps

  def _reduced(self, name: str, x: _Value, axes: Shape, shape: Shape) -> _Value:
    kind = self.reductions[name]
    made = self.graph.operator(kind, [x, axes], shape, keepDims=False)
    if name == "reduce_sum" and axes == (1, 2) and len(x.shape) == 4:
      made.summed = (x, x.shape[1] * x.shape[2])
    return made

  def _matmul(self, x: _Value, y: _Value | np.ndarray) -> _Value:
    shape = (*x.shape[:-1], y.shape[-1])
    if not isinstance(y, np.ndarray):
      kind = "BATCH_MATMUL BatchMatMulOptions"
      return self.graph.operator(kind, [x, y], shape)
    # The operator's weights are [to, from].
    kind, y = "FULLY_CONNECTED FullyConnectedOptions", y.T.astype(np.float32)
    return self.graph.operator(kind, [x, y], shape, keepNumDims=True)

  def _pad_windows(
    self,
    x: _Value,
    window: Window,
    reach: Sequence[int],
    outside: float = 0.0,
  ) -> tuple[_Value, int]:
    """Returns the input and the kind of padding of an operator with windows.

    Padding that is neither none nor "SAME" gets an operator of its own.
    """
    kind = self.graph.schema.Padding
    if not any(map(any, window.padding)):
      return x, kind.VALID
    same = jax.lax.padtype_to_pads(x.shape[1:3], reach, window.strides, "SAME")
    if list(window.padding) == [tuple(map(int, side)) for side in same]:
      return x, kind.SAME
    sides = [(0, 0), *window.padding, (0, 0)]
    return self._padded(x, sides, np.asarray(np.float32(outside))), kind.VALID

  def _conv_general_dilated(
    self, operands: list[Any], params: Any, out: Any
  ) -> _Value:
    x, kernel = operands
    jaxpr_lib.check_convolution(params, kernel)
    height, width, depth, features = kernel.shape
    rows, columns = map(int, params["rhs_dilation"])
    top, left = [(int(low), int(high)) for low, high in params["padding"]]
    window = Window((height, width), params["window_strides"], (top, left))
    reach = ((height - 1) * rows + 1, (width - 1) * columns + 1)
    source, padding = self._pad_windows(x, window, reach)
    fields = {
      "padding": padding,
      "strideH": int(window.strides[0]),
      "strideW": int(window.strides[1]),
      "dilationHFactor": rows,
      "dilationWFactor": columns,
    }
    groups = params["feature_group_count"]
    if groups == 1:
      kind = "CONV_2D Conv2DOptions"
      kernel = kernel.transpose(3, 0, 1, 2)  # HWIO to OHWI
    elif depth == 1 and groups == x.shape[-1]:
      kind = "DEPTHWISE_CONV_2D DepthwiseConv2DOptions"
      kernel = kernel.reshape(1, height, width, features)
      fields["depthMultiplier"] = features // groups
    else:
      raise UnsupportedError(f"a convolution in {groups} groups")
    weights = [kernel.astype(np.float32), np.zeros(features, np.float32)]
    made = self.graph.operator(kind, [source, *weights], out.shape, **fields)
    made.convolution = len(self.graph.operators) - 1
    return made

  def _pooled(
    self, kind: str, x: _Value, window: Window, shape: Shape
  ) -> _Value:
    if kind == "mean" and any(map(any, window.padding)):
      # The operator's own padding would not count the cells outside.
      raise UnsupportedError("a padded sum over windows")
    outside = float(np.finfo(np.float32).min)
    source, padding = self._pad_windows(x, window, window.sides, outside)
    operator = {"max": "MAX_POOL_2D", "mean": "AVERAGE_POOL_2D"}[kind]
    return self.graph.operator(
      f"{operator} Pool2DOptions",
      [source],
      shape,
      padding=padding,
      strideH=window.strides[0],
      strideW=window.strides[1],
      filterHeight=window.sides[0],
      filterWidth=window.sides[1],
    )

  def _call_exact_gelu(self, x: _Value, out: Any) -> _Value:
    # LiteRT has no error function to build it from.
    return self._operate("GELU GeluOptions", [x], out)

  def _call_resize_bilinear(self, x: _Value, out: Any) -> _Value:
    return self.graph.operator(
      "RESIZE_BILINEAR ResizeBilinearOptions",
      [x, out.shape[1:3]],
      out.shape,
      halfPixelCenters=True,
    )

  _call_upsample_2x = _call_resize_bilinear
