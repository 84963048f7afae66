"""A run that is killed again and again ends as one that never was.

KDSEG_KILLS says how often; unset, these tests are skipped, as each kill takes
half a minute:

  KDSEG_KILLS=24 pytest -n 0 tests/experiment/kill_test.py -s
"""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kdseg.runtime import checkpoint
from kdseg.runtime import preemption

TESTS = pathlib.Path(__file__).parents[1]
KILLS = int(os.environ.get("KDSEG_KILLS", "0"))
pytestmark = pytest.mark.skipif(
  not KILLS, reason="KDSEG_KILLS=24 kills that often, half a minute each"
)
# Bounds a run that hangs, not one that is slow.
TIMEOUT = 600
# What a run is doing when it is killed; "": anything, by the time it takes.
AIMS = ("", "scores", "students", "scores", "teacher_")


def start(workdir, data_dir, *flags):
  return subprocess.Popen(
    [sys.executable, "killed_run.py", str(workdir), str(data_dir), *flags],
    cwd=TESTS,
    env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def read_until(process, stage):
  """Reads what a run says until a stage speaks, or it ends."""
  read = []
  for line in process.stdout:
    read.append(line)
    if line.startswith(stage):
      break
  return "".join(read)


def finish(process):
  out, _ = process.communicate(timeout=TIMEOUT)
  assert process.returncode == 0, out[-3000:]
  return out


def stage_of(out):
  """Names what was going on when the output ended."""
  lines = [line for line in out.splitlines() if ": " in line]
  names = [line.split(":")[0] for line in lines]
  stages = [n for n in names if re.match(r"teacher_|students|scores|data", n)]
  return stages[-1] if stages else "start"


def assert_same(workdir, reference):
  for name in ("scores.csv", "table.csv"):
    assert (workdir / name).read_bytes() == (reference / name).read_bytes()
  networks = sorted(
    path.parent.relative_to(reference)
    for kind in ("teachers", "arms")
    for path in reference.glob(f"{kind}/*/about.json")
  )
  assert len(networks) == 4
  for network in networks:
    ours, theirs = (
      checkpoint.flatten(checkpoint.load_variables(folder / network)[0])
      for folder in (workdir, reference)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
      np.testing.assert_array_equal(value, theirs[name], f"{network} {name}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nobody stopped: (workdir, data, seconds, renames)."""
  folder = tmp_path_factory.mktemp("whole")
  data = folder / "data"
  # The first prepares the data and compiles.
  finish(start(folder / "first", data))
  began = time.monotonic()
  out = finish(start(folder / "reference", data))
  seconds = time.monotonic() - began
  renames = int(re.findall(r"renames: (\d+)", out)[-1])
  return folder / "reference", data, seconds, renames


def test_a_run_killed_at_any_point_ends_as_one_that_was_not(
  whole, tmp_path, capsys
):
  reference, data, seconds, renames = whole
  workdir = tmp_path / "run"
  draw = random.Random(KILLS)
  log, killed = [], 0
  while killed < KILLS:
    kind = ("SIGTERM", "rename", "SIGKILL")[killed % 3]
    flags = []
    if kind == "rename":
      # In a tenth of a run, as what is done is not done again.
      flags = ["--die-at-rename", str(draw.randint(1, max(1, renames // 10)))]
    process = start(workdir, data, *flags)
    after = draw.uniform(0.1, 1.0) * seconds
    before, aim = "", AIMS[killed // 3 % len(AIMS)]
    if aim and kind != "rename":
      before, after = read_until(process, aim), draw.uniform(0.0, 0.5)
    try:
      out, _ = process.communicate(
        timeout=TIMEOUT if kind == "rename" else after
      )
    except subprocess.TimeoutExpired:
      process.send_signal(getattr(signal, kind))
      out, _ = process.communicate(timeout=TIMEOUT)
    out = before + out
    code = process.returncode
    if code == 0:
      # It was faster. Once more from the start.
      assert_same(workdir, reference)
      workdir = tmp_path / f"run{killed}_{len(log)}"
      log.append("     finished, started anew")
      continue
    killed += 1
    assert code in (-signal.SIGKILL, -signal.SIGTERM, preemption.EXIT_CODE), out
    log.append(f"{killed:4} {kind:8} exit {code:4}  {stage_of(out)}")
  finish(start(workdir, data))
  assert_same(workdir, reference)
  with capsys.disabled():
    print("\n".join(["", "kill log:", *log, "differences: none"]))


def test_a_second_process_on_a_workdir_stops_with_a_message(whole, tmp_path):
  _, data, _, _ = whole
  first = start(tmp_path / "run", data)
  lock = tmp_path / "run" / "config.json"
  deadline = time.monotonic() + TIMEOUT
  while not lock.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  second = start(tmp_path / "run", data)
  out, _ = second.communicate(timeout=TIMEOUT)
  first.kill()
  first.communicate()
  assert second.returncode == 1
  assert "another process works in" in out
