"""Distances between the boundaries of two masks, and boundary IoU.

A mask's boundary is that of surface-distance (Nikolov et al., J Med Internet
Res 23(7):e26151, 2021): the corners of the pixel grid whose four pixels are
not all alike, each weighted by the length of the contour through it. The world
outside the image is background, so the contour of a lesion that touches the
frame is closed along it.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.ndimage
import scipy.spatial

PERCENTILE = 0.95  # of HD95

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


class Surface(NamedTuple):
  """How far two boundaries are apart.

  `hd95` and `assd` in pixels of the image; `nsd` and `boundary_iou` in [0, 1].
  """

  hd95: float
  assd: float
  nsd: float
  boundary_iou: float


def compare(
  prediction: np.ndarray, truth: np.ndarray, *, tolerance: float, band: int
) -> Surface:
  """Compares the boundaries of two masks, neither of them empty.

  HD95 is the larger of the two directions' 95th percentiles, ASSD the mean
  over both boundaries together, NSD the share of both within `tolerance`; each
  weighted by contour length. Boundary IoU is that of Cheng et al. (CVPR 2021,
  eq. 1).

  Args:
    prediction: bool [h, w].
    truth: bool [h, w].
    tolerance: of NSD, in pixels.
    band: width of the band of boundary IoU, in pixels.
  """
  # No boundary lies outside the joint bounding box.
  box = _bounding_box(prediction | truth)
  prediction, truth = prediction[box], truth[box]
  predicted, predicted_length = _contour(prediction)
  true, true_length = _contour(truth)
  to_true = _squared_distance(predicted, true)
  to_predicted = _squared_distance(true, predicted)
  squared = np.concatenate([to_true, to_predicted])
  length = np.concatenate([predicted_length, true_length])
  inner, other = _inner_band(prediction, band), _inner_band(truth, band)
  return Surface(
    hd95=max(
      _percentile(to_true, predicted_length),
      _percentile(to_predicted, true_length),
    ),
    assd=float(np.average(np.sqrt(squared), weights=length)),
    nsd=float(np.average(squared <= tolerance**2, weights=length)),
    boundary_iou=float(
      np.count_nonzero(inner & other) / np.count_nonzero(inner | other)
    ),
  )


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


def _squared_distance(points: np.ndarray, others: np.ndarray) -> np.ndarray:
  # A tree over a few thousand corners instead of a distance transform over
  # millions of pixels; exact, and squared distances are integers.
  tree = scipy.spatial.cKDTree(others, balanced_tree=False, compact_nodes=False)
  _, nearest = tree.query(points)
  return np.square(points - others[nearest]).sum(1)


def _percentile(squared: np.ndarray, length: np.ndarray) -> float:
  order = np.lexsort((length, squared))
  reached = np.cumsum(length[order]) / length.sum()
  index = min(int(np.searchsorted(reached, PERCENTILE)), len(order) - 1)
  return math.sqrt(squared[order[index]])


def _inner_band(mask: np.ndarray, width: int) -> np.ndarray:
  """Returns what `width` erosions by a 3 x 3 square take away from a mask.

  The frame counts as background, as in the authors' code.
  """
  depth = scipy.ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")
  return mask & (depth[1:-1, 1:-1] <= width)
