"""Batches of arrays in memory, split over the devices, from any step on."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kdseg.data import loading
from kdseg.data import orientations as orientations_lib
from kdseg.data import pipeline
from kdseg.runtime import devices

Tree = Any
BatchInfo = Mapping[str, Any]
# From the first step, yields (step, batch, batch_info).
Batches = Callable[[int], Iterator[tuple[int, Tree, BatchInfo]]]
# {"encoder_features" | "teacher_out": {name: [8 or 1, N, ...]}}.
CachedOutputs = Mapping[str, Mapping[str, np.ndarray]]


def make_batches(
  arrays: loading.Arrays,
  *,
  seed: int,
  batch_size: int,
  steps: int,
  cached_outputs: CachedOutputs | None = None,
) -> Batches:
  """Makes `batches(first_step)`, prefetched and split over the devices.

  Args:
    arrays: the training split.
    seed: of the run; with the step it decides the examples, and with
      `cached_outputs` their orientation.
    batch_size: over all devices and hosts.
    steps: of the whole training.
    cached_outputs: {"encoder_features" | "teacher_out": {name: [8, N, ...]}},
      outputs of frozen networks by orientation (see `cached_outputs`), or
      [1, N, h, w, ...], maps that turn with the image. With them, images, masks
      and such maps are brought into the drawn orientation here.

  Returns:
    A function from the first step to an iterator of (step, batch, batch_info):
    the batch for `prepare.make_prepare`; `batch_info` with the examples' "ids"
    and the host arrays.
  """
  count, index = jax.process_count(), jax.process_index()

  def examples(first_step: int) -> Iterator[tuple[int, dict, BatchInfo]]:
    for step, batch in pipeline.batches(
      arrays,
      seed=seed,
      batch_size=batch_size,
      first_step=first_step,
      last_step=steps,
      process_index=index,
      process_count=count,
    ):
      rows = batch.pop("index")
      batch_info = {
        "ids": [arrays.ids[i] for i in rows],
        "image": batch["image"],
        "mask": batch["mask"],
      }
      if cached_outputs:
        drawn = orientations_lib.draw_orientations(seed, step, batch_size)
        mine = pipeline.shard_for_process(drawn, index, count)
        batch = _orient(batch, rows, mine, cached_outputs)
      yield step, batch, batch_info

  def put(example: tuple[int, dict, BatchInfo]) -> tuple[int, Tree, BatchInfo]:
    step, batch, batch_info = example
    return step, devices.shard(batch), batch_info

  return lambda first_step: pipeline.prefetch(examples(first_step), put)


def _orient(
  batch: Mapping[str, np.ndarray],
  rows: np.ndarray,
  orientations: np.ndarray,
  cached_outputs: CachedOutputs,
) -> dict[str, Any]:
  """Turns a batch's images and masks; adds the cached outputs, turned alike.

  Args:
    batch: "image" [B, S, S, 3] and "mask" [B, S, S].
    rows: of the examples in the cached outputs, [B].
    orientations: of the examples, [B].
    cached_outputs: see `make_batches`.
  """
  oriented: dict[str, Any] = {
    name: orientations_lib.orient_each(array, orientations)
    for name, array in batch.items()
  }
  for what, files in cached_outputs.items():
    oriented[what] = {
      name: (
        orientations_lib.orient_each(file[0, rows], orientations)
        if len(file) == 1
        else file[orientations, rows]
      )
      for name, file in files.items()
    }
  return oriented
