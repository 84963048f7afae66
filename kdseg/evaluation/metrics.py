"""Scores of one predicted mask against the annotated one.

`METRICS` has one record a metric; the columns of scores.csv, the headings and
digits of the tables and what arms are compared by are derived from it.

Overlap follows the official scorer of the ISIC challenges: masks at the
image's own size, one value per image, the mean over images taken later (by
`report`). `pooled` gives the other convention in use, one value from the pixel
counts of all images together.

Distances are in pixels *of an image whose shorter side is `REFERENCE_SIDE`*
(isotropic, whatever the image's own size is), so that a score means the same
for a 767 x 576 and for a 4288 x 2848 image; `*_diagonal` are the same
distances as a share of the image's diagonal. Boundaries: see `surface`.

An empty mask scores by rule, is counted (`empty_prediction`), and is never
left out:

  | prediction | annotation | overlap, NSD, boundary IoU | HD95, ASSD       |
  |------------|------------|----------------------------|------------------|
  | empty      | empty      | 1                          | 0                |
  | empty      | lesion     | 0                          | the diagonal     |
  | lesion     | empty      | 0                          | the diagonal     |

where sensitivity is 1 if the annotation is empty, and specificity 1 if it
fills the image (nothing was there to be missed), as the official scorer has
it. Pixel accuracy needs no rule.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple

import numpy as np
from PIL import Image

from kdseg.evaluation import surface

# Probability above which a pixel is lesion. The official scorer's "> 128 of
# 255" on 8-bit masks is the same for masks of 0 and 255, which ours are.
THRESHOLD = 0.5
JACCARD_FLOOR = 0.65  # below it, ISIC's thresholded Jaccard is 0
REFERENCE_SIDE = 256  # pixels
TOLERANCE = 2  # of normalised surface Dice, in pixels at REFERENCE_SIDE
BAND_SHARE = 0.02  # of the diagonal, the band's width in boundary IoU


class Counts(NamedTuple):
  """Pixels of one image, or of many images together."""

  true_positive: int
  false_positive: int
  false_negative: int
  true_negative: int


@dataclasses.dataclass(frozen=True)
class Pair:
  """The predicted and the annotated mask of one image, bool [h, w].

  What several metrics share is computed once, in pixels of the image itself.
  """

  prediction: np.ndarray
  truth: np.ndarray

  @property
  def shorter(self) -> int:
    """Returns the shorter side of the image."""
    return min(self.truth.shape)

  @property
  def diagonal(self) -> float:
    """Returns the length of the image's diagonal."""
    return math.hypot(*self.truth.shape)

  @functools.cached_property
  def counts(self) -> Counts:
    """Counts right and wrong pixels."""
    hit = int(np.count_nonzero(self.prediction & self.truth))
    extra = int(np.count_nonzero(self.prediction)) - hit
    missed = int(np.count_nonzero(self.truth)) - hit
    return Counts(hit, extra, missed, self.truth.size - hit - extra - missed)

  @functools.cached_property
  def boundaries(self) -> surface.Surface:
    """Compares the boundaries; an empty mask is compared by rule."""
    empty = not self.prediction.any(), not self.truth.any()
    if any(empty):
      share = 0.0 if all(empty) else 1.0
      far = share * self.diagonal
      return surface.Surface(far, far, 1.0 - share, 1.0 - share)
    return surface.compare(
      self.prediction,
      self.truth,
      tolerance=TOLERANCE * self.shorter / REFERENCE_SIDE,
      band=max(1, round(BAND_SHARE * self.diagonal)),
    )

  def at_reference_size(self, distance: float) -> float:
    """Brings a distance to pixels at a shorter side of REFERENCE_SIDE."""
    return distance * (REFERENCE_SIDE / self.shorter)


@dataclasses.dataclass(frozen=True)
class Metric:
  """One metric: its column of scores.csv and its place in the tables.

  Attributes:
    name: of the column.
    label: heading in the tables; what follows a comma is the unit.
    function: maps a `Pair`, or its `Counts`, to a finite number.
    takes: "counts" or "pair". A metric of counts can be pooled.
    digits: shown after the point.
    lower_is_better: as of a distance.
    compared: stands in the main table, and arms are compared by it.
  """

  name: str
  label: str
  function: Callable[[Any], float]
  takes: str = "pair"
  digits: int = 4
  lower_is_better: bool = False
  compared: bool = False


def _share(part: int, whole: int) -> float:
  return part / whole if whole else 1.0


def _dice(counts: Counts) -> float:
  hit, extra, missed, _ = counts
  return _share(2 * hit, 2 * hit + extra + missed)


def _jaccard(counts: Counts) -> float:
  hit, extra, missed, _ = counts
  return _share(hit, hit + extra + missed)


def _thresholded_jaccard(counts: Counts) -> float:
  jaccard = _jaccard(counts)
  return jaccard if jaccard >= JACCARD_FLOOR else 0.0


METRICS = (
  Metric("dice", "Dice", _dice, "counts", compared=True),
  Metric("jaccard", "Jaccard", _jaccard, "counts", compared=True),
  Metric("accuracy", "accuracy", lambda c: (c[0] + c[3]) / sum(c), "counts"),
  Metric(
    "sensitivity", "sensitivity", lambda c: _share(c[0], c[0] + c[2]), "counts"
  ),
  Metric(
    "specificity", "specificity", lambda c: _share(c[3], c[3] + c[1]), "counts"
  ),
  Metric(
    "thresholded_jaccard",
    f"Jaccard, 0 below {JACCARD_FLOOR}",
    _thresholded_jaccard,
    "counts",
  ),
  Metric(
    "hd95",
    "HD95, px",
    lambda pair: pair.at_reference_size(pair.boundaries.hd95),
    digits=2,
    lower_is_better=True,
    compared=True,
  ),
  Metric(
    "hd95_diagonal",
    "HD95 / diagonal",
    lambda pair: pair.boundaries.hd95 / pair.diagonal,
    lower_is_better=True,
  ),
  Metric(
    "assd",
    "ASSD, px",
    lambda pair: pair.at_reference_size(pair.boundaries.assd),
    digits=2,
    lower_is_better=True,
    compared=True,
  ),
  Metric(
    "assd_diagonal",
    "ASSD / diagonal",
    lambda pair: pair.boundaries.assd / pair.diagonal,
    lower_is_better=True,
  ),
  Metric(
    "nsd",
    f"NSD at {TOLERANCE} px",
    lambda pair: pair.boundaries.nsd,
    compared=True,
  ),
  Metric(
    "boundary_iou",
    "boundary IoU",
    lambda pair: pair.boundaries.boundary_iou,
    compared=True,
  ),
)
# What else scores.csv says of an image, in whole numbers.
FACTS = (*Counts._fields, "height", "width", "empty_prediction")
COLUMNS = (*(metric.name for metric in METRICS), *FACTS)


def resize_probability(
  probability: np.ndarray, height: int, width: int
) -> np.ndarray:
  """Brings a probability map to the size its image was taken at.

  Bilinear with pixel centres at half integers (Pillow's), widened to the
  scale when shrinking, so that no pixel is skipped.

  Args:
    probability: [S, S] or [h, w] float in [0, 1].
    height: rows of the result.
    width: columns of the result.

  Returns:
    [height, width] float32.

  Raises:
    ValueError: on NaN, infinity, values outside [0, 1], or another shape.
  """
  probability = np.asarray(probability)
  if probability.ndim != 2 or 0 in probability.shape:
    raise ValueError(
      f"a probability map is [height, width], got shape {probability.shape}"
    )
  _check_probability(probability)
  if height < 1 or width < 1:
    raise ValueError(f"cannot resize to {height} x {width} pixels")
  probability = np.ascontiguousarray(probability, np.float32)
  if probability.shape == (height, width):
    return probability.copy()
  resized = Image.fromarray(probability).resize(
    (width, height), Image.Resampling.BILINEAR
  )
  return np.array(resized)


def score(
  probability: np.ndarray,
  truth: np.ndarray,
  *,
  threshold: float = THRESHOLD,
) -> dict[str, float]:
  """Scores one image by every metric of scores.csv.

  Args:
    probability: [h, w], either float in [0, 1] (lesion where > `threshold`)
      or bool (the predicted mask itself), at the annotation's size.
    truth: [h, w] bool, the annotated mask at the image's own size.
    threshold: probability above which a pixel counts as lesion.

  Returns:
    A dict with the keys `COLUMNS`, in that order. Counts are in pixels of the
    image itself, `hd95` and `assd` in pixels at a shorter side of 256.

  Raises:
    ValueError: on NaN, infinity, values outside [0, 1] (logits, for example),
      integer arrays, and when the two sizes differ.
  """
  probability, truth = np.asarray(probability), np.asarray(truth)
  if truth.dtype != bool or truth.ndim != 2 or 0 in truth.shape:
    raise ValueError(
      "truth has to be a bool mask [height, width], got "
      f"{truth.dtype} of shape {truth.shape}"
    )
  if probability.shape != truth.shape:
    raise ValueError(
      f"the prediction has shape {probability.shape}, the annotation "
      f"{truth.shape}: resize the prediction (resize_probability) first"
    )
  if probability.dtype != bool:
    _check_probability(probability)
    probability = probability > threshold
  pair = Pair(probability, truth)
  return {
    **{
      metric.name: metric.function(
        pair.counts if metric.takes == "counts" else pair
      )
      for metric in METRICS
    },
    **pair.counts._asdict(),
    "height": truth.shape[0],
    "width": truth.shape[1],
    "empty_prediction": int(not probability.any()),
  }


def pooled(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Scores many images as if their pixels were one image.

  The convention of EGE-UNet, MALUNet and others; large lesions and large
  images count for more. Its Jaccard is exactly D / (2 - D) of its Dice, which
  a mean over images is not.

  Args:
    rows: one mapping an image, with the pixel counts of `Counts`.

  Returns:
    Every metric of counts.

  Raises:
    ValueError: when there is no row.
  """
  rows = list(rows)
  if not rows:
    raise ValueError("cannot pool the pixels of no image")
  # Python integers: 379 images of 12 million pixels pass 2**31.
  counts = Counts(
    *(sum(int(row[name]) for row in rows) for name in Counts._fields)
  )
  return {
    metric.name: metric.function(counts)
    for metric in METRICS
    if metric.takes == "counts"
  }


def _check_probability(probability: np.ndarray) -> None:
  if not np.issubdtype(probability.dtype, np.floating):
    raise ValueError(
      "expected float probabilities or a bool mask, got "
      f"{probability.dtype}; turn 0/255 masks into bool with `mask > 128`"
    )
  low, high = probability.min(), probability.max()
  if not (np.isfinite(low) and np.isfinite(high)):
    bad = np.argwhere(~np.isfinite(probability))
    raise ValueError(
      f"{len(bad)} of {probability.size} probabilities are not finite, the "
      f"first at row {bad[0][0]}, column {bad[0][1]}"
    )
  if low < 0 or high > 1:
    raise ValueError(
      f"probabilities lie in [0, 1], got {low:g} to {high:g}; are these logits?"
    )
