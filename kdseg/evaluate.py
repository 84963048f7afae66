"""Probabilities at each image's own size, and one row of scores an image."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdseg import cache
from kdseg import metrics
from kdseg import step as step_lib
from kdseg.data import pipeline

Tree = Any
Predict = Callable[[Tree, Tree], Any]

AVERAGING = ("none", "dihedral")


def probabilities(
  predict: Predict,
  variables: Tree,
  arrays: pipeline.Arrays,
  *,
  batch_size: int,
  averaging: str = "none",
  encoded: dict[str, np.ndarray] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (example, probability [S, S] float32) for every example, once.

  Args:
    predict: `step.make_predict`, mapped over the devices.
    variables: replicated.
    arrays: the examples.
    batch_size: examples a call; the last call is padded.
    averaging: "none", or "dihedral", the mean over eight orientations.
    encoded: what a frozen encoder made of the examples, by name,
      [orientations, N, ...].

  Raises:
    ValueError: on an unknown `averaging`.
  """
  if averaging not in AVERAGING:
    raise ValueError(
      f"test-time averaging must be one of {', '.join(AVERAGING)}: "
      f"{averaging!r}"
    )
  count = 1 if averaging == "none" else cache.ORIENTATIONS
  for batch in pipeline.eval_batches(arrays, batch_size):
    real = batch["_mask"]
    total = 0.0
    for orientation in range(count):
      given = {
        "image": np.ascontiguousarray(cache.orient(batch["image"], orientation))
      }
      if encoded is not None:
        given["encoded"] = {
          name: np.asarray(values[orientation][batch["index"]])
          for name, values in encoded.items()
        }
      answer = np.asarray(predict(variables, step_lib.shard(given)))
      answer = answer.reshape(-1, *answer.shape[2:])
      total = total + cache.restore_orientation(answer, orientation)
    for i in np.flatnonzero(real):
      yield int(batch["index"][i]), total[i] / count


def mean_dice(
  predict: Predict,
  variables: Tree,
  arrays: pipeline.Arrays,
  *,
  batch_size: int,
  encoded: dict[str, np.ndarray] | None = None,
) -> float:
  """Returns the mean per-image Dice at the size of the arrays.

  For choosing checkpoints: no resizing to the images' own sizes.

  Raises:
    ValueError: if there is no example.
  """
  values = []
  for i, probability in probabilities(
    predict, variables, arrays, batch_size=batch_size, encoded=encoded
  ):
    prediction = probability > metrics.THRESHOLD
    truth = arrays.mask[i] > 0
    size = prediction.sum() + truth.sum()
    overlap = np.logical_and(prediction, truth).sum()
    values.append(2 * overlap / size if size else 1.0)
  if not values:
    raise ValueError(f"{arrays.name}/{arrays.split} holds no example")
  return float(np.mean(values))


def score(
  predict: Predict,
  variables: Tree,
  arrays: pipeline.Arrays,
  *,
  batch_size: int,
  averaging: str = "none",
  keep: Callable[[str, np.ndarray], None] | None = None,
) -> list[dict[str, Any]]:
  """Returns one row an image, every metric at the image's own size.

  Args:
    predict: mapped over the devices.
    variables: replicated.
    arrays: a whole test set.
    batch_size: examples a call.
    averaging: see `probabilities`.
    keep: called with (id, predicted mask [h, w] bool) for every image.
  """
  rows = []
  for i, probability in probabilities(
    predict, variables, arrays, batch_size=batch_size, averaging=averaging
  ):
    truth = arrays.native_mask(i)
    native = metrics.resize_probability(probability, *truth.shape)
    rows.append({"id": arrays.ids[i], **metrics.score(native, truth)})
    if keep is not None:
      keep(arrays.ids[i], native > metrics.THRESHOLD)
  return rows
