"""What a frozen network makes of an image, computed once an orientation.

Flips and quarter turns make eight orientations of a square image. A network
that is not trained any more answers each of them alike every time, so its
answers are computed once and read back: a teacher's pass then costs a copy.
Other geometric augmentation is off where this is used; colour jitter is seen
by the student alone.
"""

from collections.abc import Callable
from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

import numpy as np

from kdseg.data import orientations as orientations_lib
from kdseg.runtime import files as files_lib

Arrays = dict[str, np.ndarray]


def average(files: Mapping[str, np.ndarray]) -> Arrays:
  """Averages answers over the eight orientations, brought back to the first.

  What a network answers on average moves with the image exactly, so that one
  orientation says it all; see `feed.make_batches`.

  Args:
    files: {name: [8, N, h, w, ...]}, as of `compute`; h = w.

  Returns:
    {name: [1, N, h, w, ...] float16}.
  """
  means = {}
  for name, file in files.items():
    mean = np.empty((1, *file.shape[1:]), np.float16)
    # Example by example: the whole in float32 may not fit into memory.
    for i in range(file.shape[1]):
      mean[0, i] = np.mean(
        [
          orientations_lib.restore_orientation(
            file[o, i][None].astype(np.float32), o
          )[0]
          for o in range(orientations_lib.ORIENTATIONS)
        ],
        axis=0,
      )
    means[name] = mean
  return means


def compute(
  function: Callable[[np.ndarray], Mapping[str, Any]],
  images: np.ndarray,
  directory: str | pathlib.Path,
  *,
  batch_size: int,
  key: str,
  orientations: int = orientations_lib.ORIENTATIONS,
  extra: Mapping[str, np.ndarray] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Arrays:
  """Returns {name: [orientations, N, ...] float16, on disk}, computed once.

  A killed run continues with the first batch that is not recorded as done; a
  cache of another `key` is computed again.

  Args:
    function: maps images [batch_size, S, S, 3] uint8 (and, with `extra`, a
      dict of the same examples' arrays) to a dict of arrays [batch_size, ...].
    images: [N, S, S, 3] uint8.
    directory: of the files, one a name.
    batch_size: of `function`; the last batch is padded with zeros.
    key: names the network, its weights and the data.
    orientations: how many, from 0.
    extra: arrays [orientations, N, ...] handed to `function` beside the
      images.
    progress: called with (images done, images in all).
  """
  directory = pathlib.Path(directory)
  with files_lib.writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  record_path = directory / "record.json"
  record = {"key": key, "orientations": orientations, "images": 0}
  count = len(images)
  starts = [
    (o, s) for o in range(orientations) for s in range(0, count, batch_size)
  ]
  if record_path.exists():
    found = json.loads(record_path.read_text())
    # Once batches were counted, whose size could not change then.
    if found.pop("done", None) == len(starts):
      found["images"] = orientations * count
    if {**found, "images": 0} == record:
      record |= found
  files: Arrays = {}
  if record["images"]:
    files = {
      path.stem: np.load(path, mmap_mode="r+")
      for path in sorted(directory.glob("*.npy"))
    }
  else:
    # The answers of another key go with its record: they may have had other
    # names, and must not be taken for whole if this run is killed.
    _write_record(record_path, record)
    for path in directory.glob("*.npy"):
      path.unlink()
  for number, (orientation, start) in enumerate(starts):
    done = orientation * count + min(start + batch_size, count)
    if done <= record["images"]:
      continue
    batch = orientations_lib.orient(
      images[start : start + batch_size], orientation
    )
    given = [_padded(batch, batch_size)]
    if extra is not None:
      given.append(
        {
          name: _padded(
            array[orientation, start : start + batch_size], batch_size
          )
          for name, array in extra.items()
        }
      )
    answers = function(*given)
    for name, answer in answers.items():
      answer = np.asarray(answer)[: len(batch)]
      if name not in files:
        files[name] = _make_file(
          directory / f"{name}.npy", (orientations, count, *answer.shape[1:])
        )
      files[name][orientation, start : start + len(batch)] = answer
    if number % 16 == 15 or number + 1 == len(starts):
      with files_lib.writing(directory):
        for file in files.values():
          file.flush()
      record["images"] = done
      _write_record(record_path, record)
    if progress is not None:
      progress(done, orientations * count)
  return files


def _make_file(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray:
  """Makes an array of float16 on disk, which has its space from the start.

  Without, a disk that is full later would end the process, with no error.

  Raises:
    WriteError: if there is not enough space; nothing of the file is left.
  """
  with files_lib.writing(path):
    try:
      file = np.lib.format.open_memmap(path, "w+", np.float16, shape)
      if hasattr(os, "posix_fallocate"):  # macOS has none.
        with open(path, "r+b") as raw:
          os.posix_fallocate(raw.fileno(), 0, path.stat().st_size)
    except OSError:
      path.unlink(missing_ok=True)
      raise
  return file


def _write_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  files_lib.write_text(path, json.dumps(record))


def _padded(array: np.ndarray, length: int) -> np.ndarray:
  if len(array) == length:
    return np.ascontiguousarray(array)
  zeros = np.zeros((length - len(array), *array.shape[1:]), array.dtype)
  return np.concatenate([array, zeros])
