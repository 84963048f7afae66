"""One network in one file: safetensors, with what is needed to run it.

  kdseg weights WORKDIR --arm NAME --out FILE [--seed 0]

for example

  kdseg weights runs/isic2016 --arm patch_unet_50k-mbf --out student.safetensors

writes a finished arm (or teacher) of a workdir. The file does not contain the
align and generator layers, which only distillation needs.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from kdseg.evaluation import statistics
from kdseg.report import scores
from kdseg.runtime import checkpoint
from kdseg.runtime import commands
from kdseg.runtime import files

Tree = Any

# Changes when a reader of this version could not read the file any more.
FORMAT = "1"
# What a file says about its network; all of it text.
REQUIRED = ("format", "network", "options", "size", "threshold")


class WeightsError(Exception):
  """A file of weights that cannot be used; says which and why."""


def save(
  path: str | pathlib.Path, variables: Tree, about: Mapping[str, Any]
) -> None:
  """Writes a network whole, or not at all.

  Args:
    path: of the file.
    variables: {"params", "batch_stats"} of the network.
    about: "network" and "options" of `networks.make_network`, "size" (side of
      its input in pixels), "threshold", and anything else worth knowing; JSON
      values.
  """
  path = pathlib.Path(path)
  about = {"format": FORMAT, **about}
  missing = [key for key in REQUIRED if key not in about]
  if missing:
    raise ValueError(f"about lacks {', '.join(missing)}")
  arrays = {
    name: np.ascontiguousarray(leaf)
    for name, leaf in checkpoint.flatten(variables).items()
  }
  metadata = {
    key: value if key == "format" else json.dumps(value)
    for key, value in about.items()
  }
  with files.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole(path) as file:
    file.write(safetensors.numpy.save(arrays, metadata))


def load(
  path: str | pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns ({name: array}, about) of a file that `save` wrote.

  Raises:
    WeightsError: if it is no such file, is damaged, or is of another version.
  """
  path = pathlib.Path(path)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  # AttributeError: of a kind of number that numpy does not have.
  except (AttributeError, OSError, safetensors.SafetensorError) as error:
    raise WeightsError(
      f"{path} cannot be read as safetensors: {error}"
    ) from error
  missing = [key for key in REQUIRED if key not in metadata]
  if missing:
    raise WeightsError(
      f"{path} was not written by kdseg: its metadata lack {', '.join(missing)}"
    )
  if metadata["format"] != FORMAT:
    raise WeightsError(
      f"{path} has format {metadata['format']}, and this kdseg reads {FORMAT}; "
      "install the version that wrote it"
    )
  try:
    about = {
      key: value if key == "format" else json.loads(value)
      for key, value in metadata.items()
    }
  except (RecursionError, ValueError) as error:
    raise WeightsError(f"{path}: its metadata are damaged: {error}") from error
  check(about, str(path))
  for name, array in arrays.items():
    # "V" is bfloat16.
    if array.dtype.kind not in "fV" or not np.isfinite(array).all():
      raise WeightsError(
        f"{path}: {name} ({array.dtype}) is not of finite real numbers"
      )
  return arrays, about


def check(about: Mapping[str, Any], where: str) -> None:
  """Refuses values that no network can be run with.

  Raises:
    WeightsError: on a size, a threshold or options of another kind.
  """
  size, threshold = about["size"], about["threshold"]
  whole = isinstance(size, int) and not isinstance(size, bool)
  if not (whole and 0 < size <= 8192):
    raise WeightsError(f"{where}: size is {size!r}, not a side in pixels")
  if not (isinstance(threshold, float) and 0.0 < threshold < 1.0):
    raise WeightsError(f"{where}: threshold is {threshold!r}, not in (0, 1)")
  if not isinstance(about["options"], Mapping):
    raise WeightsError(f"{where}: options are {about['options']!r}")


def read_arm(
  workdir: str | pathlib.Path, arm: str, seed: int = 0
) -> tuple[Tree, dict[str, Any]]:
  """Returns (variables, about) of a finished arm or teacher of a workdir.

  Raises:
    WeightsError: if it is not there; names the finished ones.
  """
  return read_folder(arm_folder(workdir, arm, seed))


def arm_folder(
  workdir: str | pathlib.Path, arm: str, seed: int = 0
) -> pathlib.Path:
  """Returns where a workdir keeps an arm, or a teacher of that name."""
  workdir = pathlib.Path(workdir)
  teacher = workdir / "teachers" / arm
  return teacher if teacher.exists() else workdir / "arms" / f"{arm}-seed{seed}"


def check_finished(folder: pathlib.Path) -> None:
  """Refuses a folder that is not that of a finished network.

  Raises:
    WeightsError: that names the finished ones.
  """
  if not checkpoint.is_finished(folder):
    folder = folder.absolute()
    if (folder / "weights.safetensors").exists():
      raise WeightsError(
        f"{folder} is an export; name a file of it, as "
        f"{folder / 'weights.safetensors'}"
      )
    is_workdir = (folder / "config.json").exists()
    workdir = folder if is_workdir else folder.parent.parent
    there = sorted(
      path.parent.name
      for kind in ("arms", "teachers")
      for path in workdir.glob(f"{kind}/*/about.json")
    )
    those = ", ".join(there) or "none at all"
    if is_workdir:
      raise WeightsError(
        f"{workdir} is the workdir of a run; name the folder of a finished "
        f"network, as {workdir / 'arms'}/NAME-seedN; it has {those}"
      )
    raise WeightsError(
      f"{workdir} has no finished {folder.name}; it has {those}"
    )


def read_folder(folder: str | pathlib.Path) -> tuple[Tree, dict[str, Any]]:
  """Returns (variables, about) of the folder of a finished network.

  Args:
    folder: WORKDIR/arms/NAME-seedN or WORKDIR/teachers/NAME.

  Raises:
    WeightsError: if no finished network is there (names the finished ones), or
      its run's config cannot be read.
  """
  folder = pathlib.Path(folder).absolute()
  check_finished(folder)
  workdir = folder.parent.parent
  try:
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    variables, known = checkpoint.load_variables(folder)
    options = config["students"].get(known["network"], {})
    if known["arm"] in config["teachers"]:
      options = config["teachers"][known["arm"]]["options"]
    about = {
      "network": known["network"],
      "options": options,
      "size": config["data"]["size"],
      "threshold": 0.5,
      "arm": known["arm"],
      "seed": known["seed"],
      "parameters": known["parameters"],
      "validation_dice": known.get("validation_dice"),
      "trained_on": config["data"]["name"],
    }
  except (OSError, json.JSONDecodeError, checkpoint.CheckpointError) as error:
    raise WeightsError(f"{folder} cannot be used: {error}") from error
  except KeyError as error:
    raise WeightsError(
      f"{folder} is of a run of another version: {error} is missing"
    ) from error
  check(about, str(folder))
  return variables, about | _scored(workdir, known["arm"], known["seed"])


def _scored(workdir: pathlib.Path, arm: str, seed: int) -> dict[str, str]:
  """Returns the run's scores of this network as text; complete rows only."""
  about = {}
  path = workdir / "scores.csv"
  if path.exists():
    whole, _ = scores.recover(path)
    found = [
      f"{dataset}: Dice {_interval(rows, 'dice')}, Jaccard "
      f"{_interval(rows, 'jaccard')} (n = {len(rows)})"
      for (name, number, dataset), rows in scores.groups(whole).items()
      if (name, number) == (arm, seed)
    ]
    if found:
      about["scores"] = "; ".join(found)
  path = workdir / "report.json"
  if path.exists():
    try:
      meta = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
      return about
    train, protocol = meta.get("train", {}), meta.get("protocol", {})
    about["protocol"] = (
      f"trained on {train.get('found')} of {train.get('official')} pairs of "
      f"{train.get('name')}; one value an image at its own size, mean over "
      "images; test-time augmentation: "
      f"{protocol.get('test_time_augmentation')}; checkpoint: "
      f"{protocol.get('checkpoint')}"
    )
  return about


def _interval(rows: list[scores.Row], metric: str) -> str:
  """Returns a mean and its 95 % interval over images."""
  found = statistics.interval_of_mean([row[metric] for row in rows])
  if np.isnan(found.low):
    return f"{found.value:.4f}"
  return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = commands.Parser("weights", __doc__)
  parser.add_argument("workdir", metavar="WORKDIR")
  parser.add_argument("--arm", required=True, help="as in scores.csv")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", required=True, help="a .safetensors file")
  options = parser.parse_args(arguments)
  try:
    variables, about = read_arm(options.workdir, options.arm, options.seed)
    save(options.out, variables, about)
  except (WeightsError, OSError) as error:
    print(f"kdseg: {error}", file=sys.stderr)
    return 1
  size = pathlib.Path(options.out).stat().st_size
  count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  print(f"{options.out}: {count:,} parameters, {size:,} bytes")
  return 0


if __name__ == "__main__":
  sys.exit(main())
