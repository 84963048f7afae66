"""Saves and restores trees: a training's checkpoints, a finished network."""

from collections.abc import Mapping
from collections.abc import Sequence
import errno
import json
import logging
import os
import pathlib
import shutil
from typing import Any
from typing import BinaryIO

import jax
import numpy as np
import orbax.checkpoint as ocp

from kdseg.runtime import files

Tree = Any

_LOG = logging.getLogger("kdseg")


def _alone() -> ocp.options.MultiprocessingOptions:
  """Returns options for a host that reads and writes without the others."""
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=index, active_processes={index}
  )


class CheckpointError(RuntimeError):
  """A checkpoint cannot be read, or is of another network."""


def to_host(tree: Tree) -> Tree:
  """Copies a tree's leaves to numpy arrays."""
  return jax.tree.map(np.asarray, jax.device_get(tree))


def open_checkpoints(
  directory: str | pathlib.Path, *, keep: int = 2
) -> ocp.CheckpointManager:
  """Opens the checkpoints of a training, for use in a `with` statement.

  Saving is atomic: a process killed meanwhile leaves the earlier checkpoints
  whole.

  Args:
    directory: made if it is missing.
    keep: how many of the latest to keep; a second one serves if the latest is
      damaged.

  Raises:
    WriteError: if the directory cannot be made.
  """
  directory = pathlib.Path(directory).absolute()
  # With `active_processes`, Orbax does not make it.
  with files.writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=False,
      # Left by saves that were killed, or that a full disk ended.
      cleanup_tmp_directories=True,
      enable_async_checkpointing=False,
      multiprocessing_options=_alone(),
    ),
  )


def save(
  manager: ocp.CheckpointManager,
  step: int,
  tree: Tree,
  extra: Mapping[str, Any],
) -> None:
  """Saves a tree and a JSON-able mapping beside it.

  Raises:
    WriteError: if the disk is full; the checkpoints before it stay.
  """
  with files.writing(pathlib.Path(manager.directory)):
    manager.save(
      step,
      args=ocp.args.Composite(
        tree=ocp.args.StandardSave(to_host(tree)),
        extra=ocp.args.JsonSave(dict(extra)),
      ),
      force=True,
    )


def restore_latest(
  manager: ocp.CheckpointManager,
) -> tuple[int, Tree, dict[str, Any]] | None:
  """Returns (step, tree of numpy arrays, extra) of the latest whole one.

  A damaged checkpoint is named in the log and renamed to "damaged-STEP", and
  the one before it is used: a training that resumes from an earlier step
  reaches that step again, and has to save it.

  Raises:
    WriteError: if it cannot be renamed.
    CheckpointError: if there are checkpoints, and none can be read.
  """
  steps = sorted(manager.all_steps(), reverse=True)
  for number, step in enumerate(steps):
    try:
      restored = manager.restore(
        step,
        args=ocp.args.Composite(
          tree=ocp.args.StandardRestore(), extra=ocp.args.JsonRestore()
        ),
      )
    except Exception as error:  # Orbax raises what its storage raises.
      _LOG.warning(
        "checkpoint of step %d in %s is damaged (%s); trying the one before",
        step,
        manager.directory,
        str(error).splitlines()[0] if str(error) else type(error).__name__,
      )
      continue
    _put_aside(manager, steps[:number])
    return step, to_host(restored["tree"]), dict(restored["extra"])
  if steps:
    raise CheckpointError(
      f"none of the checkpoints in {manager.directory} can be read; delete "
      "the folder to start this stage again"
    )
  return None


def _put_aside(manager: ocp.CheckpointManager, steps: Sequence[int]) -> None:
  folder = pathlib.Path(manager.directory)
  with files.writing(folder):
    for step in steps:
      aside = folder / f"damaged-{step}"
      shutil.rmtree(aside, ignore_errors=True)
      (folder / str(step)).rename(aside)
  if steps:
    manager.reload()


def save_variables(
  directory: str | pathlib.Path, variables: Tree, about: Mapping[str, Any]
) -> None:
  """Writes a finished network: `variables/`, then `about.json`.

  `about.json` is written last and whole: where it exists, the rest does.

  Raises:
    WriteError: if the disk is full.
  """
  directory = pathlib.Path(directory).absolute()
  with files.writing(directory):
    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer(
      multiprocessing_options=_alone()
    ) as checkpointer:
      checkpointer.save(directory / "variables", to_host(variables), force=True)
  write_json(directory / "about.json", about)


def is_finished(directory: str | pathlib.Path) -> bool:
  """Returns whether `save_variables` has finished there."""
  return (pathlib.Path(directory) / "about.json").exists()


def load_variables(
  directory: str | pathlib.Path, expected: Tree | None = None
) -> tuple[Tree, dict[str, Any]]:
  """Returns (variables as numpy arrays, about) of a finished network.

  Args:
    directory: as given to `save_variables`.
    expected: a tree of arrays or shapes that the variables must match.

  Raises:
    CheckpointError: if no finished network is there, or it is another one.
  """
  directory = pathlib.Path(directory).absolute()
  if not is_finished(directory):
    raise CheckpointError(
      f"{directory} holds no finished network (about.json is missing)"
    )
  about = json.loads((directory / "about.json").read_text())
  with ocp.StandardCheckpointer(
    multiprocessing_options=_alone()
  ) as checkpointer:
    try:
      variables = to_host(checkpointer.restore(directory / "variables"))
    except Exception as error:
      raise CheckpointError(
        f"the variables in {directory} cannot be read: {error}"
      ) from error
  if expected is not None:
    check_match(variables, expected, str(directory))
  return variables, about


def flatten(tree: Tree) -> dict[str, Any]:
  """Returns {path: leaf}, which Orbax stores without losing types or nodes."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def unflatten(flat: Mapping[str, Any], like: Tree, where: str) -> Tree:
  """Inverts `flatten`, with the structure of `like`.

  Raises:
    CheckpointError: that names the first leaf of another name or shape.
  """
  expected = flatten(like)
  for name in sorted(flat.keys() | expected.keys()):
    have = np.shape(flat[name]) if name in flat else "missing"
    want = np.shape(expected[name]) if name in expected else "unknown"
    if have != want:
      raise CheckpointError(
        f"{where} is of another network: {name} is {have} there and {want} "
        "here; use the config it was made with, or another folder"
      )
  return jax.tree.unflatten(
    jax.tree.structure(like), [flat[name] for name in expected]
  )


def check_match(tree: Tree, expected: Tree, where: str) -> None:
  """Checks that two trees have the same names and shapes.

  Raises:
    CheckpointError: that names the first leaf of another name or shape.
  """
  unflatten(flatten(tree), expected, where)


def write_json(path: str | pathlib.Path, value: Any) -> None:
  """Writes JSON whole or not at all.

  Raises:
    WriteError: if the disk is full.
  """
  files.write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def append_json_line(path: str | pathlib.Path, record: Any) -> None:
  """Appends one record to a JSON-lines file, whole or not at all.

  Half a line at the end, left by a process that was killed while writing, is
  removed.

  Raises:
    WriteError: if the disk is full.
  """
  line = json.dumps(record, sort_keys=True).encode() + b"\n"
  with files.writing(path), open(path, "a+b", buffering=0) as file:
    end = _end_of_lines(file)
    file.truncate(end)
    try:
      # On a disk that fills up, `write` returns less and raises nothing.
      if file.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
      file.truncate(end)
      raise


def _end_of_lines(file: BinaryIO) -> int:
  """Returns where the last whole line of a file ends."""
  end = file.seek(0, os.SEEK_END)
  while end:
    start = max(0, end - 4096)
    file.seek(start)
    found = file.read(end - start).rfind(b"\n")
    if found >= 0:
      return start + found + 1
    end = start
  return 0
