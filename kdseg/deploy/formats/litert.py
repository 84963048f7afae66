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
UnsupportedError = jaxpr_lib.UnsupportedError
# The transposition in a fold of pixels into channels, and back.
_FOLD = (0, 1, 3, 2, 4, 5)


_Value = litert_graph.Value
_Operand = _Value | np.ndarray


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
    function: maps [B, *shape] to [B, ...]; may close over weights, and must
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
  # An operator and its type of options, if it has one.
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
    "reduce_max": "REDUCE_MAX",
    "reduce_sum": "SUM",
  }

  def __init__(self, graph: litert_graph.Graph) -> None:
    self.graph = graph

  # ------------------------------------------------------------ elementwise

  def _elementwise(
    self, name: str, operands: Sequence[_Operand], out: Any
  ) -> _Value:
    if name == "div" and isinstance(operands[0], _Value):
      x, by = operands[0].summed, operands[1]
      if (
        x and isinstance(by, np.ndarray) and by.size == 1 and by.item() == x[1]
      ):
        axes = self.graph.weight([1, 2], np.int32)
        options = self.graph.options(
          "ReducerOptions", keepDims=len(out.shape) == 4
        )
        return self.graph.operator(
          "MEAN", [self.graph.index_of(x[0]), axes], out.shape, options
        )
    return super()._elementwise(name, operands, out)

  def _operate(
    self, kind: str, operands: Sequence[_Operand], out: Any
  ) -> _Value:
    operator, _, options = kind.partition(" ")
    return self.graph.operator(
      operator,
      [self.graph.index_of(x) for x in operands],
      out.shape,
      self.graph.options(options) if options else None,
      out.dtype,
    )

  def _relu(self, x: _Value, out: Any) -> _Value:
    if x.convolution is None:
      return self._operate("RELU", [x], out)
    *_, options = self.graph.operators[x.convolution]
    options.fusedActivationFunction = (
      self.graph.schema.ActivationFunctionType.RELU
    )
    return _Value(x.shape, x.index, x.dtype)

  def _convert_element_type(
    self, operands: list[_Value], params: Any, out: Any
  ) -> _Value:
    [x] = operands
    have, want = map(self.graph.type_of, (x.dtype, out.dtype))
    if have == want:
      return x
    options = self.graph.options(
      "CastOptions", inDataType=have, outDataType=want
    )
    return self.graph.operator(
      "CAST", [self.graph.index_of(x)], out.shape, options, out.dtype
    )

  def _read_convolution(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
    operator, inputs, *_ = self.graph.operators[index]
    kernel, bias = (self.graph.constants[i] for i in inputs[1:])
    # Of [O, H, W, I], or [1, H, W, O] where it is depthwise.
    return kernel, bias, 0 if operator == "CONV_2D" else 3

  def _write_convolution(
    self, index: int, kernel: np.ndarray, bias: np.ndarray
  ) -> None:
    operator, inputs, output, options = self.graph.operators[index]
    inputs = [inputs[0], self.graph.weight(kernel), self.graph.weight(bias)]
    self.graph.operators[index] = (operator, inputs, output, options)

  # ------------------------------------------------------------------ shapes

  def _reshaped(self, x: _Value, shape: tuple[int, ...]) -> _Value:
    if x.folded is not None and shape[1:] == x.folded[1]:
      return self._refolded(x.folded[0], shape)
    sides = [-1, *shape[1:]]
    inputs = [self.graph.index_of(x), self.graph.weight(sides, np.int32)]
    options = self.graph.options("ReshapeOptions", newShape=sides)
    made = self.graph.operator("RESHAPE", inputs, shape, options, x.dtype)
    made.reshaped, made.summed = x, x.summed
    return made

  def _refolded(self, x: _Value, shape: tuple[int, ...]) -> _Value:
    """Writes a whole fold of pixels into channels, or back, as one operator."""
    if shape[1] < x.shape[1]:
      kind, options = "SPACE_TO_DEPTH", "SpaceToDepthOptions"
      block = x.shape[1] // shape[1]
    else:
      kind, options = "DEPTH_TO_SPACE", "DepthToSpaceOptions"
      block = shape[1] // x.shape[1]
    made = self.graph.options(options, blockSize=block)
    return self.graph.operator(
      kind, [self.graph.index_of(x)], shape, made, x.dtype
    )

  def _repeated(self, x: _Value, shape: tuple[int, ...]) -> _Value:
    # BroadcastTo would have to know the batch.
    inputs = [
      self.graph.index_of(x),
      self.graph.weight(np.zeros((1, *shape[1:]))),
    ]
    return self.graph.operator(
      "ADD", inputs, shape, self.graph.options("AddOptions")
    )

  def _permuted(self, x: _Value, axes: tuple[int, ...]) -> _Value:
    made = self.graph.operator(
      "TRANSPOSE",
      [self.graph.index_of(x), self.graph.weight(axes, np.int32)],
      [x.shape[axis] for axis in axes],
      self.graph.options("TransposeOptions"),
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

  def _slice(self, operands: list[_Value], params: Any, out: Any) -> _Value:
    [x] = operands
    if out.shape[0] != x.shape[0] or set(params["strides"] or (1,)) != {1}:
      raise UnsupportedError(f"cutting {out.shape} out of {x.shape}")
    # -1 takes all that is left, as the batch is not known.
    sizes = [
      -1 if side == x.shape[a] else side for a, side in enumerate(out.shape)
    ]
    inputs = [self.graph.index_of(x)] + [
      self.graph.weight(numbers, np.int32)
      for numbers in (params["start_indices"], sizes)
    ]
    options = self.graph.options("SliceOptions")
    return self.graph.operator("SLICE", inputs, out.shape, options, x.dtype)

  def _concatenate(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    options = self.graph.options(
      "ConcatenationOptions", axis=params["dimension"]
    )
    inputs = [self.graph.index_of(x) for x in operands]
    return self.graph.operator(
      "CONCATENATION", inputs, out.shape, options, out.dtype
    )

  def _padded(
    self, x: _Value, sides: Sequence[tuple[int, int]], value: np.ndarray
  ) -> _Value:
    shape = tuple(side + sum(pad) for side, pad in zip(x.shape, sides))
    inputs = [self.graph.index_of(x), self.graph.weight(sides, np.int32)]
    if jaxpr_lib.is_zero(value):
      options = self.graph.options("PadOptions")
      return self.graph.operator("PAD", inputs, shape, options, x.dtype)
    inputs.append(self.graph.weight(value.reshape(1), value.dtype))
    options = self.graph.options("PadV2Options")
    return self.graph.operator("PADV2", inputs, shape, options, x.dtype)

  # --------------------------------------------------------------- over maps

  def _reduce(
    self, name: str, x: _Value, axes: tuple[int, ...], shape: tuple[int, ...]
  ) -> _Value:
    made = self.graph.operator(
      self.reductions[name],
      [self.graph.index_of(x), self.graph.weight(axes, np.int32)],
      shape,
      self.graph.options("ReducerOptions", keepDims=False),
    )
    if name == "reduce_sum" and axes == (1, 2) and len(x.shape) == 4:
      made.summed = (x, x.shape[1] * x.shape[2])
    return made

  def _matmul(self, x: _Value, y: _Operand) -> _Value:
    shape = (*x.shape[:-1], y.shape[-1])
    if isinstance(y, np.ndarray):
      # The operator's weights are [to, from].
      inputs = [self.graph.index_of(x), self.graph.weight(y.T)]
      options = self.graph.options("FullyConnectedOptions", keepNumDims=True)
      return self.graph.operator("FULLY_CONNECTED", inputs, shape, options)
    inputs = [self.graph.index_of(x), self.graph.index_of(y)]
    options = self.graph.options("BatchMatMulOptions")
    return self.graph.operator("BATCH_MATMUL", inputs, shape, options)

  def _pad_windows(
    self,
    x: _Value,
    window: jaxpr_lib.Window,
    reach: Sequence[int],
    outside: float = 0.0,
  ) -> tuple[int, int]:
    """Returns the input and the kind of padding of an operator with windows.

    Padding that is neither none nor "SAME" gets an operator of its own.
    """
    kind = self.graph.schema.Padding
    if not any(map(any, window.padding)):
      return self.graph.index_of(x), kind.VALID
    same = jax.lax.padtype_to_pads(x.shape[1:3], reach, window.strides, "SAME")
    if list(window.padding) == [tuple(map(int, side)) for side in same]:
      return self.graph.index_of(x), kind.SAME
    sides = [(0, 0), *window.padding, (0, 0)]
    padded = self._padded(x, sides, np.full((), outside, np.float32))
    return padded.index, kind.VALID

  def _conv_general_dilated(
    self, operands: list[Any], params: Any, out: Any
  ) -> _Value:
    x, kernel = operands
    jaxpr_lib.check_convolution(params, kernel)
    height, width, depth, features = kernel.shape
    rows, columns = params["rhs_dilation"]
    padding = [(int(low), int(high)) for low, high in params["padding"]]
    window = jaxpr_lib.Window(
      (height, width), params["window_strides"], (padding[0], padding[1])
    )
    reach = ((height - 1) * rows + 1, (width - 1) * columns + 1)
    source, kind_of_padding = self._pad_windows(x, window, reach)
    common = {
      "padding": kind_of_padding,
      "strideH": int(window.strides[0]),
      "strideW": int(window.strides[1]),
      "dilationHFactor": int(rows),
      "dilationWFactor": int(columns),
    }
    groups = params["feature_group_count"]
    if groups == 1:
      kind, kernel = "CONV_2D", kernel.transpose(3, 0, 1, 2)  # HWIO to OHWI
      options = self.graph.options("Conv2DOptions", **common)
    elif depth == 1 and groups == x.shape[-1]:
      kind = "DEPTHWISE_CONV_2D"
      kernel = kernel.reshape(1, height, width, features)
      options = self.graph.options(
        "DepthwiseConv2DOptions", depthMultiplier=features // groups, **common
      )
    else:
      raise UnsupportedError(f"a convolution in {groups} groups")
    inputs = [
      source,
      self.graph.weight(kernel),
      self.graph.weight(np.zeros(features)),
    ]
    made = self.graph.operator(kind, inputs, out.shape, options)
    made.convolution = len(self.graph.operators) - 1
    return made

  def _pool(
    self,
    kind: str,
    x: _Value,
    window: jaxpr_lib.Window,
    shape: tuple[int, ...],
  ) -> _Value:
    if kind == "mean" and any(map(any, window.padding)):
      # The operator's own padding would not count the cells outside.
      raise UnsupportedError("a padded sum over windows")
    outside = float(np.finfo(np.float32).min)
    source, padding = self._pad_windows(x, window, window.sides, outside)
    options = self.graph.options(
      "Pool2DOptions",
      padding=padding,
      strideH=window.strides[0],
      strideW=window.strides[1],
      filterHeight=window.sides[0],
      filterWidth=window.sides[1],
    )
    operator = {"max": "MAX_POOL_2D", "mean": "AVERAGE_POOL_2D"}[kind]
    return self.graph.operator(operator, [source], shape, options)

  def _call_exact_gelu(self, x: _Value, out: Any) -> _Value:
    # LiteRT has no error function to build it from.
    return self._operate("GELU GeluOptions", [x], out)

  def _call_upsample_2x(self, x: _Value, out: Any) -> _Value:
    return self._call_resize_bilinear(x, out)

  def _call_resize_bilinear(self, x: _Value, out: Any) -> _Value:
    inputs = [
      self.graph.index_of(x),
      self.graph.weight(out.shape[1:3], np.int32),
    ]
    options = self.graph.options("ResizeBilinearOptions", halfPixelCenters=True)
    return self.graph.operator("RESIZE_BILINEAR", inputs, out.shape, options)
