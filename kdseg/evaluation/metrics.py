"""Scores of one predicted mask against the annotated one.

Overlap follows the official scorer of the ISIC challenges: masks at the
image's own size, one value per image, the mean over images taken later (by
`report.tables`). `pooled` gives the other convention in use, one value from
the pixel counts of all images together.

Boundaries are those of surface-distance (Nikolov et al., J Med Internet Res
23(7):e26151, 2021): a mask's boundary consists of the corners of the pixel
grid whose four pixels are not all alike, each weighted by the length of the
contour through it. The world outside the image is background, so a lesion
that touches the frame is closed along it, as if padded by one pixel.

Distances are in pixels *of an image whose shorter side is `REFERENCE_SIDE`*
(isotropic, whatever the image's own size is), so that a score means the same
for a 767 x 576 and for a 4288 x 2848 image; `*_diagonal` are the same
distances as a share of the image's diagonal.

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

from collections.abc import Iterable
from collections.abc import Mapping
import math

import numpy as np
from PIL import Image
import scipy.ndimage
import scipy.spatial

METRICS = (
  "dice",
  "jaccard",
  "accuracy",
  "sensitivity",
  "specificity",
  "thresholded_jaccard",
  "hd95",
  "hd95_diagonal",
  "assd",
  "assd_diagonal",
  "nsd",
  "boundary_iou",
  "true_positive",
  "false_positive",
  "false_negative",
  "true_negative",
  "height",
  "width",
  "empty_prediction",
)
COUNTS = (
  "true_positive",
  "false_positive",
  "false_negative",
  "true_negative",
)
# Probability above which a pixel is lesion. The official scorer's "> 128 of
# 255" on 8-bit masks is the same for masks of 0 and 255, which ours are.
THRESHOLD = 0.5
JACCARD_FLOOR = 0.65  # below it, ISIC's thresholded Jaccard is 0
REFERENCE_SIDE = 256  # pixels
TOLERANCE = 2  # of normalised surface Dice, in pixels at REFERENCE_SIDE
PERCENTILE = 0.95  # of HD95
BAND_SHARE = 0.02  # of the diagonal, the band's width in boundary IoU

# Contour length through a pixel corner, by which of its four pixels belong to
# the mask (bits: 8 top left, 4 top right, 2 bottom left, 1 bottom right).
_CORNER, _EDGE, _SADDLE = math.sqrt(2) / 2, 1.0, math.sqrt(2)
_CONTOUR_LENGTH = np.array(
  [
    *(0, _CORNER, _CORNER, _EDGE),
    *(_CORNER, _EDGE, _SADDLE, _CORNER),
    *(_CORNER, _SADDLE, _EDGE, _CORNER),
    *(_EDGE, _CORNER, _CORNER, 0),
  ]
)


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
    A dict with the keys `METRICS`, in that order. Counts are in pixels of the
    image itself, `hd95` and `assd` in pixels at a shorter side of 256.

  Raises:
    ValueError: on NaN or infinity, on values outside [0, 1] (logits, for
      example), on integer arrays, and when the two sizes differ.
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
  if probability.dtype == bool:
    prediction = probability
  else:
    _check_probability(probability)
    prediction = probability > threshold

  counts = _counts(prediction, truth)
  overlap = _overlap(**counts)
  height, width = truth.shape
  jaccard = overlap["jaccard"]
  values = {
    **overlap,
    "thresholded_jaccard": jaccard if jaccard >= JACCARD_FLOOR else 0.0,
    **_boundary(prediction, truth),
    **counts,
    "height": height,
    "width": width,
    "empty_prediction": int(not prediction.any()),
  }
  return {name: values[name] for name in METRICS}


def pooled(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """Scores many images as if their pixels were one image.

  The convention of EGE-UNet, MALUNet and others; large lesions and large
  images count for more. Its Jaccard is exactly D / (2 - D) of its Dice, which
  a mean over images is not.

  Args:
    rows: one mapping an image, with the four pixel counts in `COUNTS`.

  Returns:
    dice, jaccard, accuracy, sensitivity and specificity.

  Raises:
    ValueError: when there is no row.
  """
  rows = list(rows)
  if not rows:
    raise ValueError("cannot pool the pixels of no image")
  # Python integers: 379 images of 12 million pixels pass 2**31.
  return _overlap(
    **{name: sum(int(row[name]) for row in rows) for name in COUNTS}
  )


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


def _counts(prediction: np.ndarray, truth: np.ndarray) -> dict[str, int]:
  true_positive = int(np.count_nonzero(prediction & truth))
  false_positive = int(np.count_nonzero(prediction)) - true_positive
  false_negative = int(np.count_nonzero(truth)) - true_positive
  return {
    "true_positive": true_positive,
    "false_positive": false_positive,
    "false_negative": false_negative,
    "true_negative": (
      truth.size - true_positive - false_positive - false_negative
    ),
  }


def _overlap(
  true_positive: int,
  false_positive: int,
  false_negative: int,
  true_negative: int,
) -> dict[str, float]:
  union = true_positive + false_positive + false_negative
  lesion = true_positive + false_negative
  background = true_negative + false_positive
  return {
    "dice": 2 * true_positive / (union + true_positive) if union else 1.0,
    "jaccard": true_positive / union if union else 1.0,
    "accuracy": (true_positive + true_negative) / (lesion + background),
    "sensitivity": true_positive / lesion if lesion else 1.0,
    "specificity": true_negative / background if background else 1.0,
  }


def _boundary(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
  height, width = truth.shape
  shorter = min(height, width)
  diagonal = math.hypot(height, width)
  empty = not prediction.any(), not truth.any()
  if any(empty):
    share = 0.0 if all(empty) else 1.0
    hd95 = assd = share * diagonal
    nsd = boundary_iou = 1.0 - share
  else:
    # Nothing outside the joint bounding box has a say: no boundary is there.
    box = _bounding_box(prediction | truth)
    prediction, truth = prediction[box], truth[box]
    hd95, assd, nsd = _surface(
      prediction, truth, tolerance=TOLERANCE * shorter / REFERENCE_SIDE
    )
    boundary_iou = _boundary_iou(
      prediction, truth, max(1, round(BAND_SHARE * diagonal))
    )
  scale = REFERENCE_SIDE / shorter
  return {
    "hd95": hd95 * scale,
    "hd95_diagonal": hd95 / diagonal,
    "assd": assd * scale,
    "assd_diagonal": assd / diagonal,
    "nsd": nsd,
    "boundary_iou": boundary_iou,
  }


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice]:
  rows = np.flatnonzero(mask.any(1))
  columns = np.flatnonzero(mask.any(0))
  return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _contour(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Gives the boundary's corners [n, 2] and the contour's length at each."""
  # Not a view: Pillow hands out bools whose bytes are 255.
  padded = np.pad(mask, 1).astype(np.uint8)
  code = padded[:-1, :-1] * np.uint8(8)
  code += padded[:-1, 1:] * np.uint8(4)
  code += padded[1:, :-1] * np.uint8(2)
  code += padded[1:, 1:]
  flat = np.flatnonzero((code != 0) & (code != 15))
  points = np.stack(np.divmod(flat, code.shape[1]), axis=1)
  return points, _CONTOUR_LENGTH[code.ravel()[flat]]


def _surface(
  prediction: np.ndarray, truth: np.ndarray, *, tolerance: float
) -> tuple[float, float, float]:
  """Compares two boundaries; distances in pixels of the arrays.

  HD95: the larger of the two directions' 95th percentiles. ASSD: the mean
  over both boundaries together. NSD: the share of both within `tolerance`.
  Each is weighted by contour length.
  """
  predicted, predicted_length = _contour(prediction)
  true, true_length = _contour(truth)
  # A tree over a few thousand corners instead of a distance transform over
  # millions of pixels; exact, and squared distances are integers.
  to_true = _squared_distance(predicted, true)
  to_predicted = _squared_distance(true, predicted)
  hd95 = max(
    _percentile(to_true, predicted_length),
    _percentile(to_predicted, true_length),
  )
  squared = np.concatenate([to_true, to_predicted])
  length = np.concatenate([predicted_length, true_length])
  assd = np.average(np.sqrt(squared), weights=length)
  nsd = np.average(squared <= tolerance**2, weights=length)
  return float(hd95), float(assd), float(nsd)


def _squared_distance(points: np.ndarray, others: np.ndarray) -> np.ndarray:
  tree = scipy.spatial.cKDTree(others, balanced_tree=False, compact_nodes=False)
  _, nearest = tree.query(points)
  return np.square(points - others[nearest]).sum(1)


def _percentile(squared: np.ndarray, length: np.ndarray) -> float:
  order = np.lexsort((length, squared))
  reached = np.cumsum(length[order]) / length.sum()
  index = min(np.searchsorted(reached, PERCENTILE), len(order) - 1)
  return math.sqrt(squared[order[index]])


def _boundary_iou(
  prediction: np.ndarray, truth: np.ndarray, width: int
) -> float:
  """Boundary IoU (Cheng et al., CVPR 2021, eq. 1), both masks not empty.

  The band is what `width` erosions by a 3 x 3 square take away, the frame
  counting as background, as in the authors' code.
  """
  predicted, true = _inner_band(prediction, width), _inner_band(truth, width)
  union = np.count_nonzero(predicted | true)
  return float(np.count_nonzero(predicted & true) / union)


def _inner_band(mask: np.ndarray, width: int) -> np.ndarray:
  depth = scipy.ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")
  return mask & (depth[1:-1, 1:-1] <= width)
