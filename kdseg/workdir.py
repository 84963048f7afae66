"""What lies in a workdir, and whose it is."""

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
import ml_collections

from kdseg import checkpoint
from kdseg import disk

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
    with disk.writing(workdir):
      file = stack.enter_context(open(workdir / ".lock", "a", encoding="utf-8"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise WorkdirError(
        f"another process works in {workdir}; wait for it, or choose another "
        "--workdir"
      ) from error
    yield


def adopt_config(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> None:
  """Writes config.json, or checks that the one there is of the same run.

  Arms and methods may be added to a run, arms taken away, and the primary
  family of comparisons changed; nothing else may change.

  Raises:
    WorkdirError: that names the first key which differs.
  """
  path = workdir / "config.json"
  new = json.loads(config.to_json_best_effort())
  if path.exists():
    old = json.loads(path.read_text(encoding="utf-8"))
    for key, before, now in differences(old, new):
      top, *inner = key.split(".")
      whole_method = top == "methods" and len(inner) == 1
      if top in ("arms", "primary") or (whole_method and None in (before, now)):
        continue
      raise WorkdirError(
        f"{workdir} holds a run of another config: {key} was {before!r} and "
        f"is {now!r} now; choose another --workdir, or the old value"
      )
    if old == new:
      return
  checkpoint.write_json(path, new)


def differences(
  old: Any, new: Any, prefix: str = ""
) -> list[tuple[str, Any, Any]]:
  """Returns (key, old, new) wherever two nested dicts differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    found = []
    for key in sorted(old.keys() | new.keys()):
      inner = f"{prefix}.{key}" if prefix else key
      found += differences(old.get(key), new.get(key), inner)
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

  Without a repository $KDSEG_COMMIT, which the launch scripts set, or "".
  """
  command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
  with contextlib.suppress(OSError, subprocess.CalledProcessError):
    answer = subprocess.run(
      command,
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
    return answer.stdout.strip()
  return os.environ.get("KDSEG_COMMIT", "")
