"""What lies in a workdir, and whose it is."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import fcntl
import functools
from importlib import metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax
import ml_collections

from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import hosts

Log = Callable[[Mapping[str, Any]], None]

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

# What a key has for a value that one of two configs does not have.
ABSENT = object()
# What may change within a run: its numbers stay, up to rounding.
_FREE = (
  *("evaluation.batch_size", "data.manual_dir", "data.data_dir"),
  *("seeds_at_once", "mapping"),
)
# What an earlier version did not have, or a config may leave out.
_OPTIONAL = ("seeds_at_once", "mapping")


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


def check_config(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> bool:
  """Whether config.json says the same; checks that it is of the same run.

  Arms and methods may be added to a run, arms taken away, the primary family of
  comparisons changed, the size of the evaluation's batches and how many seeds
  are updated at once, which memory decides, and where the data lie, which
  `check_data` knows by their content; nothing else may change.

  Raises:
    WorkdirError: that names the first key which differs.
  """
  path = workdir / "config.json"
  new = json.loads(config.to_json_best_effort())
  if path.exists():
    try:
      old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise WorkdirError(
        f"{path} is damaged ({error}); put a copy in its place, or choose "
        "another --workdir"
      ) from error
    for key, before, now in differences(old, new):
      top, *inner = key.split(".")
      whole_method = top == "methods" and len(inner) == 1
      came_or_went = before is ABSENT or now is ABSENT
      if top in ("arms", "primary") or (whole_method and came_or_went):
        continue
      if key in _FREE and (key in _OPTIONAL or not came_or_went):
        continue
      raise WorkdirError(_other_config(workdir, key, before, now))
    return old == new
  return False


def adopt_config(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> None:
  """Writes config.json, unless it says the same; see `check_config`.

  Raises:
    WorkdirError: that names the first key which differs.
  """
  if not check_config(config, workdir):
    new = json.loads(config.to_json_best_effort())
    checkpoint.write_json(workdir / "config.json", new)


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
  before = _environment(workdir).get("data", {})
  for split, facts in data.items():
    known = before.get(split, {})
    if known.get("sha256", facts["sha256"]) != facts["sha256"]:
      raise WorkdirError(
        f"{workdir} was begun with other {split} images "
        f"({known.get('images')} then, {facts['images']} now): give it those, "
        "or choose another --workdir. Another version of Pillow may read the "
        "same file as another image, too"
      )


def _other_config(
  workdir: pathlib.Path, key: str, before: Any, now: Any
) -> str:
  """Returns what to say of a workdir whose config has another `key`."""
  made_by = _made_by(workdir)
  here = _name_version(version(), commit())
  what, way_out = say_change(key, before, now)
  whose = "holds a run of another config"
  if made_by and made_by != here:
    whose += f", made by {made_by}, and this is {here}"
    if before is ABSENT or now is ABSENT:
      # The other version had no such key, and this one cannot do without.
      way_out = "go on with that version"
  return f"{workdir} {whose}: {what}; choose another --workdir, or {way_out}"


def say_change(key: str, before: Any, now: Any) -> tuple[str, str]:
  """Returns what to say of a key that changed, and what would undo it."""
  if before is ABSENT:
    return f"{key} was not there and is {now!r} now", "leave it out"
  if now is ABSENT:
    return f"{key} was {before!r} and is not there now", "put it back"
  return f"{key} was {before!r} and is {now!r} now", "the old value"


def _made_by(workdir: pathlib.Path) -> str:
  """Names the version that worked last in a workdir; "" if nothing tells."""
  found = _environment(workdir)
  try:
    return _name_version(found["versions"]["kdseg"], found.get("commit", ""))
  except (LookupError, TypeError):
    return ""


def _environment(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what environment.json says; {} where it says nothing."""
  with contextlib.suppress(OSError, ValueError):
    found = json.loads((workdir / "environment.json").read_text("utf-8"))
    if isinstance(found, dict):
      return found
  return {}


def _name_version(number: str, commit_: str) -> str:
  return f"kdseg {number} (commit {commit_})" if commit_ else f"kdseg {number}"


def version() -> str:
  """Returns the version of the package; "unknown" if it is not installed."""
  try:
    return metadata.version("kdseg")
  except metadata.PackageNotFoundError:
    return "unknown"


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


def make_log(workdir: pathlib.Path) -> Log:
  """Returns what writes log.jsonl; nothing on any host but the first."""
  if not hosts.is_first():
    return lambda record: None
  return functools.partial(checkpoint.append_json_line, workdir / "log.jsonl")
