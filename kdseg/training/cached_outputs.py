"""Outputs of frozen networks, computed once for each orientation of an image.

Flips and quarter turns make eight orientations of a square image. A network
that is no longer trained gives the same outputs each time, so they are computed
once and read back: a teacher's pass then costs a copy. No other geometric
augmentation is possible with them; only the student sees colour jitter.
"""

from collections.abc import Callable
from collections.abc import Mapping
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from kdseg.data import orientations as orientations_lib
from kdseg.runtime import files as files_lib

Arrays = dict[str, np.ndarray]

_RECORD = "record.json"


def average(files: Mapping[str, np.ndarray]) -> Arrays:
  """Averages outputs over the eight orientations, turned back to the first.

  The average turns with the image exactly, so one orientation of it is enough;
  see `batches.make_batches`.

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
  function: Callable[..., Mapping[str, Any]],
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
  record = {"key": key, "orientations": orientations}
  files, resumed = _open(directory, record)
  count = len(images)
  starts = list(
    itertools.product(range(orientations), range(0, count, batch_size))
  )
  for number, (orientation, start) in enumerate(starts):
    done = orientation * count + min(start + batch_size, count)
    if done <= resumed:
      continue
    rows = slice(start, start + batch_size)
    batch = orientations_lib.orient(images[rows], orientation)
    given: list[Any] = [_padded(batch, batch_size)]
    if extra is not None:
      given.append(
        {n: _padded(x[orientation, rows], batch_size) for n, x in extra.items()}
      )
    for name, output in function(*given).items():
      output = np.asarray(output)[: len(batch)]
      if name not in files:
        shape = orientations, count, *output.shape[1:]
        files[name] = _make_file(directory / f"{name}.npy", shape)
      files[name][orientation, rows] = output
    if number % 16 == 15 or number + 1 == len(starts):
      with files_lib.writing(directory):
        for file in files.values():
          file.flush()
      _write_record(directory, record | {"images": done})
    if progress is not None:
      progress(done, orientations * count)
  return dict(files)


def _open(
  directory: pathlib.Path, record: Mapping[str, Any]
) -> tuple[dict[str, np.memmap], int]:
  """Opens the files that have this record; deletes those of another.

  Returns:
    The files by name, and how many images of them are done.
  """
  with files_lib.writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  path = directory / _RECORD
  found = json.loads(path.read_text()) if path.exists() else {}
  done = found.pop("images", 0)
  if found == record and done:
    names = sorted(directory.glob("*.npy"))
    return {p.stem: np.load(p, mmap_mode="r+") for p in names}, done
  # First the record: if this run is killed, files of another key, which may
  # have other names, must not be taken for complete.
  _write_record(directory, {**record, "images": 0})
  for file in directory.glob("*.npy"):
    file.unlink()
  return {}, 0


def _make_file(path: pathlib.Path, shape: tuple[int, ...]) -> np.memmap:
  """Makes an array of float16 on disk, and reserves its space.

  Otherwise a disk that fills up later would kill the process without an error.

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


def _write_record(directory: pathlib.Path, record: Mapping[str, Any]) -> None:
  files_lib.write_text(directory / _RECORD, json.dumps(record))


def _padded(array: np.ndarray, length: int) -> np.ndarray:
  if len(array) == length:
    return np.ascontiguousarray(array)
  zeros = np.zeros((length - len(array), *array.shape[1:]), array.dtype)
  return np.concatenate([array, zeros])
