"""ISIC-2016, part 1: dermoscopic images with lesion masks (ISBI challenge).

Gutman et al., "Skin Lesion Analysis toward Melanoma Detection: A Challenge at
ISBI 2016" (arXiv:1605.01397). 900 training and 379 test images, CC0.

Two training images show lesions of the test set (Cassidy et al., "Analysis of
the ISIC image datasets", Medical Image Analysis 2022); they are left out of
training and validation unless `duplicates="include"`.
"""

from collections.abc import Mapping
import json
import os
import pathlib
import re
import types
from typing import Any

from kdseg.data import archives
from kdseg.data import builder
from kdseg.data import pairs
from kdseg.data.archives import DataError
from kdseg.data.archives import File
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair
from kdseg.runtime import files as files_lib

URL = "https://isic-challenge-data.s3.amazonaws.com/2016/"
ARCHIVES = {
  "train_image": "ISBI2016_ISIC_Part1_Training_Data",
  "train_mask": "ISBI2016_ISIC_Part1_Training_GroundTruth",
  "test_image": "ISBI2016_ISIC_Part1_Test_Data",
  "test_mask": "ISBI2016_ISIC_Part1_Test_GroundTruth",
}
TRAIN_COUNT = 900
TEST_COUNT = 379
KNOWN_DUPLICATES = ("ISIC_0001184", "ISIC_0001385")
DUPLICATES = ("exclude", "include")

# Numbers of the official test images. They tell an archive that is cut short
# or mistaken for another one, and name what is missing from it.
_NUMBERS = """
  3 12 13 14 15 20 22 23 27 36 37 40 43 52 53 56 57 64 66 69 71 72 88 92 98 99
  101 107 111 113 115 117 125 126 129 132 136 138 141 149 160 161 164 165 169
  172 174 177 188 195 196 197 198 200 201 202 212 213 222 226 227 228 230 231
  233 234 246 253 254 257 258 271 279 287 289 298 299 302 306 310 311 319 320
  325 327 328 340 343 354 357 368 371 377 378 380 388 392 393 407 418 420 433
  448 449 456 466 470 476 479 482 484 487 490 494 499 501 508 509 510 515 518
  525 527 533 534 537 539 540 547 549 550 1100 1103 1128 1131 1142 1181 1185
  1186 1190 1204 1242 1299 1427 1484 1685 1960 2107 2246 2673 2829 2871 3056
  3559 3728 4115 4346 5000 6193 6711 7322 7693 8116 8207 8406 8507 8600 8626
  8659 8992 8998 9035 9078 9083 9201 9298 9564 9869 9872 9874 9879 9880 9881
  9882 9885 9889 9891 9898 9901 9902 9906 9918 9920 9923 9926 9927 9928 9930
  9931 9943 9945 9946 9948 9954 9955 9956 9958 9959 9965 9970 9977 9980 9982
  9988 9990 9992 9993 9994 9998 10004 10009 10011 10013 10016 10018 10020
  10023 10028 10033 10034 10037 10038 10041 10047 10055 10058 10059 10061
  10062 10073 10077 10088 10089 10092 10100 10103 10171 10173 10175 10180
  10183 10187 10190 10192 10193 10201 10202 10206 10207 10215 10216 10229
  10231 10234 10238 10254 10255 10257 10261 10326 10331 10336 10340 10346
  10347 10348 10360 10368 10369 10373 10374 10377 10378 10379 10437 10444
  10448 10449 10451 10452 10454 10456 10460 10463 10474 10477 10483 10494
  10498 10552 10553 10556 10565 10574 10582 10584 10587 10588 10591 10592
  10596 10597 10598 10599 10604 10606 10607 10846 10847 10854 10856 10863
  11080 11081 11083 11089 11090 11092 11098 11101 11104 11107 11110 11112
  11122 11129 11132 11143 11148 11149 11150 11151 11152 11155 11162 11167
  11168 11171 11172 11175 11176 11177 11204 11205 11213 11219 11224 11227
  11292 11294 11298 11300 11305 11310 11319 11321 11325 11333 11336 11338
  11344 11349 11359 11363 11367 11374 11384 11386 11392
"""
TEST_IDS = tuple(f"ISIC_{int(number):07d}" for number in _NUMBERS.split())

_IMAGE = re.compile(r"(ISIC_\d{7})\.jpe?g", re.IGNORECASE)
_MASK = re.compile(r"(ISIC_\d{7})_Segmentation\.png", re.IGNORECASE)


class Isic2016(builder.PairBuilder):
  """tfds builder `isic2016`; splits train, validation and test.

  `info.metadata` holds the counts, and which known duplicates were left out.
  """

  name = "isic2016"
  title = "ISIC-2016 part 1 (Gutman et al. 2016)"
  test_name = "isic2016_test"
  official = True
  official_counts = types.MappingProxyType(
    {"train": TRAIN_COUNT, "validation": TRAIN_COUNT, "test": TEST_COUNT}
  )
  terms_of_use = "CC0"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Optional. A folder with the four official archives (zip, or unpacked to"
    " folders of the same names): "
    + ", ".join(f"{stem}.zip" for stem in ARCHIVES.values())
    + f", from {URL}. Without it they are downloaded (about 840 MB)."
  )
  description = (
    "900 training and 379 test dermoscopic images with lesion masks, of the"
    " ISBI 2016 challenge, part 1. One training image in ten is held out for"
    " validation, by a hash of its id."
  )
  homepage = "https://challenge.isic-archive.com/data/#2016"
  citation = """@article{gutman2016skin,
  title={Skin Lesion Analysis toward Melanoma Detection: A Challenge at the
    International Symposium on Biomedical Imaging (ISBI) 2016, hosted by the
    International Skin Imaging Collaboration (ISIC)},
  author={Gutman, David and Codella, Noel C. F. and Celebi, Emre and Helba,
    Brian and Marchetti, Michael and Mishra, Nabin and Halpern, Allan},
  journal={arXiv preprint arXiv:1605.01397},
  year={2016}
}"""

  def __init__(self, *, duplicates: str = "exclude", **kwargs: Any):
    """Makes the builder.

    Args:
      duplicates: `"exclude"` keeps the training images that are known to show
        lesions of the test set out of training and validation; `"include"`
        leaves them in.
      **kwargs: see `PairBuilder`.
    """
    if duplicates not in DUPLICATES:
      raise ValueError(
        f"duplicates is {duplicates!r}, not one of {DUPLICATES}."
      )
    self._duplicates = duplicates
    super().__init__(**kwargs)

  def options(self) -> dict[str, str]:
    """See base class."""
    mine = {} if self._duplicates == "exclude" else {"duplicates": "include"}
    return {**mine, **super().options()}

  @classmethod
  def find_sources(cls, manual_dir: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """See base class."""
    return tuple(find_sources(manual_dir).values())

  def inventory(
    self,
    manual_dir: pathlib.Path | None,
    download: builder.Download | None = None,
  ) -> Inventory:
    """See base class."""
    if manual_dir is not None and (
      download is None or find_sources(manual_dir)
    ):
      sources = require_sources(manual_dir)
    elif download is None:
      raise DataError(f"{self.name}: {self.MANUAL_DOWNLOAD_INSTRUCTIONS}")
    else:
      sources = _download(download)
    return take_inventory(sources, duplicates=self._duplicates)


def find_sources(manual_dir: pathlib.Path) -> dict[str, pathlib.Path]:
  """Finds which of the four parts are in a folder, as zip or unpacked.

  Args:
    manual_dir: the folder.

  Returns:
    Paths by the keys of `ARCHIVES`. Where a part is there as a zip and as a
    folder, the zip: it knows the checksums of its members.

  Raises:
    DataError: if a part is there only as a RAR.
  """
  sources = {}
  for part, stem in ARCHIVES.items():
    candidates = (manual_dir / f"{stem}.zip", manual_dir / stem)
    found = next((path for path in candidates if path.exists()), None)
    if found is not None:
      sources[part] = found
    elif (rar := manual_dir / f"{stem}.rar").exists():
      archives.list_files(rar)  # says how to unpack it
  return sources


def require_sources(manual_dir: pathlib.Path) -> dict[str, pathlib.Path]:
  """As `find_sources`; raises `DataError` unless all four parts are there."""
  sources = find_sources(manual_dir)
  missing = [stem for part, stem in ARCHIVES.items() if part not in sources]
  if missing:
    raise DataError(
      f"{manual_dir} has no {' and no '.join(missing)} (.zip, or unpacked)."
      f" Download {' '.join(f'{URL}{stem}.zip' for stem in missing)} into it."
    )
  return sources


def take_inventory(
  sources: Mapping[str, pathlib.Path], *, duplicates: str = "exclude"
) -> Inventory:
  """Matches images and masks by id and compares with the official release.

  The test set has to be whole. Of the training set a part is accepted, so a
  training mask may lack its image, but no image its mask.

  Args:
    sources: path of each part, by the keys of `ARCHIVES`.
    duplicates: `"exclude"` or `"include"` the two known duplicates.

  Returns:
    The inventory; its `problems` name file or id.

  Raises:
    DataError: if a part cannot be read at all.
  """
  problems = []
  by_id = {}
  listed = []
  for part, path in sources.items():
    files = archives.list_files(path)
    listed.extend(files)
    by_id[part], part_problems = _by_id(part, path, files)
    problems.extend(part_problems)

  train, train_problems, train_notes = _match(by_id, "train")
  test, test_problems, test_notes = _match(by_id, "test")
  # Another archive first: what its files lack as pairs follows from that.
  problems += _compare_with_release(sources, by_id)
  problems += train_problems + test_problems

  excluded = tuple(
    pair.id
    for pair in train
    if duplicates == "exclude" and pair.id in KNOWN_DUPLICATES
  )
  kept = [pair for pair in train if pair.id not in excluded]
  splits = {**pairs.hold_out(kept), "test": tuple(test)}
  return Inventory(
    splits={name: found for name, found in splits.items() if found},
    official=Isic2016.official_counts,
    found={"train": len(train), "validation": len(train), "test": len(test)},
    excluded=excluded,
    problems=tuple(problems),
    notes=(*train_notes, *test_notes, _duplicates_note(train, excluded)),
    stamp=archives.stamp(listed),
  )


def _by_id(
  part: str, path: pathlib.Path, files: tuple[File, ...]
) -> tuple[dict[str, File], list[str]]:
  """Sorts the files of one part by id, and names those that do not belong."""
  pattern = _MASK if part.endswith("mask") else _IMAGE
  example = (
    "ISIC_0000000_Segmentation.png"
    if part.endswith("mask")
    else "ISIC_0000000.jpg"
  )
  found = {}
  strangers = []
  problems = []
  for file in files:
    match = pattern.fullmatch(file.name)
    if match is None:
      strangers.append(file.path)
      continue
    id_ = match[1].upper()
    if id_ in found:
      problems.append(
        f"{path} has {id_} twice ({found[id_].path}, {file.path}); keep one."
      )
    found[id_] = file
  if not found:
    return found, [
      f"{path} is not {ARCHIVES[part]}: it has no file named like {example}"
      f" (but {pairs.listing(strangers) or 'nothing'}). Download"
      f" {URL}{ARCHIVES[part]}.zip again."
    ]
  if strangers:
    problems.append(
      f"{path} has files that do not belong to {ARCHIVES[part]}:"
      f" {pairs.listing(strangers)}. Remove them."
    )
  return found, problems


def _match(
  by_id: Mapping[str, Mapping[str, File]], release: str
) -> tuple[list[Pair], list[str], list[str]]:
  images, masks = by_id[f"{release}_image"], by_id[f"{release}_mask"]
  problems = []
  notes = []
  if not images or not masks:  # already said: it is another archive
    return [], problems, notes
  if unmasked := sorted(images.keys() - masks.keys()):
    problems.append(
      f"{pairs.listing(unmasked)}: no mask in"
      f" {next(iter(masks.values())).source} for {len(unmasked)} of"
      f" {len(images)} {release} images. Add ID_Segmentation.png, or remove the"
      " image."
    )
  if unpictured := sorted(masks.keys() - images.keys()):
    # In the training set that is a partial set; in the test set, whose ids
    # are known, `_compare_with_release` makes it a problem.
    notes.append(
      f"{pairs.listing(unpictured)}: no image in"
      f" {next(iter(images.values())).source} for {len(unpictured)} of"
      f" {len(masks)} {release} masks."
    )
  matched = [
    Pair(id_, images[id_], masks[id_])
    for id_ in sorted(images.keys() & masks.keys())
  ]
  return matched, problems, notes


def _compare_with_release(
  sources: Mapping[str, pathlib.Path],
  by_id: Mapping[str, Mapping[str, File]],
) -> list[str]:
  problems = []
  test_ids = set(TEST_IDS)
  for part in ("train_image", "train_mask"):
    if leaked := sorted(by_id[part].keys() & test_ids):
      problems.append(
        f"{sources[part]} has {len(leaked)} images of the official test set"
        f" ({pairs.listing(leaked)}): it is not {ARCHIVES[part]}."
      )
    elif len(by_id[part]) > TRAIN_COUNT:
      problems.append(
        f"{sources[part]} has {len(by_id[part])} ids, the official training"
        f" set {TRAIN_COUNT}: it is not {ARCHIVES[part]}."
      )
  for part in ("test_image", "test_mask"):
    if foreign := sorted(by_id[part].keys() - test_ids):
      problems.append(
        f"{sources[part]} has {len(foreign)} ids that are not in the official"
        f" test set ({pairs.listing(foreign)}): it is not {ARCHIVES[part]}."
      )
    elif by_id[part] and (missing := sorted(test_ids - by_id[part].keys())):
      problems.append(
        f"{sources[part]} lacks {len(missing)} of the {TEST_COUNT} official"
        f" test ids ({pairs.listing(missing)}). The test set has to be whole;"
        f" download {URL}{ARCHIVES[part]}.zip again."
      )
  return problems


def _duplicates_note(train: list[Pair], excluded: tuple[str, ...]) -> str:
  there = [pair.id for pair in train if pair.id in KNOWN_DUPLICATES]
  if excluded:
    verdict = f"{' and '.join(excluded)} left out of training"
  elif there:
    verdict = f"{' and '.join(there)} kept in training as asked"
  else:
    verdict = "neither is among these images"
  return (
    f"{' and '.join(KNOWN_DUPLICATES)} are known to show lesions of the test"
    f" set: {verdict}."
  )


def _download(download: builder.Download) -> dict[str, pathlib.Path]:
  urls = {part: f"{URL}{stem}.zip" for part, stem in ARCHIVES.items()}
  try:
    downloaded = download(urls)
  except Exception as error:
    # Whatever kind of error the network and tfds come up with.
    raise DataError(
      f"the archives cannot be downloaded ({error}). Download"
      f" {' '.join(urls.values())} by other means, and pass their folder as"
      " manual_dir."
    ) from error
  paths = {
    part: pathlib.Path(os.fspath(path)) for part, path in downloaded.items()
  }
  _record_checksums(paths)
  return paths


def _record_checksums(paths: Mapping[str, pathlib.Path]) -> None:
  """Records what was downloaded first, and holds later downloads to it.

  No checksums are published for these archives, so the first download is
  taken at its word and written beside the downloads.

  Raises:
    DataError: if an archive is not the one downloaded before, or the record is
      damaged.
  """
  record = next(iter(paths.values())).parent / "isic2016_checksums.json"
  try:
    known = json.loads(record.read_text()) if record.exists() else {}
  except ValueError as error:
    raise DataError(
      f"{record} is damaged ({error}), so that the archives cannot be held to"
      " it. Delete it to take them as they are now."
    ) from None
  found = {
    ARCHIVES[part]: archives.sha256(path) for part, path in paths.items()
  }
  for part, path in paths.items():
    stem = ARCHIVES[part]
    if stem in known and known[stem] != found[stem]:
      raise DataError(
        f"{path} has SHA-256 {found[stem]}, but {URL}{stem}.zip was"
        f" {known[stem]} when it was first downloaded ({record}). If the"
        " official archive was replaced, delete that record."
      )
  files_lib.write_text(
    record, json.dumps({**known, **found}, indent=2, sort_keys=True)
  )
