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

from kdseg import checkpoint
from kdseg import metrics
from kdseg import networks
from kdseg import step as step_lib
from kdseg.data import pipeline
from kdseg.deploy import weights

Tree = Any


@dataclasses.dataclass(frozen=True)
class Model:
  """A network ready to run.

  Attributes:
    name: for people.
    network: the module.
    variables: its weights, host arrays.
    size: side of its input in pixels.
    threshold: lesion where the probability is above.
    about: what its file says of it.
  """

  name: str
  network: nn.Module
  variables: Tree
  size: int
  threshold: float
  about: dict[str, Any]

  @functools.cached_property
  def _run(self) -> Any:
    return jax.jit(step_lib.make_predict(self.network))

  def predict(self, image: np.ndarray) -> np.ndarray:
    """Returns the probability of lesion, pixel by pixel.

    The same arithmetic as the scores of a run: the image is squashed to the
    network's square by an antialiased bilinear filter, and the probability
    brought back to the image's size.

    Args:
      image: [h, w, 3] uint8 RGB, of any size.

    Returns:
      [h, w] float32 in [0, 1].

    Raises:
      ValueError: on another shape or type.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
      raise ValueError(
        f"an image is uint8 [h, w, 3], RGB, not {image.dtype} {image.shape}"
      )
    if 0 in image.shape:
      raise ValueError(f"an image of {image.shape[:2]} has no pixel")
    square = pipeline.resize_image(np.ascontiguousarray(image), self.size)
    probability = np.asarray(
      self._run(self.variables, {"image": square[None]})
    )[0]
    return metrics.resize_probability(probability, *image.shape[:2])

  def segment(self, image: np.ndarray) -> np.ndarray:
    """Returns the mask [h, w] bool of `predict` above the threshold."""
    return self.predict(image) > self.threshold


def shipped() -> dict[str, pathlib.Path]:
  """Returns the models that come with the package, by name."""
  folder = pathlib.Path(str(importlib.resources.files("kdseg") / "models"))
  return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load(name_or_path: str | pathlib.Path) -> Model:
  """Returns a network, ready to run.

  Args:
    name_or_path: a shipped model ("isic2016-student"), a file of weights, or
      the folder of an arm or a teacher in a workdir ("runs/x/arms/NAME-seed0").
      A student of a user's own (`kdseg.own`) is unknown here.

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
