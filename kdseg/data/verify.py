"""Checks every file of a data set and lists all that is wrong or unusual.

Where the builders stop at the first problem, this lists all of them. It adds
sizes, empty masks, masks that touch the frame, and images that look alike
within a split or across splits, which forbid nothing.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
from PIL import Image
from scipy import fft
import tqdm

from kdseg.data import archives
from kdseg.data import builder as builder_lib
from kdseg.data import decode
from kdseg.data import masks
from kdseg.data import orientations
from kdseg.data import pairs as pairs_lib
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
  """

  first: str
  second: str
  bits: int

  @property
  def across(self) -> bool:
    """Whether they are in different splits."""
    return self.first.split("/", 1)[0] != self.second.split("/", 1)[0]

  def __str__(self) -> str:
    return f"{self.first} and {self.second} ({self.bits} of 255 bits differ)"


@dataclasses.dataclass(frozen=True)
class Report:
  """What `verify` found.

  Attributes:
    title: the data set, and where it was read.
    inventory: its pairs.
    official: by split, pairs of the official release.
    sizes: by split, (height, width) of each image, in pixels.
    problems: each forbids the use of the data set.
    empty: `split/id` of masks with no lesion.
    touching: `split/id` of masks with lesion on the frame.
    alike: pairs of images that look alike.
    warnings: what a user should know before the data set is used.
  """

  title: str
  inventory: Inventory
  official: Mapping[str, int]
  sizes: Mapping[str, list[tuple[int, int]]]
  problems: tuple[str, ...]
  empty: tuple[str, ...] = ()
  touching: tuple[str, ...] = ()
  alike: tuple[Alike, ...] = ()
  warnings: tuple[str, ...] = ()

  @property
  def ok(self) -> bool:
    """Whether the data set can be prepared."""
    return not self.problems


def verify(
  name: str,
  *,
  manual_dir: prepare.Path | None = None,
  data_dir: prepare.Path | None = None,
  builders: prepare.Builders = sets.BUILDERS,
  **options: Any,
) -> Report:
  """Checks every file of a data set.

  Args:
    name: see `prepare.make_builder`.
    manual_dir: the archives or the folder. Without it, the records prepared in
      `data_dir` are checked instead.
    data_dir: see `prepare.make_builder`.
    builders: see `prepare.make_builder`.
    **options: see `prepare.make_builder`.

  Returns:
    The report; nothing is written.

  Raises:
    DataError: if there are neither files nor records to check.
  """
  builder = prepare.make_builder(
    name, data_dir=data_dir, builders=builders, **options
  )
  if manual_dir is not None:
    directory = pathlib.Path(manual_dir).expanduser()
    if not directory.is_dir():
      raise DataError(f"manual_dir {directory} is no folder.")
    source, inventory = str(directory), builder.inventory(directory)
  elif prepare.is_prepared(builder):
    source, inventory = builder.data_dir, prepared_inventory(builder)
  else:
    try:
      source, inventory = "drawings", builder.inventory(None)
    except DataError as error:
      raise DataError(
        f"{name} is not prepared in {builder.data_dir}; pass --manual-dir."
        f" {error}"
      ) from None
  report = inspect(
    f"{name} from {source}",
    inventory,
    official=builder.official_counts or inventory.found,
    # What lies prepared went through the rule already.
    rule=builder.mask_rule if manual_dir is not None else masks.MaskRule(),
  )
  count = len(inventory.splits.get("test", ()))
  return dataclasses.replace(
    report,
    problems=report.problems + _find_gaps(builder, inventory),
    warnings=report.warnings + pairs_lib.warn_of_few(name, count),
  )


def _find_gaps(
  builder: builder_lib.PairBuilder, inventory: Inventory
) -> tuple[str, ...]:
  """Returns a line if a run could not train on the set, though it has images.

  A set with no training images is for scoring alone.
  """
  gaps = [s for s in ("validation", "test") if s not in inventory.splits]
  if "train" not in inventory.splits or not gaps:
    return ()
  return (
    f"{builder.name} has no pair for {' or '.join(gaps)}, so that no run can be"
    f" trained on it. {builder.how_split}".rstrip(),
  )


def prepared_inventory(builder: builder_lib.PairBuilder) -> Inventory:
  """Returns the inventory of a prepared data set, read from its records."""

  def file(split: str, name: str, content: bytes) -> archives.File:
    where = f"{builder.name}/{split}: {name}"
    return archives.File(name, "", where, len(content), lambda: content)

  metadata = prepare.read_metadata(builder)
  return Inventory(
    splits={
      split: tuple(
        Pair(
          id_,
          file(split, f"{id_}.image", image),
          file(split, f"{id_}.mask", mask),
        )
        for id_, image, mask in prepare.read_records(builder, split)
      )
      for split in builder.info.splits
    },
    found=metadata["found_count"],
    excluded=tuple(metadata["excluded"]),
    notes=tuple(metadata["notes"]),
    stamp=metadata["stamp"],
  )


def inspect(
  title: str,
  inventory: Inventory,
  *,
  official: Mapping[str, int],
  rule: masks.MaskRule = masks.MaskRule(),  # noqa: B008  (an immutable tuple)
) -> Report:
  """Decodes every pair of an inventory and reports on it.

  Args:
    title: the data set, and where it was read.
    inventory: its pairs.
    official: by split, pairs of the official release.
    rule: which values of masks are lesion.

  Returns:
    The report.
  """
  problems = list(inventory.problems)
  sizes: dict[str, list[tuple[int, int]]] = {s: [] for s in inventory.splits}
  thumbs: dict[str, np.ndarray] = {}
  empty, touching = [], []
  everything = [
    (split, pair)
    for split, split_pairs in inventory.splits.items()
    for pair in split_pairs
  ]
  for split, pair in tqdm.tqdm(
    everything, desc=f"Reading {title}", leave=False, disable=None
  ):
    label = f"{split}/{pair.id}"
    try:
      pair = dataclasses.replace(
        pair, image=pair.image.held(), mask=pair.mask.held()
      )
      image = decode.decode_image(pair.image.read(), pair.image.where)
      sizes[split].append(image.shape[:2])
      thumbs[label] = thumb(image)
      mask = masks.decode_mask(pair.mask.read(), pair.mask.where, rule)
      decode.check_fit(pair, image, mask)
    except DataError as error:
      problems.append(str(error))
      continue
    if not mask.any():
      empty.append(label)
    if masks.touches_frame(mask):
      touching.append(label)
  return Report(
    title=title,
    inventory=inventory,
    official=official,
    sizes=sizes,
    problems=tuple(problems),
    empty=tuple(empty),
    touching=tuple(touching),
    alike=find_alike(thumbs),
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


def find_alike(thumbs: Mapping[str, np.ndarray]) -> tuple[Alike, ...]:
  """Finds pairs of images that look alike, in any of eight orientations.

  Args:
    thumbs: see `thumb`, by `split/id`.

  Returns:
    The pairs, those across splits first, then by likeness.
  """
  if len(thumbs) < 2:
    return ()
  names = list(thumbs)
  stacked = np.stack(list(thumbs.values()))
  turned = [
    perceptual_hash(orientations.orient(stacked, k))
    for k in range(orientations.ORIENTATIONS)
  ]
  found = []
  for row in range(len(names) - 1):
    bits = functools.reduce(
      np.minimum,
      (
        np.bitwise_count(turned[0][row] ^ way[row + 1 :]).sum(-1, dtype=int)
        for way in turned
      ),
    )
    found += [
      Alike(names[row], names[row + 1 + other], int(bits[other]))
      for other in np.flatnonzero(bits <= ALIKE_BITS).tolist()
    ]
  return tuple(sorted(found, key=lambda pair: (not pair.across, pair.bits)))


def describe(report: Report, *, limit: int = 20) -> str:
  """Writes a report as text, each list cut after `limit` lines."""
  inventory = report.inventory
  lines = [report.title, ""]
  for split, split_pairs in inventory.splits.items():
    line = f"  {split:<11}{len(split_pairs):>5} pairs"
    line += f", {inventory.found[split]} of {report.official[split]} found"
    if report.sizes[split]:
      heights, widths = np.array(report.sizes[split]).T
      line += (
        f", width {_spread(widths)}, height {_spread(heights)} (min/median/max)"
      )
    lines.append(line)
  if inventory.excluded:
    lines.append(f"  kept out of training: {', '.join(inventory.excluded)}")
  lines += [f"  note: {note}" for note in inventory.notes]
  across = [pair for pair in report.alike if pair.across]
  within = [pair for pair in report.alike if not pair.across]
  for title, entries in (
    ("problems, each to be solved before use", report.problems),
    ("warnings", report.warnings),
    ("empty masks", report.empty),
    ("masks that touch the frame", report.touching),
    ("look-alikes across splits", across),
    ("look-alikes within a split", within),
  ):
    lines += ["", f"{len(entries)} {title}"]
    lines += [f"  {entry}" for entry in entries[:limit]]
    if len(entries) > limit:
      lines.append(f"  and {len(entries) - limit} more")
  lines += ["", "ok" if report.ok else "not usable as it is"]
  return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
  return f"{values.min()}/{np.median(values):g}/{values.max()}"
