"""Segments images with a trained network.

  kdseg predict MODEL IMAGES... --out DIR

for example

  kdseg predict isic2016-student photo.jpg --out masks

MODEL is a shipped model (isic2016-student), a file of weights, the folder of an
arm in a workdir, or a file of `kdseg.deploy.export`; IMAGES are files, folders
or patterns. Into DIR go masks/NAME.png at each image's own size (white where
there is lesion), overlays/NAME.png, and predictions.csv with a row an image.
One that cannot be read is named in its row and does not stop the others; the
exit code is then 1. Ctrl-C keeps what was done, and its rows; the exit code is
then 130. Research software, not a medical device.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import csv
import io
import os
import pathlib
import sys
import time
from typing import TextIO

import numpy as np
from PIL import Image

from kdseg.data import archives
from kdseg.deploy import models
from kdseg.deploy import pictures
from kdseg.deploy import weights
from kdseg.report import cells
from kdseg.report import overlays
from kdseg.runtime import commands
from kdseg.runtime import files

COLUMNS = (
  "file",
  "mask",
  "width",
  "height",
  "area_share",
  "confidence",
  "milliseconds",
  "error",
)
# Marks a folder of results, which may be replaced.
_MARK = ".kdseg-predictions"
_OVERLAY_SIDE = 1024  # pixels, the longer side at most


class PlaceError(RuntimeError):
  """Results would replace files of something else."""


def confidence(probability: np.ndarray, mask: np.ndarray) -> float:
  """Returns how sure the network is, in [.5, 1] at a threshold of .5.

  The mean probability of what it calls lesion; where it calls nothing lesion,
  the mean probability of skin. It is not calibrated.

  Args:
    probability: [h, w].
    mask: [h, w] bool.
  """
  if mask.any():
    return float(probability[mask].mean())
  return float(1.0 - probability.mean())


def name_outputs(paths: Sequence[pathlib.Path]) -> list[str]:
  """Returns a file name for each path, no two alike (nor but for case)."""
  taken: set[str] = set()
  names = []
  for path in paths:
    # Room for a number and the suffix in the 255 bytes of a name.
    stem = path.stem
    if len(os.fsencode(stem)) > 240:
      stem = os.fsencode(stem)[:240].decode(errors="ignore")
    name, number = f"{stem}.png", 2
    while name.lower() in taken:
      name, number = f"{stem}_{number}.png", number + 1
    taken.add(name.lower())
    names.append(name)
  return names


def _check_place(
  out: pathlib.Path, paths: Sequence[pathlib.Path], names: Sequence[str]
) -> None:
  """Refuses to replace images that are read, and files of something else.

  Raises:
    PlaceError: that names one.
  """
  ours = (out / _MARK).exists()
  inputs = {path.resolve() for path in paths}
  for folder in ("masks", "overlays"):
    for name in names:
      target = out / folder / name
      if target.resolve() in inputs or (target.exists() and not ours):
        raise PlaceError(
          f"{target} is there already, and no result of this command; name "
          "another folder as --out"
        )


def predict(
  model: models.Segmenter,
  paths: Sequence[pathlib.Path],
  out: pathlib.Path,
  *,
  threshold: float,
) -> Iterator[dict[str, str | int]]:
  """Segments each image and yields its row, errors included.

  Args:
    model: the network.
    paths: of images.
    out: folder for masks and overlays.
    threshold: lesion where the probability is above.

  Raises:
    PlaceError: if a file of something else is in the way.
    WriteError: if the disk is full or may not be written to.
  """
  names = name_outputs(paths)
  _check_place(out, paths, names)
  with files.writing(out):
    for folder in ("masks", "overlays"):
      (out / folder).mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
  for path, name in zip(paths, names):
    row: dict[str, str | int] = dict.fromkeys(COLUMNS, "")
    row["file"] = str(path)
    try:
      image = pictures.read(path)
    except archives.DataError as error:
      for folder in ("masks", "overlays"):
        # An earlier run's must not be taken for this one's.
        (out / folder / name).unlink(missing_ok=True)
      yield row | {"error": str(error)}
      continue
    began = time.perf_counter()
    probability = model.predict(image)
    milliseconds = 1e3 * (time.perf_counter() - began)
    mask = probability > threshold
    with files.whole(out / "masks" / name) as file:
      Image.fromarray(mask).save(file, "PNG")
    picture = overlays.outline(
      image,
      [(mask, overlays.PREDICTION_COLOUR, 2.2, 1.0)],
      min(_OVERLAY_SIDE, max(image.shape[:2])),
    )
    with files.whole(out / "overlays" / name) as file:
      picture.save(file, "PNG")
    yield row | {
      "mask": name,
      "width": image.shape[1],
      "height": image.shape[0],
      "area_share": f"{mask.mean():.6f}",
      "confidence": f"{confidence(probability, mask):.4f}",
      "milliseconds": f"{milliseconds:.1f}",
    }


def _say(text: str, stream: TextIO) -> None:
  """Prints, or does nothing once the reader has gone, as behind `| head`."""
  try:
    print(archives.shown(text), file=stream, flush=True)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(
  model: models.Segmenter,
  paths: Sequence[pathlib.Path],
  out: pathlib.Path,
  threshold: float,
) -> int:
  """Segments images, writes predictions.csv, and prints a line an image.

  Returns:
    The command's exit code.
  """
  done = failed = 0
  stopped = False
  with files.writing(out):
    out.mkdir(parents=True, exist_ok=True)
  with (
    files.whole(out / "predictions.csv") as raw,
    io.TextIOWrapper(
      raw,
      newline="",
      encoding="utf-8",
      # File names need not be text.
      errors="backslashreplace",
    ) as file,
  ):
    writer = csv.DictWriter(file, COLUMNS)
    writer.writeheader()
    try:
      for row in predict(model, paths, out, threshold=threshold):
        writer.writerow({k: cells.safe(str(v)) for k, v in row.items()})
        done += 1
        if row["error"]:
          failed += 1
          _say(f"kdseg: {row['error']}", sys.stderr)
        else:
          _say(
            f"{row['file']}: lesion on {float(row['area_share']):.1%} of the "
            f"image, confidence {row['confidence']}",
            sys.stdout,
          )
    except KeyboardInterrupt:
      # The rows of the images that were segmented are kept.
      stopped = True
  _say(f"{done - failed} of {len(paths)} segmented; see {out}", sys.stdout)
  if stopped:
    print("kdseg: stopped by Ctrl-C", file=sys.stderr)
    return 130
  return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = commands.Parser("predict", __doc__)
  parser.add_argument("model", metavar="MODEL")
  parser.add_argument("images", metavar="IMAGES", nargs="+")
  parser.add_argument("--out", required=True, help="folder for the results")
  parser.add_argument(
    "--threshold", type=float, help="lesion above it; the model's own if unset"
  )
  options = parser.parse_args(arguments)
  threshold, out = options.threshold, pathlib.Path(options.out)
  if threshold is not None and not 0.0 < threshold < 1.0:
    parser.error(f"--threshold must be between 0 and 1: {threshold}")
  try:
    model = models.load(options.model)
    # Compiles the network, so that the first image's time is like the others'.
    model.predict(np.zeros((model.size, model.size, 3), np.uint8))
    return _run(
      model,
      pictures.find(options.images),
      out,
      model.threshold if threshold is None else threshold,
    )
  except (
    ImportError,
    PlaceError,
    files.WriteError,
    weights.WeightsError,
  ) as error:
    print(f"kdseg: {error}", file=sys.stderr)
  except OSError as error:
    print(f"kdseg: {out} cannot be written: {error}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main())
