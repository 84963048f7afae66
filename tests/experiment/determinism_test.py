"""What gives the same bits, and what the same numbers; docs/determinism.md.

Each course is a process of its own. They are shared, as starting one and
compiling is most of what they take.
"""

import csv
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kdseg.runtime import checkpoint
from kdseg.runtime import preemption

TESTS = pathlib.Path(__file__).parents[1]
NETWORKS = (
  "teachers/teacher_tiny",
  "arms/tiny-none-seed0",
  "arms/tiny-mbf-seed0",
)


def course(workdir, data_dir, *flags, devices, compiled=None):
  """Runs it; `compiled` is the folder of programs that it may take over."""
  count = f"--xla_force_host_platform_device_count={devices}"
  done = subprocess.run(
    [sys.executable, "course_run.py", str(workdir), str(data_dir), *flags],
    cwd=TESTS,
    env=os.environ
    | {
      "PYTHONPATH": str(TESTS.parent),
      # Beside what conftest sets, which makes compilation quick.
      "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}",
    }
    | (
      {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      }
      if compiled
      else {}
    ),
    capture_output=True,
    text=True,
    check=False,
  )
  stopped = "--stop" in flags
  assert done.returncode == stopped * preemption.EXIT_CODE, done.stderr[-3000:]
  if stopped:
    assert "students: stopped after step 2 of 6" in done.stdout
  return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("courses")


@pytest.fixture(scope="module")
def compiled(folder):
  return folder / "compiled"


@pytest.fixture(scope="module")
def on_two(folder, compiled):
  return course(folder / "two", folder / "data", devices=2, compiled=compiled)


@pytest.fixture(scope="module")
def on_one(folder, compiled):
  return course(folder / "one", folder / "data", devices=1, compiled=compiled)


def leaves(workdir, network):
  return checkpoint.flatten(checkpoint.load_variables(workdir / network)[0])


def rows(workdir):
  with (workdir / "scores.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def assert_same_numbers(ours, theirs):
  for network in NETWORKS:
    expected = leaves(theirs, network)
    for name, value in leaves(ours, network).items():
      np.testing.assert_allclose(
        value, expected[name], rtol=1e-5, atol=1e-5, err_msg=f"{network} {name}"
      )
  keys = ("arm", "seed", "dataset", "id")
  ours, theirs = rows(ours), rows(theirs)
  assert [[r[k] for k in keys] for r in ours] == [
    [r[k] for k in keys] for r in theirs
  ]
  np.testing.assert_allclose(
    [float(r["dice"]) for r in ours],
    [float(r["dice"]) for r in theirs],
    atol=1e-3,
  )


def test_two_processes_of_the_same_run_write_the_same_bits(folder, on_two):
  # That compiles its programs itself.
  again = course(folder / "again", folder / "data", devices=2)
  for network in NETWORKS:
    expected = leaves(on_two, network)
    found = leaves(again, network)
    assert found.keys() == expected.keys()
    for name, value in found.items():
      assert value.tobytes() == expected[name].tobytes(), f"{network} {name}"
  ours, theirs = (
    {
      p.relative_to(w): p.read_bytes()
      for p in (w / "predictions").rglob("*.png")
    }
    for w in (again, on_two)
  )
  assert len(ours) == 3 * 6
  assert ours == theirs
  for name in ("scores.csv", "table.csv"):
    assert (again / name).read_bytes() == (on_two / name).read_bytes()


def test_two_devices_train_what_one_does(on_one, on_two):
  assert_same_numbers(on_two, on_one)


@pytest.mark.long
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_devices(
  folder, compiled, on_one, first, then
):
  workdir, data = folder / f"from{first}to{then}", folder / "data"
  course(workdir, data, "--stop", devices=first, compiled=compiled)
  course(workdir, data, devices=then, compiled=compiled)
  assert_same_numbers(workdir, on_one)
