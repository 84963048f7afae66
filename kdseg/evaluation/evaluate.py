"""Probabilities at each image's own size, and one row of scores an image."""

import base64
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import math
from typing import Any
import zlib

import jax
import numpy as np

from kdseg.data import loading
from kdseg.data import orientations
from kdseg.data import pipeline
from kdseg.evaluation import metrics
from kdseg.runtime import devices
from kdseg.runtime import hosts

Tree = Any
Predict = Callable[[Tree, Tree], Any]
Row = dict[str, Any]

TTA_MODES = ("none", "dihedral")


def probabilities(
  predict: Predict,
  variables: Tree,
  arrays: loading.Arrays,
  *,
  batch_size: int,
  tta: str = "none",
  encoder_features: Mapping[str, np.ndarray] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (example, probability [S, S] float32) for every example, once.

  Each of several hosts yields its share of every batch.

  Args:
    predict: `step.make_predict`, mapped over the devices.
    variables: replicated.
    arrays: the examples.
    batch_size: examples a call, of all hosts; the last call is padded.
    tta: "none", or "dihedral", the mean over eight orientations.
    encoder_features: outputs of a frozen encoder for the examples, by name,
      [orientations, N, ...].

  Raises:
    ValueError: on an unknown `tta`.
  """
  for batch in _predict_batches(
    predict, variables, arrays, batch_size, tta, encoder_features
  ):
    yield from batch


def _predict_batches(
  predict: Predict,
  variables: Tree,
  arrays: loading.Arrays,
  batch_size: int,
  tta: str,
  encoder_features: Mapping[str, np.ndarray] | None = None,
  first: int = 0,
) -> Iterator[list[tuple[int, np.ndarray]]]:
  """Yields the results of `probabilities` by batch, from batch `first` on."""
  if tta not in TTA_MODES:
    raise ValueError(
      f"test-time averaging must be one of {', '.join(TTA_MODES)}: {tta!r}"
    )
  count = 1 if tta == "none" else orientations.ORIENTATIONS
  mine = pipeline.shard_for_process(
    np.arange(batch_size), jax.process_index(), jax.process_count()
  )
  batches = pipeline.eval_batches(arrays, batch_size)
  for batch in itertools.islice(batches, first, None):
    batch = {name: values[mine] for name, values in batch.items()}
    real = batch["_mask"]
    total: Any = 0.0
    for orientation in range(count):
      given: Tree = {
        "image": np.ascontiguousarray(
          orientations.orient(batch["image"], orientation)
        )
      }
      if encoder_features is not None:
        given["encoder_features"] = {
          name: np.asarray(values[orientation][batch["index"]])
          for name, values in encoder_features.items()
        }
      found = np.asarray(predict(variables, devices.shard(given)))
      found = found.reshape(-1, *found.shape[2:])
      total = total + orientations.restore_orientation(found, orientation)
    yield [
      (int(batch["index"][i]), total[i] / count) for i in np.flatnonzero(real)
    ]


def mean_dice(
  predict: Predict,
  variables: Tree,
  arrays: loading.Arrays,
  *,
  batch_size: int,
  encoder_features: Mapping[str, np.ndarray] | None = None,
) -> float:
  """Returns the mean per-image Dice at the size of the arrays.

  For choosing checkpoints: no resizing to the images' own sizes.

  Raises:
    ValueError: if there is no example.
  """
  values = {}
  for i, probability in probabilities(
    predict,
    variables,
    arrays,
    batch_size=batch_size,
    encoder_features=encoder_features,
  ):
    prediction = probability > metrics.THRESHOLD
    truth = arrays.mask[i] > 0
    size = prediction.sum() + truth.sum()
    overlap = np.logical_and(prediction, truth).sum()
    values[i] = float(2 * overlap / size) if size else 1.0
  found = [pair for part in hosts.gather(list(values.items())) for pair in part]
  if not found:
    raise ValueError(f"{arrays.name}/{arrays.split} holds no example")
  return float(np.mean([value for _, value in sorted(found)]))


def score(
  predict: Predict,
  variables: Tree,
  arrays: loading.Arrays,
  *,
  batch_size: int,
  tta: str = "none",
  keep: Callable[[str, np.ndarray], None] | None = None,
  before: Sequence[Sequence[Row]] = (),
  note: Callable[[Sequence[Row]], None] | None = None,
) -> list[Row]:
  """Returns one row an image, every metric at the image's own size.

  Args:
    predict: mapped over the devices.
    variables: replicated.
    arrays: a whole test set.
    batch_size: examples a call.
    tta: see `probabilities`.
    keep: called with (id, predicted mask [h, w] bool) for every image; on the
      first host, if there are several.
    before: the rows that a stopped call passed to `note`, a list a batch;
      these batches, the first ones, are not predicted again.
    note: called with the rows of each batch after `keep`; on every host.
  """
  rows = [row for batch in before for row in batch]
  for batch in _predict_batches(
    predict, variables, arrays, batch_size, tta, first=len(before)
  ):
    scored: list[tuple[int, Row, Any]] = []
    for i, probability in batch:
      truth = arrays.native_mask(i)
      native = metrics.resize_probability(probability, *truth.shape)
      row = {"id": arrays.ids[i], **metrics.score(native, truth)}
      mask = native > metrics.THRESHOLD
      scored.append((i, row, _to_text(mask) if hosts.are_many() else mask))
    if hosts.are_many():
      found = [entry for part in hosts.gather(scored) for entry in part]
      scored = [
        (i, row, _from_text(mask, arrays.native_mask(i).shape))
        for i, row, mask in sorted(found, key=lambda entry: entry[0])
      ]
    if keep is not None and hosts.is_first():
      for _, row, mask in scored:
        keep(str(row["id"]), mask)
    rows += [row for _, row, _ in scored]
    if note is not None:
      note([row for _, row, _ in scored])
  return rows


def _to_text(mask: np.ndarray) -> str:
  return base64.b64encode(zlib.compress(np.packbits(mask).tobytes())).decode()


def _from_text(text: str, shape: tuple[int, ...]) -> np.ndarray:
  packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
  return np.unpackbits(packed, count=math.prod(shape)).reshape(shape) > 0
