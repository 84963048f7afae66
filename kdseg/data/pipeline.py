"""From a prepared data set to batches, a pure function of (seed, step).

Each split is read once, resized, and kept as uint8 arrays in memory. Which
examples a step sees is arithmetic on the step, so a resumed run needs no saved
position and two arms of a comparison see the same batches.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent import futures
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
import queue
import threading
import types
from typing import Any
from typing import NamedTuple
from typing import TypeVar

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from kdseg.data import archives
from kdseg.data import builder as builder_lib
from kdseg.data import pairs
from kdseg.data.archives import DataError
from kdseg.data.sets import folder
from kdseg.data.sets import isic2016
from kdseg.data.sets import ph2
from kdseg.data.sets import synthetic
from kdseg.runtime import files

T = TypeVar("T")
U = TypeVar("U")
Batch = dict[str, np.ndarray]

BUILDERS = types.MappingProxyType(
  {
    "isic2016": isic2016.Isic2016,
    "ph2": ph2.Ph2,
    "synthetic": synthetic.Synthetic,
    "folder": folder.Folder,
  }
)


class Record(NamedTuple):
  """One example as it lies prepared, image and mask still encoded."""

  id: str
  image: bytes
  mask: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
  """One split, resized, in memory.

  Attributes:
    name: of the data set, e.g. `isic2016`.
    split: `train`, `validation` or `test`.
    ids: one per example, sorted.
    image: [N, S, S, 3] uint8 RGB.
    mask: [N, S, S] uint8, 1 where there is lesion.
    official_count: pairs in the official release that the split comes from
      (900 for both train and validation of ISIC-2016).
    found_count: pairs of that release that were found, excluded ones included.
    excluded: ids that were found but are kept out of training and validation.
    native_masks: each mask as PNG at the image's own size; see `native_mask`.
  """

  name: str
  split: str
  ids: tuple[str, ...]
  image: np.ndarray = dataclasses.field(repr=False)
  mask: np.ndarray = dataclasses.field(repr=False)
  official_count: int
  found_count: int
  excluded: tuple[str, ...] = ()
  native_masks: tuple[bytes, ...] = dataclasses.field(default=(), repr=False)

  def __len__(self) -> int:
    return len(self.ids)

  @property
  def coverage(self) -> str:
    """How much of the official release this is, e.g. `751 of 900`."""
    return f"{self.found_count} of {self.official_count}"

  def native_mask(self, index: int) -> np.ndarray:
    """The mask of one example at its own size, bool [h, w]."""
    return pairs.mask_values(self.native_masks[index], self.ids[index]) > 128

  def native_size(self, index: int) -> tuple[int, int]:
    """Height and width of one example's own image, in pixels."""
    with Image.open(io.BytesIO(self.native_masks[index])) as mask:
      width, height = mask.size
    return height, width


def load(
  name: str,
  split: str,
  *,
  size: int,
  data_dir: str | os.PathLike[str] | None = None,
  manual_dir: str | os.PathLike[str] | None = None,
  **options: Any,
) -> Arrays:
  """Reads one split into memory, preparing the data set on first use.

  Images are resized by an antialiased bilinear filter; masks by area: a pixel
  is lesion if at least half of the pixels it covers are. Both squash the frame
  to a square; nothing is cropped or padded.

  Args:
    name: `isic2016`, `ph2`, `synthetic` or `folder`.
    split: `train`, `validation` or `test`.
    size: side S of the square, in pixels.
    data_dir: where prepared data sets lie; the default of tfds if None.
    manual_dir: the official archives, or for `folder` the folder itself.
    **options: of the builder, e.g. `duplicates="include"`.

  Returns:
    The split, ordered by id.

  Raises:
    DataError: if the data are not there or not as they should be.
  """
  if size <= 0:
    raise ValueError(f"size is {size}; it is a number of pixels, so above 0.")
  builder = prepare(name, data_dir=data_dir, manual_dir=manual_dir, **options)
  if split not in builder.info.splits:
    raise DataError(
      f"{name} has no split {split!r}, only"
      f" {', '.join(sorted(builder.info.splits))}.{builder.describe_splits()}"
    )
  count = builder.info.splits[split].num_examples
  ids = [""] * count
  native_masks = [b""] * count
  image = np.empty((count, size, size, 3), np.uint8)
  mask = np.empty((count, size, size), np.uint8)

  def fill(index: int, record: Record) -> None:
    where = f"{builder.data_dir}: {split}/{record.id}"
    ids[index] = record.id
    native_masks[index] = record.mask
    image[index] = resize_image(pairs.decode_image(record.image, where), size)
    lesion = pairs.mask_values(record.mask, f"{where} (mask)") > 128
    mask[index] = resize_mask(lesion, size)

  # Pillow decodes and resizes outside the interpreter's lock. In pieces, as
  # the full-size images take more memory together than is worth holding.
  stream = read_records(builder, split)
  with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    for start in range(0, count, 64):
      records = list(itertools.islice(stream, 64))
      for _ in pool.map(fill, itertools.count(start), records):
        pass

  metadata = read_metadata(builder)
  return Arrays(
    name=name,
    split=split,
    ids=tuple(ids),
    image=image,
    mask=mask,
    official_count=int(metadata["official_count"][split]),
    found_count=int(metadata["found_count"][split]),
    excluded=tuple(metadata["excluded"]),
    native_masks=tuple(native_masks),
  )


def prepare(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  manual_dir: str | os.PathLike[str] | None = None,
  **options: Any,
) -> builder_lib.PairBuilder:
  """Returns the builder of a prepared data set, preparing it if it is not.

  Args:
    name: `isic2016`, `ph2`, `synthetic` or `folder`.
    data_dir: see `load`.
    manual_dir: see `load`.
    **options: see `load`.

  Returns:
    The tfds builder, ready for `as_data_source`.

  Raises:
    DataError: if the data are not as they should be, or were prepared from
      other files than those in `manual_dir`.
    WriteError: if the disk is full or may not be written to.
  """
  if manual_dir is not None:
    manual_dir = pathlib.Path(manual_dir).expanduser()
    if not manual_dir.is_dir():
      raise DataError(
        f"manual_dir {manual_dir} is no folder; it should hold the files of"
        f" {name}."
      )
  if name == "folder":
    options.setdefault("directory", str(manual_dir) if manual_dir else "")
  builder = make_builder(name, data_dir=data_dir, **options)
  if is_prepared(builder):
    _check_same_files(builder, manual_dir)
    return builder
  config = tfds.download.DownloadConfig(
    manual_dir=None if manual_dir is None else str(manual_dir),
    try_download_gcs=False,
  )
  try:
    with files.writing(_data_root(data_dir)):
      builder.download_and_prepare(download_config=config)
  except DataError as error:
    # Without the thirty frames of tfds between the fault and its reader.
    raise DataError(str(error)) from None
  except files.WriteError:
    raise
  except OSError:
    # Another process may have prepared the same data set first.
    if not is_prepared(builder):
      raise
    builder = make_builder(name, data_dir=data_dir, **options)
  return builder


def is_prepared(builder: builder_lib.PairBuilder) -> bool:
  """Whether the records of a builder are on disk, whole."""
  return (pathlib.Path(builder.data_dir) / "dataset_info.json").exists()


def read_records(
  builder: builder_lib.PairBuilder, split: str
) -> Iterator[Record]:
  """Yields every example of a prepared split, in order.

  Raises:
    DataError: if the records are damaged; names their folder.
  """
  undecoded = tfds.decode.SkipDecoding()
  try:
    source = builder.as_data_source(
      split, decoders={"image": undecoded, "mask": undecoded}
    )
    for index in range(len(source)):
      record = source[index]
      yield Record(
        record["id"].decode(), bytes(record["image"]), bytes(record["mask"])
      )
  except Exception as error:
    # A damaged file gives RuntimeError or None in the place of bytes.
    raise DataError(_damaged(builder.data_dir, archives.shown(error))) from None


def read_metadata(builder: builder_lib.PairBuilder) -> Mapping[str, Any]:
  """What was found of the official release when the data were prepared.

  Raises:
    DataError: if it is not there; names its folder.
  """
  metadata = builder.info.metadata
  missing = [key for key in builder_lib.METADATA if key not in metadata]
  if missing:
    raise DataError(
      _damaged(builder.data_dir, f"metadata.json has no {missing[0]}")
    )
  return metadata


def _damaged(folder: str | os.PathLike[str], error: object) -> str:
  return (
    f"what lies prepared in {folder} is damaged ({error}). Delete that folder"
    " to prepare it anew."
  )


def make_builder(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  **options: Any,
) -> builder_lib.PairBuilder:
  """The tfds builder of a data set, not prepared; knows kdseg's names only.

  Raises:
    DataError: on an unknown name, or if what lies prepared is damaged.
    TypeError: on an option that the data set does not have.
    ValueError: on a value that an option does not have.
  """
  if name not in BUILDERS:
    raise DataError(
      f"no data set is called {name!r}; there are {', '.join(BUILDERS)}."
    )
  try:
    return BUILDERS[name](data_dir=data_dir, **options)
  except Exception as error:
    if isinstance(error, OSError | TypeError | ValueError) and not isinstance(
      error, UnicodeDecodeError
    ):
      raise
    # tfds reads the dataset_info.json of an earlier run, whatever became of it,
    # and raises ParseError or AssertionError.
    raise DataError(
      _damaged(_data_root(data_dir) / name, archives.shown(error))
    ) from None


def _data_root(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns where prepared data sets lie."""
  root = data_dir or tfds.core.constants.DATA_DIR
  return pathlib.Path(root).expanduser()


def _check_same_files(
  builder: builder_lib.PairBuilder, manual_dir: pathlib.Path | None
) -> None:
  """Raises if the prepared records come from other files than these."""
  if manual_dir is None:
    return
  stamp = builder.inventory(manual_dir).stamp
  if stamp != read_metadata(builder)["stamp"]:
    raise DataError(
      f"{builder.data_dir} was prepared from other files than those in"
      f" {manual_dir}. Delete it to prepare it anew, or name another data_dir."
    )


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes uint8 [h, w, 3] to [size, size, 3], bilinear and antialiased."""
  if image.shape[:2] == (size, size):
    return image
  resized = Image.fromarray(image).resize(
    (size, size), Image.Resampling.BILINEAR
  )
  return np.asarray(resized)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
  """Resizes bool [h, w] to uint8 [size, size]: 1 where half or more is lesion.

  Enlarging repeats pixels.
  """
  if mask.shape == (size, size):
    return mask.astype(np.uint8)
  share = Image.fromarray(mask.astype(np.float32)).resize(
    (size, size), Image.Resampling.BOX
  )
  # One part in a million for sums like 1/3 + 1/6.
  return (np.asarray(share) >= 0.5 - 1e-6).astype(np.uint8)


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of `n` examples in one epoch, int32 [n].

  Sorts the raw output of a counter-based generator, which numpy promises not
  to change; its `permutation` comes without that promise.
  """
  bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
  return np.argsort(bits.random_raw(n), kind="stable").astype(np.int32)


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
  """The examples of one step, int32 [batch_size].

  Epochs follow each other without a gap: a batch may end one epoch and begin
  the next, so every example is seen equally often and no batch is short. (Such
  a batch can hold an example twice, as can any batch larger than `n`.)

  Args:
    seed: of the run.
    step: counts from 0.
    batch_size: examples in a step, over all devices and hosts.
    n: examples in the split.

  Raises:
    ValueError: if `step` is negative, or a count is not positive.
  """
  if step < 0 or batch_size <= 0 or n <= 0:
    raise ValueError(
      f"step {step} must be 0 or more, batch_size {batch_size} and n {n} above"
      " 0."
    )
  positions = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, within = np.divmod(positions, n)
  orders = {
    epoch: epoch_order(seed, int(epoch), n) for epoch in np.unique(epochs)
  }
  return np.array(
    [orders[epoch][i] for epoch, i in zip(epochs, within, strict=True)],
    np.int32,
  )


def steps_for_epochs(epochs: float, batch_size: int, n: int) -> int:
  """Steps that show every example `epochs` times, rounded up."""
  return int(np.ceil(epochs * n / batch_size))


def shard_for_process(
  indices: np.ndarray, process_index: int, process_count: int
) -> np.ndarray:
  """The part of a batch that one host loads: its block, in process order.

  Raises:
    ValueError: if the batch cannot be divided evenly.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index {process_index} is not below process_count"
      f" {process_count}."
    )
  if len(indices) % process_count:
    raise ValueError(
      f"a batch of {len(indices)} cannot be divided over {process_count}"
      " hosts; choose a multiple as batch_size."
    )
  share = len(indices) // process_count
  return indices[process_index * share : (process_index + 1) * share]


def batches(
  arrays: Arrays,
  *,
  seed: int,
  batch_size: int,
  first_step: int,
  last_step: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[tuple[int, Batch]]:
  """Yields (step, batch) for the steps `first_step` to `last_step - 1`.

  Args:
    arrays: the split to train on.
    seed: of the run.
    batch_size: examples in a step, over all devices and hosts.
    first_step: the step to begin with; 0, or where a run was stopped.
    last_step: one past the last step.
    process_index: which host this is.
    process_count: how many there are.

  Yields:
    The step, and `image` [B, S, S, 3] uint8, `mask` [B, S, S] uint8 and
    `index` [B] int32 (position in `arrays.ids`) of this host's share.
  """
  for step in range(first_step, last_step):
    index = shard_for_process(
      batch_indices(seed, step, batch_size, len(arrays)),
      process_index,
      process_count,
    )
    yield (
      step,
      {
        "image": arrays.image[index],
        "mask": arrays.mask[index],
        "index": index,
      },
    )


def eval_batches(arrays: Arrays, batch_size: int) -> Iterator[Batch]:
  """Yields every example once, in order, in batches of one size.

  The last batch is filled up with black images of no lesion, index -1 and
  `_mask` 0, so that any number of devices counts every image once.

  Yields:
    `image` [B, S, S, 3] uint8, `mask` [B, S, S] uint8, `index` [B] int32,
    `_mask` [B] float32.
  """
  if batch_size <= 0:
    raise ValueError(f"batch_size is {batch_size}; it must be above 0.")
  for start in range(0, len(arrays), batch_size):
    index = np.arange(start, min(start + batch_size, len(arrays)))
    missing = batch_size - len(index)

    def pad(values: np.ndarray, fill: int = 0, missing: int = missing):
      width = [(0, missing)] + [(0, 0)] * (values.ndim - 1)
      return np.pad(values, width, constant_values=fill)

    yield {
      "image": pad(arrays.image[index]),
      "mask": pad(arrays.mask[index]),
      "index": pad(index.astype(np.int32), fill=-1),
      "_mask": pad(np.ones(len(index), np.float32)),
    }


def prefetch(
  items: Iterable[T], put: Callable[[T], U], *, depth: int = 2
) -> Iterator[U]:
  """Applies `put` ahead of the consumer, in one background thread.

  `put` is where arrays go to the devices, so copies overlap with steps. An
  error of `items` or `put` is raised where its element would have come.
  Closing or leaving the iterator stops the thread.

  Args:
    items: what to prepare, in order.
    put: called once on each, in the thread.
    depth: how many results may wait.

  Yields:
    `put(item)` for each item, in order.
  """
  if depth <= 0:
    raise ValueError(f"depth is {depth}; it must be above 0.")
  results: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
  stopped = threading.Event()

  def offer(kind: str, value: Any) -> bool:
    while not stopped.is_set():
      try:
        results.put((kind, value), timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def work() -> None:
    try:
      for item in items:
        if not offer("item", put(item)):
          return
    except BaseException as error:
      offer("error", error)
    else:
      offer("end", None)

  thread = threading.Thread(target=work, name="kdseg-prefetch", daemon=True)
  thread.start()
  try:
    while True:
      kind, value = results.get()
      if kind == "end":
        return
      if kind == "error":
        raise value
      yield value
  finally:
    stopped.set()
    thread.join()


def fingerprint(arrays: Arrays) -> str:
  """SHA-256 over everything that training or scoring can see of a split."""
  digest = hashlib.sha256()

  def add(content: bytes) -> None:
    digest.update(len(content).to_bytes(8, "big"))
    digest.update(content)

  for text in (arrays.name, arrays.split, *arrays.ids):
    add(text.encode())
  for values in (arrays.image, arrays.mask):
    add(repr((values.shape, values.dtype.str)).encode())
    add(np.ascontiguousarray(values).tobytes())
  for index in range(len(arrays)):
    # Pixels, not PNG bytes: another zlib packs the same mask differently.
    mask = arrays.native_mask(index)
    add(repr(mask.shape).encode())
    add(np.packbits(mask).tobytes())
  return digest.hexdigest()
