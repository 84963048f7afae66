"""PH2: 200 dermoscopic images with lesion masks and diagnoses.

Mendonca et al., "PH2 - A dermoscopic image database for research and
benchmarking", EMBC 2013. Free for research; it has to be downloaded by hand
and may not be passed on.
"""

import dataclasses
import pathlib
import re
import types
from typing import Any

import tensorflow_datasets as tfds

from kdseg.data import archives
from kdseg.data import builder
from kdseg.data import pairs
from kdseg.data.archives import DataError
from kdseg.data.archives import File
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair

HOMEPAGE = "https://www.fc.up.pt/addi/ph2%20database.html"
COUNT = 200
TABLE = "PH2_dataset.txt"
# The codes of the table's column "Clinical Diagnosis".
DIAGNOSES = {"0": "common_nevus", "1": "atypical_nevus", "2": "melanoma"}

_NUMBERS = """
  2 3 4 6 8 9 10 13 14 15 16 17 18 19 20 21 22 23 24 25 27 30 31 32 33 35 36
  37 38 39 40 41 42 43 44 45 47 48 49 50 57 58 61 63 64 65 75 76 78 80 85 88
  90 91 92 101 103 105 107 108 112 118 120 125 126 132 133 134 135 137 138 139
  140 142 143 144 146 147 149 150 152 153 154 155 156 157 159 160 161 162 164
  166 168 169 170 171 173 175 176 177 182 196 197 198 199 200 203 204 206 207
  208 210 211 219 226 240 242 243 251 254 256 278 279 280 284 285 304 305 306
  312 328 331 339 347 348 349 356 360 364 365 367 368 369 370 371 372 374 375
  376 378 379 380 381 382 383 384 385 386 388 389 390 392 393 394 395 396 397
  398 399 400 402 403 404 405 406 407 408 409 410 411 413 417 418 419 420 421
  423 424 425 426 427 429 430 431 432 433 434 435 436 437
"""
IDS = tuple(f"IMD{int(number):03d}" for number in _NUMBERS.split())

_IMAGE = re.compile(r"(IMD\d{3})\.bmp", re.IGNORECASE)
_MASK = re.compile(r"(IMD\d{3})_lesion\.bmp", re.IGNORECASE)
# Colour regions and the documentation come with the whole archive.
_KNOWN_EXTRAS = re.compile(
  r"(?:.*/)?(?:IMD\d{3}_roi/.*|PH2_dataset\.(?:txt|xlsx?)|[^/]*\.pdf)",
  re.IGNORECASE,
)


class Ph2(builder.PairBuilder):
  """200 dermoscopic images with lesion masks; all are one split, test.

  80 common nevi, 80 atypical nevi and 40 melanomas. The feature `diagnosis` is
  `common_nevus`, `atypical_nevus`, `melanoma`, or empty where
  `PH2_dataset.txt` is not there or does not list the image.
  """

  name = test_name = "ph2"
  title = "PH2 (Mendonca et al. 2013)"
  official = True
  official_counts = types.MappingProxyType({"test": COUNT})
  terms_of_use = "for research and benchmarking only"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"Download PH2Dataset.rar from {HOMEPAGE}, unpack it"
    " (`unrar x PH2Dataset.rar`), and pass the folder that holds the folder"
    " PH2Dataset (or a PH2Dataset.zip of it) as manual_dir."
  )
  homepage = HOMEPAGE

  def extra_features(self) -> dict[str, Any]:
    """See base class."""
    return {"diagnosis": tfds.features.Text()}

  def extra_values(self, pair: Pair) -> dict[str, Any]:
    """See base class."""
    return {"diagnosis": pair.diagnosis}

  @classmethod
  def find_sources(cls, manual_dir: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """See base class."""
    for candidate in (
      manual_dir / "PH2Dataset.zip",
      manual_dir / "PH2Dataset",
      manual_dir / "PH2 Dataset images",
    ):
      if candidate.exists():
        # The table lies beside the images' folder.
        is_images = candidate.name == "PH2 Dataset images"
        return (manual_dir if is_images else candidate,)
    for path in sorted(manual_dir.glob("*")):
      if path.name.lower() == "ph2dataset.rar":
        archives.list_files(path)  # says how to unpack it
    return ()

  def inventory(
    self,
    manual_dir: pathlib.Path | None,
    download: builder.Download | None = None,
  ) -> Inventory:
    """See base class."""
    del download  # the licence wants a visit to the page
    for source in self.find_sources(self.require(manual_dir)):
      return take_inventory(source)
    raise DataError(
      f"{manual_dir} has no PH2Dataset (folder or .zip). "
      + self.MANUAL_DOWNLOAD_INSTRUCTIONS
    )


def take_inventory(source: pathlib.Path) -> Inventory:
  """Matches images and masks by id and compares with the official release.

  Args:
    source: the zip, or the folder it unpacks to.

  Returns:
    The inventory; its `problems` name file or id.

  Raises:
    DataError: if the source cannot be read at all.
  """
  files = archives.list_files(source)
  # Regions of interest are named like other files; only their folder tells.
  extras = [file for file in files if _KNOWN_EXTRAS.fullmatch(file.path)]
  rest = [file for file in files if file not in extras]
  images = pairs.sort_by_id(rest, pairs.id_in_name(_IMAGE))
  masks = pairs.sort_by_id(rest, pairs.id_in_name(_MASK))
  strangers = sorted({*images.strangers} & {*masks.strangers})

  problems = images.problems + masks.problems
  if not images.files or not masks.files:
    kind = "mask IMD000_lesion.bmp" if images.files else "image IMD000.bmp"
    problems.insert(
      0,
      f"{source} is not PH2: it has no file named like the {kind} (but"
      f" {pairs.listing(strangers) or 'nothing else'}). "
      + Ph2.MANUAL_DOWNLOAD_INSTRUCTIONS,
    )
  else:
    for kind, found in (("image", images), ("mask", masks)):
      problems += pairs.compare_with_release(kind, found.files, IDS, "PH2")
    if strangers:
      problems.append(
        f"{source} has files that do not belong to PH2:"
        f" {pairs.listing(strangers)}. Remove them."
      )

  diagnoses: dict[str, str] = {}
  for file in extras:
    if file.name.lower() == TABLE.lower():
      diagnoses = _read_table(file)
  matched, _, _ = pairs.match(images.files, masks.files)
  matched = tuple(
    dataclasses.replace(pair, diagnosis=diagnoses.get(pair.id, ""))
    for pair in matched
  )
  known = sum(bool(pair.diagnosis) for pair in matched)
  return Inventory(
    splits={"test": matched},
    problems=tuple(problems),
    notes=(f"{known} of {len(matched)} images have a diagnosis.",),
    stamp=archives.stamp(files),
  )


def _read_table(table: File) -> dict[str, str]:
  """Reads ids and diagnoses from the table, whose columns `||` separates."""
  diagnoses = {}
  column = None
  for line in table.read().decode("utf-8", errors="replace").splitlines():
    cells = [cell.strip() for cell in line.strip().strip("|").split("||")]
    if "Clinical Diagnosis" in cells:
      column = cells.index("Clinical Diagnosis")
    elif column is not None and len(cells) > column:
      code = cells[column]
      if cells[0].upper().startswith("IMD") and code in DIAGNOSES:
        diagnoses[cells[0].upper()] = DIAGNOSES[code]
  return diagnoses
