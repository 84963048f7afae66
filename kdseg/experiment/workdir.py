"""A workdir: its lock, and whether it belongs to this config and these data."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import fcntl
from importlib import metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from kdseg.runtime import checkpoint
from kdseg.runtime import files

PACKAGES = (
  "kdseg",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "scipy",
  "pillow",
  "tensorflow-datasets",
)

# Of what lies in a workdir. Raise it when a run cannot continue what an earlier
# version wrote.
FORMAT = 1
# Stands for the value of a key that only one of two configs has.
ABSENT = object()
# Keys that may change within a run: its numbers stay, up to rounding.
_FREE = (
  *("evaluation.batch_size", "data.manual_dir", "data.data_dir"),
  *("seeds_at_once", "mapping"),
)


class WorkdirError(RuntimeError):
  """A workdir that is in use, or belongs to another config."""


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this process.

  Raises:
    WorkdirError: if another process holds it.
    WriteError: if the workdir may not be written to.
  """
  with contextlib.ExitStack() as stack:
    with files.writing(workdir):
      file = stack.enter_context(open(workdir / ".lock", "a", encoding="utf-8"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise WorkdirError(
        f"another process works in {workdir}; wait for it, or choose another "
        "--workdir"
      ) from error
    yield


def check_config(config: Mapping[str, Any], workdir: pathlib.Path) -> bool:
  """Whether config.json says the same; refuses that of another run.

  What may change: arms and methods may be added and arms left out; the primary
  family of comparisons; where the data lie, as `check_data` knows them by
  their content; and what memory decides, the size of the evaluation's batches
  and how many seeds are updated at once.

  Args:
    config: as JSON.
    workdir: of the run; need not exist.

  Raises:
    WorkdirError: that names the first key which differs, or says that another
      version wrote the workdir.
  """
  path = workdir / "config.json"
  if not path.exists():
    return False
  try:
    old = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise WorkdirError(
      f"{path} is damaged ({error}); put a copy in its place, or choose "
      "another --workdir"
    ) from error
  if old.pop("format", None) != FORMAT:
    raise WorkdirError(
      f"{workdir} was written by another version of kdseg, which its "
      "environment.json names: continue it with that one, or choose another "
      "--workdir"
    )
  for key, before, now in differences(old, config):
    top, *inner = key.split(".")
    whole_method = top == "methods" and len(inner) == 1
    came_or_went = before is ABSENT or now is ABSENT
    if key in _FREE or top in ("arms", "primary"):
      continue
    if whole_method and came_or_went:
      continue
    what, way_out = say_change(key, before, now)
    raise WorkdirError(
      f"{workdir} holds a run of another config: {what}; choose another "
      f"--workdir, or {way_out}"
    )
  return bool(old == config)


def adopt_config(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Writes config.json, unless it says the same; see `check_config`.

  Raises:
    WorkdirError: see `check_config`.
  """
  if not check_config(config, workdir):
    tree = {"format": FORMAT, **config}
    checkpoint.write_json(workdir / "config.json", tree)


def check_data(
  workdir: pathlib.Path, data: Mapping[str, Mapping[str, Any]]
) -> None:
  """Refuses images other than those that the workdir was begun with.

  Args:
    workdir: of the run.
    data: facts about each split, as for `write_environment`.

  Raises:
    WorkdirError: that names the split.
  """
  path = workdir / "environment.json"
  if not path.exists():
    return
  before = json.loads(path.read_text(encoding="utf-8"))["data"]
  for split, facts in data.items():
    known = before.get(split, {})
    if known.get("sha256", facts["sha256"]) != facts["sha256"]:
      raise WorkdirError(
        f"{workdir} was begun with other {split} images "
        f"({known.get('images')} then, {facts['images']} now): give it those, "
        "or choose another --workdir. Another version of Pillow may read the "
        "same file as another image, too"
      )


def say_change(key: str, before: Any, now: Any) -> tuple[str, str]:
  """Returns what to say of a key that changed, and what would undo it."""
  if before is ABSENT:
    return f"{key} was not there and is {now!r} now", "leave it out"
  if now is ABSENT:
    return f"{key} was {before!r} and is not there now", "put it back"
  return f"{key} was {before!r} and is {now!r} now", "the old value"


def differences(
  old: Any, new: Any, prefix: str = ""
) -> list[tuple[str, Any, Any]]:
  """Returns (key, old, new), `ABSENT` included, where nested dicts differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    found = []
    for key in sorted(old.keys() | new.keys()):
      inner = f"{prefix}.{key}" if prefix else key
      found += differences(old.get(key, ABSENT), new.get(key, ABSENT), inner)
    return found
  return [] if old == new else [(prefix, old, new)]


def write_environment(
  workdir: pathlib.Path, data: Mapping[str, Mapping[str, Any]]
) -> None:
  """Writes environment.json: what the numbers were made with, and from.

  Args:
    workdir: of the run.
    data: facts about each split, by its name.
  """
  versions = {}
  for package in PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[package] = metadata.version(package)
  checkpoint.write_json(
    workdir / "environment.json",
    {
      "python": platform.python_version(),
      "platform": platform.platform(),
      "cpus": os.cpu_count(),
      "devices": [str(device) for device in jax.devices()],
      "backend": jax.default_backend(),
      "processes": jax.process_count(),
      "versions": versions,
      "commit": commit(),
      "argv": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
      "data": data,
    },
  )


def commit() -> str:
  """Returns the commit that runs, "-dirty" behind it if changed.

  Without a repository $KDSEG_COMMIT, which the launch scripts set, or "". A
  repository in which the package is merely installed says nothing of it.
  """
  package = pathlib.Path(__file__).resolve().parents[1]

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", *arguments],
      cwd=package,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  with contextlib.suppress(OSError, subprocess.CalledProcessError):
    if pathlib.Path(git("rev-parse", "--show-toplevel")) == package.parent:
      return git("describe", "--always", "--dirty", "--abbrev=12")
  return os.environ.get("KDSEG_COMMIT", "")
