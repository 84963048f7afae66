"""Finds a network by name or path, and runs it on images of any size."""

import dataclasses
import functools
import importlib.resources
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg import networks
from kdseg.deploy import artefacts
from kdseg.deploy import segmenter
from kdseg.deploy import weights
from kdseg.runtime import checkpoint
from kdseg.training import step as step_lib

Tree = Any


@dataclasses.dataclass(frozen=True)
class Model(segmenter.Segmenter):
  """A network with its weights, run by JAX.

  Attributes:
    network: the module.
    variables: its weights, host arrays.
  """

  network: nn.Module
  variables: Tree

  @functools.cached_property
  def _run(self) -> Any:
    return jax.jit(step_lib.make_predict(self.network))

  def probabilities(self, batch: np.ndarray) -> np.ndarray:
    """See the base class."""
    return np.asarray(self._run(self.variables, {"image": batch}))


def shipped() -> dict[str, pathlib.Path]:
  """Returns the models that come with the package, by name."""
  folder = pathlib.Path(str(importlib.resources.files("kdseg") / "models"))
  return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load(name_or_path: str | pathlib.Path) -> segmenter.Segmenter:
  """Returns a network in whatever form it is, ready to run.

  Args:
    name_or_path: what `load_weights` takes, or a file that
      `kdseg.deploy.export` wrote (.onnx, .tflite, .stablehlo).

  Raises:
    ImportError: if the runtime of a file is not installed; names the extra.
    WeightsError: if it is none of these, or damaged.
  """
  if pathlib.Path(name_or_path).suffix in artefacts.SUFFIXES:
    return artefacts.load(name_or_path)
  return load_weights(name_or_path)


def load_weights(name_or_path: str | pathlib.Path) -> Model:
  """Returns a network with its weights.

  Args:
    name_or_path: a shipped model ("isic2016-student"), a file of weights, or
      the folder of an arm or a teacher in a workdir ("runs/x/arms/NAME-seed0").
      A student of a user's own (`kdseg.distill.extensions`) is unknown here.

  Raises:
    WeightsError: if it is none of these, or damaged.
  """
  path = shipped().get(str(name_or_path), pathlib.Path(name_or_path))
  try:
    if path.is_dir():
      variables, about = weights.read_folder(path)
      flat = checkpoint.flatten(variables)
    elif path.exists():
      flat, about = weights.load(path)
    else:
      raise weights.WeightsError(
        f"{name_or_path} is no file, no folder and no shipped model; shipped: "
        f"{', '.join(shipped()) or 'none'}"
      )
    network = networks.make_network(about["network"], **dict(about["options"]))
    size = about["size"]
    expected = jax.eval_shape(
      network.init, jax.random.key(0), jnp.zeros((1, size, size, 3))
    )
    variables = checkpoint.unflatten(flat, expected, str(path))
  except (checkpoint.CheckpointError, TypeError, ValueError) as error:
    raise weights.WeightsError(f"{path}: {error}") from error
  return Model(
    name=path.stem if path.is_file() else path.name,
    network=network,
    variables=jax.tree.map(np.asarray, variables),
    size=size,
    threshold=about["threshold"],
    about=about,
  )
