"""Writes a network's program, a jaxpr, as a LiteRT (TensorFlow Lite) model.

Maps stay [B, H, W, C], as in JAX. Only built-in operators; a per-channel scale
and shift behind a convolution (BatchNorm) go into its weights, a ReLU behind a
convolution into the operator. A call of `layers.upsample_2x` or
`layers.resize_bilinear` becomes one ResizeBilinear, folds of pixels into
channels become SpaceToDepth, and back.

Google's converter is not used, as its package cannot be installed beside chex
(litert-converter 0.5 pins xdsl 0.28, which wants typing-extensions below 4.13).
The format's definition comes with LiteRT itself.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from kdseg.deploy.formats import jaxpr as jaxpr_lib

BATCH = jaxpr_lib.BATCH
UnsupportedError = jaxpr_lib.UnsupportedError
# Version of the format, and what its files begin with.
_SCHEMA = 3
_IDENTIFIER = b"TFL3"
# Of pixels folded into channels, and unfolded.
_FOLD = (0, 1, 3, 2, 4, 5)
# By which LiteRT's own tools call the graph.
SIGNATURE = "serving_default"


@dataclasses.dataclass
class _Value:
  """A tensor of the graph.

  Attributes:
    index: of the tensor.
    shape: as JAX has it.
    convolution: index of the operator that made it, while no other reads it.
    reshaped: the value that this one is a reshape of.
    folded: the value that this one folds, and the shape that a last reshape
      must give.
    summed: the value whose sides this one sums up, and how many cells they
      have.
    narrow: the value that this one repeats along its sides of 1.
  """

  index: int
  shape: tuple[int, ...]
  convolution: int | None = None
  reshaped: "_Value | None" = None
  folded: "tuple[_Value, tuple[int, ...]] | None" = None
  summed: "tuple[_Value, int] | None" = None
  narrow: "_Value | None" = None


_Operand = _Value | np.ndarray


def export(
  function: Callable[[jax.Array], jax.Array],
  shape: Sequence[int],
  dtype: Any,
  *,
  input_name: str,
  output_name: str,
  description: str = "",
) -> bytes:
  """Returns the LiteRT model of a function of one batch of images.

  Args:
    function: maps [B, *shape] to [B, ...]; may close over weights, and must
      not compute with the size of the batch.
    shape: of one image.
    dtype: of the input.
    input_name: in the graph.
    output_name: in the graph.
    description: what the file says of itself.

  Returns:
    The file. Its batch is 1, and can be resized to any.

  Raises:
    ImportError: if LiteRT is not installed.
    UnsupportedError: on an operation that has no form here.
  """
  try:
    from ai_edge_litert import schema_py_generated as schema
    import flatbuffers
  except ModuleNotFoundError as error:
    raise ImportError(
      "writing LiteRT needs the package ai-edge-litert: pip install "
      "'kdseg[litert]'"
    ) from error
  program = jaxpr_lib.trace(function, shape, dtype)
  writer = _Writer(schema)
  image = writer.tensor((BATCH, *shape), dtype, input_name)
  [out] = writer.run(program.jaxpr, program.consts, [image])
  model = writer.finish(image, out, output_name, description)
  builder = flatbuffers.Builder(1 << 16)
  builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
  return bytes(builder.Output())


class _Writer(jaxpr_lib.Walker):
  """Collects operators and weights while it walks a program."""

  form = "LiteRT"

  def __init__(self, schema: Any) -> None:
    self.schema = schema
    self.operators: list[tuple[str, list[int], int, Any]] = []
    self.tensors: list[Any] = []
    self._constants: dict[int, np.ndarray] = {}

  # ------------------------------------------------------------------ graph

  def tensor(self, shape: Sequence[int], dtype: Any, name: str = "") -> _Value:
    """Adds a tensor without content."""
    made = self.schema.TensorT()
    made.shape = [1 if side == BATCH else side for side in shape]
    if BATCH in shape:
      made.shapeSignature = [-1 if side == BATCH else side for side in shape]
    made.type = _type(self.schema, dtype)
    made.name = name or f"tensor_{len(self.tensors)}"
    self.tensors.append(made)
    return _Value(len(self.tensors) - 1, tuple(shape))

  def _weight(self, array: np.ndarray) -> int:
    array = np.ascontiguousarray(array)
    index = self.tensor(array.shape, array.dtype).index
    self._constants[index] = array
    return index

  def _index(self, value: _Operand) -> int:
    if isinstance(value, np.ndarray):
      return self._weight(value)
    value.convolution = None
    return value.index

  def _operator(
    self, kind: str, inputs: Sequence[int], out: Any, options: Any = None
  ) -> _Value:
    made = self.tensor(out.shape, out.dtype)
    self.operators.append((kind, list(inputs), made.index, options))
    return made

  def _options(self, kind: str, **fields: Any) -> Any:
    options = getattr(self.schema, f"{kind}T")()
    for name, value in fields.items():
      setattr(options, name, value)
    return options

  def finish(
    self, image: _Value, out: _Value, name: str, description: str
  ) -> Any:
    """Returns the model of what the output depends on."""
    self.tensors[out.index].name = name
    needed, kept = {out.index}, []
    for operator in reversed(self.operators):
      if operator[2] in needed:
        needed.update(operator[1])
        kept.append(operator)
    order = [image.index, *sorted(needed - {image.index})]
    place = {index: number for number, index in enumerate(order)}

    schema = self.schema
    model = schema.ModelT()
    model.version = _SCHEMA
    model.description = description
    empty = schema.BufferT()
    model.buffers = [empty]
    graph = schema.SubGraphT()
    graph.name = "main"
    graph.tensors = [self.tensors[index] for index in order]
    for index in order:
      if index in self._constants:
        buffer = schema.BufferT()
        content = self._constants[index].tobytes()
        buffer.data = np.frombuffer(content, np.uint8)
        model.buffers.append(buffer)
        self.tensors[index].buffer = len(model.buffers) - 1
    graph.inputs, graph.outputs = [0], [place[out.index]]
    model.operatorCodes, codes, graph.operators = [], {}, []
    for kind, inputs, output, options in reversed(kept):
      if kind not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = 3 if kind == "RESIZE_BILINEAR" else 1
        codes[kind] = len(model.operatorCodes)
        model.operatorCodes.append(code)
      operator = schema.OperatorT()
      operator.opcodeIndex = codes[kind]
      operator.inputs = [place[i] for i in inputs]
      operator.outputs = [place[output]]
      if options is not None:
        kind_of_options = type(options).__name__.removesuffix("T")
        operator.builtinOptionsType = getattr(
          schema.BuiltinOptions, kind_of_options
        )
        operator.builtinOptions = options
      graph.operators.append(operator)
    model.subgraphs = [graph]
    signature = schema.SignatureDefT()
    signature.signatureKey = SIGNATURE
    signature.inputs = [self._named(image.index, place)]
    signature.outputs = [self._named(out.index, place)]
    model.signatureDefs = [signature]
    return model

  def _named(self, index: int, place: dict[int, int]) -> Any:
    named = self.schema.TensorMapT()
    named.name = self.tensors[index].name
    named.tensorIndex = place[index]
    return named

  # ------------------------------------------------------------ elementwise

  def _binary(
    self, kind: str, options: str, operands: list[_Operand], out: Any
  ) -> _Value:
    # The operator repeats a side of 1 by itself; not where both have one.
    if (
      sum(isinstance(x, _Value) and x.narrow is not None for x in operands) < 2
    ):
      operands = [getattr(x, "narrow", None) or x for x in operands]
    return self._operator(
      kind,
      [self._index(x) for x in operands],
      out,
      self._options(options) if options else None,
    )

  def _fold(self, kind: str, operands: list[_Operand]) -> _Value | None:
    """Moves a per-channel scale or shift into the convolution before it."""
    left, right = operands
    if isinstance(left, np.ndarray) and kind in ("add", "mul"):
      left, right = right, left
    if not (isinstance(left, _Value) and isinstance(right, np.ndarray)):
      return None
    channel = jaxpr_lib.per_channel(right, left.shape[-1])
    if left.convolution is None or channel is None:
      return None
    operator, inputs, output, options = self.operators[left.convolution]
    if options.fusedActivationFunction:
      return None
    kernel, bias = (self._constants[index] for index in inputs[1:])
    if kind in ("mul", "div"):
      scale = channel if kind == "mul" else 1.0 / channel
      # Of [O, H, W, I], or [1, H, W, O] where it is depthwise.
      first = operator == "CONV_2D"
      kernel = kernel * (scale[:, None, None, None] if first else scale)
      bias = bias * scale
    else:
      bias = bias + (channel if kind == "add" else -channel)
    inputs = [
      inputs[0],
      self._weight(kernel.astype(np.float32)),
      self._weight(bias.astype(np.float32)),
    ]
    self.operators[left.convolution] = (operator, inputs, output, options)
    return left

  def _add(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._fold("add", operands) or self._binary(
      "ADD", "AddOptions", operands, out
    )

  def _sub(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._fold("sub", operands) or self._binary(
      "SUB", "SubOptions", operands, out
    )

  def _mul(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._fold("mul", operands) or self._binary(
      "MUL", "MulOptions", operands, out
    )

  def _div(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    x, by = operands
    summed = x.summed if isinstance(x, _Value) else None
    if summed and isinstance(by, np.ndarray) and by.size == 1:
      source, cells = summed
      if by.item() == cells:
        axes = self._weight(np.array([1, 2], np.int32))
        options = self._options("ReducerOptions", keepDims=len(out.shape) == 4)
        return self._operator("MEAN", [self._index(source), axes], out, options)
    return self._fold("div", operands) or self._binary(
      "DIV", "DivOptions", operands, out
    )

  def _max(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    x, bound = operands
    if not jaxpr_lib.is_zero(bound):
      return self._binary("MAXIMUM", "MaximumMinimumOptions", operands, out)
    if x.convolution is not None:
      *_, options = self.operators[x.convolution]
      options.fusedActivationFunction = self.schema.ActivationFunctionType.RELU
      return _Value(x.index, x.shape)
    return self._operator("RELU", [self._index(x)], out)

  def _min(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("MINIMUM", "MaximumMinimumOptions", operands, out)

  def _ge(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("GREATER_EQUAL", "GreaterEqualOptions", operands, out)

  def _select_n(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    which, no, yes = operands
    return self._binary("SELECT_V2", "SelectV2Options", [which, yes, no], out)

  def _logistic(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    return self._binary("LOGISTIC", "", operands, out)

  def _neg(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("NEG", "NegOptions", operands, out)

  def _exp(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("EXP", "ExpOptions", operands, out)

  def _square(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("MUL", "MulOptions", [operands[0], operands[0]], out)

  def _rsqrt(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    return self._binary("RSQRT", "", operands, out)

  def _convert_element_type(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    [x] = operands
    have = self.tensors[x.index].type
    want = _type(self.schema, out.dtype)
    if have == want:
      return x
    options = self._options("CastOptions", inDataType=have, outDataType=want)
    return self._operator("CAST", [self._index(x)], out, options)

  # ------------------------------------------------------------------ shapes

  def _reshape(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    x = operands[0]
    if x.shape[:1] != out.shape[:1] or BATCH in out.shape[1:]:
      raise UnsupportedError(
        f"reshaping {x.shape} to {out.shape} moves the batch"
      )
    if x.folded is not None and out.shape[1:] == x.folded[1]:
      return self._refold(x.folded[0], out)
    shape = [-1, *out.shape[1:]]
    made = self._operator(
      "RESHAPE",
      [self._index(x), self._weight(np.array(shape, np.int32))],
      out,
      self._options("ReshapeOptions", newShape=shape),
    )
    made.reshaped, made.summed = x, x.summed
    return made

  _squeeze = _reshape

  def _refold(self, x: _Value, out: Any) -> _Value:
    """Writes a whole fold of pixels into channels, or back, as one operator."""
    if out.shape[1] < x.shape[1]:
      kind, options = "SPACE_TO_DEPTH", "SpaceToDepthOptions"
      block = x.shape[1] // out.shape[1]
    else:
      kind, options = "DEPTH_TO_SPACE", "DepthToSpaceOptions"
      block = out.shape[1] // x.shape[1]
    return self._operator(
      kind, [self._index(x)], out, self._options(options, blockSize=block)
    )

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
    # BroadcastTo would have to know the batch.
    zeros = self._weight(np.zeros((1, *out.shape[1:]), np.float32))
    made = self._operator(
      "ADD", [self._index(x), zeros], out, self._options("AddOptions")
    )
    made.narrow = x
    return made

  def _in_shape(self, x: _Value, shape: Sequence[int]) -> _Value:
    """See the base class."""
    if tuple(x.shape) == tuple(shape):
      return x
    out = jax.ShapeDtypeStruct(tuple(shape), np.float32)
    return self._reshape([x], {}, out)

  def _slice(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    [x] = operands
    if out.shape[0] != x.shape[0] or set(params["strides"] or (1,)) != {1}:
      raise UnsupportedError(f"cutting {out.shape} out of {x.shape}")
    # -1: all that is left, as the batch is not known.
    sizes = [
      -1 if side == x.shape[a] else side for a, side in enumerate(out.shape)
    ]
    names = [self._index(x)] + [
      self._weight(np.array(numbers, np.int32))
      for numbers in (params["start_indices"], sizes)
    ]
    return self._operator("SLICE", names, out, self._options("SliceOptions"))

  def _transpose(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    return self._permute(operands[0], params["permutation"])

  def _permute(self, x: _Value, axes: Sequence[int]) -> _Value:
    """See the base class."""
    permutation = tuple(int(axis) for axis in axes)
    if permutation == tuple(range(len(permutation))):
      return x
    out = jax.ShapeDtypeStruct(
      tuple(x.shape[axis] for axis in permutation), np.float32
    )
    made = self._operator(
      "TRANSPOSE",
      [self._index(x), self._weight(np.array(permutation, np.int32))],
      out,
      self._options("TransposeOptions"),
    )
    whole = x.reshaped
    if permutation == _FOLD and whole is not None:
      _, height, a, width, b, rest = x.shape
      if a == b and whole.shape[1:] == (height * a, width * b, rest):
        made.folded = (whole, (height, width, a * b * rest))
      elif width == b and whole.shape[1:] == (height, a, width * b * rest):
        made.folded = (whole, (height * width, a * b, rest))
    return made

  def _concatenate(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    options = self._options("ConcatenationOptions", axis=params["dimension"])
    return self._operator(
      "CONCATENATION", [self._index(x) for x in operands], out, options
    )

  def _pad(self, operands: list[_Operand], params: Any, out: Any) -> _Value:
    x, value = operands
    config = params["padding_config"]
    if any(low < 0 or high < 0 or inside for low, high, inside in config):
      raise UnsupportedError(f"padding by {config}")
    sides = self._weight(np.array([c[:2] for c in config], np.int32))
    if jaxpr_lib.is_zero(value):
      return self._operator(
        "PAD", [self._index(x), sides], out, self._options("PadOptions")
      )
    if not isinstance(value, np.ndarray):
      raise UnsupportedError("padding by a computed number")
    names = [self._index(x), sides, self._weight(value.reshape(1))]
    return self._operator("PADV2", names, out, self._options("PadV2Options"))

  # --------------------------------------------------------------- over maps

  def _reduce_sum(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    [x] = operands
    axes = tuple(int(axis) for axis in params["axes"])
    made = self._operator(
      "SUM",
      [self._index(x), self._weight(np.array(axes, np.int32))],
      out,
      self._options("ReducerOptions", keepDims=False),
    )
    if axes == (1, 2) and len(x.shape) == 4:
      made.summed = (x, x.shape[1] * x.shape[2])
    return made

  def _reduce_max(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    axes = self._weight(np.array(params["axes"], np.int32))
    return self._operator(
      "REDUCE_MAX",
      [self._index(operands[0]), axes],
      out,
      self._options("ReducerOptions", keepDims=False),
    )

  def _matmul(self, x: _Value, y: _Operand) -> _Value:
    """See the base class."""
    out = jax.ShapeDtypeStruct((*x.shape[:-1], y.shape[-1]), np.float32)
    if isinstance(y, np.ndarray):
      # Its weights are [to, from]; without bias.
      names = [self._index(x), self._weight(y.T.astype(np.float32))]
      options = self._options("FullyConnectedOptions", keepNumDims=True)
      return self._operator("FULLY_CONNECTED", names, out, options)
    return self._operator(
      "BATCH_MATMUL",
      [self._index(x), self._index(y)],
      out,
      self._options("BatchMatMulOptions"),
    )

  def _windows(
    self,
    x: _Operand,
    padding: Sequence[tuple[int, int]],
    reach: Sequence[int],
    strides: Sequence[int],
    value: float = 0.0,
  ) -> tuple[int, int]:
    """Returns the input and the kind of padding of an operator with windows.

    Padding that is neither none nor "SAME" is done before.
    """
    kind = self.schema.Padding
    padding = [(int(low), int(high)) for low, high in padding]
    if not any(map(any, padding)):
      return self._index(x), kind.VALID
    same = jax.lax.padtype_to_pads(x.shape[1:3], reach, strides, "SAME")
    if padding == [tuple(map(int, side)) for side in same]:
      return self._index(x), kind.SAME
    shape = list(x.shape)
    for axis, (low, high) in enumerate(padding, 1):
      shape[axis] += low + high
    sides = self._weight(np.array([(0, 0), *padding, (0, 0)], np.int32))
    out = jax.ShapeDtypeStruct(tuple(shape), np.float32)
    names = [self._index(x), sides]
    if value == 0.0:
      padded = self._operator("PAD", names, out, self._options("PadOptions"))
    else:
      names.append(self._weight(np.array([value], np.float32)))
      padded = self._operator(
        "PADV2", names, out, self._options("PadV2Options")
      )
    return padded.index, kind.VALID

  def _conv_general_dilated(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    x, kernel = operands
    jaxpr_lib.check_convolution(params, kernel)
    height, width, depth, features = kernel.shape
    rows, columns = params["rhs_dilation"]
    reach = ((height - 1) * rows + 1, (width - 1) * columns + 1)
    strides = params["window_strides"]
    source, padding = self._windows(x, params["padding"], reach, strides)
    common = {
      "padding": padding,
      "strideH": int(strides[0]),
      "strideW": int(strides[1]),
      "dilationHFactor": int(rows),
      "dilationWFactor": int(columns),
    }
    groups = params["feature_group_count"]
    if groups == 1:
      kind, kernel = "CONV_2D", kernel.transpose(3, 0, 1, 2)  # HWIO to OHWI
      options = self._options("Conv2DOptions", **common)
    elif depth == 1 and groups == x.shape[-1]:
      kind = "DEPTHWISE_CONV_2D"
      kernel = kernel.reshape(1, height, width, features)
      options = self._options(
        "DepthwiseConv2DOptions", depthMultiplier=features // groups, **common
      )
    else:
      raise UnsupportedError(f"a convolution in {groups} groups")
    made = self._operator(
      kind,
      [
        source,
        self._weight(kernel.astype(np.float32)),
        self._weight(np.zeros(features, np.float32)),
      ],
      out,
      options,
    )
    made.convolution = len(self.operators) - 1
    return made

  def _pool(
    self, kind: str, x: _Operand, params: Any, out: Any, outside: float
  ) -> _Value:
    jaxpr_lib.check_pooling(params)
    window = params["window_dimensions"][1:3]
    strides = params["window_strides"][1:3]
    padding = params["padding"][1:3]
    if kind == "AVERAGE_POOL_2D" and any(map(any, padding)):
      # Its own padding would not count the cells outside.
      raise UnsupportedError("a padded sum over windows")
    source, padding = self._windows(x, padding, window, strides, outside)
    options = self._options(
      "Pool2DOptions",
      padding=padding,
      strideH=int(strides[0]),
      strideW=int(strides[1]),
      filterHeight=int(window[0]),
      filterWidth=int(window[1]),
    )
    return self._operator(kind, [source], out, options)

  def _reduce_window_max(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    lowest = float(np.finfo(np.float32).min)
    return self._pool("MAX_POOL_2D", operands[0], params, out, lowest)

  def _reduce_window_sum(
    self, operands: list[_Operand], params: Any, out: Any
  ) -> _Value:
    mean = self._pool("AVERAGE_POOL_2D", operands[0], params, out, 0.0)
    count = np.float32(np.prod(params["window_dimensions"]))
    return self._binary("MUL", "MulOptions", [mean, np.asarray(count)], out)

  def _call_exact_gelu(self, x: _Value, out: Any) -> _Value:
    # LiteRT has no error function to build it from.
    return self._binary("GELU", "GeluOptions", [x], out)

  def _call_upsample_2x(self, x: _Value, out: Any) -> _Value:
    return self._call_resize_bilinear(x, out)

  def _call_resize_bilinear(self, x: _Value, out: Any) -> _Value:
    size = self._weight(np.array(out.shape[1:3], np.int32))
    options = self._options("ResizeBilinearOptions", halfPixelCenters=True)
    return self._operator(
      "RESIZE_BILINEAR", [self._index(x), size], out, options
    )


def _type(schema: Any, dtype: Any) -> int:
  names = {"bool": "BOOL", "uint8": "UINT8", "int8": "INT8"}
  names |= {"float32": "FLOAT32", "int32": "INT32", "int64": "INT64"}
  name = np.dtype(dtype).name
  if name not in names:
    raise UnsupportedError(f"numbers of type {name}")
  return getattr(schema.TensorType, names[name])
