"""Finds the images and the masks of a folder, in the layouts of many tools.

Names are compared without regard to case, and IMAGES and MASKS stand for any of
`IMAGE_NAMES` and `MASK_NAMES`:

    IMAGES/ MASKS/                 divided by a hash of the names
    SPLIT/IMAGES/ SPLIT/MASKS/     SPLIT: train; validation, val, valid or dev;
    IMAGES/SPLIT/ MASKS/SPLIT/     test (COCO also writes train2017)
    SPLIT/ SPLITannot/             SPLIT_MASKS/, too (CamVid of SMP, Carvana)
    imagesTr/ labelsTr/            nnU-Net; imagesTs/ labelsTs/ are the test set
    a.jpg a_mask.png               side by side, in the folder or in SPLIT/
"""

from collections.abc import Iterable
import difflib
import pathlib
import re
from typing import NamedTuple

from kdseg.data import archives
from kdseg.data import decode
from kdseg.data.archives import DataError

IMAGE_NAMES = (
  *("images", "image", "imgs", "img", "pictures", "photos", "jpegimages"),
)
MASK_NAMES = (
  *("masks", "mask", "labels", "label", "annotations", "annotation", "annot"),
  *("groundtruth", "ground_truth", "gt", "segmentations", "segmentation"),
  "segmentationclass",
)
MASK_ENDING = re.compile(
  r"_(?:masks?|segmentation|seg|lesion|gt|groundtruth|label|annotation)$",
  re.IGNORECASE,
)
_SPLIT_NAMES = {
  "train": "train(?:ing)?",
  "validation": "val(?:id(?:ation)?)?|dev",
  "test": "test(?:ing)?",
}
HOW = (
  "Put the images in images/ and the masks in masks/, both under the same"
  " names; or both into each of train/, validation/ (or val/, valid/, dev/) and"
  " test/"
)


class Part(NamedTuple):
  """Where images and masks lie.

  Attributes:
    split: the split they are of; empty if they are to be divided.
    images: the folder of the images.
    masks: that of the masks; the same if they lie side by side.
  """

  split: str
  images: pathlib.Path
  masks: pathlib.Path


class Layout(NamedTuple):
  """How a folder is laid out.

  Attributes:
    parts: where images and masks lie; never empty.
    hold_out: whether validation pairs are taken from those of training.
    unused: folders beside them that nothing reads.
    channel: what images' names end in and masks' do not, as `_0000`.
  """

  parts: tuple[Part, ...]
  hold_out: bool
  unused: tuple[str, ...]
  channel: str = ""


def find(directory: pathlib.Path) -> Layout:
  """Finds how a folder is laid out.

  Raises:
    DataError: if it is in none of the layouts; names what it has.
  """
  folders = _folders(directory)
  images = _first(folders, IMAGE_NAMES)
  masks = _first(folders, MASK_NAMES)
  if "imagestr" in folders and "labelstr" in folders:
    return _nn_unet(folders)
  if images and masks:
    parts = _nested_splits(images, masks) or (Part("", images, masks),)
    return Layout(parts, False, _unused(folders, (images, masks)))
  if images:
    raise DataError(
      f"{directory} has no masks/ (nor {', '.join(MASK_NAMES[2:6])}) for its"
      f" {images.name}/. {HOW}."
    )
  if parts := _split_folders(folders):
    used = [path for part in parts for path in (part.images, part.masks)]
    return Layout(parts, False, _unused(folders, used))
  if _lies_side_by_side(directory):
    return Layout((Part("", directory, directory),), False, ())
  found = ", ".join(
    f"{path.name}/{_nearest(name)}" for name, path in folders.items()
  )
  raise DataError(
    f"{directory} has neither images/ and masks/ nor any of train/, validation/"
    f" and test/ with those inside, but {found or 'no folder'}. {HOW}."
  )


def split_of_folder(name: str) -> str:
  """Returns the split that a folder's name stands for; empty if none."""
  for split, names in _SPLIT_NAMES.items():
    if re.fullmatch(rf"(?:{names})(?:[-_]?set)?(?:20\d\d)?", name.casefold()):
      return split
  return ""


def _folders(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the visible folders in a folder, by their names in lower case."""
  try:
    inside = sorted(directory.iterdir())
  except OSError as error:
    raise DataError(
      f"{archives.shown(directory)} cannot be listed: {error.strerror}."
    ) from None
  return {
    path.name.casefold(): path
    for path in inside
    if path.is_dir() and not path.name.startswith((".", "__MACOSX"))
  }


def _nearest(name: str) -> str:
  """Returns a suggestion if a folder's name is nearly one that is read."""
  known = (*IMAGE_NAMES, *MASK_NAMES, *_SPLIT_NAMES, "imagestr", "labelstr")
  near = difflib.get_close_matches(name, known, n=1)
  return f' (did you mean "{near[0]}"?)' if near else ""


def _first(
  folders: dict[str, pathlib.Path], names: Iterable[str]
) -> pathlib.Path | None:
  return next((folders[name] for name in names if name in folders), None)


def _unused(
  folders: dict[str, pathlib.Path], used: Iterable[pathlib.Path]
) -> tuple[str, ...]:
  """Returns the folders in which none of the used ones lies."""
  read = {part for path in used for part in (path, path.parent)}
  return tuple(path.name for path in folders.values() if path not in read)


def _nn_unet(folders: dict[str, pathlib.Path]) -> Layout:
  train = folders["imagestr"], folders["labelstr"]
  if "imagests" not in folders or "labelsts" not in folders:
    return Layout((Part("", *train),), False, _unused(folders, train), "_0000")
  test = folders["imagests"], folders["labelsts"]
  parts = (Part("train", *train), Part("test", *test))
  return Layout(parts, True, _unused(folders, (*train, *test)), "_0000")


def _nested_splits(
  images: pathlib.Path, masks: pathlib.Path
) -> tuple[Part, ...]:
  """Returns the parts of images/SPLIT/ and masks/SPLIT/, if they are so."""
  inside = _folders(images)
  others = _folders(masks)
  if not inside or not all(map(split_of_folder, (*inside, *others))):
    return ()
  by_split = {split_of_folder(name): path for name, path in others.items()}
  parts = [
    Part(split_of_folder(name), path, by_split[split_of_folder(name)])
    for name, path in inside.items()
    if split_of_folder(name) in by_split
  ]
  order = list(_SPLIT_NAMES)
  return tuple(sorted(parts, key=lambda part: order.index(part.split)))


def _split_folders(folders: dict[str, pathlib.Path]) -> tuple[Part, ...]:
  """Returns the parts of SPLIT/IMAGES/, SPLIT/ and SPLITannot/, and the like.

  Raises:
    DataError: if one split has two folders, or one has images alone.
  """
  parts: dict[str, Part] = {}
  taken: dict[str, str] = {}
  for name, path in folders.items():
    # train/, or train_images/.
    stem, _, ending = name.rpartition("_")
    split = split_of_folder(name)
    split = split or (split_of_folder(stem) if ending in IMAGE_NAMES else "")
    if not split:
      continue
    if taken.setdefault(split, path.name) != path.name:
      raise DataError(
        f"{path.parent} has {taken[split]}/ and {path.name}/, both of the"
        f" {split} split. Keep one, or rename the other."
      )
    root = name if split_of_folder(name) else stem
    beside = _first(
      folders,
      (f"{root}{mark}{mask}" for mark in ("", "_", "-") for mask in MASK_NAMES),
    )
    inside = _folders(path)
    images, masks = (
      _first(inside, names) for names in (IMAGE_NAMES, MASK_NAMES)
    )
    if images and masks:
      parts[split] = Part(split, images, masks)
    elif images:
      raise DataError(f"{path} has no masks/ for its {images.name}/. {HOW}.")
    elif beside:
      parts[split] = Part(split, path, beside)
    elif _lies_side_by_side(path):
      parts[split] = Part(split, path, path)
  return tuple(parts[split] for split in _SPLIT_NAMES if split in parts)


def _lies_side_by_side(directory: pathlib.Path) -> bool:
  """Whether a folder holds a.jpg and a_mask.png, of any name."""
  stems = {
    path.stem
    for path in directory.iterdir()
    if path.suffix.lower() in decode.SUFFIXES
  }
  return any(is_mask_of(stem, stems) for stem in stems)


def is_mask_of(stem: str, stems: Iterable[str]) -> bool:
  """Whether a stem ends as a mask's does, and its image is there."""
  return bool(MASK_ENDING.search(stem)) and MASK_ENDING.sub("", stem) in stems
