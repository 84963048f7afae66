"""Saves the arms of a stage, resumes them, and writes their results."""

from collections.abc import Mapping
import logging
from typing import Any

import numpy as np

from kdseg import networks
from kdseg.runtime import checkpoint
from kdseg.runtime import devices
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.training import arms as arms_lib
from kdseg.training import state as state_lib

_LOG = logging.getLogger("kdseg")

Tree = Any
Arms = dict[str, arms_lib.ArmState]

# In the keys of `_flatten`, between the arm, "state" or "best", and the path.
_GAP = "\t"


def save(manager: Any, step: int, arms: Arms) -> None:
  """Saves the arms after `step` updates.

  Args:
    manager: of the checkpoints; None on hosts that do not write.
    step: updates made so far.
    arms: by name.
  """
  if manager is None:
    return
  tree, extra = {}, {}
  for name, arm in arms.items():
    tree[name] = {"state": checkpoint.flatten(arm.state)}
    if arm.best:
      tree[name]["best"] = checkpoint.flatten(arm.best["variables"])
    extra[name] = {
      "diverged": arm.diverged,
      "best": {k: v for k, v in arm.best.items() if k != "variables"},
      "skipped": arm.skipped,
    }
  checkpoint.save(manager, step, tree, {"arms": extra})


def resume(manager: Any, arms: Arms, stage: str, steps: int) -> int:
  """Puts the latest checkpoint into `arms`; returns the steps done.

  Args:
    manager: of the checkpoints; None on hosts that do not have them.
    arms: their states and bests are replaced.
    stage: name for the log.
    steps: of the whole training, for the log.

  Raises:
    CheckpointError: if none of them is whole, or they are of other arms.
    HostError: if the first host cannot read them, on the others.
  """
  tree: Tree = {}

  def read() -> dict[str, Any]:
    nonlocal tree
    found = checkpoint.restore_latest(manager)
    if found is None:
      return {}
    step, tree, extra = found
    return {"step": step, "extra": extra, "where": str(manager.directory)}

  told = hosts.on_first(read)
  if not told:
    return 0
  flat = hosts.arrays_of_first(lambda: _flatten(tree))
  step, extra, where = int(told["step"]), told["extra"], told["where"]
  tree = _nest(flat, list(extra["arms"]))
  if tree.keys() != arms.keys():
    raise checkpoint.CheckpointError(
      f"{where} holds the arms {', '.join(sorted(tree))}, not "
      f"{', '.join(sorted(arms))}; finish that run first, or delete the folder"
    )
  for name, arm in arms.items():
    state = checkpoint.unflatten(tree[name]["state"], arm.state, where)
    arm.state = devices.replicate(state)
    about = extra["arms"][name]
    arm.diverged, arm.skipped = about["diverged"], about["skipped"]
    if "best" in tree[name]:
      like = state_lib.network_variables(arm.state)
      variables = checkpoint.unflatten(tree[name]["best"], like, where)
      arm.best = {**about["best"], "variables": variables}
  _LOG.info("%s: resumes at step %d of %d", stage, step, steps)
  return step


def _flatten(tree: Tree) -> dict[str, np.ndarray]:
  """Flattens {arm: {"state" | "best": {path: array}}}."""
  return {
    _GAP.join((name, part, path)): array
    for name, parts in tree.items()
    for part, arrays in parts.items()
    for path, array in arrays.items()
  }


def _nest(flat: Mapping[str, np.ndarray], names: list[str]) -> Tree:
  """Undoes `_flatten`."""
  tree: Tree = {name: {} for name in names}
  for key, array in flat.items():
    name, part, path = key.split(_GAP)
    tree[name].setdefault(part, {})[path] = array
  return tree


def write_result(
  spec: arms_lib.ArmSpec, arm: arms_lib.ArmState, steps: int
) -> None:
  """Writes an arm's best weights, or why it has none, to its destination."""
  about = {
    **spec.about,
    "seed": spec.seed,
    "steps": steps,
    "diverged": arm.diverged,
  }
  if not arm.best:
    with files.writing(spec.destination):
      spec.destination.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(spec.destination / "failed.json", about)
    return
  checkpoint.save_variables(
    spec.destination,
    arm.best["variables"],
    {
      **about,
      "validation_dice": arm.best["score"],
      "best_step": arm.best["step"],
      "parameters": networks.count_parameters(arm.best["variables"]),
    },
  )
