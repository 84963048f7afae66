"""Collects a LiteRT graph, and packs it as the format's schema has it."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from kdseg.deploy.formats import jaxpr as jaxpr_lib

BATCH = jaxpr_lib.BATCH
# Name by which LiteRT's own tools call the graph.
SIGNATURE = "serving_default"
# Version of the schema, and the first bytes of a file.
_SCHEMA = 3
IDENTIFIER = b"TFL3"
_TYPES = ("bool", "uint8", "int8", "float32", "int32", "int64")


@dataclasses.dataclass
class Value(jaxpr_lib.Value):
  """A tensor of the graph.

  Attributes:
    index: of the tensor.
    dtype: of its numbers.
    reshaped: the value that this one is a reshape of.
    folded: the value that this one folds, and the shape [H, W, C] that the
      reshape that ends the fold must give.
    summed: the value whose sides this one sums up, and how many cells they
      have.
  """

  index: int
  dtype: Any
  reshaped: "Value | None" = None
  folded: "tuple[Value, tuple[int, ...]] | None" = None
  summed: "tuple[Value, int] | None" = None


class Graph:
  """Tensors and operators, in the order in which they were added.

  Attributes:
    operators: (kind, inputs, output, options); tensors are named by index.
    constants: content of the tensors that are weights, by index.
  """

  def __init__(self, schema: Any) -> None:
    self.schema = schema
    self.operators: list[tuple[str, list[int], int, Any]] = []
    self.tensors: list[Any] = []
    self.constants: dict[int, np.ndarray] = {}

  def tensor(self, shape: Sequence[int], dtype: Any, name: str = "") -> Value:
    """Adds a tensor without content."""
    made = self.schema.TensorT()
    made.shape = [1 if side == BATCH else side for side in shape]
    if BATCH in shape:
      made.shapeSignature = [-1 if side == BATCH else side for side in shape]
    made.type = self.type_of(dtype)
    made.name = name or f"tensor_{len(self.tensors)}"
    self.tensors.append(made)
    return Value(tuple(shape), len(self.tensors) - 1, dtype)

  def weight(self, array: np.ndarray) -> int:
    """Adds a tensor with content; returns its index."""
    array = np.ascontiguousarray(array)
    index = self.tensor(array.shape, array.dtype).index
    self.constants[index] = array
    return index

  def operator(
    self,
    kind: str,
    operands: Sequence[Value | np.ndarray | Sequence[Any]],
    shape: Sequence[int],
    dtype: Any = np.float32,
    **fields: Any,
  ) -> Value:
    """Adds an operator.

    Args:
      kind: of the operator and, after a space, of its options.
      operands: arrays become weights, and lists weights of 32-bit integers.
      shape: of the output.
      dtype: of the output.
      **fields: of the options.

    Returns:
      The output.
    """
    kind, _, kind_of_options = kind.partition(" ")
    inputs = []
    for operand in operands:
      if isinstance(operand, Value):
        operand.convolution = None
        inputs.append(operand.index)
      elif isinstance(operand, np.ndarray):
        inputs.append(self.weight(operand))
      else:
        inputs.append(self.weight(np.array(operand, np.int32)))
    options = None
    if kind_of_options:
      options = getattr(self.schema, f"{kind_of_options}T")()
      for name, value in fields.items():
        setattr(options, name, value)
    made = self.tensor(shape, dtype)
    self.operators.append((kind, inputs, made.index, options))
    return made

  def finish(
    self, image: Value, out: Value, name: str, description: str
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
    model.buffers = [schema.BufferT()]
    graph = schema.SubGraphT()
    graph.name = "main"
    graph.tensors = [self.tensors[index] for index in order]
    for index in order:
      if index in self.constants:
        buffer = schema.BufferT()
        content = self.constants[index].tobytes()
        buffer.data = np.frombuffer(content, np.uint8)
        model.buffers.append(buffer)
        self.tensors[index].buffer = len(model.buffers) - 1
    graph.inputs, graph.outputs = [0], [place[out.index]]
    graph.operators, model.operatorCodes = self._pack(kept[::-1], place)
    model.subgraphs = [graph]
    signature = schema.SignatureDefT()
    signature.signatureKey = SIGNATURE
    signature.inputs = [self._named(image.index, place)]
    signature.outputs = [self._named(out.index, place)]
    model.signatureDefs = [signature]
    return model

  def _pack(
    self, operators: Sequence[Any], place: Mapping[int, int]
  ) -> tuple[list[Any], list[Any]]:
    """Returns the operators, and their kinds, as the schema has them."""
    schema = self.schema
    packed = []
    codes: dict[str, Any] = {}
    for kind, inputs, output, options in operators:
      if kind not in codes:
        code = codes[kind] = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = 3 if kind == "RESIZE_BILINEAR" else 1
      operator = schema.OperatorT()
      operator.opcodeIndex = list(codes).index(kind)
      operator.inputs = [place[i] for i in inputs]
      operator.outputs = [place[output]]
      if options is not None:
        kind_of_options = type(options).__name__.removesuffix("T")
        operator.builtinOptionsType = getattr(
          schema.BuiltinOptions, kind_of_options
        )
        operator.builtinOptions = options
      packed.append(operator)
    return packed, list(codes.values())

  def _named(self, index: int, place: Mapping[int, int]) -> Any:
    named = self.schema.TensorMapT()
    named.name = self.tensors[index].name
    named.tensorIndex = place[index]
    return named

  def type_of(self, dtype: Any) -> int:
    """Returns what the schema calls a type of numbers.

    Raises:
      UnsupportedError: if LiteRT does not have it.
    """
    name = np.dtype(dtype).name
    if name not in _TYPES:
      raise jaxpr_lib.UnsupportedError(f"numbers of type {name}")
    return getattr(self.schema.TensorType, name.upper())
