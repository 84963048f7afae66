"""Checks every file of a data set and lists all that is wrong or unusual.

Where the builders stop at the first problem, this lists all of them. It adds
sizes, empty masks, masks that touch the frame and images that look alike within
a split, which forbid nothing; images alike across splits do, unless allowed.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
import tqdm

from kdseg.data import alike as alike_lib
from kdseg.data import archives
from kdseg.data import builder as builder_lib
from kdseg.data import decode
from kdseg.data import masks
from kdseg.data import pairs as pairs_lib
from kdseg.data import prepare
from kdseg.data import sets
from kdseg.data.archives import DataError
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair


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
  alike: tuple[alike_lib.Alike, ...] = ()
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
  allow_alike: str = "",
  **options: Any,
) -> Report:
  """Checks every file of a data set.

  Args:
    name: see `prepare.make_builder`.
    manual_dir: the archives or the folder. Without it, the records prepared in
      `data_dir` are checked instead.
    data_dir: see `prepare.make_builder`.
    builders: see `prepare.make_builder`.
    allow_alike: see `inspect`.
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
    allow_alike=allow_alike,
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
  allow_alike: str = "",
) -> Report:
  """Decodes every pair of an inventory and reports on it.

  Args:
    title: the data set, and where it was read.
    inventory: its pairs.
    official: by split, pairs of the official release.
    rule: which values of masks are lesion.
    allow_alike: ids, joined by commas, of images that may look like one of
      another split.

  Returns:
    The report.
  """
  problems = list(inventory.problems)
  sizes: dict[str, list[tuple[int, int]]] = {s: [] for s in inventory.splits}
  thumbs: dict[str, np.ndarray] = {}
  empty, touching, frame_shares = [], [], []
  for split, pair in _each_pair(title, inventory):
    label = f"{split}/{pair.id}"
    try:
      pair = pair.held()
      image = decode.decode_image(pair.image.read(), pair.image.where)
      sizes[split].append(image.shape[:2])
      thumbs[label] = alike_lib.thumb(image)
      mask = masks.decode_mask(pair.mask.read(), pair.mask.where, rule)
      decode.check_fit(pair, image, mask)
    except DataError as error:
      problems.append(str(error))
      continue
    if not mask.any():
      empty.append(label)
    frame_shares.append(masks.frame_share(mask))
    if frame_shares[-1]:
      touching.append(label)
  alike = alike_lib.find_alike(thumbs)
  problems += alike_lib.refuse(alike, allow_alike)
  return Report(
    title=title,
    inventory=inventory,
    official=official,
    sizes=sizes,
    problems=tuple(problems),
    empty=tuple(empty),
    touching=tuple(touching),
    alike=alike,
    warnings=masks.warn_of_inverted(frame_shares, rule),
  )


def _each_pair(title: str, inventory: Inventory) -> Iterator[tuple[str, Pair]]:
  """Yields every pair with its split, and shows how far it is."""
  everything = [
    (split, pair)
    for split, split_pairs in inventory.splits.items()
    for pair in split_pairs
  ]
  yield from tqdm.tqdm(
    everything, desc=f"Reading {title}", leave=False, disable=None
  )


def group(problems: Sequence[str]) -> list[str]:
  """Says problems of one kind in one line, with a count and three examples.

  Of one kind are lines that differ only in paths, ids and numbers: in words
  with a digit, a slash or a full stop inside, or before a colon at the start.
  """
  kinds: dict[str, list[str]] = {}
  for problem in problems:
    words = re.sub(r"^[^:]*: ", "", problem).split()
    kind = " ".join(w for w in words if not re.search(r"[\d/]|\.\w", w))
    kinds.setdefault(kind, []).append(problem)
  lines = []
  for alike in kinds.values():
    if len(alike) <= 3:
      lines += alike
      continue
    others = ", ".join(
      problem.split(": ")[0].split()[0] for problem in alike[1:3]
    )
    lines.append(
      f"{len(alike)} times: {alike[0]} Likewise {others} and"
      f" {len(alike) - 3} more."
    )
  return lines


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
  problems = group(report.problems)
  for title, count, entries in (
    ("problems, each to be solved before use", len(report.problems), problems),
    ("warnings", len(report.warnings), report.warnings),
    ("empty masks", len(report.empty), report.empty),
    ("masks that touch the frame", len(report.touching), report.touching),
    ("look-alikes across splits", len(across), across),
    ("look-alikes within a split", len(within), within),
  ):
    lines += ["", f"{count} {title}"]
    lines += [f"  {entry}" for entry in entries[:limit]]
    if len(entries) > limit:
      lines.append(f"  and {len(entries) - limit} more")
  lines += ["", "ok" if report.ok else "not usable as it is"]
  return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
  return f"{values.min()}/{np.median(values):g}/{values.max()}"
