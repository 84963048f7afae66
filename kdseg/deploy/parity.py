"""Measures how far each file of an export is from JAX, and how fast it is."""

from collections.abc import Mapping
import pathlib
import platform
import time
from typing import Any

import numpy as np

from kdseg.data.sets import synthetic
from kdseg.deploy.formats import record

# Largest distance from JAX in probability, of files with 32-bit weights.
TOLERANCE = 1e-4
_GOLDEN = 4
_RANDOM = 4
_TIMED = 30


class ParityError(RuntimeError):
  """A file that computes something else than its network."""


def make_inputs(size: int) -> dict[str, np.ndarray]:
  """Returns drawn lesions ("golden") and noise ("random"), [N, S, S, 3]."""
  drawn = [
    synthetic.draw(np.random.default_rng(seed), size)[0]
    for seed in range(_GOLDEN)
  ]
  noise = np.random.default_rng(0).integers(
    0, 256, (_RANDOM, size, size, 3), np.uint8
  )
  return {"golden": np.stack(drawn), "random": noise}


def measure(
  content: bytes,
  format: record.Format,
  inputs: Mapping[str, np.ndarray],
  expected: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], np.ndarray]:
  """Runs a file on one thread.

  Args:
    content: of the file.
    format: of the file.
    inputs: from `make_inputs`.
    expected: JAX's probabilities for them.

  Returns:
    Its entry in PARITY.json (bytes, largest distance from JAX by kind of
    input, milliseconds for one image), and its probabilities for the golden
    inputs.
  """
  run = format.open(content, 1).run
  outputs = {kind: run(x) for kind, x in inputs.items()}
  one = inputs["golden"][:1]
  run(one)
  seconds = []
  for _ in range(_TIMED):
    began = time.perf_counter()
    run(one)
    seconds.append(time.perf_counter() - began)
  entry = {
    "bytes": len(content),
    "largest_difference": {
      kind: float(np.abs(output - expected[kind]).max())
      for kind, output in outputs.items()
    },
    # Not the median: other work on the machine only ever adds.
    "milliseconds": 1e3 * min(seconds),
  }
  return entry, outputs["golden"]


def describe_cpu(cpuinfo: str | None = None) -> str:
  """Says which CPU this is to a file with 8-bit weights.

  Args:
    cpuinfo: of Linux; that of this machine if None.

  Returns:
    For example "x86_64 CPU with VNNI".
  """
  name = f"{platform.machine()} CPU"
  if cpuinfo is None:
    path = pathlib.Path("/proc/cpuinfo")
    cpuinfo = path.read_text() if path.exists() else ""
  flags = next(
    (line.split() for line in cpuinfo.splitlines() if line[:5] == "flags"), None
  )
  # Other CPUs, and other systems, list no such flags.
  if flags is None:
    return name
  has = not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags)
  return f"{name} {'with' if has else 'without'} VNNI"


def is_int8(entry: Any) -> bool:
  """Whether an entry of PARITY.json is of a file with 8-bit weights."""
  return isinstance(entry, Mapping) and "changed_pixels" in entry


def describe_int8(name: str, parity: Mapping[str, Any]) -> str:
  """Says in words what 8-bit weights gain and lose against 32-bit ones."""
  full_name = name.replace(".int8.", ".")
  entry, full = parity[name], parity[full_name]
  size = entry["bytes"] / full["bytes"]
  pace = entry["milliseconds"] / full["milliseconds"]
  # Two runs of one file differ by a tenth.
  speed = "as fast as it"
  if pace < 0.9:
    speed = "faster"
  elif pace > 1.1:
    speed = "slower"
  return (
    f"{'smaller' if size < 1 else 'no smaller'} and {speed} here, with "
    f"{size:.0%} of the bytes of {full_name} and {pace:.2f} times its "
    f"milliseconds; {entry['changed_pixels']:.2%} of the golden images' pixels "
    f"change sides; measured on an {entry['cpu']}, and 8-bit arithmetic is not "
    "the same on all: compare with golden.npz where it is to run"
  )
