"""Finds a network by name or path, and runs it on images of any size."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import importlib.resources
import json
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg import networks
from kdseg.data import loading
from kdseg.deploy import formats as formats_lib
from kdseg.deploy import weights
from kdseg.deploy.formats import record
from kdseg.evaluation import metrics
from kdseg.runtime import checkpoint
from kdseg.training import step as step_lib

Tree = Any


@dataclasses.dataclass(frozen=True, repr=False)
class Segmenter:
  """A network ready to run, by `probabilities` of a subclass.

  Attributes:
    name: as messages show it.
    size: side of its input in pixels.
    threshold: lesion where the probability is above.
    about: what its file says of it.
    source: the file or folder that it came from, if any.
  """

  name: str
  size: int
  threshold: float
  about: Mapping[str, Any]
  source: pathlib.Path | None = dataclasses.field(default=None, kw_only=True)

  def __repr__(self) -> str:
    """Returns one line without the weights."""
    return (
      f"<{type(self).__name__} {self.name}: {self._describe()}input "
      f"{self.size} x {self.size} pixels, threshold {self.threshold:g}"
      f"{f', from {self.source}' if self.source else ''}>"
    )

  def _describe(self) -> str:
    """Returns what the line of `repr` says of the network."""
    return ""

  def probabilities(self, batch: np.ndarray) -> np.ndarray:
    """Runs the network on its own squares.

    Args:
      batch: [B, S, S, 3] uint8 RGB.

    Returns:
      [B, S, S] float32, the probability of lesion.
    """
    raise NotImplementedError

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
    square = loading.resize_image(np.ascontiguousarray(image), self.size)
    [probability] = self.probabilities(square[None])
    return metrics.resize_probability(probability, *image.shape[:2])

  def segment(self, image: np.ndarray) -> np.ndarray:
    """Returns the mask [h, w] bool of `predict` above the threshold."""
    return self.predict(image) > self.threshold


@dataclasses.dataclass(frozen=True, repr=False)
class Model(Segmenter):
  """A network with its weights, run by JAX.

  Attributes:
    network: the module.
    variables: its weights, host arrays.
  """

  network: nn.Module
  variables: Tree

  def _describe(self) -> str:
    """See the base class."""
    name = self.about.get("network", type(self.network).__name__)
    return f"{name}, {networks.count_parameters(self.variables):,} parameters, "

  @functools.cached_property
  def _run(self) -> Any:
    return jax.jit(step_lib.make_predict(self.network))

  def probabilities(self, batch: np.ndarray) -> np.ndarray:
    """See the base class."""
    return np.asarray(self._run(self.variables, {"image": batch}))


@dataclasses.dataclass(frozen=True, repr=False)
class ExportedModel(Segmenter):
  """A file of an export, run by its own runtime and none of this package.

  Attributes:
    run: [B, S, S, 3] uint8 to [B, S, S] float32.
  """

  run: record.Run

  def probabilities(self, batch: np.ndarray) -> np.ndarray:
    """See the base class."""
    return self.run(batch)


def shipped() -> dict[str, pathlib.Path]:
  """Returns the models that come with the package, by name."""
  folder = pathlib.Path(str(importlib.resources.files("kdseg") / "models"))
  return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def load(name_or_path: str | pathlib.Path) -> Segmenter:
  """Returns a network in any format, ready to run.

  Args:
    name_or_path: what `load_weights` takes, or a file that
      `kdseg.deploy.export` wrote (.onnx, .tflite, .stablehlo).

  Raises:
    ImportError: if the runtime of a file is not installed; names the extra.
    WeightsError: if it is none of these, or damaged.
  """
  path = pathlib.Path(name_or_path)
  if any(path.suffix == format.suffix for format in formats_lib.FORMATS):
    return load_exported(path)
  return load_weights(name_or_path)


def load_exported(
  path: str | pathlib.Path,
  formats: Sequence[record.Format] = formats_lib.FORMATS,
) -> ExportedModel:
  """Opens a file that `kdseg.deploy.export` wrote.

  Args:
    path: with the suffix of one of the formats.
    formats: that are known.

  Raises:
    ImportError: if its runtime is not installed; names the extra.
    WeightsError: if it is no such file, or damaged.
  """
  path = pathlib.Path(path)
  by_suffix = {format.suffix: format for format in formats}
  if path.suffix not in by_suffix:
    raise weights.WeightsError(f"{path} is none of {', '.join(by_suffix)}")
  format = by_suffix[path.suffix]
  try:
    with format.naming_extra():
      run, size, about = format.open(path.read_bytes(), 0)
    beside = path.with_name("preprocess.json")
    if not about and beside.exists():
      about = json.loads(beside.read_text(encoding="utf-8"))
  except ImportError:
    raise
  # Each runtime has errors of its own, some of them bare RuntimeErrors.
  except Exception as error:
    raise weights.WeightsError(
      f"{path} cannot be opened: {(str(error) or repr(error)).splitlines()[0]}"
    ) from error
  return ExportedModel(
    name=path.name,
    size=size,
    threshold=float(about.get("threshold", 0.5)),
    about=about,
    run=run,
    source=path,
  )


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
    source=path,
  )
