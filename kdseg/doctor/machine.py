"""Checks the machine: devices, memory, disk, and JAX's settings."""

import collections
from collections.abc import Iterator
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from kdseg.doctor.findings import Finding
from kdseg.doctor.findings import installed
from kdseg.doctor.findings import ok
from kdseg.doctor.findings import one_line
from kdseg.doctor.findings import problem
from kdseg.doctor.findings import warning
from kdseg.runtime import commands

# What is not of Python itself is imported inside the checks, so that a package
# that cannot be imported is one finding, and the other checks still run.

# The driver that each CUDA of JAX's wheels needs, as in launch/gpu.sh.
CUDA_DRIVERS = ((13, 580), (12, 525))
# With less memory, a training of the size of configs/isic2016.py may be killed.
LEAST_MEMORY = 2 * 2**30
# The teacher's cached outputs for eight orientations of ISIC-2016 take 3.
LEAST_DISK = 5 * 2**30
MEMINFO = pathlib.Path("/proc/meminfo")
HUGE_PAGE_SWITCH = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
TPU_CHIPS = (pathlib.Path("/dev/accel0"), pathlib.Path("/dev/vfio/0"))


def _gib(size: float) -> str:
  return f"{size / 2**30:.1f} GiB"


def check_devices() -> Iterator[Finding]:
  """Names what JAX computes on, and the accelerators that it does not use."""
  import jax

  platforms = jax.config.jax_platforms or ""
  try:
    backend = jax.default_backend()
  # JAX also asserts that the platform it is told to use exists.
  except (AssertionError, RuntimeError) as error:
    backend = ""
    yield problem(
      f"JAX cannot start{platforms and f' on {platforms}'}: {one_line(error)}",
      platforms and "unset JAX_PLATFORMS",
    )
  else:
    kinds = collections.Counter(x.device_kind for x in jax.devices())
    named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    yield ok(f"backend {backend}: {named}")
  if backend in ("", "cpu"):
    yield from find_gpu(platforms, jax.__version__)
    yield from find_tpu(platforms)


def find_gpu(platforms: str, version: str) -> Iterator[Finding]:
  """Says what to do about an NVIDIA GPU that JAX does not use, if there is one.

  Args:
    platforms: that JAX is told to use, or "".
    version: of JAX.
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
    return
  plugins = [f"jax-cuda{cuda}-plugin" for cuda, _ in CUDA_DRIVERS]
  if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
    yield warning(
      "a GPU is present but CUDA_VISIBLE_DEVICES hides it",
      "unset CUDA_VISIBLE_DEVICES",
    )
  elif version in (installed(plugin) for plugin in plugins):
    yield _unused(
      "GPU",
      platforms,
      "JAX's CUDA plugin is installed: is LD_LIBRARY_PATH set to another CUDA? "
      "In a container, was it started with --gpus all?",
    )
  else:
    yield _unused("GPU", platforms, jax_for_driver(answer.partition("\n")[0]))


def find_tpu(platforms: str) -> Iterator[Finding]:
  """Says what to do about a TPU that JAX does not use, if there is one."""
  # A vfio device alone may be anything.
  named = any(name.startswith("TPU_") for name in os.environ)
  if named and any(chip.exists() for chip in TPU_CHIPS):
    yield _unused("TPU", platforms, 'pip install "jax[tpu]"')


def _unused(device: str, platforms: str, advice: str) -> Finding:
  if platforms:
    return warning(
      f"a {device} is present but JAX is told to use {platforms}",
      "unset JAX_PLATFORMS",
    )
  return problem(f"a {device} is present but JAX sees none", advice)


def jax_for_driver(driver: str) -> str:
  """Returns how to install the JAX that a driver, "580.65.06", can run."""
  for cuda, needed in CUDA_DRIVERS:
    if int(driver.partition(".")[0]) >= needed:
      return f'pip install "jax[cuda{cuda}]"'
  return (
    f"install a driver of {needed} or later, which JAX needs: here {driver}"
  )


def check_memory() -> Iterator[Finding]:
  """Says how much memory the host and its devices have."""
  text = MEMINFO.read_text(encoding="utf-8") if MEMINFO.exists() else ""
  lines = re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)
  sizes = {key: 1024 * int(size) for key, size in lines}
  if "MemAvailable" in sizes:
    free, total = sizes["MemAvailable"], sizes["MemTotal"]
    text = f"host: {_gib(free)} of {_gib(total)} available"
    if free < LEAST_MEMORY:
      yield warning(text, "end other programs, or lower data.batch_size")
    else:
      yield ok(text)
  import jax

  for device in jax.local_devices():
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
      limit = stats["bytes_limit"]
      free = limit - stats.get("bytes_in_use", 0)
      yield ok(f"{device}: {_gib(free)} of {_gib(limit)} available")


def check_huge_pages() -> Iterator[Finding]:
  """Names the variable that makes steps on a CPU faster, where it would."""
  try:
    library = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()[-1]
    new_enough = tuple(int(x) for x in library.split(".")[:2]) >= (2, 35)
    asked = "[madvise]" in HUGE_PAGE_SWITCH.read_text(encoding="ascii")
  except (AttributeError, IndexError, OSError, ValueError):
    return  # another C library or kernel
  if new_enough and asked and commands.TUNABLES not in os.environ:
    yield ok(
      "memory in pages of 2 MB is given to programs that ask, which makes a "
      "step on the CPU up to a third faster",
      "`kdseg run` and launch/ ask for them; elsewhere export "
      f"{commands.TUNABLES}={commands.HUGE_PAGES}",
    )


def _existing(folder: pathlib.Path) -> pathlib.Path:
  folder = folder.expanduser().absolute()
  return next(x for x in (folder, *folder.parents) if x.exists())


def _write_error(folder: pathlib.Path) -> str:
  """Returns why a folder cannot be written, or made and written, or ""."""
  try:
    with tempfile.TemporaryFile(dir=_existing(folder)) as file:
      file.write(b"0")
  except OSError as error:
    return error.strerror or str(error)
  return ""


def check_workdir(folder: pathlib.Path) -> Iterator[Finding]:
  """Says whether a run could write into a folder, and how much.

  Args:
    folder: of the run; it need not exist.
  """
  place = _existing(folder)
  if why := _write_error(place):
    yield problem(
      f"{place} cannot be written: {why}", "choose another --workdir"
    )
    return
  free = shutil.disk_usage(place).free
  text = f"{place} can be written, {_gib(free)} free"
  if free < LEAST_DISK:
    yield warning(text, f"free some space: a run may take {_gib(LEAST_DISK)}")
  else:
    yield ok(text)


def check_compile_cache() -> Iterator[Finding]:
  """Says whether compiled programs outlive the process, and where."""
  import jax

  folder = jax.config.jax_compilation_cache_dir
  if not folder or not jax.config.jax_enable_compilation_cache:
    yield warning(
      "off: every start compiles everything again",
      "unset JAX_ENABLE_COMPILATION_CACHE"
      if folder
      else 'export JAX_COMPILATION_CACHE_DIR="$HOME/.cache/jax"',
    )
  # A bucket is not tried.
  elif "://" not in folder and (why := _write_error(pathlib.Path(folder))):
    yield warning(
      f"{folder} cannot be written: {why}",
      "set JAX_COMPILATION_CACHE_DIR to another folder",
    )
  else:
    yield ok(folder)
