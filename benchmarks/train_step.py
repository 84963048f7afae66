"""Times kdseg's networks against the same networks in PyTorch.

  pip install 'kdseg[bench]'
  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
  python benchmarks/train_step.py [--networks enet vit_unet] [--batch 8]
      [--size 256] [--repeats 6] [--no-compile] [--threads 2] [--device gpu]
      [--out FILE.csv]

One training step of every student (forward, BCE + soft Dice at full size,
backward, clipping, AdamW with warm-up and cosine, moving average of the
weights, nothing done if a number is not finite; settings of
`configs/isic2016.py`), and the forward pass of every teacher in evaluation
mode, 32-bit floats. JAX runs what `training.loop` runs, `step.make_train_step`
mapped by `devices.parallel`. PyTorch runs `torch_networks.py` twice: eagerly,
and with `torch.compile` (inductor, default mode) around network and loss.

PyTorch is given its better form: contiguous and channels_last memory are both
tried eagerly and the faster one is kept for both ways; AdamW is the fused one,
clipping and averaging work on all tensors at once, gradients are freed and not
zeroed, evaluation is in inference mode. Freed memory is kept, and the variable
above asks for huge pages, for both. Before anything is timed, both sides start
from the same weights and have to agree: on the logits, or on loss and gradient
norm of the first three steps.

All ways take turns, in an order that moves on by one each turn. In its turn a
way rests until the threads of the one before have stopped spinning, makes one
call that does not count, as the caches are another's, and then those that do.
Shown are the medians of all calls and their ratios; above 1, JAX is faster.

GFLOP are twice `networks.count_macs`, three times that for a training step, so
that all ways are measured by the same count. The machine's peak is the fastest
product of two large matrices in the same run, in JAX or PyTorch.

On a GPU both multiply in TF32, as JAX does unless told otherwise, so that they
agree to fewer digits; `torch.compile` records graphs of the kernels there
(mode reduce-overhead), as XLA does unasked.

Most of a first run is `torch.compile`; inductor keeps what it compiled for the
next one. A run with `--repeats 1` does that on a machine that is still busy.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import csv
import dataclasses
import math
import os
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdseg import networks
from kdseg.runtime import devices
from kdseg.runtime import memory
from kdseg.training import optimizer
from kdseg.training import state as state_lib
from kdseg.training import step as step_lib

STUDENTS = ("patch_unet_12k", "patch_unet_50k", "lite_unet", "enet")
TEACHERS = ("vit_unet", "unetpp", "deeplab", "pspnet")

# Columns of the table, and what they are called there.
WAYS = {
  "jax": "JAX",
  "torch_eager": "PyTorch",
  "torch_compiled": "torch.compile",
}

# As in configs/isic2016.py and, what it leaves out, settings.TrainConfig.
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-3
CLIP_NORM = 1.0
AVERAGE_DECAY = 0.99
STEPS = 3008
WARMUP_STEPS = 150

# Side of the matrices whose product is the machine's peak.
PEAK_SIDE = {"cpu": 2048, "gpu": 8192}
# How far losses and logits may be from each other, see `check_agreement`.
TOLERANCE = {"cpu": 2e-3, "gpu": 2e-2}
# What PyTorch calls the devices, and how it compiles for them.
TORCH_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
COMPILE_MODE = {"cpu": "default", "gpu": "reduce-overhead"}
# A libgomp thread that waits for work spins for some milliseconds.
REST_SECONDS = 0.02
# Quick calls are repeated for about so long in each turn.
TURN_SECONDS = 0.4
MOST_CALLS = 8

# Returns what the ways have to agree on: loss and norm, or logits.
Call = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batch:
  """For all ways: image [B, H, W, 3] in [0, 1], mask [B, H, W], float32."""

  image: np.ndarray
  mask: np.ndarray


def make_batch(batch: int, size: int) -> Batch:
  """Makes noise with a darker disc in it."""
  draw = np.random.default_rng(0)
  y, x = np.mgrid[0:size, 0:size]
  disc = np.hypot(y - size / 2, x - size / 2) < size / 4
  mask = np.broadcast_to(disc, (batch, size, size)).astype(np.float32)
  image = draw.random((batch, size, size, 3), np.float32)
  return Batch(image * (1.0 - 0.5 * mask[..., None]), mask)


def load_torch() -> tuple[Any, Any]:
  """Returns the modules `torch` and `torch_networks`.

  Raises:
    ImportError: if PyTorch is not installed; says what to install.
  """
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ImportError(
      "PyTorch, which kdseg is measured against, is not installed: "
      "pip install 'kdseg[bench]'"
    ) from error
  import torch_networks

  return torch, torch_networks


def make_jax_step(name: str, variables: Any, batch: Batch) -> Call:
  """Makes one update of a student, as `kdseg.training.loop` runs it."""
  network = networks.make_network(name, axis_name=devices.AXIS)
  tx = optimizer.make_optimizer(
    name="adamw",
    schedule=optimizer.make_schedule(
      peak=LEARNING_RATE, steps=STEPS, warmup_steps=WARMUP_STEPS
    ),
    weight_decay=WEIGHT_DECAY,
    clip_norm=CLIP_NORM,
  )
  update = devices.parallel(
    step_lib.make_train_step(
      network,
      tx,
      segmentation={"bce": 1.0, "dice": 1.0},
      steps=STEPS,
      ema_decay=AVERAGE_DECAY,
    ),
    replicated=1,
    out_replicated=True,
    donate=True,
  )
  state = devices.replicate(
    state_lib.make_state(variables, {}, tx, seed=0, keep_average=True)
  )
  # Through a mapped function, as in training, so that it lies where the update
  # wants it.
  prepared = jax.pmap(lambda x: x)(
    devices.shard({"image": batch.image, "mask": batch.mask})
  )

  def call() -> np.ndarray:
    nonlocal state
    state, metrics = jax.block_until_ready(update(state, prepared))
    return np.array([metrics["loss"], metrics["gradient_norm"]])

  return call


def make_jax_forward(name: str, variables: Any, batch: Batch) -> Call:
  """Makes the forward pass of a teacher in evaluation mode."""
  network = networks.make_network(name)
  forward = jax.jit(
    lambda variables, image: network.apply(variables, image, train=False)[
      "logits"
    ]
  )
  variables, image = jax.device_put((variables, batch.image))

  def call() -> np.ndarray:
    # On the CPU this is a view.
    return np.asarray(jax.block_until_ready(forward(variables, image)))

  return call


def make_torch_call(
  name: str,
  variables: Any,
  batch: Batch,
  *,
  device: str,
  channels_last: bool,
  compiled: bool,
) -> Call:
  """Makes the same update or forward pass in PyTorch.

  Args:
    name: of the network.
    variables: of the kdseg network, copied.
    batch: images and masks.
    device: "cpu" or "gpu".
    channels_last: whether weights and maps lie in that memory format.
    compiled: whether `torch.compile` is applied.
  """
  torch, twins = load_torch()
  network = twins.TWINS[name]()
  twins.copy_variables(network, variables)
  layout = torch.channels_last if channels_last else torch.contiguous_format
  where = TORCH_DEVICE[device]
  network = network.to(where, memory_format=layout)
  image = torch.from_numpy(batch.image).permute(0, 3, 1, 2)
  image = image.contiguous(memory_format=layout).to(where)
  mask = torch.from_numpy(batch.mask).to(where)
  mode = COMPILE_MODE[device] if compiled else None
  if name in STUDENTS:
    return _make_torch_step(network, image, mask, mode=mode)
  network.eval()
  forward = network
  if compiled:
    forward = torch.compile(network, dynamic=False, mode=mode)

  def call() -> np.ndarray:
    with torch.inference_mode():
      return forward(image).cpu().numpy()

  return call


def _make_torch_step(
  network: Any, image: Any, mask: Any, *, mode: str | None
) -> Call:
  torch, _ = load_torch()
  network.train()

  def loss_fn(image: Any, mask: Any) -> Any:
    logits = network(image)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, mask)
    probability = logits.sigmoid()
    overlap = (probability * mask).sum((1, 2))
    area = probability.sum((1, 2)) + mask.sum((1, 2))
    return bce + (1.0 - (2.0 * overlap + 1.0) / (area + 1.0)).mean()

  if mode:
    loss_fn = torch.compile(loss_fn, dynamic=False, mode=mode)
  parameters = list(network.parameters())
  kernels = [x for x in parameters if x.ndim > 1]
  others = [x for x in parameters if x.ndim <= 1]
  tx = torch.optim.AdamW(
    [
      {"params": kernels, "weight_decay": WEIGHT_DECAY},
      {"params": others, "weight_decay": 0.0},
    ],
    lr=LEARNING_RATE,
    fused=True,
  )

  def learning_rate(step: int) -> float:
    if step < WARMUP_STEPS:
      return step / WARMUP_STEPS
    passed = min((step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * passed))

  schedule = torch.optim.lr_scheduler.LambdaLR(tx, learning_rate)
  # These share their memory with the network; counters are left out.
  now = [x for x in network.state_dict().values() if x.is_floating_point()]
  average = [x.clone() for x in now]
  count = 0

  def call() -> np.ndarray:
    nonlocal count
    tx.zero_grad(set_to_none=True)
    loss = loss_fn(image, mask)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    if torch.isfinite(loss + norm):
      tx.step()
      decay = min(AVERAGE_DECAY, (1.0 + count) / (10.0 + count))
      with torch.no_grad():
        torch._foreach_lerp_(average, now, 1.0 - decay)
    schedule.step()
    count += 1
    return np.array([loss.item(), norm.item()])

  return call


def check_agreement(
  name: str, way: str, ours: np.ndarray, theirs: Any, tolerance: float
) -> None:
  """Holds what PyTorch computed against what JAX did.

  Raises:
    RuntimeError: if they are not the same network, and no comparison is fair.
  """
  scale = max(1.0, float(np.sqrt(np.mean(np.square(ours)))))
  off = float(np.max(np.abs(ours - theirs)))
  # Not `off > ...`, which is false of a number that is none.
  if not off <= tolerance * scale:
    raise RuntimeError(f"{name}: {way} is {off:.2g} away from JAX")


def seconds(call: Call) -> float:
  """Returns how long one call takes."""
  began = time.perf_counter()
  call()
  return time.perf_counter() - began


def take_turns(
  calls: Mapping[str, Call], repeats: int
) -> dict[str, list[float]]:
  """Returns the seconds of every call that counts, by way."""
  ways = list(calls)
  taken: dict[str, list[float]] = {way: [] for way in ways}
  for turn in range(repeats):
    first = turn % len(ways)
    for way in ways[first:] + ways[:first]:
      time.sleep(REST_SECONDS)
      warm = seconds(calls[way])
      count = min(max(round(TURN_SECONDS / warm), 1), MOST_CALLS)
      taken[way] += [seconds(calls[way]) for _ in range(count)]
  return taken


def measure_peak(repeats: int, device: str) -> dict[str, float]:
  """Returns the GFLOP/s of a large product in each framework."""
  torch, _ = load_torch()
  side = PEAK_SIDE[device]
  x = np.random.default_rng(0).random((side, side), np.float32)
  ours = jax.device_put(x)
  theirs = torch.from_numpy(x).to(TORCH_DEVICE[device])
  product = jax.jit(jnp.matmul)

  def multiply() -> None:
    _ = theirs @ theirs
    if device == "gpu":
      torch.cuda.synchronize()

  calls = {
    "jax": lambda: jax.block_until_ready(product(ours, ours)),
    "torch": multiply,
  }
  calls["jax"]()
  taken = take_turns(calls, repeats)
  return {way: 2e-9 * side**3 / min(taken[way]) for way in calls}


def measure(
  name: str,
  *,
  device: str,
  batch: int,
  size: int,
  repeats: int,
  compiled: bool,
) -> dict[str, Any]:
  """Measures one network; returns its row of the table, peak left out.

  Raises:
    RuntimeError: if PyTorch computes something else than JAX.
  """
  trains = name in STUDENTS
  images = make_batch(batch, size)
  variables = jax.device_get(
    networks.make_variables(
      networks.make_network(name), jax.random.key(0), size=size, weights=False
    )
  )
  macs = networks.count_macs(networks.make_network(name), size=size)
  make = make_jax_step if trains else make_jax_forward
  calls = {"jax": make(name, variables, images)}
  expected = [calls["jax"]() for _ in range(3 if trains else 1)]

  def add(way: str, *, channels_last: bool, compiled: bool) -> None:
    calls[way] = make_torch_call(
      name,
      variables,
      images,
      device=device,
      channels_last=channels_last,
      compiled=compiled,
    )
    for ours in expected:
      check_agreement(name, way, ours, calls[way](), TOLERANCE[device])

  formats = {"contiguous": False, "channels_last": True}
  for layout, channels_last in formats.items():
    add(layout, channels_last=channels_last, compiled=False)
  tried = take_turns({layout: calls[layout] for layout in formats}, 2)
  layout = min(formats, key=lambda layout: np.median(tried[layout]))
  calls = {"jax": calls["jax"], "torch_eager": calls[layout]}
  if compiled:
    torch, _ = load_torch()
    # One network's guards would be checked in the next one's calls.
    torch.compiler.reset()
    add("torch_compiled", channels_last=formats[layout], compiled=True)
  taken = take_turns(calls, repeats)

  gflop = 2e-9 * macs * batch * (3 if trains else 1)
  row: dict[str, Any] = {
    "network": name,
    "pass": "training step" if trains else "forward",
    "batch": batch,
    "size": size,
    "parameters": networks.count_parameters(variables),
    "gflop": gflop,
    "torch_format": layout,
  }
  for way, each in taken.items():
    low, median, high = np.quantile(each, (0.25, 0.5, 0.75))
    row[f"{way}_ms"] = 1e3 * median
    row[f"{way}_low_ms"], row[f"{way}_high_ms"] = 1e3 * low, 1e3 * high
    row[f"{way}_calls"] = len(each)
    row[f"{way}_gflops"] = gflop / median
    if way != "jax":
      row[f"{way}_over_jax"] = row[f"{way}_ms"] / row["jax_ms"]
  return row


def format_tables(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns two Markdown tables, of times and of speeds."""
  ways = [way for way in WAYS if f"{way}_ms" in rows[0]]
  titles = [WAYS[way] for way in ways]
  lines = [
    "| network | pass | PyTorch's format | "
    + " | ".join(f"{title}, ms" for title in titles)
    + "".join(f" | {title} / JAX" for title in titles[1:])
    + " |",
    "|---|---|---|" + "---:|" * (2 * len(ways) - 1),
  ]
  for row in rows:
    cells = [row["network"], row["pass"], row["torch_format"]]
    cells += [f"{row[f'{way}_ms']:.1f}" for way in ways]
    cells += [f"{row[f'{way}_over_jax']:.2f}" for way in ways[1:]]
    lines.append("| " + " | ".join(cells) + " |")
  lines += [
    "",
    "| network | pass | GFLOP | "
    + " | ".join(f"{title}, GFLOP/s | of peak" for title in titles)
    + " |",
    "|---|---|" + "---:|" * (2 * len(ways) + 1),
  ]
  for row in rows:
    cells = [row["network"], row["pass"], f"{row['gflop']:.1f}"]
    for way in ways:
      speed = row[f"{way}_gflops"]
      cells += [f"{speed:.1f}", f"{speed / row['peak_gflops']:.0%}"]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes one line a network."""
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
      writer.writerow(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
      )


def bind(threads: int) -> int:
  """Binds this process to so many cores; returns how many it has.

  JAX has no switch for the size of its thread pool, which is that of the cores
  the process may run on when it is first used. PyTorch's has one.

  Args:
    threads: 0 for all cores that the process has now.

  Raises:
    ValueError: if there are fewer, or they cannot be bound here.
  """
  if not hasattr(os, "sched_setaffinity"):
    if threads:
      raise ValueError("--threads needs Linux, to bind JAX to as many cores")
    return os.cpu_count() or 1
  cores = sorted(os.sched_getaffinity(0))
  if threads > len(cores) or threads < 0:
    raise ValueError(f"--threads {threads}: there are {len(cores)} cores")
  if threads:
    os.sched_setaffinity(0, cores[:threads])
  return len(os.sched_getaffinity(0))


def processor() -> str:
  """Returns the name of the processor, as far as the system tells it."""
  path = pathlib.Path("/proc/cpuinfo")
  if path.exists():
    for line in path.read_text(encoding="utf-8").splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  known = (*STUDENTS, *TEACHERS)
  parser.add_argument(
    "--networks", nargs="+", choices=known, default=known, metavar="NAME"
  )
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--size", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=6, help="turns of each")
  parser.add_argument("--no-compile", action="store_true")
  parser.add_argument(
    "--threads",
    type=int,
    default=0,
    help="cores to bind both frameworks to; 0 for all",
  )
  parser.add_argument("--device", choices=tuple(TORCH_DEVICE), default="cpu")
  parser.add_argument("--out", type=pathlib.Path, help="a CSV file")
  options = parser.parse_args()
  if "GLIBC_TUNABLES" not in os.environ:
    print("no huge pages: GLIBC_TUNABLES is not set, see --help")
  memory.keep_freed()

  device = options.device
  jax.config.update("jax_platforms", "cpu" if device == "cpu" else "cuda")
  try:
    # Before PyTorch is loaded and JAX used, which count the cores.
    cores = bind(options.threads)
    torch, _ = load_torch()
  except (ImportError, ValueError) as error:
    sys.exit(str(error))
  torch.set_num_threads(cores)
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.backends.cudnn.allow_tf32 = True

  peaks = measure_peak(options.repeats, device)
  peak = max(peaks.values())
  about = {
    "peak_gflops": peak,
    "python": platform.python_version(),
    "jax": jax.__version__,
    "torch": torch.__version__,
    "cores": cores,
    "processor": processor(),
    "device": jax.devices()[0].device_kind,
  }
  rows: list[dict[str, Any]] = []
  for name in options.networks:
    began = time.perf_counter()
    row = measure(
      name,
      device=device,
      batch=options.batch,
      size=options.size,
      repeats=options.repeats,
      compiled=not options.no_compile,
    )
    rows.append(row | about)
    if options.out:
      # After each, so that a run that is cut short leaves what it has.
      write_csv(options.out, rows)
    took = time.perf_counter() - began
    print(f"{name}: done in {took:.0f} s", file=sys.stderr, flush=True)

  print(
    f"jax {jax.__version__}, torch {torch.__version__}, Python "
    f"{about['python']}, {about['processor']}, {about['device']}; bound to "
    f"{cores} cores (JAX), {torch.get_num_threads()} threads (PyTorch); "
    f"batch {options.batch}, {options.size} x {options.size} pixels, "
    f"medians of {options.repeats} turns; peak {peak:.0f} GFLOP/s "
    f"(JAX {peaks['jax']:.0f}, PyTorch {peaks['torch']:.0f}, "
    f"{PEAK_SIDE[device]} x {PEAK_SIDE[device]} "
    "matrices)\n"
  )
  print(format_tables(rows))


if __name__ == "__main__":
  main()
