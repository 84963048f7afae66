"""Looks through a whole data set and says what a reader of results should know.

Where the builders stop at the first fault, this lists all of them, and adds
what forbids nothing: sizes, empty masks, masks that touch the frame, and
images that look alike within a split or across splits.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image
from scipy import fft
import tqdm

from kdseg.data import archives
from kdseg.data import builder as builder_lib
from kdseg.data import pairs
from kdseg.data import prepare
from kdseg.data import sets
from kdseg.data.archives import DataError
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair

# Bits of 255 in which two images may differ and still be called alike. On
# ISIC-2016 and PH2 the closest two of 1330 images differ in 44; an image and
# its copy saved as JPEG of quality 20, or at half the size, in at most 34.
# A copy that was cropped by more than about 2 % is not found.
ALIKE_BITS = 36

_HASH_SIDE = 16
_THUMB_SIDE = 32


@dataclasses.dataclass(frozen=True)
class Alike:
  """Two images that look alike, in one of eight orientations.

  Attributes:
    first: `split/id`.
    second: `split/id`.
    bits: in how many of the 255 bits of their hashes they differ.
    across: whether they are in different splits.
  """

  first: str
  second: str
  bits: int
  across: bool


@dataclasses.dataclass(frozen=True)
class Report:
  """What `verify` found.

  Attributes:
    name: of the data set.
    source: where it was read.
    counts: pairs by split.
    official: pairs of the official release, by split.
    found: pairs found of that release, by split.
    excluded: ids found but kept out of training and validation.
    sizes: by split, (height, width) of each image, in pixels.
    problems: each forbids the use of the data set.
    notes: what else the inventory says.
    empty: `split/id` of masks with no lesion.
    touching: `split/id` of masks with lesion on the frame.
    alike: pairs of images that look alike.
  """

  name: str
  source: str
  counts: Mapping[str, int]
  official: Mapping[str, int]
  found: Mapping[str, int]
  excluded: tuple[str, ...]
  sizes: Mapping[str, tuple[tuple[int, int], ...]]
  problems: tuple[str, ...]
  notes: tuple[str, ...]
  empty: tuple[str, ...]
  touching: tuple[str, ...]
  alike: tuple[Alike, ...]

  @property
  def ok(self) -> bool:
    """Whether the data set can be prepared."""
    return not self.problems


def verify(
  name: str,
  *,
  manual_dir: str | os.PathLike[str] | None = None,
  data_dir: str | os.PathLike[str] | None = None,
  builders: prepare.Builders = sets.BUILDERS,
  **options: Any,
) -> Report:
  """Checks every file of a data set.

  Args:
    name: a key of `builders`.
    manual_dir: the archives or the folder. Without it, what lies prepared in
      `data_dir` is looked through instead.
    data_dir: where prepared data sets lie; the default of tfds if None.
    builders: the data sets by name.
    **options: of the builder.

  Returns:
    The report; nothing is written.

  Raises:
    DataError: if there is nothing to look through.
  """
  if name == "folder" and manual_dir is None:
    raise DataError("verify folder needs --manual_dir, the folder itself.")
  grey_masks = options.get("grey_masks", "error")
  builder = prepare.make_builder(
    name, data_dir=data_dir, builders=builders, **options
  )
  if manual_dir is not None:
    directory = pathlib.Path(manual_dir).expanduser()
    if not directory.is_dir():
      raise DataError(f"manual_dir {directory} is no folder.")
    inventory = builder.inventory(directory)
    source = str(directory)
  elif name == "synthetic":
    inventory = builder.inventory(None)
    source = "drawn"
  elif prepare.is_prepared(builder):
    inventory = prepared_inventory(builder)
    source = str(builder.data_dir)
  else:
    raise DataError(
      f"{name} is not prepared in {builder.data_dir}. Pass --manual_dir, or"
      f" run `python -m kdseg.data prepare {name}` first."
    )
  return inspect(name, source, inventory, grey_masks=grey_masks)


def prepared_inventory(builder: builder_lib.PairBuilder) -> Inventory:
  """The inventory of a prepared data set, read from its records."""
  metadata = prepare.read_metadata(builder)
  splits = {
    split: tuple(_record_pairs(builder, split)) for split in builder.info.splits
  }
  return Inventory(
    splits=splits,
    official=metadata["official_count"],
    found=metadata["found_count"],
    excluded=tuple(metadata["excluded"]),
    notes=tuple(metadata["notes"]),
    stamp=metadata["stamp"],
  )


def inspect(
  name: str, source: str, inventory: Inventory, *, grey_masks: str = "error"
) -> Report:
  """Decodes every pair of an inventory and reports on it.

  Args:
    name: of the data set.
    source: where it comes from, for the report.
    inventory: the pairs.
    grey_masks: see `pairs.decode_mask`.

  Returns:
    The report.
  """
  problems = list(inventory.problems)
  sizes = {split: [] for split in inventory.splits}
  names, thumbs, empty, touching = [], [], [], []
  everything = [
    (split, pair)
    for split, split_pairs in inventory.splits.items()
    for pair in split_pairs
  ]
  for split, pair in tqdm.tqdm(
    everything, desc=f"Reading {name}", leave=False, disable=None
  ):
    label = f"{split}/{pair.id}"
    try:
      image = pairs.decode_pairs_image(pair)
    except DataError as error:
      problems.append(str(error))
      continue
    sizes[split].append(image.shape[:2])
    names.append(label)
    thumbs.append(thumb(image))
    try:
      mask = pairs.decode_mask(
        pair.mask.read(), pair.mask.where, grey_masks=grey_masks
      )
      pairs.check_sizes(pair, image, mask)
    except DataError as error:
      problems.append(str(error))
      continue
    if not mask.any():
      empty.append(label)
    if touches_frame(mask):
      touching.append(label)
  return Report(
    name=name,
    source=source,
    counts={split: len(found) for split, found in inventory.splits.items()},
    official=dict(inventory.official),
    found=dict(inventory.found),
    excluded=inventory.excluded,
    sizes={split: tuple(found) for split, found in sizes.items()},
    problems=tuple(problems),
    notes=inventory.notes,
    empty=tuple(empty),
    touching=tuple(touching),
    alike=find_alike(names, thumbs),
  )


def thumb(image: np.ndarray) -> np.ndarray:
  """Shrinks uint8 [h, w, 3] to grey float32 [32, 32], the frame squashed."""
  grey = Image.fromarray(image).convert("L")
  small = grey.resize((_THUMB_SIDE, _THUMB_SIDE), Image.Resampling.BOX)
  return np.asarray(small, np.float32)


def perceptual_hash(thumbs: np.ndarray) -> np.ndarray:
  """Hashes pictures so that look-alikes differ in few bits.

  The signs of the lowest 255 frequencies of a cosine transform (Zauner,
  "Implementation and benchmarking of perceptual image hash functions", 2010)
  against their median; with 16 x 16 of them instead of 8 x 8, since
  dermoscopic images are all alike in the lowest 63.

  Args:
    thumbs: [n, 32, 32] float.

  Returns:
    [n, 4] uint64; the last bit is always 0.
  """
  waves = fft.dctn(thumbs, axes=(1, 2), norm="ortho")
  low = waves[:, :_HASH_SIDE, :_HASH_SIDE].reshape(len(thumbs), -1)[:, 1:]
  bits = low > np.median(low, axis=1, keepdims=True)
  packed = np.packbits(bits, axis=1)
  return np.ascontiguousarray(packed).view(np.uint64)


def orientations(thumbs: np.ndarray) -> Iterator[np.ndarray]:
  """The eight ways to lay [n, s, s] pictures on the table."""
  for quarter_turns in range(4):
    turned = np.rot90(thumbs, quarter_turns, axes=(1, 2))
    yield turned
    yield turned[:, :, ::-1]


def find_alike(
  names: Sequence[str], thumbs: Sequence[np.ndarray]
) -> tuple[Alike, ...]:
  """Finds pairs of images that look alike, whichever way they are turned.

  Args:
    names: `split/id` of each image.
    thumbs: see `thumb`.

  Returns:
    The pairs, those across splits first, then by likeness.
  """
  if len(names) < 2:
    return ()
  stacked = np.stack(thumbs)
  upright = perceptual_hash(stacked)
  turned = [perceptual_hash(way) for way in orientations(stacked)]
  found = []
  for row in range(len(names) - 1):
    bits = functools.reduce(
      np.minimum,
      (
        np.bitwise_count(upright[row] ^ way[row + 1 :]).sum(-1, dtype=int)
        for way in turned
      ),
    )
    found += [
      Alike(
        names[row],
        names[row + 1 + other],
        int(bits[other]),
        _split(names[row]) != _split(names[row + 1 + other]),
      )
      for other in np.flatnonzero(bits <= ALIKE_BITS)
    ]
  return tuple(sorted(found, key=lambda pair: (not pair.across, pair.bits)))


def touches_frame(mask: np.ndarray) -> bool:
  """Whether any pixel of the outermost rows and columns is lesion."""
  return bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())


def describe(report: Report, *, limit: int = 20) -> str:
  """Writes a report as text, each list cut after `limit` lines."""
  lines = [f"{report.name} from {report.source}", ""]
  for split, count in report.counts.items():
    heights, widths = np.array(report.sizes[split]).reshape(-1, 2).T
    line = f"  {split:<11}{count:>5} pairs"
    line += f", {report.found[split]} of {report.official[split]} found"
    if len(heights):
      line += (
        f", width {_spread(widths)}, height {_spread(heights)} (min/median/max)"
      )
    lines.append(line)
  if report.excluded:
    lines.append(f"  kept out of training: {', '.join(report.excluded)}")
  lines += [f"  note: {note}" for note in report.notes]
  across = [pair for pair in report.alike if pair.across]
  within = [pair for pair in report.alike if not pair.across]
  for title, entries in (
    ("problems, each to be mended before use", report.problems),
    ("empty masks", report.empty),
    ("masks that touch the frame", report.touching),
    ("look-alikes across splits", [_pair_line(pair) for pair in across]),
    ("look-alikes within a split", [_pair_line(pair) for pair in within]),
  ):
    lines += ["", f"{len(entries)} {title}"]
    lines += [f"  {entry}" for entry in entries[:limit]]
    if len(entries) > limit:
      lines.append(f"  and {len(entries) - limit} more")
  lines += ["", "ok" if report.ok else "not usable as it is"]
  return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
  return f"{values.min()}/{np.median(values):g}/{values.max()}"


def _pair_line(pair: Alike) -> str:
  return f"{pair.first} and {pair.second} ({pair.bits} of 255 bits differ)"


def _split(label: str) -> str:
  return label.split("/", 1)[0]


def _record_pairs(
  builder: builder_lib.PairBuilder, split: str
) -> Iterator[Pair]:
  where = f"{builder.name}/{split}"
  for id_, image, mask in prepare.read_records(builder, split):
    yield Pair(
      id_,
      archives.in_memory(f"{id_}.image", where, image),
      archives.in_memory(f"{id_}.mask", where, mask),
    )
