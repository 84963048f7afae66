"""What every network in every form does: segment an image of any size."""

import dataclasses
from typing import Any

import numpy as np

from kdseg.data import loading
from kdseg.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class Segmenter:
  """A network ready to run; a subclass says how (`probabilities`).

  Attributes:
    name: for people.
    size: side of its input in pixels.
    threshold: lesion where the probability is above.
    about: what its file says of it.
  """

  name: str
  size: int
  threshold: float
  about: dict[str, Any]

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
