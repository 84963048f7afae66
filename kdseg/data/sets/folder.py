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
from kdseg.data import decode
from kdseg.data import pairs
from kdseg.data.archives import DataError
from kdseg.data.archives import File
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair

SPLITS = ("train", "validation", "test")

MAX_NAME_BYTES = 255  # of most file systems

_HOW_SPLIT = (
  "Pairs in images/ and masks/ are divided by a hash of their names, which may "
  "leave a split without any: divide them yourself, as train/, validation/ and "
  "test/ with those inside."
)
_MASK_ENDING = re.compile(r"_(?:mask|segmentation|lesion)$", re.IGNORECASE)


class Folder(builder.PairBuilder):
  """A folder of images and masks, matched by the stem of their names."""

  name = test_name = "folder"
  how_split = _HOW_SPLIT
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
    directory: the folder with `images/` and `masks/`, or with sub-folders that
      have them.

  Returns:
    The inventory; its `problems` name files.

  Raises:
    DataError: if the folder has no such sub-folders.
  """
  roots = {split: directory / split for split in SPLITS}
  if (directory / "images").is_dir():
    roots = {"": directory}
  splits: dict[str, tuple[Pair, ...]] = {}
  problems: list[str] = []
  files: list[tuple[str, File]] = []
  for split, root in roots.items():
    if root.is_dir():
      splits[split], its_problems, its_files = _match(root)
      problems += its_problems
      files += [(split, file) for file in its_files]
  if not splits:
    raise DataError(
      f"{directory} has neither images/ and masks/ nor any of"
      f" {', '.join(f'{name}/' for name in SPLITS)}. "
      + Folder.MANUAL_DOWNLOAD_INSTRUCTIONS
    )
  notes = []
  if "" in splits:
    splits = {
      name: tuple(pair for pair in splits[""] if split_of(pair.id) == name)
      for name in SPLITS
    }
    if missing := [name for name in SPLITS if not splits[name]]:
      notes.append(f"no pair is for {' or '.join(missing)}. {_HOW_SPLIT}")
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
) -> tuple[tuple[Pair, ...], list[str], list[File]]:
  """Returns the pairs of `images/` and `masks/`, problems, and all files."""
  problems: list[str] = []
  files: list[File] = []
  found: dict[str, dict[str, File]] = {"images": {}, "masks": {}}
  for kind in found:
    path = directory / kind
    if not path.is_dir():
      raise DataError(
        f"{directory} has no {kind}/. " + Folder.MANUAL_DOWNLOAD_INSTRUCTIONS
      )

    def find_id(file: File, kind: str = kind) -> str | None:
      if file.suffix not in decode.SUFFIXES:
        return None
      stem = file.path.rsplit(".", 1)[0]
      is_mask = kind == "masks" and stem not in found["images"]
      return _MASK_ENDING.sub("", stem) if is_mask else stem

    listed = archives.list_files(path)
    files += listed
    found[kind], strangers, repeated = pairs.sort_by_id(listed, find_id)
    problems += repeated
    if strangers:
      problems.append(
        f"{path} has files that are no images: {pairs.listing(strangers)}."
        f" Remove them, or convert them ({', '.join(decode.SUFFIXES)})."
      )
  matched, unmasked, unpictured = pairs.match(found["images"], found["masks"])
  problems += unmasked + unpictured
  return matched, problems, files


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
