"""Reads one split of a data set into memory, resized, as uint8 arrays."""

from concurrent import futures
import dataclasses
import hashlib
import io
import itertools
import os
from typing import Any

import numpy as np
from PIL import Image

from kdseg.data import builder as builder_lib
from kdseg.data import decode
from kdseg.data import masks
from kdseg.data import prepare
from kdseg.data import sets
from kdseg.data.archives import DataError


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
    return masks.mask_values(self.native_masks[index], self.ids[index]) > 128

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
  data_dir: prepare.Path | None = None,
  manual_dir: prepare.Path | None = None,
  builders: prepare.Builders = sets.BUILDERS,
  **options: Any,
) -> Arrays:
  """Reads one split into memory, preparing the data set on first use.

  Images are resized by an antialiased bilinear filter; masks by area: a pixel
  is lesion if at least half of the pixels it covers are. Both squash the frame
  to a square; nothing is cropped or padded.

  Args:
    name: see `prepare.make_builder`.
    split: `train`, `validation` or `test`.
    size: side S of the square, in pixels.
    data_dir: see `prepare.make_builder`.
    manual_dir: see `prepare.prepare`.
    builders: see `prepare.make_builder`.
    **options: see `prepare.make_builder`.

  Returns:
    The split, ordered by id.

  Raises:
    DataError: if the data are not there or not as they should be.
  """
  if size <= 0:
    raise ValueError(f"size is {size}; it is a number of pixels, so above 0.")
  builder = prepare.prepare(
    name,
    data_dir=data_dir,
    manual_dir=manual_dir,
    builders=builders,
    **options,
  )
  if split not in builder.info.splits:
    raise DataError(
      f"{name} has no split {split!r}, only"
      f" {', '.join(sorted(builder.info.splits))}. {builder.how_split}".rstrip()
    )
  return _read(builder, split, size)


def _read(builder: builder_lib.PairBuilder, split: str, size: int) -> Arrays:
  count = builder.info.splits[split].num_examples
  image = np.empty((count, size, size, 3), np.uint8)
  mask = np.empty((count, size, size), np.uint8)

  def fill(index: int, record: prepare.Record) -> tuple[str, bytes]:
    where = f"{builder.data_dir}: {split}/{record.id}"
    image[index] = resize_image(decode.decode_image(record.image, where), size)
    lesion = masks.mask_values(record.mask, f"{where} (mask)") > 128
    mask[index] = resize_mask(lesion, size)
    return record.id, record.mask

  # Pillow decodes and resizes outside the interpreter's lock. In pieces, so
  # that few images are in memory at full size.
  stream = prepare.read_records(builder, split)
  kept: list[tuple[str, bytes]] = []
  with futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    for start in range(0, count, 64):
      piece = list(itertools.islice(stream, 64))
      kept += pool.map(fill, itertools.count(start), piece)

  metadata = prepare.read_metadata(builder)
  return Arrays(
    name=builder.name,
    split=split,
    ids=tuple(id_ for id_, _ in kept),
    image=image,
    mask=mask,
    official_count=int(metadata["official_count"][split]),
    found_count=int(metadata["found_count"][split]),
    excluded=tuple(metadata["excluded"]),
    native_masks=tuple(native for _, native in kept),
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
