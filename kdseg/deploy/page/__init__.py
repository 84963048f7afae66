"""Writes a page that outlines lesions in the browser, as a static folder.

  kdseg page DIR [--model MODEL]

for example

  kdseg page site --model isic2016-student

MODEL is a folder that `kdseg export` wrote, or a model that is exported first.
A `model.int8.onnx` in that folder, or --int8 FILE, lets visitors choose between
32-bit and 8-bit weights. Any web server can serve DIR as it is, without special
headers; to try it: python -m http.server -d DIR. Images never leave the
browser, and after the first visit the page works offline.

Its runtime, ONNX Runtime Web, is fetched once through npm, checked against its
hash, and kept in the user's cache (XDG_CACHE_HOME, or ~/.cache); --runtime
takes the package from a file instead. Research software, not a medical device.
"""

from collections.abc import Sequence
import pathlib
import sys
import tempfile

from kdseg.deploy import export
from kdseg.deploy import models
from kdseg.deploy import parity
from kdseg.deploy import weights
from kdseg.deploy.formats.jaxpr import UnsupportedError
from kdseg.deploy.page import runtime
from kdseg.deploy.page import site
from kdseg.runtime import checkpoint
from kdseg.runtime import commands


def _export_folder(name: str, scratch: pathlib.Path) -> pathlib.Path:
  """Returns the folder of an export, made first if `name` is a model."""
  path = pathlib.Path(name)
  # The folder of an arm is a model, and has no ONNX; one that has neither is
  # named as the export that it should have been.
  is_export = (path / "model.onnx").exists() or not checkpoint.is_finished(path)
  if name not in models.shipped() and path.is_dir() and is_export:
    return path
  export.export(models.load_weights(name), scratch, formats=[site.ONNX])
  return scratch


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = commands.Parser("page", __doc__)
  parser.add_argument("out", metavar="DIR")
  parser.add_argument(
    "--model",
    default="isic2016-student",
    help="an export's folder or a model; isic2016-student if unset",
  )
  parser.add_argument(
    "--int8", metavar="FILE", help="the network with 8-bit weights, ONNX"
  )
  parser.add_argument(
    "--runtime",
    metavar="FILE",
    help=f"{runtime.RUNTIME}-{runtime.RUNTIME_VERSION}.tgz, where npm cannot "
    "fetch it",
  )
  parser.add_argument(
    "--force", action="store_true", help="write into a folder in use"
  )
  options = parser.parse_args(arguments)
  try:
    out = pathlib.Path(options.out)
    # Before the download and the export, which take a while.
    site.check_place(out, options.force)
    with tempfile.TemporaryDirectory() as scratch:
      exported = _export_folder(options.model, pathlib.Path(scratch))
      description = site.build(
        out,
        exported,
        runtime=runtime.get_runtime(options.runtime),
        int8=options.int8,
        force=options.force,
      )
  except (
    ImportError,
    OSError,
    runtime.PageError,
    parity.ParityError,
    UnsupportedError,
    weights.WeightsError,
  ) as error:
    print(f"kdseg: {error}", file=sys.stderr)
    return 1
  size = sum((out / name).stat().st_size for name in description["files"])
  kinds = " and ".join(entry["id"] for entry in description["networks"])
  print(
    f"{out}: {kinds}, {size / 1e6:.1f} MB; to try it: "
    f"python -m http.server -d {out} and open http://localhost:8000"
  )
  return 0
