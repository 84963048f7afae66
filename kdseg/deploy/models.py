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
import PIL.Image
import PIL.ImageOps

from kdseg import networks
from kdseg.data import decode
from kdseg.data import loading
from kdseg.deploy import formats as formats_lib
from kdseg.deploy import pictures
from kdseg.deploy import weights
from kdseg.deploy.formats import record
from kdseg.evaluation import metrics
from kdseg.runtime import checkpoint
from kdseg.training import step as step_lib

Tree = Any
# What `Segmenter.predict` takes.
Image = str | pathlib.Path | PIL.Image.Image | np.ndarray


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

  def predict(self, image: Image) -> np.ndarray:
    """Returns the probability of lesion, pixel by pixel.

    The same arithmetic as the scores of a run: the image is squashed to the
    network's square by an antialiased bilinear filter, and the probability
    brought back to the image's size.

    Args:
      image: of any size, as one of

        * a path (str or Path) of a JPEG, PNG, BMP, TIFF, WebP or GIF, or a PIL
          picture; either is turned as its orientation tag says;
        * RGB [h, w, 3], RGBA [h, w, 4] (transparency is dropped) or grey
          [h, w] or [h, w, 1], of uint8, or of floats in [0, 1];
        * a batch [B, h, w, 3] (or 4, or 1) of these.

    Returns:
      [h, w] float32 in [0, 1]; [B, h, w] for a batch.

    Raises:
      DataError: if a file cannot be read, or pixels are of an unknown kind.
      ValueError: on an array of another shape, type or range; names them, and
        how to convert it.
    """
    rgb = to_rgb(image)
    if rgb.ndim == 4:
      return np.stack([self.predict(one) for one in rgb])
    square = loading.resize_image(np.ascontiguousarray(rgb), self.size)
    [probability] = self.probabilities(square[None])
    return metrics.resize_probability(probability, *rgb.shape[:2])

  def segment(self, image: Image) -> np.ndarray:
    """Returns the mask [h, w] bool of `predict` above the threshold."""
    return self.predict(image) > self.threshold


def to_rgb(image: Image) -> np.ndarray:
  """Returns what `Segmenter.predict` takes as uint8 [h, w, 3] or [B, h, w, 3].

  Raises:
    DataError: if a file cannot be read, or pixels are of an unknown kind.
    ValueError: on an array of another shape, type or range.
  """
  if isinstance(image, str | pathlib.Path):
    return pictures.read(pathlib.Path(image))
  if isinstance(image, PIL.Image.Image):
    return decode.to_rgb(PIL.ImageOps.exif_transpose(image), "the picture")
  array = np.asarray(image)
  found = f"this one is {array.dtype} {list(array.shape)}"
  if array.ndim == 2:
    array = array[..., None]
  if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4):
    channels_first = array.ndim in (3, 4) and array.shape[-3] in (1, 3, 4)
    hint = "; move its channels last: np.moveaxis(image, -3, -1)"
    raise ValueError(
      "an image is [h, w] or [h, w, C], a batch [B, h, w, C], with C of 1, 3 "
      f"or 4, but {found}{hint if channels_first else ''}"
    )
  if 0 in array.shape:
    raise ValueError(f"an image has at least one pixel, but {found}")
  if np.issubdtype(array.dtype, np.floating):
    # `not`, so that NaN is refused, too.
    if not (array.min() >= 0 and array.max() <= 1):
      raise ValueError(
        f"an image of floats lies in [0, 1], but {found} from "
        f"{array.min():g} to {array.max():g}; scale it, or convert 0 to 255 by "
        "image.astype(np.uint8)"
      )
    array = np.round(array * 255).astype(np.uint8)
  if array.dtype != np.uint8:
    raise ValueError(
      f"an image is uint8 or floats in [0, 1], but {found}; divide it by its "
      "largest possible value, such as image / 65535 for 16 bits"
    )
  if array.shape[-1] == 1:
    return np.repeat(array, 3, axis=-1)
  return array[..., :3]


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
