"""ONNX Runtime Web, which a page runs its network with: fetched and checked."""

import base64
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

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
    PageError: if they can be found nowhere, or are not those expected.
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
