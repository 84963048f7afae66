"""Writes a trained network in the formats that run elsewhere, and checks them.

  kdseg export MODEL --out DIR [--calibration IMAGES...]
      [--formats onnx litert stablehlo]
  kdseg export WORKDIR --arm NAME [--seed 0] --out DIR

for example

  kdseg export isic2016-student --out exported

MODEL is a shipped model, a file of weights or the folder of an arm. Into DIR go

  weights.safetensors   this package
  model.onnx            ONNX Runtime, also in a browser; extra `export`
  model.tflite          LiteRT, for phones; extra `litert`
  model.int8.onnx, model.int8.tflite
                        the same with weights of 8 bits
  model.stablehlo       JAX on CPU, GPU and TPU; extra `export`
  preprocess.json       what to do to an image before and after
  golden.npz            inputs, and the outputs that they must give
  PARITY.json           how far each file is from JAX
  README.md             its model card

Input is uint8 [batch, S, S, 3], RGB; output the probability of lesion, float32
[batch, S, S]. Normalisation is inside the graph. If a file with 32-bit weights
is further than 1e-4 from JAX, the command names it and writes nothing. Files
with 8-bit weights are further away; the command says how far, and whether they
are smaller and faster here. `kdseg score DIR` scores each file
on a data set.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from kdseg.data import archives
from kdseg.data import loading
from kdseg.deploy import card
from kdseg.deploy import formats as formats_lib
from kdseg.deploy import models
from kdseg.deploy import parity as parity_lib
from kdseg.deploy import pictures
from kdseg.deploy import weights
from kdseg.deploy.formats import record
from kdseg.deploy.formats.jaxpr import UnsupportedError
from kdseg.runtime import checkpoint
from kdseg.runtime import commands
from kdseg.runtime import files
from kdseg.training import step as step_lib

FORMATS = formats_lib.FORMATS
# What every export writes, and what tells an export from other folders.
_WRITTEN = ("weights.safetensors", "golden.npz", "README.md")
_MARKS = ("PARITY.json", "preprocess.json")
_OF_SCORES = ("SCORES.json", "SCORES.md", "scores.csv")


class PlaceError(RuntimeError):
  """An export would replace files of something else."""


def make_function(model: models.Model) -> record.Function:
  """Returns uint8 [B, S, S, 3] -> probability [B, S, S], weights inside."""
  predict = step_lib.make_predict(model.network)
  return lambda image: predict(model.variables, {"image": image})


def export(
  model: models.Model,
  out: str | pathlib.Path,
  *,
  formats: Sequence[record.Format] = FORMATS,
  calibration: np.ndarray | None = None,
  force: bool = False,
) -> dict[str, Any]:
  """Writes a network in each format, and the proof that the files agree.

  Args:
    model: from `models.load_weights`.
    out: folder; files of these names in it are replaced; those of formats that
      are left out, and scores of earlier ones, are deleted.
    formats: to write.
    calibration: [N, S, S, 3] uint8, which the ranges of the int8 ONNX file
      are measured on; drawn lesions if None.
    force: write also where these names are files of something else.

  Returns:
    What PARITY.json says: by file its bytes, its largest distance from JAX
    over golden and random inputs, and its milliseconds for one image on one
    thread; for 8-bit weights also the share of pixels of the golden images
    that change sides, and the CPU.

  Raises:
    ImportError: if a package is not installed; names the extra.
    ParityError: if a file is further than 1e-4 from JAX.
    PlaceError: if files of something else are in the way.
    UnsupportedError: if a format lacks an operation of the network.
    WriteError: if the disk is full or may not be written to; an earlier export
      stays as it is.
  """
  out = pathlib.Path(out)
  replaced = ["PARITY.json", *_OF_SCORES]
  for format in {*FORMATS, *formats}:
    replaced += [format.file, format.int8_file]
  if not force:
    _check_place(out, [*replaced, *_WRITTEN])
  inputs = parity_lib.make_inputs(model.size)
  expected = {name: model.probabilities(x) for name, x in inputs.items()}
  contents = make_contents(
    model, formats, inputs["golden"] if calibration is None else calibration
  )
  parity = _measure(model, formats, contents, inputs, expected)
  result = {
    "tolerance": parity_lib.TOLERANCE,
    "against": f"jax {jax.__version__}",
    "calibration": "drawn lesions" if calibration is None else "given images",
    **parity,
  }
  with _replacing(out, replaced) as folder:
    for name, content in contents.items():
      (folder / name).write_bytes(content)
    _write_rest(folder, model, inputs, expected, parity)
    checkpoint.write_json(folder / "PARITY.json", result)
  return result


@contextlib.contextmanager
def _replacing(
  out: pathlib.Path, stale: Sequence[str]
) -> Iterator[pathlib.Path]:
  """Gives a folder whose files take the place of an earlier export's."""
  with files.writing(out):
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
      folder = pathlib.Path(scratch)
      yield folder
      for name in stale:
        (out / name).unlink(missing_ok=True)
      # PARITY.json last: no new proof may stand beside an old file.
      paths = sorted(folder.iterdir(), key=lambda p: p.name == "PARITY.json")
      for path in paths:
        path.replace(out / path.name)


def _check_place(out: pathlib.Path, names: Sequence[str]) -> None:
  """Refuses a folder in which something else would be replaced or deleted."""
  if any((out / name).exists() for name in _MARKS):
    return
  taken = sorted(name for name in names if (out / name).exists())
  if taken:
    raise PlaceError(
      f"{out} holds {', '.join(taken)} and is no export; name another folder, "
      "or add --force to replace them"
    )


def make_contents(
  model: models.Model,
  formats: Sequence[record.Format],
  calibration: np.ndarray,
  *,
  int8: bool = True,
) -> dict[str, bytes]:
  """Returns the files of the formats by name, not checked.

  Args:
    model: the network.
    formats: to write.
    calibration: see `export`.
    int8: whether to write those with weights of 8 bits, too.

  Raises:
    ImportError: if a package is not installed; names the extra.
    UnsupportedError: if a format lacks an operation of the network.
  """
  function = make_function(model)
  contents = {}
  for format in formats:
    with format.naming_extra():
      content = format.write(function, model.size, describe_input(model))
      contents[format.file] = content
      if int8 and format.quantize is not None:
        contents[format.int8_file] = format.quantize(content, calibration)
  return contents


def _measure(
  model: models.Model,
  formats: Sequence[record.Format],
  contents: Mapping[str, bytes],
  inputs: Mapping[str, np.ndarray],
  expected: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Returns the entry of each file in PARITY.json.

  Raises:
    ParityError: if a file with 32-bit weights is too far from JAX.
  """
  parity = {}
  for format in formats:
    for name in (format.file, format.int8_file):
      if name not in contents:
        continue
      with format.naming_extra():
        entry, golden = parity_lib.measure(
          contents[name], format, inputs, expected
        )
      distance = max(entry["largest_difference"].values())
      if name == format.int8_file:
        before, after = expected["golden"], golden
        changed = (before > model.threshold) != (after > model.threshold)
        entry["changed_pixels"] = float(np.mean(changed))
        entry["cpu"] = parity_lib.describe_cpu()
      # `not <=`, so that NaN is refused, too.
      elif not distance <= parity_lib.TOLERANCE:
        raise parity_lib.ParityError(
          f"{name} is {distance:.2g} away from JAX in probability, more than "
          f"{parity_lib.TOLERANCE:g}; nothing is written"
        )
      parity[name] = entry
  return parity


def _write_rest(
  folder: pathlib.Path,
  model: models.Model,
  inputs: Mapping[str, np.ndarray],
  expected: Mapping[str, np.ndarray],
  parity: Mapping[str, Any],
) -> None:
  """Writes what every export has beside the files of its formats."""
  about = {k: v for k, v in model.about.items() if k != "format"}
  weights.save(folder / "weights.safetensors", model.variables, about)
  golden: dict[str, Any] = {f"{k}_input": x for k, x in inputs.items()}
  golden |= {f"{k}_output": x for k, x in expected.items()}
  np.savez_compressed(folder / "golden.npz", **golden)
  checkpoint.write_json(folder / "preprocess.json", describe_input(model))
  size = (folder / "weights.safetensors").stat().st_size
  text = card.make_card(model, size, parity)
  (folder / "README.md").write_text(text, encoding="utf-8")


def describe_input(model: models.Model) -> dict[str, Any]:
  """Returns what to do to an image before and after, for preprocess.json."""
  return {
    "input": record.INPUT,
    "input_layout": "uint8 [batch, height, width, 3], RGB",
    "size": model.size,
    "resize": "to a square, bilinear and antialiased, without cropping",
    "normalisation": "inside the graph",
    "output": record.OUTPUT,
    "output_layout": "float32 [batch, height, width], probability of lesion",
    "after": "resize the probability to the image's size, bilinear",
    "threshold": model.threshold,
  }


def _make_parser() -> commands.Parser:
  parser = commands.Parser("export", __doc__)
  names = [format.name for format in FORMATS]
  parser.add_argument("model", metavar="MODEL")
  parser.add_argument("--arm", help="of the workdir MODEL, as in scores.csv")
  parser.add_argument("--seed", type=int, default=0, help="of the arm")
  parser.add_argument("--out", required=True, help="folder for the files")
  parser.add_argument(
    "--formats", nargs="+", choices=names, default=names, help="all if unset"
  )
  parser.add_argument(
    "--calibration",
    nargs="+",
    metavar="IMAGES",
    help="what int8 ranges are measured on; drawn lesions if unset",
  )
  parser.add_argument(
    "--force", action="store_true", help="replace files of something else"
  )
  return parser


def _run(options: argparse.Namespace) -> dict[str, Any]:
  name = options.model
  if options.arm:
    name = weights.arm_folder(options.model, options.arm, options.seed)
    weights.check_finished(name)
  model = models.load_weights(name)
  images = None
  if options.calibration:
    images = np.stack(
      [
        loading.resize_image(pictures.read(path), model.size)
        for path in pictures.find(options.calibration)
      ]
    )
  return export(
    model,
    options.out,
    formats=[f for f in FORMATS if f.name in options.formats],
    calibration=images,
    force=options.force,
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  try:
    parity = _run(_make_parser().parse_args(arguments))
  except (
    ImportError,
    OSError,
    PlaceError,
    UnsupportedError,
    archives.DataError,
    parity_lib.ParityError,
    weights.WeightsError,
  ) as error:
    print(f"kdseg: {error}", file=sys.stderr)
    return 1
  for name, entry in parity.items():
    if isinstance(entry, dict):
      print(
        f"{name}: {entry['bytes']:,} bytes, at most "
        f"{max(entry['largest_difference'].values()):.1e} from JAX, "
        f"{entry['milliseconds']:.1f} ms"
      )
  for name, entry in parity.items():
    if parity_lib.is_int8(entry):
      print(f"{name}: {parity_lib.describe_int8(name, parity)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
