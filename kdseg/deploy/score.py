"""Scores every file of an export on test sets.

  kdseg score DIR --manual-dir FOLDER [--tests isic2016 ph2]

for example

  kdseg score exported --manual-dir archives

DIR was written by `kdseg.deploy.export`; FOLDER holds the official archives.
Every file runs in its own runtime, on the images and with the metrics of a
run. Writes scores.csv (a row an image and file, as in a workdir), SCORES.json
and SCORES.md, and says how far the Dice of each file is from that of the
weights.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

import numpy as np
import tqdm

from kdseg.data import archives
from kdseg.data import loading
from kdseg.data import sets
from kdseg.deploy import formats
from kdseg.deploy import models
from kdseg.deploy import weights
from kdseg.evaluation import metrics
from kdseg.report import scores
from kdseg.runtime import checkpoint
from kdseg.runtime import commands
from kdseg.runtime import files

REFERENCE = "weights.safetensors"


def find(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the networks in a folder, the weights first.

  Raises:
    WeightsError: if the weights, which the others are compared with, are not
      there.
  """
  if not (folder / REFERENCE).is_file():
    raise weights.WeightsError(
      f"{folder} has no {REFERENCE}; write it with kdseg export MODEL --out "
      f"{folder}"
    )
  suffixes = {format.suffix for format in formats.FORMATS}
  return [folder / REFERENCE] + [
    path for path in sorted(folder.iterdir()) if path.suffix in suffixes
  ]


def score(
  model: models.Segmenter, arrays: loading.Arrays, dataset: str, file: str
) -> list[scores.Row]:
  """Returns a row an image, as a run writes them, with the file as the arm.

  Raises:
    WeightsError: if a probability is not finite.
  """
  rows = []
  for i in tqdm.tqdm(range(len(arrays)), f"{file} on {dataset}"):
    [probability] = model.probabilities(arrays.image[i : i + 1])
    truth = arrays.native_mask(i)
    if not np.isfinite(probability).all():
      raise weights.WeightsError(
        f"{file} gives a probability that is not finite for {arrays.ids[i]}"
      )
    # Rounding of 8-bit weights may pass 1 by a hair.
    native = metrics.resize_probability(
      np.clip(probability, 0.0, 1.0), *truth.shape
    )
    rows.append(
      {
        "arm": file,
        "seed": 0,
        "dataset": dataset,
        "id": arrays.ids[i],
        **metrics.score(native, truth, threshold=model.threshold),
      }
    )
  return rows


def summarise(rows: Sequence[scores.Row]) -> dict[str, dict[str, Any]]:
  """Returns means by data set and file, and how far from the weights'."""
  result: dict[str, dict[str, Any]] = {}
  for (file, _, dataset), members in scores.groups(rows).items():
    result.setdefault(dataset, {})[file] = {
      "images": len(members),
      **{
        name: float(np.mean([row[name] for row in members]))
        for name in ("dice", "jaccard")
      },
    }
  for entries in result.values():
    for entry in entries.values():
      entry["dice_change"] = entry["dice"] - entries[REFERENCE]["dice"]
  return result


def make_table(
  summary: Mapping[str, Mapping[str, Any]], coverage: Mapping[str, str]
) -> str:
  """Returns the summary as Markdown."""
  lines = [
    "| data set | file | images | Dice | Jaccard | Dice, less the weights' |",
    "|---|---|---:|---:|---:|---:|",
  ]
  lines += [
    f"| {dataset} | {file} | {entry['images']} | {entry['dice']:.4f} | "
    f"{entry['jaccard']:.4f} | {entry['dice_change']:+.5f} |"
    for dataset, entries in summary.items()
    for file, entry in entries.items()
  ]
  found = "; ".join(f"{name}: {share}" for name, share in coverage.items())
  lines += ["", f"Images found of those released: {found}.", ""]
  return "\n".join(lines)


def score_folder(
  folder: pathlib.Path,
  tests: Sequence[str],
  *,
  data_dir: str | None = None,
  manual_dir: str | None = None,
) -> str:
  """Scores the networks of an export, and writes the scores beside them.

  Args:
    folder: of the export.
    tests: names of data sets.
    data_dir: where prepared data sets lie.
    manual_dir: folder of the official archives.

  Returns:
    What SCORES.md says.

  Raises:
    DataError: if a data set cannot be read.
    ImportError: if the runtime of a file is not installed; names the extra.
    WeightsError: if a file cannot be used.
  """
  paths = find(folder)
  size = models.load_weights(paths[0]).size
  rows: list[scores.Row] = []
  coverage = {}
  for name in tests:
    arrays = loading.load(
      name, "test", size=size, data_dir=data_dir, manual_dir=manual_dir
    )
    dataset = sets.BUILDERS[name].test_name
    coverage[dataset] = arrays.coverage
    for path in paths:
      rows += score(models.load(path), arrays, dataset, path.name)
  summary = summarise(rows)
  table = make_table(summary, coverage)
  scores.write(folder / "scores.csv", rows)
  files.write_text(folder / "SCORES.md", table)
  checkpoint.write_json(
    folder / "SCORES.json", {"coverage": coverage, **summary}
  )
  return table


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = commands.Parser("score", __doc__)
  parser.add_argument("folder", metavar="DIR", type=pathlib.Path)
  parser.add_argument(
    "--tests",
    nargs="+",
    choices=tuple(sets.BUILDERS),
    default=[name for name, b in sets.BUILDERS.items() if b.official],
  )
  parser.add_argument("--manual-dir", help="folder of the official archives")
  parser.add_argument("--data-dir", help="where prepared data sets lie")
  options = parser.parse_args(arguments)
  try:
    table = score_folder(
      options.folder,
      options.tests,
      data_dir=options.data_dir,
      manual_dir=options.manual_dir,
    )
  except (
    archives.DataError,
    ImportError,
    OSError,
    weights.WeightsError,
  ) as error:
    print(f"kdseg: {error}", file=sys.stderr)
    return 1
  print(table)
  return 0


if __name__ == "__main__":
  sys.exit(main())
