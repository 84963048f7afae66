"""Builds the page: a static folder around one exported network."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import functools
import hashlib
import importlib.resources
import io
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
from PIL import Image

from kdseg.data.sets import synthetic
from kdseg.deploy import formats
from kdseg.deploy import models
from kdseg.deploy import weights
from kdseg.deploy.page import runtime as runtime_lib
from kdseg.runtime import files as files_lib

# (seed of the drawing, name of the file, title). The shipped student outlines
# the first two well, the third less so.
EXAMPLES = (
  (8, "hairs", "Under hairs"),
  (18, "sharp", "Sharp border"),
  (7, "fading", "Fading border"),
)
ONNX = next(format for format in formats.FORMATS if format.name == "onnx")
DESCRIPTION = "page.json"
_MADE_BY = "kdseg.deploy.page 1"
_LICENCE = "onnxruntime-LICENSE.txt"
_WORKER = "sw.js"


def draw_examples() -> dict[str, bytes]:
  """Returns the example images, JPEG by file name; the same ones every time."""
  return {f"examples/{name}.jpg": _draw(seed) for seed, name, _ in EXAMPLES}


@functools.cache
def _draw(seed: int) -> bytes:
  # Drawn large, then halved, as the drawing's grain is always one pixel wide.
  # 4 : 3, as most dermoscopic images are.
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
    WeightsError: if `int8` or the export's weights cannot be read.
    WriteError: if the disk is full or may not be written to; an earlier page
      stays as it is.
  """
  out, exported = pathlib.Path(out), pathlib.Path(exported)
  earlier = check_place(out, force)
  networks = _read_networks(exported, int8)

  content: dict[str, bytes] = {}
  sources = importlib.resources.files("kdseg") / "deploy" / "page" / "files"
  for source in sources.iterdir():
    if source.is_file():
      content[source.name] = source.read_bytes()
  content["runtime/LICENSE.txt"] = content.pop(_LICENCE)
  worker = content.pop(_WORKER).decode()
  content |= {f"runtime/{name}": data for name, data in runtime.items()}
  content |= {file: data for file, _, data in networks.values()}
  content |= draw_examples()

  description = _describe(networks, runtime, exported)
  description["files"] = sorted([*content, _WORKER])
  content[DESCRIPTION] = _to_json(description)
  content[_WORKER] = _fill_worker(worker, content)
  _write(out, content, earlier)
  return description


def _describe(
  networks: Mapping[str, tuple[str, str, bytes]],
  runtime: Mapping[str, bytes],
  exported: pathlib.Path,
) -> dict[str, Any]:
  """Returns what page.json says, all but the list of files."""
  return {
    "made_by": _MADE_BY,
    **_read_preprocess(exported),
    "networks": [
      {"id": key, "title": title, "file": file, "bytes": len(data)}
      for key, (file, title, data) in networks.items()
    ],
    "runtime": {
      "file": "runtime/ort.js",
      "wasm": "runtime/ort.wasm",
      "bytes": len(runtime["ort.wasm"]),
      "version": runtime_lib.RUNTIME_VERSION,
    },
    "examples": [
      {"file": f"examples/{name}.jpg", "title": title}
      for _, name, title in EXAMPLES
    ],
    **_read_about(exported),
  }


def check_place(out: pathlib.Path, force: bool) -> list[str]:
  """Returns the files of an earlier page there; refuses anything else."""
  if not out.exists():
    return []
  if not out.is_dir():
    raise runtime_lib.PageError(f"{out} is a file; name a folder")
  earlier: list[str] = []
  with contextlib.suppress(
    OSError, ValueError, KeyError, TypeError, AttributeError
  ):
    said = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
    if said["made_by"].startswith("kdseg.deploy.page "):
      earlier = [str(name) for name in said["files"]]
  if not earlier and not force and any(out.iterdir()):
    raise runtime_lib.PageError(
      f"{out} is not empty, and holds no earlier page; name another folder, or "
      "add --force to write among what is there"
    )
  return earlier


def _read_networks(
  exported: pathlib.Path, int8: str | pathlib.Path | None
) -> dict[str, tuple[str, str, bytes]]:
  """Returns precision -> (file on the page, title, content)."""
  path = exported / ONNX.file
  if not path.is_file():
    raise runtime_lib.PageError(
      f"{exported} has no {ONNX.file}; write it with kdseg export MODEL --out "
      f"{exported}"
    )
  networks = {"fp32": (ONNX.file, "32-bit", path.read_bytes())}
  small = pathlib.Path(int8) if int8 else exported / ONNX.int8_file
  if int8:
    models.load_exported(small, [ONNX])
  if small.exists():
    networks["int8"] = (ONNX.int8_file, "8-bit", small.read_bytes())
  return networks


def _read_preprocess(exported: pathlib.Path) -> dict[str, Any]:
  path = exported / "preprocess.json"
  try:
    said = json.loads(path.read_text(encoding="utf-8"))
    return {key: said[key] for key in ("input", "output", "size", "threshold")}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise runtime_lib.PageError(
      f"{path} cannot be read ({error!r}); export again"
    ) from error


def _read_about(exported: pathlib.Path) -> dict[str, Any]:
  """Returns what the page says of the network."""
  path = exported / "weights.safetensors"
  if not path.exists():
    return {"name": exported.name, "about": []}
  arrays, about = weights.load(path)
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
  # The worker's text counts, too: another way to cache is another version.
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
    # One level down: only its owner may read a temporary folder, and everybody
    # a page.
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
