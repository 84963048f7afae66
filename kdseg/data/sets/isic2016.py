"""ISIC-2016, part 1: dermoscopic images with lesion masks (ISBI challenge).

Gutman et al., "Skin Lesion Analysis toward Melanoma Detection: A Challenge at
ISBI 2016" (arXiv:1605.01397). 900 training and 379 test images, CC0.

Two training images show lesions of the test set (Cassidy et al., "Analysis of
the ISIC image datasets", Medical Image Analysis 2022); they are left out of
training and validation unless `duplicates="include"`.
"""

from collections.abc import Mapping
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
  """900 training and 379 test dermoscopic images with lesion masks (ISBI 2016).

  One training image in ten is held out for validation, by a hash of its id.
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
  homepage = "https://challenge.isic-archive.com/data/#2016"

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
    sources = {} if manual_dir is None else find_sources(manual_dir)
    missing = [stem for part, stem in ARCHIVES.items() if part not in sources]
    if download is not None and not sources:
      sources = _download(download)
    elif missing:
      raise DataError(
        f"{self.require(manual_dir)} has no {' and no '.join(missing)} (.zip,"
        " or unpacked). Download"
        f" {' '.join(f'{URL}{stem}.zip' for stem in missing)} into it."
      )
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
  listed: list[File] = []
  problems: list[str] = []
  parts = {}
  for part, path in sources.items():
    files = archives.list_files(path)
    listed += files
    parts[part], part_problems = _sort(part, path, files)
    problems += part_problems
  problems += _compare_with_release(sources, parts)
  train, train_unmasked, train_notes = pairs.match(
    parts["train_image"], parts["train_mask"]
  )
  test, test_unmasked, test_notes = pairs.match(
    parts["test_image"], parts["test_mask"]
  )
  if all(parts.values()):  # or it is another archive, which was said above
    problems += train_unmasked + test_unmasked

  known = [pair.id for pair in train if pair.id in KNOWN_DUPLICATES]
  excluded = tuple(known) if duplicates == "exclude" else ()
  kept = [pair for pair in train if pair.id not in excluded]
  return Inventory(
    splits={**pairs.hold_out(kept), "test": test},
    found={"train": len(train), "validation": len(train), "test": len(test)},
    excluded=excluded,
    problems=tuple(problems),
    notes=(*train_notes, *test_notes, _duplicates_note(known, excluded)),
    stamp=archives.stamp(listed),
  )


def _sort(
  part: str, path: pathlib.Path, files: tuple[File, ...]
) -> tuple[dict[str, File], list[str]]:
  """Sorts the files of one part by id, and names those that do not belong."""
  pattern = _MASK if part.endswith("mask") else _IMAGE
  found = pairs.sort_by_id(files, pairs.id_in_name(pattern))
  strangers = pairs.listing(found.strangers)
  problems = found.problems
  if not found.files:
    ending = "_Segmentation.png" if part.endswith("mask") else ".jpg"
    problems.append(
      f"{path} is not {ARCHIVES[part]}: it has no file named like"
      f" ISIC_0000000{ending} (but {strangers or 'nothing'}). Download"
      f" {URL}{ARCHIVES[part]}.zip again."
    )
  elif strangers:
    problems.append(
      f"{path} has files that do not belong to {ARCHIVES[part]}: {strangers}."
      " Remove them."
    )
  return found.files, problems


def _compare_with_release(
  sources: Mapping[str, pathlib.Path],
  parts: Mapping[str, Mapping[str, File]],
) -> list[str]:
  problems = []
  for part, files in parts.items():
    kind = part.partition("_")[2]
    leaked = sorted(files.keys() & set(TEST_IDS))
    if not files:
      continue
    if part.startswith("test"):
      problems += pairs.compare_with_release(
        kind, files, TEST_IDS, f"the official test set, {ARCHIVES[part]}"
      )
    elif leaked:
      problems.append(
        f"{sources[part]} has {len(leaked)} {kind}s of the official test set"
        f" ({pairs.listing(leaked)}): it is not {ARCHIVES[part]}."
      )
    elif len(files) > TRAIN_COUNT:
      problems.append(
        f"{sources[part]} has {len(files)} {kind}s, the official training set"
        f" {TRAIN_COUNT}: it is not {ARCHIVES[part]}."
      )
  return problems


def _duplicates_note(known: list[str], excluded: tuple[str, ...]) -> str:
  if excluded:
    verdict = f"{' and '.join(excluded)} left out of training"
  elif known:
    verdict = f"{' and '.join(known)} kept in training as asked"
  else:
    verdict = "neither is among these images"
  return (
    f"{' and '.join(KNOWN_DUPLICATES)} are known to show lesions of the test"
    f" set: {verdict}."
  )


def _download(download: builder.Download) -> dict[str, pathlib.Path]:
  urls = {part: f"{URL}{stem}.zip" for part, stem in ARCHIVES.items()}
  try:
    paths = download(urls)
  except Exception as error:
    # The network and tfds raise many kinds of error.
    raise DataError(
      f"the archives cannot be downloaded ({error}). Download"
      f" {' '.join(urls.values())} by other means, and pass their folder as"
      " manual_dir."
    ) from error
  return {part: pathlib.Path(os.fspath(path)) for part, path in paths.items()}
