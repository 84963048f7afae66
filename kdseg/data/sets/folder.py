"""Own data with no code: a folder of images and masks, matched by name.

    DIR/images/lesion_7.jpg          DIR/train/images/...  DIR/train/masks/...
    DIR/masks/lesion_7.png     or    DIR/validation/...
                                     DIR/test/...

or in another of the layouts that `data.layouts` knows. An image and its mask
share the stem of their names (a mask may also end in `_mask`, `_segmentation`,
`_lesion` or the like). Without folders of splits, the pairs are divided by the
rank of a hash of the stem: a tenth each for test and validation, exactly.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import hashlib
import pathlib
import re
from typing import Any
import unicodedata

from kdseg.data import archives
from kdseg.data import builder
from kdseg.data import decode
from kdseg.data import layouts
from kdseg.data import pairs
from kdseg.data.archives import File
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair

MAX_NAME_BYTES = 255  # of most file systems


class Folder(builder.PairBuilder):
  """A folder of images and masks, matched by the stem of their names."""

  name = test_name = "folder"
  how_split = (
    "Every split needs pairs: at least three in one images/ and masks/, which"
    " are divided; or train/, validation/ (or val/, valid/, dev/) and test/,"
    " each with images/ and masks/ inside."
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Pass a folder with images/ and masks/ (or train/, validation/ and test/"
    " with those inside) as manual_dir."
  )

  def __init__(self, *, directory: str = "", **kwargs: Any):
    """Makes the builder.

    Args:
      directory: the folder; `manual_dir` if empty. Its name and stamp name the
        prepared records, which are thus kept apart from those of another
        folder, or of this one before it changed.
      **kwargs: see `PairBuilder`.
    """
    self._directory = directory
    super().__init__(**kwargs)

  def options(self) -> dict[str, str]:
    """See base class."""
    if not self._directory:
      return super().options()
    directory = pathlib.Path(self._directory).expanduser().resolve()
    stem = re.sub(r"[^A-Za-z0-9]+", "_", directory.name).strip("_") or "root"
    return {stem: take_inventory(directory).stamp, **super().options()}

  @classmethod
  def options_from(cls, manual_dir: pathlib.Path | None) -> dict[str, Any]:
    """See base class."""
    return {"directory": str(manual_dir) if manual_dir else ""}

  def inventory(
    self,
    manual_dir: pathlib.Path | None,
    download: builder.Download | None = None,
  ) -> Inventory:
    """See base class."""
    del download
    directory = self._directory or self.require(manual_dir)
    return take_inventory(pathlib.Path(directory).expanduser())


def take_inventory(directory: pathlib.Path) -> Inventory:
  """Matches images and masks by stem.

  Args:
    directory: a folder in one of the layouts of `data.layouts`.

  Returns:
    The inventory; its `problems` name files.

  Raises:
    DataError: if the folder is in none of the layouts.
  """
  layout = layouts.find(directory)
  splits: dict[str, tuple[Pair, ...]] = {}
  problems: list[str] = []
  files: list[tuple[str, File]] = []
  for part in layout.parts:
    its_pairs, its_problems, its_files = _match(part, layout.channel)
    splits[part.split] = its_pairs
    problems += its_problems
    files += [(part.split, file) for file in its_files]
  notes = []
  if layout.unused:
    unused = ", ".join(f"{name}/" for name in layout.unused)
    notes.append(f"not read: {unused} of {directory}")
  if "" in splits:
    splits = divide(splits[""])
  elif layout.hold_out:
    held = divide(splits["train"])
    splits["train"] = _by_id((*held["train"], *held["test"]))
    splits["validation"] = held["validation"]
  if "" in {part.split for part in layout.parts} or layout.hold_out:
    counts = ", ".join(f"{len(found)} {name}" for name, found in splits.items())
    notes.append(f"divided by the rank of a hash of the names: {counts}")
  return Inventory(
    splits=splits,
    problems=(*problems, *_unfit_ids(directory, splits)),
    notes=tuple(notes),
    stamp=_stamp(files),
  )


def _stamp(files: Iterable[tuple[str, File]]) -> str:
  """Hashes where files lie, their sizes and when they were written.

  Unlike a release, a folder changes: a pair moves to another split, a mask is
  redrawn.
  """
  # Names the rule of division: records of another are not read.
  digest = hashlib.sha256(b"by rank\n")
  lines = []
  for split, file in files:
    written = pathlib.Path(file.source, file.path).stat().st_mtime_ns
    kind = pathlib.Path(file.source).name
    lines.append(f"{split}/{kind}/{file.path}\t{file.size}\t{written}\n")
  for line in sorted(lines):
    digest.update(line.encode())
  return digest.hexdigest()[:16]


def divide(found: Sequence[Pair]) -> dict[str, tuple[Pair, ...]]:
  """Divides pairs by the rank of a hash of their ids: 80, 10 and 10 %, exactly.

  The same ids are divided in the same way on every machine. Not by the size of
  lesions, which would take decoding every mask before it is known what is
  prepared already.

  Returns:
    The pairs of train, validation and test, sorted by id; from three on, no
    split is empty.
  """
  ranked = sorted(
    found, key=lambda pair: hashlib.sha256(f"split/{pair.id}".encode()).digest()
  )
  tenth = max(1, round(len(ranked) / 10)) if len(ranked) > 2 else 0
  return {
    "train": _by_id(ranked[2 * tenth :]),
    "validation": _by_id(ranked[:tenth]),
    "test": _by_id(ranked[tenth : 2 * tenth]),
  }


def _by_id(found: Iterable[Pair]) -> tuple[Pair, ...]:
  return tuple(sorted(found, key=lambda pair: pair.id))


def _match(
  part: layouts.Part, channel: str
) -> tuple[tuple[Pair, ...], list[str], list[File]]:
  """Returns the pairs of two folders, problems, and all files."""
  problems: list[str] = []
  is_one = part.images == part.masks
  folders = dict.fromkeys((part.images, part.masks))
  listed = {path: archives.list_files(path) for path in folders}
  for path, files in listed.items():
    strangers = [f.path for f in files if f.suffix not in decode.SUFFIXES]
    if strangers:
      hint = ""
      if any(name.endswith(".json") for name in strangers):
        hint = " Outlines in JSON have to be drawn as PNG masks first."
      problems.append(
        f"{path} has files that are no images: {pairs.listing(strangers)}."
        f" Remove them, or convert them ({', '.join(decode.SUFFIXES)}).{hint}"
      )
  images = [f for f in listed[part.images] if f.suffix in decode.SUFFIXES]
  masks = [f for f in listed[part.masks] if f.suffix in decode.SUFFIXES]
  if is_one:
    stems = {_stem(file) for file in images}
    images, masks = (
      [f for f in images if layouts.is_mask_of(_stem(f), stems) == is_mask]
      for is_mask in (False, True)
    )
  by_id = pairs.sort_by_id(images, lambda f: _stem(f).removesuffix(channel))

  def find_id(mask: File) -> str:
    stem = _stem(mask)
    if stem in by_id.files and not is_one:
      return stem
    return layouts.MASK_ENDING.sub("", stem)

  masks_by_id = pairs.sort_by_id(masks, find_id)
  problems += by_id.problems + masks_by_id.problems
  matched, unmasked, unpictured = pairs.match(by_id.files, masks_by_id.files)
  every = [file for files in listed.values() for file in files]
  return matched, problems + unmasked + unpictured, every


def _stem(file: File) -> str:
  """Returns the path without its suffix, composed as ids are."""
  return unicodedata.normalize("NFC", file.path.rsplit(".", 1)[0])


def _unfit_ids(
  directory: pathlib.Path, splits: dict[str, tuple[Pair, ...]]
) -> list[str]:
  """Names ids of two splits, and ids that no table or file can be named by."""
  problems = []
  split_of_id: dict[str, str] = {}
  taken: dict[str, str] = {}
  for split, found in splits.items():
    for id_ in (pair.id for pair in found):
      where = f"{directory}: {id_}"
      flat = id_.replace("/", "_")
      # Disks of macOS and Windows do not tell upper from lower case.
      folded = flat.casefold()
      if split_of_id.setdefault(id_, split) != split:
        problems.append(
          f"{where} is in both {split_of_id[id_]}/ and {split}/. Remove one, or"
          " rename it if it is another lesion."
        )
      if len(f"{flat}.png".encode()) > MAX_NAME_BYTES:
        problems.append(
          f"{where} is too long for the name of a prediction, {flat}.png (more"
          f" than {MAX_NAME_BYTES} bytes). Rename it."
        )
      if (other := taken.setdefault(folded, id_)) != id_:
        only_case = id_.casefold() == other.casefold()
        why = " on a disk that ignores case" if only_case else ""
        problems.append(
          f"{where} and {other} would both have predictions called"
          f" {flat}.png{why}. Rename one."
        )
  return problems
