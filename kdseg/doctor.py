"""Looks at the machine and the installation, and says what to do.

  python -m kdseg.doctor [--workdir DIR] [--manual-dir ARCHIVES]
      [--no-self-test]

A line each: ok; warning, where everything works but something optional is
missing or slow; or problem. What can be done about it stands below, after an
arrow. Nothing is installed, downloaded or left behind. The self-test compiles
one training step, which takes a core about 15 seconds, and runs it twice from
the same state. Exit code 1 if there is a problem, 0 if not.
"""

import argparse
import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import enum
import functools
from importlib import metadata
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

# Whatever is not of Python itself is imported inside the checks: a package
# that cannot be imported is then one line, and the other checks still run.

PACKAGE = "kdseg"
# The driver that each CUDA of JAX's wheels needs, as in launch/gpu.sh.
CUDA_DRIVERS = ((13, 580), (12, 525))
# Below, a training of the size of configs/isic2016.py may be killed.
LEAST_MEMORY = 2 * 2**30
# A teacher's answers for eight orientations of ISIC-2016 take some of these.
LEAST_DISK = 5 * 2**30
STUDENT = "patch_unet_12k"
AGAIN = f"install {PACKAGE} once more: its files are not whole"

# The requirements of setup.cfg have no other form.
_REQUIREMENT = re.compile(
  r"(?P<name>[A-Za-z0-9][\w.-]*)\s*"
  r"(?:(?P<relation>>=|==)\s*(?P<version>[\w.]+))?\s*"
  r"(?:;\s*extra\s*==\s*['\"](?P<extra>[\w.-]+)['\"])?"
)


class Level(enum.StrEnum):
  """How bad a finding is."""

  OK = "ok"
  WARNING = "warning"
  PROBLEM = "problem"


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a check has to say.

  Attributes:
    level: how bad it is.
    text: what was found.
    advice: what to do about it, or "".
  """

  level: Level
  text: str
  advice: str = ""


Check = Callable[[], Iterable[Finding]]


@dataclasses.dataclass(frozen=True)
class Requirement:
  """A package that kdseg asks for.

  Attributes:
    name: of the package.
    relation: ">=", "==" or "" for any version.
    version: for the relation.
    extra: that asks for it, or "" for the core.
  """

  name: str
  relation: str
  version: str
  extra: str

  def complaint(self) -> str:
    """Returns "" if it is met, else which package is there instead."""
    installed = _version(self.name)
    if not installed:
      return self.name
    have, want = _release(installed), _release(self.version)
    met = have == want if self.relation == "==" else have >= want
    if not self.relation or met:
      return ""
    return f"{self.name}{self.relation}{self.version} (here: {installed})"


@dataclasses.dataclass(frozen=True)
class Trial:
  """What a training step did.

  Attributes:
    loss: of the first step.
    same: whether the second step from the same state gave the same bits.
    images: in the batch, over all devices.
    compile_seconds: what the first step took longer than the second.
    step_seconds: of the second.
  """

  loss: float
  same: bool
  images: int
  compile_seconds: float
  step_seconds: float


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ""


def _release(version: str) -> tuple[int, ...]:
  """Returns the numbers of a version; "2.10.0rc1+cpu" is (2, 10)."""
  match = re.match(r"\d+(?:\.\d+)*", version)
  numbers = [int(x) for x in match[0].split(".")] if match else []
  while numbers and not numbers[-1]:
    numbers.pop()
  return tuple(numbers)


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}" if number == 1 else f"{number or 'no'} {noun}s"


def _gib(size: float) -> str:
  return f"{size / 2**30:.1f} GiB"


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split())


def read_requirements() -> list[Requirement]:
  """Returns what the installed package asks for.

  Raises:
    PackageNotFoundError: if kdseg is not installed.
    ValueError: on a requirement of another form than setup.cfg has.
  """
  requirements = []
  for line in metadata.requires(PACKAGE) or ():
    match = _REQUIREMENT.fullmatch(line.strip())
    if not match:
      raise ValueError(f"not understood: the requirement {line!r}")
    requirements.append(Requirement(**match.groupdict(default="")))
  return requirements


def check_versions() -> Iterator[Finding]:
  """Names the versions that a run would record."""
  yield Finding(
    Level.OK, f"Python {platform.python_version()} on {platform.platform()}"
  )
  from kdseg.experiment import workdir

  yield Finding(
    Level.OK,
    ", ".join(f"{x} {_version(x) or 'missing'}" for x in workdir.PACKAGES),
  )
  commit = workdir.commit()
  if commit:
    yield Finding(Level.OK, f"commit {commit}")
  else:
    yield Finding(
      Level.WARNING,
      "no commit is known: a run could not say what code it was made with",
      "run from a git checkout, or set KDSEG_COMMIT",
    )


def check_packages() -> Iterator[Finding]:
  """Holds what is installed against what the package and its extras need."""
  try:
    requirements = read_requirements()
  except metadata.PackageNotFoundError:
    yield Finding(
      Level.PROBLEM,
      f"{PACKAGE} is not installed, so that its requirements are unknown",
      "pip install -e . in the checkout",
    )
    return
  extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
  for extra in ("", *extras):
    needed = [x for x in requirements if x.extra == extra]
    lacking = [x for x in (r.complaint() for r in needed) if x]
    name = f"extra {extra}" if extra else "core"
    if not lacking:
      yield Finding(Level.OK, f"{name}: installed")
      continue
    yield Finding(
      Level.WARNING if extra else Level.PROBLEM,
      f"{name}: missing {', '.join(lacking)}",
      f"pip install '{PACKAGE}[{extra}]'"
      if extra
      else f"pip install {PACKAGE}",
    )


def check_devices(root: pathlib.Path) -> Iterator[Finding]:
  """Names what JAX computes on, and what it does not see.

  Args:
    root: of the file system.
  """
  import jax

  platforms = jax.config.jax_platforms or ""
  try:
    backend = jax.default_backend()
  # JAX asserts, too, that what it was told to use is there.
  except (AssertionError, RuntimeError) as error:
    yield Finding(
      Level.PROBLEM,
      f"JAX cannot start{platforms and f' on {platforms}'}: "
      f"{type(error).__name__} {_one_line(error)}".rstrip(),
      platforms and "unset JAX_PLATFORMS",
    )
    yield from find_gpu(root, "", jax.__version__)
    yield from find_tpu(root, "")
    return
  kinds = collections.Counter(x.device_kind for x in jax.devices())
  named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
  yield Finding(Level.OK, f"backend {backend}: {named}")
  if backend == "cpu":
    yield from find_gpu(root, platforms, jax.__version__)
  if backend != "tpu":
    yield from find_tpu(root, platforms)


def find_gpu(
  root: pathlib.Path, platforms: str, version: str
) -> Iterator[Finding]:
  """Says what to do about an NVIDIA GPU that JAX does not use, if there is one.

  Args:
    root: of the file system.
    platforms: that JAX is told to use, or "".
    version: of JAX.
  """
  driver = read_driver(root)
  if driver is None:
    return
  if platforms:
    yield _told_otherwise("GPU", platforms)
    return
  if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
    yield Finding(
      Level.WARNING,
      "a GPU is present but CUDA_VISIBLE_DEVICES hides it",
      "unset CUDA_VISIBLE_DEVICES",
    )
    return
  plugins = [f"jax-cuda{cuda}-plugin" for cuda, _ in CUDA_DRIVERS]
  fitting = [x for x in plugins if _version(x) == version]
  yield Finding(
    Level.PROBLEM,
    "a GPU is present but JAX sees none",
    f"{fitting[0]} {version} is installed: is LD_LIBRARY_PATH set to another "
    "CUDA? In a container, was it started with --gpus all?"
    if fitting
    else jax_for_driver(driver),
  )


def _told_otherwise(device: str, platforms: str) -> Finding:
  return Finding(
    Level.WARNING,
    f"a {device} is present but JAX is told to use {platforms}",
    "unset JAX_PLATFORMS",
  )


def read_driver(root: pathlib.Path) -> str | None:
  """Returns the version of NVIDIA's driver.

  Args:
    root: of the file system.

  Returns:
    "" for a driver that does not say; None where there is none.
  """
  command = [
    "nvidia-smi",
    "--query-gpu=driver_version",
    "--format=csv,noheader",
  ]
  try:
    answer = subprocess.run(
      command, capture_output=True, text=True, check=True, timeout=30
    ).stdout
  except (OSError, subprocess.SubprocessError):
    folder = root / "proc" / "driver" / "nvidia"
    if not folder.exists():
      return None
    answer = ""
    with contextlib.suppress(OSError):
      answer = (folder / "version").read_text(encoding="utf-8")
  # The kernel's file also names a compiler, whose version starts smaller.
  match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*", answer)
  return match[0] if match else ""


def jax_for_driver(driver: str) -> str:
  """Returns how to install the JAX that a driver can run.

  Args:
    driver: its version, or "".
  """
  commands = [
    (needed, f'pip install "jax[cuda{cuda}]"') for cuda, needed in CUDA_DRIVERS
  ]
  if not driver:
    return ", ".join(
      f"{command} with driver {needed} or later" for needed, command in commands
    )
  major = int(driver.partition(".")[0])
  for needed, command in commands:
    if major >= needed:
      return command
  oldest = min(needed for needed, _ in commands)
  return (
    f"install a driver of {oldest} or later, which JAX needs: here {driver}"
  )


def find_tpu(root: pathlib.Path, platforms: str) -> Iterator[Finding]:
  """Says what to do about a TPU that JAX does not use, if there is one.

  Args:
    root: of the file system.
    platforms: that JAX is told to use, or "".
  """
  chips = [root / "dev" / "accel0", root / "dev" / "vfio" / "0"]
  # A vfio device alone may be anything.
  named = any(name.startswith("TPU_") for name in os.environ)
  if not named or not any(chip.exists() for chip in chips):
    return
  if platforms:
    yield _told_otherwise("TPU", platforms)
    return
  yield Finding(
    Level.PROBLEM,
    "a TPU is present but JAX sees none",
    'pip install "jax[tpu]"',
  )


def check_memory(root: pathlib.Path) -> Iterator[Finding]:
  """Says how much memory the host has, and the devices that tell.

  Args:
    root: of the file system.
  """
  text = ""
  with contextlib.suppress(OSError):
    text = (root / "proc" / "meminfo").read_text(encoding="utf-8")
  sizes = {
    match[1]: 1024 * int(match[2])
    for match in re.finditer(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)
  }
  total, free = sizes.get("MemTotal"), sizes.get("MemAvailable")
  if total is None or free is None:
    yield Finding(Level.OK, "host: this system does not say")
  elif free < LEAST_MEMORY:
    yield Finding(
      Level.WARNING,
      f"host: only {_gib(free)} of {_gib(total)} available",
      "end other programs, or set a smaller data.batch_size",
    )
  else:
    yield Finding(Level.OK, f"host: {_gib(free)} of {_gib(total)} available")
  import jax

  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
      limit = stats["bytes_limit"]
      free = limit - stats.get("bytes_in_use", 0)
      yield Finding(
        Level.OK, f"{device}: {_gib(free)} of {_gib(limit)} available"
      )


def _existing(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder, or the nearest above it that there is."""
  folder = folder.expanduser().absolute()
  while not folder.exists():
    folder = folder.parent
  return folder


def _write_error(folder: pathlib.Path) -> str:
  """Returns why nothing can be written into a folder, or ""."""
  try:
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(b"0")
  except OSError as error:
    return error.strerror or str(error)
  return ""


def check_workdir(folder: pathlib.Path) -> Iterator[Finding]:
  """Says whether a run could write into a folder, and how much.

  Args:
    folder: of the run; it need not be there yet.
  """
  place = _existing(folder)
  why = _write_error(place)
  if why:
    yield Finding(
      Level.PROBLEM,
      f"{place} cannot be written: {why}",
      "choose another --workdir",
    )
    return
  free = shutil.disk_usage(place).free
  text = f"{place} can be written, {_gib(free)} free"
  if free < LEAST_DISK:
    yield Finding(
      Level.WARNING,
      text,
      f"free some space: a run may take {_gib(LEAST_DISK)}",
    )
  else:
    yield Finding(Level.OK, text)


def check_compile_cache() -> Iterator[Finding]:
  """Says whether compiled programs outlive the process, and where."""
  import jax

  folder = jax.config.jax_compilation_cache_dir
  if not folder:
    yield Finding(
      Level.WARNING,
      "not set: every start compiles everything again",
      'export JAX_COMPILATION_CACHE_DIR="$HOME/.cache/jax"',
    )
  elif not jax.config.jax_enable_compilation_cache:
    yield Finding(
      Level.WARNING,
      f"{folder} is set, but the cache is switched off",
      "unset JAX_ENABLE_COMPILATION_CACHE",
    )
  elif "://" in folder:
    yield Finding(Level.OK, folder)
  elif why := _write_error(_existing(pathlib.Path(folder))):
    yield Finding(
      Level.WARNING,
      f"{folder} cannot be written: {why}",
      "set JAX_COMPILATION_CACHE_DIR to another folder",
    )
  else:
    yield Finding(Level.OK, folder)


def check_weights() -> Iterator[Finding]:
  """Reads the published weights of the encoders, hashes included."""
  from kdseg.networks.encoders import pretrained
  from kdseg.networks.encoders import vit_weights

  readers: dict[str, Callable[[], Any]] = {
    "EfficientNet-Lite0": lambda: pretrained.load_efficientnet_lite("lite0"),
    "EfficientNet-Lite2": lambda: pretrained.load_efficientnet_lite("lite2"),
    "ViT-S/14": vit_weights.load_vit_small,
  }
  for name, read in readers.items():
    try:
      read()
    except ImportError as error:
      # The message ends with what to install.
      text, pip, rest = _one_line(error).partition("pip install ")
      yield Finding(Level.WARNING, text.rstrip(": "), pip + rest)
    except (OSError, ValueError) as error:
      yield Finding(
        Level.PROBLEM,
        f"{name}: {_one_line(error)}",
        "install the package that brought the file once more",
      )
    else:
      yield Finding(Level.OK, f"{name}: found and whole")


def check_models() -> Iterator[Finding]:
  """Loads the models that come with the package."""
  from kdseg import networks
  from kdseg.deploy import models
  from kdseg.deploy import weights

  shipped = models.shipped()
  if not shipped:
    yield Finding(Level.PROBLEM, "no model came with the package", AGAIN)
  for name in shipped:
    try:
      count = networks.count_parameters(models.load_weights(name).variables)
    except weights.WeightsError as error:
      yield Finding(Level.PROBLEM, _one_line(error), AGAIN)
    else:
      yield Finding(Level.OK, f"{name}: loads, {count:,} parameters")


def check_archives(folder: pathlib.Path) -> Iterator[Finding]:
  """Lists the official archives in a folder; decodes no image.

  Args:
    folder: a data.manual_dir.
  """
  from kdseg.data import archives
  from kdseg.data import sets

  folder = folder.expanduser()
  if not folder.is_dir():
    yield Finding(
      Level.PROBLEM, f"{folder} is no folder", "choose another --manual-dir"
    )
    return
  for name, builder in sets.BUILDERS.items():
    if not builder.official:
      continue
    try:
      sources = builder.find_sources(folder)
      if sources:
        # Beside the archives lies nothing that was prepared.
        inventory = builder(data_dir=str(folder)).inventory(folder)
        yield from _describe(name, folder, sources, inventory)
      else:
        yield Finding(
          Level.WARNING,
          f"{name}: not in {folder}",
          builder.MANUAL_DOWNLOAD_INSTRUCTIONS,
        )
    except archives.DataError as error:
      yield Finding(Level.PROBLEM, f"{name}: {_one_line(error)}")


def _describe(
  name: str,
  folder: pathlib.Path,
  sources: Sequence[pathlib.Path],
  inventory: Any,
) -> Iterator[Finding]:
  verify = f"python -m kdseg.data verify {name} --manual_dir '{folder}'"
  if inventory.problems:
    more = len(inventory.problems) - 1
    yield Finding(
      Level.PROBLEM,
      f"{name}: {inventory.problems[0]}" + (f" (and {more} more)" * bool(more)),
      f"{verify} lists all",
    )
    return
  # Validation comes out of the training pairs, and would count them again.
  counted = [split for split in inventory.found if split != "validation"]
  counts = ", ".join(
    f"{split} {inventory.found[split]} of {inventory.official[split]}"
    for split in counted
  )
  # A part of the training pairs is enough to train, not to compare scores.
  whole = all(inventory.found[x] == inventory.official[x] for x in counted)
  yield Finding(
    Level.OK if whole else Level.WARNING,
    f"{name}: {', '.join(source.name for source in sources)}; pairs: {counts}",
    f"{verify} looks into every image",
  )


def check_training(size: int) -> Iterator[Finding]:
  """Takes a training step twice; see `try_step`.

  Args:
    size: side of the images in pixels.
  """
  import jax

  trial = try_step(size)
  name = (
    f"{STUDENT} with mbf on {trial.images} drawn lesions of {size} x {size}"
  )
  if not math.isfinite(trial.loss):
    yield Finding(
      Level.PROBLEM,
      f"{name}: the loss is {trial.loss}",
      "this JAX cannot be trusted on this device: try other versions of JAX "
      "and of the driver",
    )
  else:
    yield Finding(Level.OK, f"{name}: loss {trial.loss:.4f}")
  on_cpu = jax.default_backend() == "cpu"
  if trial.same:
    yield Finding(Level.OK, "two steps from the same state: the same bits")
  else:
    yield Finding(
      Level.PROBLEM if on_cpu else Level.WARNING,
      "two steps from the same state: other bits",
      "the numbers of a run cannot be repeated here: look at XLA_FLAGS"
      if on_cpu
      else "export XLA_FLAGS=--xla_gpu_deterministic_ops=true repeats a run's "
      "numbers on a GPU",
    )
  how = " without optimisation" if on_cpu else ""
  yield Finding(
    Level.OK,
    f"compiled in {trial.compile_seconds:.1f} s{how}, a step takes "
    f"{1e3 * trial.step_seconds:.1f} ms",
  )


@contextlib.contextmanager
def _quick_compilation() -> Iterator[None]:
  """Compiles for the CPU in half the time, into a slower program."""
  import jax

  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, before or jax.default_backend() == "cpu")
  try:
    yield
  finally:
    jax.config.update(name, before)


def try_step(size: int) -> Trial:
  """Takes one training step, as `stage` makes it, twice from the same state.

  The student reads drawn lesions; the teacher's features are noise, as a
  teacher would take as long to compile as the step.

  Args:
    size: side of the images in pixels, divisible by 32.
  """
  import jax
  import numpy as np

  from kdseg import networks
  from kdseg.data.sets import synthetic
  from kdseg.distill import objective
  from kdseg.runtime import devices
  from kdseg.training import stage

  images = 4 * jax.local_device_count()
  draw = np.random.default_rng(0)
  lesions = [synthetic.draw(draw, size) for _ in range(images)]
  method = objective.Method(terms={"mbf": 1.0})
  student = networks.make_network(STUDENT, axis_name=devices.AXIS)
  strides = {"low": 4, "high": 8}
  shapes = {"logits": (images, size, size)} | {
    tap: (images, size // strides[tap], size // strides[tap], 16)
    for tap in method.taps
  }
  teacher_out = {
    name: draw.standard_normal(shape, np.float32)
    for name, shape in shapes.items()
  }
  batch = devices.shard(
    {
      "image": np.stack([image for image, _ in lesions]) / np.float32(255),
      "mask": np.stack([mask for _, mask in lesions]).astype(np.float32),
      "teacher_out": teacher_out,
    }
  )
  distiller, inputs = stage.make_distiller(
    student, teacher_out, method, size=size
  )
  spec = stage.ArmSpec(
    kind="mbf",
    network=student,
    seed=0,
    destination=pathlib.Path(),
    about={},
    method=method,
    distiller=distiller,
    distiller_inputs=inputs,
  )
  run_config = stage.RunConfig(
    seed=0,
    batch_size=images,
    evaluation_batch_size=images,
    size=size,
    segmentation={"bce": 1.0, "dice": 1.0},
    augment={},
    encoder_weights=False,
    log_every=1,
  )
  training = stage.TrainConfig(epochs=1.0, learning_rate=1e-3, warmup=0.0)

  def take(state: Any) -> tuple[Any, float]:
    # A copy, as the step uses up the memory of what it is given.
    given = devices.replicate(jax.tree.map(np.array, state))
    began = time.perf_counter()
    answer = jax.block_until_ready(arm.step(given, batch))
    return jax.device_get(answer), time.perf_counter() - began

  with _quick_compilation():
    [arm] = stage.make_arms({"student": spec}, run_config, training, 1).values()
    state = jax.device_get(arm.state)
    first, first_seconds = take(state)
    second, second_seconds = take(state)
  pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second))
  return Trial(
    loss=float(first[1]["loss"]),
    # Bytes, as a number that is none equals nothing.
    same=all(
      np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    ),
    images=images,
    compile_seconds=max(first_seconds - second_seconds, 0.0),
    step_seconds=second_seconds,
  )


def run(checks: Mapping[str, Check]) -> Iterator[tuple[str, Finding]]:
  """Yields what each check finds, by its name, as it is found.

  Args:
    checks: by name; one that raises is a problem and stops no other.
  """
  for name, check in checks.items():
    try:
      for finding in check():
        yield name, finding
    except Exception as error:
      yield (
        name,
        Finding(
          Level.PROBLEM,
          f"this check failed: {type(error).__name__}: {_one_line(error)}",
        ),
      )


def make_checks(
  *,
  workdir: pathlib.Path,
  manual_dir: pathlib.Path | None,
  self_test: bool,
  root: pathlib.Path = pathlib.Path("/"),
) -> dict[str, Check]:
  """Returns the checks by name, in the order in which they run.

  Args:
    workdir: where a run would write.
    manual_dir: with the official archives, or None.
    self_test: whether a training step is taken.
    root: of the file system.
  """
  checks: dict[str, Check] = {
    "versions": check_versions,
    "packages": check_packages,
    "devices": functools.partial(check_devices, root),
    "memory": functools.partial(check_memory, root),
    "workdir": functools.partial(check_workdir, workdir),
    "compile cache": check_compile_cache,
    "weights": check_weights,
    "models": check_models,
  }
  if manual_dir is not None:
    checks["archives"] = functools.partial(check_archives, manual_dir)
  if self_test:
    checks["self-test"] = functools.partial(check_training, 64)
  return checks


def format_finding(name: str, finding: Finding) -> str:
  """Returns a finding as a line of the table, and one more for its advice."""
  text = f"{name:<13} {finding.level:<7}  {finding.text}"
  return f"{text}\n{'':<23}-> {finding.advice}" if finding.advice else text


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m kdseg.doctor",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    default=pathlib.Path(),
    help="where a run would write; the current folder if unset",
  )
  parser.add_argument(
    "--manual-dir",
    "--manual_dir",
    type=pathlib.Path,
    help="folder with the official archives",
  )
  parser.add_argument(
    "--no-self-test",
    dest="self_test",
    action="store_false",
    help="take no training step",
  )
  options = parser.parse_args(arguments)
  checks = make_checks(**vars(options))
  levels: collections.Counter[Level] = collections.Counter()
  for name, finding in run(checks):
    levels[finding.level] += 1
    print(_printable(format_finding(name, finding)), flush=True)
  print(
    f"{_count(levels[Level.PROBLEM], 'problem')}, "
    f"{_count(levels[Level.WARNING], 'warning')}"
  )
  return 1 if levels[Level.PROBLEM] else 0


def _printable(text: str) -> str:
  """Escapes what the terminal cannot show; file names need not be text."""
  encoding = sys.stdout.encoding or "utf-8"
  return text.encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
  sys.exit(main())
