"""Image and mask pairs: found, matched by id, divided into splits.

Each data set lists its files as an `Inventory`; the builders, `verify` and the
tests all work from it, so that they agree on what belongs to what.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import re
from typing import NamedTuple
import unicodedata

from kdseg.data import archives
from kdseg.data.archives import DataError
from kdseg.data.archives import File

FEW_TEST_IMAGES = 20


@dataclasses.dataclass(frozen=True)
class Pair:
  """An image, its mask, and what is known about them.

  Attributes:
    id: unique within the data set.
    image: the image's file.
    mask: the mask's file.
    diagnosis: in the data set's own words; empty if not known.
  """

  id: str
  image: archives.File
  mask: archives.File
  diagnosis: str = ""

  def held(self) -> "Pair":
    """Returns the same pair with both files' contents held in memory."""
    return dataclasses.replace(
      self, image=self.image.held(), mask=self.mask.held()
    )


@dataclasses.dataclass(frozen=True)
class Inventory:
  """What was found of a data set, before any image is decoded.

  Attributes:
    splits: the pairs of each split, sorted by id; empty splits are dropped.
    found: by split, how many pairs were found of the release that the split
      comes from (one number for training and validation of ISIC-2016); the
      pairs of each split if left empty.
    excluded: ids found but kept out of training and validation.
    problems: one line for each reason not to use the data set.
    notes: one line for each fact that a reader of results should know.
    stamp: hash of the names and sizes of the files; `archives.stamp` of the
      pairs' files if left empty.
  """

  splits: Mapping[str, tuple[Pair, ...]]
  found: Mapping[str, int] = dataclasses.field(default_factory=dict)
  excluded: tuple[str, ...] = ()
  problems: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  stamp: str = ""

  def __post_init__(self) -> None:
    splits = {name: pairs for name, pairs in self.splits.items() if pairs}
    counts = {name: len(pairs) for name, pairs in splits.items()}
    files = [
      file
      for pairs in splits.values()
      for pair in pairs
      for file in (pair.image, pair.mask)
    ]
    object.__setattr__(self, "splits", splits)
    object.__setattr__(self, "found", self.found or counts)
    object.__setattr__(self, "stamp", self.stamp or archives.stamp(files))

  def check(self) -> None:
    """Raises `DataError` with the first problem, if there is one."""
    if not self.problems:
      return
    more = len(self.problems) - 1
    suffix = (
      f" ({more} more like this; `kdseg data verify` lists all.)"
      if more
      else ""
    )
    raise DataError(self.problems[0] + suffix)


class Sorted(NamedTuple):
  """Files by id.

  Attributes:
    files: the first file of each id.
    strangers: paths of files that have no id.
    problems: a line for each further file of an id.
  """

  files: dict[str, File]
  strangers: list[str]
  problems: list[str]


def sort_by_id(
  files: Iterable[File], find_id: Callable[[File], str | None]
) -> Sorted:
  """Sorts files by the id that `find_id` gives each; None makes a stranger.

  Ids are composed (NFC): macOS and others write one letter by different bytes.
  """
  found = Sorted({}, [], [])
  for file in files:
    id_ = find_id(file)
    if id_ is None:
      found.strangers.append(file.path)
      continue
    id_ = unicodedata.normalize("NFC", id_)
    if id_ in found.files:
      found.problems.append(
        f"{file.source} has {id_} twice ({found.files[id_].path}, {file.path});"
        " keep one."
      )
    else:
      found.files[id_] = file
  return found


def id_in_name(pattern: re.Pattern[str]) -> Callable[[File], str | None]:
  """Returns a `find_id`: group 1 of a pattern of the whole name, upper case."""

  def find_id(file: File) -> str | None:
    match = pattern.fullmatch(file.name)
    return match[1].upper() if match else None

  return find_id


def match(
  images: Mapping[str, File], masks: Mapping[str, File]
) -> tuple[tuple[Pair, ...], list[str], list[str]]:
  """Pairs images and masks, both by id.

  Returns:
    The pairs, sorted by id; a line that names the images without a mask, and
    one that names the masks without an image, if there are any.
  """

  def lonely(
    kind: str, files: Mapping[str, File], other: str, others: Mapping[str, File]
  ) -> list[str]:
    ids = sorted(files.keys() - others.keys())
    if not ids:
      return []
    source = next(iter(others.values())).source if others else "the data set"
    cased = {id_.casefold(): id_ for id_ in others.keys() - files.keys()}
    near = [cased[i.casefold()] for i in ids if i.casefold() in cased]
    hint = f" {listing(near)} differ by case only: rename." if near else ""
    return [
      f"{listing(ids)}: no {other} in {source} for {len(ids)} of {len(files)}"
      f" {kind}s. Add it under the same name, or remove the {kind}.{hint}"
    ]

  return (
    tuple(
      Pair(id_, images[id_], masks[id_])
      for id_ in sorted(images.keys() & masks.keys())
    ),
    lonely("image", images, "mask", masks),
    lonely("mask", masks, "image", images),
  )


def compare_with_release(
  kind: str, found: Mapping[str, File], ids: Iterable[str], release: str
) -> list[str]:
  """Returns a line for files that the release lacks, one for missing files.

  Args:
    kind: `"image"` or `"mask"`.
    found: files by id.
    ids: those of the release.
    release: its name.
  """
  ids = set(ids)
  source = next(iter(found.values())).source if found else "the data set"
  problems = []
  if foreign := sorted(found.keys() - ids):
    problems.append(
      f"{source} has {len(foreign)} {kind}s that are not in {release}:"
      f" {listing(foreign)}. Remove them; is it another archive?"
    )
  if missing := sorted(ids - found.keys()):
    problems.append(
      f"{source} lacks {len(missing)} of the {len(ids)} {kind}s of {release}:"
      f" {listing(missing)}. This set has to be whole; get it again."
    )
  return problems


def listing(names: Iterable[str], limit: int = 5) -> str:
  """Names joined by commas, the rest counted."""
  names = list(names)
  shown = ", ".join(names[:limit])
  rest = len(names) - limit
  return f"{shown} and {rest} more" if rest > 0 else shown


def warn_of_few(name: str, count: int) -> tuple[str, ...]:
  """Returns a warning if a test set is too small for its mean to say much."""
  if not 0 < count < FEW_TEST_IMAGES:
    return ()
  return (
    f"{name} has only {count} test images: a mean over so few says little;"
    f" take {FEW_TEST_IMAGES} or more",
  )


def is_validation(id_: str) -> bool:
  """Whether a training example is held out for validation: one in ten.

  Depends on the id alone, so a partial set holds out the same examples as the
  whole one, and so does every machine.
  """
  digest = hashlib.sha256(id_.encode()).digest()
  return int.from_bytes(digest[:8], "big") % 10 == 0


def hold_out(pairs: Sequence[Pair]) -> dict[str, tuple[Pair, ...]]:
  """Divides training pairs into `train` and `validation` by `is_validation`."""
  return {
    "train": tuple(p for p in pairs if not is_validation(p.id)),
    "validation": tuple(p for p in pairs if is_validation(p.id)),
  }
