"""Own data with no code: a folder with `images/` and `masks/`.

    DIR/images/lesion_7.jpg          DIR/train/images/...  DIR/train/masks/...
    DIR/masks/lesion_7.png     or    DIR/validation/...
                                     DIR/test/...

An image and its mask share the stem of their names (a mask may also end in
`_mask`, `_segmentation` or `_lesion`). Without the three sub-folders the pairs
are divided by a hash of the stem: 10 % test, 10 % validation, the rest train.
"""

from collections.abc import Iterable
import hashlib
import pathlib
import re
from typing import Any

from kdseg.data import archives
from kdseg.data import builder
from kdseg.data import pairs
from kdseg.data.archives import DataError
from kdseg.data.archives import File
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")

MAX_NAME_BYTES = 255  # of most file systems

_HOW_SPLIT = (
  "Pairs in images/ and masks/ are divided by a hash of their names, which may "
  "leave a split without any: divide them yourself, as train/, validation/ and "
  "test/ with those inside."
)
_MASK_ENDING = re.compile(r"_(?:mask|segmentation|lesion)$", re.IGNORECASE)


class Folder(builder.PairBuilder):
  """tfds builder `folder`; splits as the folder has them, or by a hash."""

  name = test_name = "folder"
  title = "pictures of its maker's own"
  terms_of_use = "under terms of their own"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Pass a folder with images/ and masks/ (or train/, validation/ and test/"
    " with those inside) as manual_dir."
  )
  description = "A folder of images and masks, matched by the stem of names."

  def __init__(self, *, directory: str = "", **kwargs: Any):
    """Makes the builder.

    Args:
      directory: the folder; it names the prepared data, which are so kept
        apart from those of another folder, or of this one before it changed.
        Without it, the `manual_dir` of the download is read.
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

  def describe_splits(self) -> str:
    """See base class."""
    return f" {_HOW_SPLIT}"

  def inventory(
    self,
    manual_dir: pathlib.Path | None,
    download: builder.Download | None = None,
  ) -> Inventory:
    """See base class."""
    del download
    directory = self._directory or manual_dir
    if directory is None:
      raise DataError(f"{self.name}: {self.MANUAL_DOWNLOAD_INSTRUCTIONS}")
    return take_inventory(pathlib.Path(directory).expanduser())


def take_inventory(directory: pathlib.Path) -> Inventory:
  """Matches images and masks by stem.

  Args:
    directory: the folder with `images/` and `masks/`, or with sub-folders that
      have them.

  Returns:
    The inventory; its `problems` name files. Whatever is found is what there
    should be, so `official` equals `found`.

  Raises:
    DataError: if the folder has no such sub-folders.
  """
  notes = []
  if (directory / "images").is_dir():
    matched, problems, files = _match(directory)
    files = [("", file) for file in files]
    splits = {
      name: tuple(p for p in matched if split_of(p.id) == name)
      for name in SPLITS
    }
    if missing := [name for name in SPLITS if not splits[name]]:
      notes.append(f"no pair is for {' or '.join(missing)}. {_HOW_SPLIT}")
  else:
    present = [name for name in SPLITS if (directory / name).is_dir()]
    if not present:
      raise DataError(
        f"{directory} has neither images/ and masks/ nor any of"
        f" {', '.join(f'{name}/' for name in SPLITS)}. "
        + Folder.MANUAL_DOWNLOAD_INSTRUCTIONS
      )
    splits, problems, files = {}, [], []
    for name in present:
      matched, its_problems, its_files = _match(directory / name)
      splits[name] = tuple(matched)
      problems += its_problems
      files += [(name, file) for file in its_files]
    problems += _shared_ids(directory, splits)
  problems += _unfit_for_files(directory, splits)
  counts = {name: len(found) for name, found in splits.items() if found}
  return Inventory(
    splits={name: found for name, found in splits.items() if found},
    official=counts,
    found=counts,
    problems=tuple(problems),
    notes=tuple(notes),
    stamp=_stamp(files),
  )


def _stamp(files: Iterable[tuple[str, File]]) -> str:
  """A short hash of where files lie, their sizes and when they were written.

  Unlike a release, a folder is worked on: a pair goes to another split, a mask
  is drawn anew.
  """
  digest = hashlib.sha256()
  lines = []
  for split, file in files:
    written = pathlib.Path(file.source, file.path).stat().st_mtime_ns
    kind = pathlib.Path(file.source).name
    lines.append(f"{split}/{kind}/{file.path}\t{file.size}\t{written}\n")
  for line in sorted(lines):
    digest.update(line.encode())
  return digest.hexdigest()[:16]


def split_of(id_: str) -> str:
  """The split of an example by a hash of its id alone."""
  if pairs.is_validation(id_):
    return "validation"
  digest = hashlib.sha256(f"test/{id_}".encode()).digest()
  # A ninth of the remaining nine tenths.
  is_test = int.from_bytes(digest[:8], "big") % 9 == 0
  return "test" if is_test else "train"


def _match(
  directory: pathlib.Path,
) -> tuple[list[Pair], list[str], list[File]]:
  problems = []
  found = {}
  listed = []
  for kind in ("images", "masks"):
    path = directory / kind
    if not path.is_dir():
      raise DataError(
        f"{directory} has no {kind}/. " + Folder.MANUAL_DOWNLOAD_INSTRUCTIONS
      )
    files = archives.list_files(path)
    listed += files
    found[kind], strangers = {}, []
    for file in files:
      if file.suffix not in SUFFIXES:
        strangers.append(file.path)
        continue
      stem = file.path.rsplit(".", 1)[0]
      if kind == "masks" and stem not in found["images"]:
        stem = _MASK_ENDING.sub("", stem)
      if stem in found[kind]:
        problems.append(
          f"{path} has two files for {stem} ({found[kind][stem].path},"
          f" {file.path}); keep one."
        )
      found[kind][stem] = file
    if strangers:
      problems.append(
        f"{path} has files that are no images: {pairs.listing(strangers)}."
        f" Remove them, or convert them ({', '.join(SUFFIXES)})."
      )
  images, masks = found["images"], found["masks"]
  if unmasked := sorted(images.keys() - masks.keys()):
    problems.append(
      f"{pairs.listing(unmasked)}: no mask in {directory / 'masks'} for"
      f" {len(unmasked)} of {len(images)} images. Add it under the same stem,"
      " or remove the image."
    )
  if unpictured := sorted(masks.keys() - images.keys()):
    problems.append(
      f"{pairs.listing(unpictured)}: no image in {directory / 'images'} for"
      f" {len(unpictured)} of {len(masks)} masks. Add it under the same stem,"
      " or remove the mask."
    )
  matched = [
    Pair(stem, images[stem], masks[stem], upright=True)
    for stem in sorted(images.keys() & masks.keys())
  ]
  return matched, problems, listed


def _unfit_for_files(
  directory: pathlib.Path, splits: dict[str, tuple[Pair, ...]]
) -> list[str]:
  """Names ids that cannot each have a file in one folder of predictions."""
  problems = []
  taken: dict[str, str] = {}
  for found in splits.values():
    for pair in found:
      flat = pair.id.replace("/", "_")
      if len(f"{flat}.png".encode()) > MAX_NAME_BYTES:
        problems.append(
          f"{directory}: {pair.id} is too long for the name of a prediction,"
          f" {flat}.png (more than {MAX_NAME_BYTES} bytes). Rename it."
        )
      if taken.setdefault(flat, pair.id) != pair.id:
        problems.append(
          f"{directory}: predictions for {taken[flat]} and {pair.id} would both"
          f" be called {flat}.png. Rename one."
        )
  return problems


def _shared_ids(
  directory: pathlib.Path, splits: dict[str, tuple[Pair, ...]]
) -> list[str]:
  problems = []
  seen: dict[str, str] = {}
  for split, found in splits.items():
    shared = [pair.id for pair in found if pair.id in seen]
    if shared:
      problems.append(
        f"{directory}: {pairs.listing(shared)} in both {seen[shared[0]]}/ and"
        f" {split}/. Remove one, or rename it if it is another lesion."
      )
    seen.update((pair.id, split) for pair in found)
  return problems
