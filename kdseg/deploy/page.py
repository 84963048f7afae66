"""Writes a page that outlines lesions in the browser, as a static folder.

  python -m kdseg.deploy.page DIR --model isic2016-student

MODEL is a folder that `kdseg.deploy.export` wrote, or whatever it takes (then
it runs first). A `model.int8.onnx` in that folder, or --int8 FILE, gives the
page a choice of weights. The folder can be served as it is, by any web server
and without special headers; to try it: python -m http.server -d DIR. Images
never leave the browser, and after the first visit the page works offline.

Its runtime, ONNX Runtime Web, is fetched once through npm, checked against its
hash, and kept in the user's cache (XDG_CACHE_HOME, or ~/.cache); --runtime
takes the package from a file instead. Research software, not a medical device.
"""

import argparse
import base64
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import functools
import hashlib
import importlib.resources
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

import numpy as np
from PIL import Image

from kdseg.data.sets import synthetic
from kdseg.deploy import artefacts
from kdseg.deploy import export
from kdseg.deploy import models
from kdseg.deploy import weights
from kdseg.deploy.formats import jaxpr
from kdseg.runtime import checkpoint
from kdseg.runtime import files as files_lib

RUNTIME = "onnxruntime-web"
RUNTIME_VERSION = "1.30.0"
# As the registry states it for this version.
RUNTIME_INTEGRITY = (
  "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7Qm"
  "RMDs1SigqR4CXAfKYQ=="
)
# Name on the page: (name in the package, sha256). Two of its 500 files: without
# WebGPU, and with all JavaScript in one.
RUNTIME_FILES = {
  "ort.js": (
    "dist/ort.wasm.bundle.min.mjs",
    "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
  ),
  "ort.wasm": (
    "dist/ort-wasm-simd-threaded.wasm",
    "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
  ),
}
# (seed of the drawing, name of the file, title). The shipped student outlines
# the first two well, the third less so.
EXAMPLES = (
  (8, "hairs", "Under hairs"),
  (18, "sharp", "Sharp border"),
  (7, "fading", "Fading border"),
)
DESCRIPTION = "page.json"
_MADE_BY = "kdseg.deploy.page 1"
_LICENCE = "onnxruntime-LICENSE.txt"
_WORKER = "sw.js"
_NPM_SECONDS = 600


class PageError(Exception):
  """A page that cannot be written; says why and what to do."""


def cache_folder() -> pathlib.Path:
  """Returns where the runtime is kept, one folder a version."""
  base = os.environ.get("XDG_CACHE_HOME", "")
  # The specification has relative paths ignored.
  if not os.path.isabs(base):
    base = os.path.expanduser("~/.cache")
  return pathlib.Path(base) / "kdseg"


def get_runtime(
  archive: str | pathlib.Path | None = None,
  *,
  files: Mapping[str, tuple[str, str]] = RUNTIME_FILES,
) -> dict[str, bytes]:
  """Returns the files of ONNX Runtime Web that a page needs, checked.

  Args:
    archive: the package, `onnxruntime-web-*.tgz`; without it the files come
      from the cache or else, through npm, from the registry it is set up with.
    files: name on the page: (name in the package, sha256).

  Raises:
    PageError: if they are to be had nowhere, or are others than expected.
  """
  kept = cache_folder() / f"{RUNTIME}-{RUNTIME_VERSION}"
  if archive is not None:
    return _unpack(pathlib.Path(archive), files)
  found = _read_cache(kept, files)
  if found is None:
    with _pack() as fetched:
      found = _unpack(fetched, files)
    _write_cache(kept, found)
  return found


def _read_cache(
  folder: pathlib.Path, files: Mapping[str, tuple[str, str]]
) -> dict[str, bytes] | None:
  """Returns the files, or None if one is missing or damaged."""
  found = {}
  for name, (_, sha256) in files.items():
    try:
      found[name] = (folder / name).read_bytes()
    except OSError:
      return None
    if hashlib.sha256(found[name]).hexdigest() != sha256:
      return None
  return found


def _write_cache(folder: pathlib.Path, found: Mapping[str, bytes]) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
      for name, content in found.items():
        path = pathlib.Path(scratch) / name
        path.write_bytes(content)
        path.replace(folder / name)
  except OSError as error:
    # It only costs the next page a download.
    print(f"kdseg: {folder} cannot be written: {error}", file=sys.stderr)


@contextlib.contextmanager
def _pack() -> Iterator[pathlib.Path]:
  """Gives the package as npm fetched it, until the block ends."""
  package = f"{RUNTIME}@{RUNTIME_VERSION}"
  npm = shutil.which("npm")
  if npm is None:
    raise PageError(
      f"the page's runtime is not in {cache_folder()}, and npm, which would "
      "fetch it, is not installed; install Node.js, or run `npm pack "
      f"{package}` elsewhere and give the file as --runtime"
    )
  print(f"fetching {package} with npm, once", file=sys.stderr)
  with tempfile.TemporaryDirectory() as scratch:
    try:
      done = subprocess.run(
        [npm, "pack", package, "--silent", "--pack-destination", scratch],
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_NPM_SECONDS,
        check=False,
      )
      said = done.stderr.strip() or done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
      done, said = None, str(error)
    archives = sorted(pathlib.Path(scratch).glob("*.tgz"))
    if done is None or done.returncode != 0 or len(archives) != 1:
      reason = next(iter(said.splitlines()), "nothing")
      raise PageError(
        f"the page's runtime is not in {cache_folder()}, and npm could not "
        f"fetch {package}. It said: {reason}. Run this once with a network, "
        f"or give the file of `npm pack {package}` as --runtime"
      )
    yield archives[0]


def _unpack(
  archive: pathlib.Path, files: Mapping[str, tuple[str, str]]
) -> dict[str, bytes]:
  try:
    content = archive.read_bytes()
  except OSError as error:
    raise PageError(f"{archive} cannot be read: {error}") from error
  digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
  if f"sha512-{digest}" != RUNTIME_INTEGRITY:
    raise PageError(
      f"{archive.name} is not {RUNTIME} {RUNTIME_VERSION} as published: its "
      "SHA-512 is another, so it is not used"
    )
  found = {}
  with tarfile.open(fileobj=io.BytesIO(content)) as package:
    for name, (member, sha256) in files.items():
      file = package.extractfile(f"package/{member}")
      found[name] = file.read() if file else b""
      if hashlib.sha256(found[name]).hexdigest() != sha256:
        raise PageError(f"{member} in {archive.name} has another SHA-256")
  return found


def draw_examples() -> dict[str, bytes]:
  """Returns the example images, JPEG by file name; the same ones every time."""
  return {f"examples/{name}.jpg": _draw(seed) for seed, name, _ in EXAMPLES}


@functools.cache
def _draw(seed: int) -> bytes:
  # Large, then halved: the drawing's grain is of a pixel's size, whatever that
  # is. 4 : 3, as most dermoscopic images are.
  picture, _ = synthetic.draw(np.random.default_rng(seed), 1280)
  small = Image.fromarray(picture[160:1120]).resize(
    (640, 480), Image.Resampling.LANCZOS
  )
  stream = io.BytesIO()
  small.save(stream, "JPEG", quality=88)
  return stream.getvalue()


def build(
  out: str | pathlib.Path,
  exported: str | pathlib.Path,
  *,
  runtime: Mapping[str, bytes],
  int8: str | pathlib.Path | None = None,
  force: bool = False,
) -> dict[str, Any]:
  """Writes the page.

  Args:
    out: folder. An earlier page there is replaced; other files stay.
    exported: folder of `kdseg.deploy.export`.
    runtime: from `get_runtime`.
    int8: the network with 8-bit weights; `model.int8.onnx` of the folder, if
      there is one, when unset.
    force: also write into a folder that holds something else.

  Returns:
    What page.json says.

  Raises:
    PageError: if the export is not whole, or `out` holds something else.
    WriteError: if the disk is full or may not be written to; an earlier page
      stays as it is.
  """
  out, exported = pathlib.Path(out), pathlib.Path(exported)
  earlier = _check_place(out, force)
  networks = _read_networks(exported, int8)
  about = _read_about(exported)
  needed = _read_preprocess(exported)

  content: dict[str, bytes] = {}
  sources = importlib.resources.files("kdseg") / "deploy" / "page_files"
  for source in sources.iterdir():
    if source.is_file():
      content[source.name] = source.read_bytes()
  content["runtime/LICENSE.txt"] = content.pop(_LICENCE)
  worker = content.pop(_WORKER).decode()
  content |= {f"runtime/{name}": data for name, data in runtime.items()}
  content |= {file: data for file, _, data in networks.values()}
  content |= draw_examples()

  description = {
    "made_by": _MADE_BY,
    **needed,
    "networks": [
      {"id": key, "title": title, "file": file, "bytes": len(data)}
      for key, (file, title, data) in networks.items()
    ],
    "runtime": {
      "file": "runtime/ort.js",
      "wasm": "runtime/ort.wasm",
      "bytes": len(runtime["ort.wasm"]),
      "version": RUNTIME_VERSION,
    },
    "examples": [
      {"file": f"examples/{name}.jpg", "title": title}
      for _, name, title in EXAMPLES
    ],
    **about,
    "files": sorted([*content, _WORKER]),
  }
  content[DESCRIPTION] = _to_json(description)
  content[_WORKER] = _fill_worker(worker, content)
  _write(out, content, earlier)
  return description


def _check_place(out: pathlib.Path, force: bool) -> list[str]:
  """Returns the files of an earlier page there; refuses anything else."""
  if not out.exists():
    return []
  if not out.is_dir():
    raise PageError(f"{out} is a file; name a folder")
  earlier: list[str] = []
  with contextlib.suppress(
    OSError, ValueError, KeyError, TypeError, AttributeError
  ):
    said = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
    if said["made_by"].startswith("kdseg.deploy.page "):
      earlier = [str(name) for name in said["files"]]
  if not earlier and not force and any(out.iterdir()):
    raise PageError(
      f"{out} is not empty, and holds no earlier page; name another folder, or "
      "add --force to write among what is there"
    )
  return earlier


def _read_networks(
  exported: pathlib.Path, int8: str | pathlib.Path | None
) -> dict[str, tuple[str, str, bytes]]:
  """Returns precision -> (file on the page, title, content)."""
  path = exported / "model.onnx"
  if not path.is_file():
    raise PageError(
      f"{exported} has no model.onnx; write it with python -m "
      f"kdseg.deploy.export MODEL --out {exported}"
    )
  networks = {"fp32": ("model.onnx", "32-bit", path.read_bytes())}
  small = pathlib.Path(int8) if int8 else exported / "model.int8.onnx"
  if int8 or small.exists():
    try:
      content = small.read_bytes()
    except OSError as error:
      raise PageError(f"{small} cannot be read: {error}") from error
    if int8:
      _check_network(small)
    networks["int8"] = ("model.int8.onnx", "8-bit", content)
  return networks


def _check_network(path: pathlib.Path) -> None:
  """Refuses a file that somebody named and is no network.

  Raises:
    ImportError: without ONNX Runtime.
  """
  try:
    artefacts.run_onnx(path.read_bytes(), 0)
  except ImportError:
    raise
  except Exception as error:  # Those of the runtime, of many kinds.
    raise PageError(
      f"{path} is no network of an export: {str(error).splitlines()[0]}"
    ) from error


def _read_preprocess(exported: pathlib.Path) -> dict[str, Any]:
  path = exported / "preprocess.json"
  try:
    said = json.loads(path.read_text(encoding="utf-8"))
    return {key: said[key] for key in ("input", "output", "size", "threshold")}
  except (OSError, ValueError) as error:
    raise PageError(f"{path} cannot be read: {error}") from error
  except (KeyError, TypeError) as error:
    raise PageError(
      f"{path} is of another version ({error} is missing); export again"
    ) from error


def _read_about(exported: pathlib.Path) -> dict[str, Any]:
  """Returns what the page says of the network, for people."""
  path = exported / "weights.safetensors"
  if not path.exists():
    return {"name": exported.name, "about": []}
  try:
    arrays, about = weights.load(path)
  except weights.WeightsError as error:
    raise PageError(str(error)) from error
  # As `networks.count_parameters`: running statistics are not among them.
  count = sum(
    array.size
    for name, array in arrays.items()
    if not name.startswith("batch_stats")
  )
  rows = [
    ("Network", about["network"]),
    ("Parameters", f"{count:,}"),
    ("Input", f"{about['size']} x {about['size']} pixels"),
    ("Threshold", about["threshold"]),
    ("Arm", about.get("arm")),
    ("Trained on", about.get("trained_on")),
    ("Seed", about.get("seed")),
    ("Scores", about.get("scores")),
    ("Protocol", about.get("protocol")),
  ]
  return {
    "name": str(about.get("arm", exported.name)),
    "parameters": count,
    "about": [[key, str(value)] for key, value in rows if value is not None],
  }


def _to_json(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _fill_worker(worker: str, content: Mapping[str, bytes]) -> bytes:
  """Tells the service worker its version and what it has to keep."""
  files = [
    [name, hashlib.sha256(data).hexdigest()]
    for name, data in sorted(content.items())
  ]
  listed = json.dumps(files)
  # Of its own text too: a worker that keeps otherwise is another version.
  version = hashlib.sha256((worker + listed).encode()).hexdigest()[:16]
  return (
    worker.replace('"__VERSION__"', f'"{version}"')
    .replace('"__FILES__"', listed)
    .encode()
  )


def _write(
  out: pathlib.Path, content: Mapping[str, bytes], earlier: Sequence[str]
) -> None:
  """Puts a page in place of an earlier one, or of nothing."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(files_lib.writing(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = stack.enter_context(
      tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-")
    )
    # One level down: a temporary folder is for its owner's eyes, a page is not.
    new = pathlib.Path(scratch) / "page"
    for name, data in content.items():
      path = new / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
    if not out.exists():
      new.rename(out)
      return
    # The folder itself stays, with what else is in it (a .git, a CNAME). The
    # service worker goes last: it is what makes visitors take the new files.
    names = [name for name in content if name not in (DESCRIPTION, _WORKER)]
    for name in [*names, DESCRIPTION, _WORKER]:
      (out / name).parent.mkdir(parents=True, exist_ok=True)
      (new / name).replace(out / name)
    for name in set(earlier) - set(content):
      path = out / name
      if path.resolve().is_relative_to(out.resolve()):
        path.unlink(missing_ok=True)


def _export_folder(name: str, scratch: pathlib.Path) -> pathlib.Path:
  """Returns the folder of an export, made first if `name` is a model."""
  path = pathlib.Path(name)
  # The folder of an arm is a model, and has no ONNX; one that has neither is
  # named as the export that it should have been.
  is_export = (path / "model.onnx").exists() or not checkpoint.is_finished(path)
  if name not in models.shipped() and path.is_dir() and is_export:
    return path
  export.export(models.load_weights(name), scratch, forms=("onnx",))
  return scratch


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m kdseg.deploy.page",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
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
    help=f"{RUNTIME}-{RUNTIME_VERSION}.tgz, where npm cannot fetch it",
  )
  parser.add_argument(
    "--force", action="store_true", help="write into a folder in use"
  )
  options = parser.parse_args(arguments)
  try:
    out = pathlib.Path(options.out)
    # Before the download and the export, which take a while.
    _check_place(out, options.force)
    with tempfile.TemporaryDirectory() as scratch:
      exported = _export_folder(options.model, pathlib.Path(scratch))
      description = build(
        out,
        exported,
        runtime=get_runtime(options.runtime),
        int8=options.int8,
        force=options.force,
      )
  except (
    ImportError,
    OSError,
    PageError,
    export.ParityError,
    jaxpr.UnsupportedError,
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


if __name__ == "__main__":
  sys.exit(main())
