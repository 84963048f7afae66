"""Two processes as two hosts, against one process with two devices.

KDSEG_HOSTS=1 pytest -n 0 tests/runtime/hosts_test.py
"""

import csv
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from kdseg.runtime import checkpoint
from kdseg.runtime import hosts
from kdseg.runtime import preemption

TESTS = pathlib.Path(__file__).parents[1]
# Bounds a run that hangs, not one that is slow.
TIMEOUT = 1800
STARTED = []
long = pytest.mark.skipif(
  not os.environ.get("KDSEG_HOSTS"),
  reason="four minutes of processes; KDSEG_HOSTS=1 runs them",
)


def free_port():
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def _nothing_runs_on():
  yield
  for process in STARTED:
    if process.poll() is None:
      process.kill()
      process.communicate()


def start(workdir, data_dir, *flags, devices=1, script="killed_run.py"):
  count = f"--xla_force_host_platform_device_count={devices}"
  process = subprocess.Popen(
    [sys.executable, script, str(workdir), str(data_dir), *flags],
    cwd=TESTS,
    env=os.environ
    | {
      "PYTHONPATH": str(TESTS.parent),
      # Beside what conftest sets, which makes compilation quick.
      "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  STARTED.append(process)
  return process


def start_pair(folder, data_dir, *flags, **options):
  address = f"localhost:{free_port()}"
  return [
    start(
      folder / f"host{index}",
      data_dir,
      *("--coordinator", address, "--hosts", "2", "--host", str(index)),
      *flags,
      **options,
    )
    for index in range(2)
  ]


def wait_until_begun(folder):
  """Waits for the first line that a pair logs."""
  deadline = time.monotonic() + TIMEOUT
  while not (folder / "host0" / "log.jsonl").exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def end(process):
  out, _ = process.communicate(timeout=TIMEOUT)
  return process.returncode, out


def variables_of(workdir):
  return {
    f"{path.parent.name}/{name}": value
    for kind in ("teachers", "arms")
    for path in sorted(workdir.glob(f"{kind}/*/about.json"))
    for name, value in checkpoint.flatten(
      checkpoint.load_variables(path.parent)[0]
    ).items()
  }


def rows_of(workdir):
  with (workdir / "scores.csv").open(newline="") as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(one process's workdir, the folder of the two hosts', the data)."""
  folder = tmp_path_factory.mktemp("hosts")
  data = folder / "data"
  one = start(folder / "one", data, devices=2)
  code, out = end(one)
  assert code == 0, out[-3000:]
  for process in start_pair(folder, data):
    code, out = end(process)
    assert code == 0, out[-3000:]
  return folder / "one", folder, data


def start_brief(folder, data_dir):
  """Two hosts that train the smallest networks for 30 steps each."""
  return start_pair(folder, data_dir, "--steps=30", script="course_run.py")


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
  """(the folder of two hosts that ran to the end, the data)."""
  folder = tmp_path_factory.mktemp("brief")
  for process in start_brief(folder, folder / "data"):
    code, out = end(process)
    assert code == 0, out[-3000:]
  return folder, folder / "data"


# The other two learn from stored outputs in 16 bits, of batches of 8 here and
# of 4 there: they differ in the last bit, and 30 steps later in all.
EXACT = ("teacher_unet", "patch_unet-none-seed0")


def losses_of(workdir, arm):
  lines = (workdir / "log.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [r["loss"] for r in records if r.get("arm") == arm and "loss" in r]


@long
@pytest.mark.parametrize("network", EXACT)
def test_two_hosts_train_the_weights_of_one_process(runs, network):
  one, folder, _ = runs
  ours, theirs = variables_of(folder / "host0"), variables_of(one)
  assert ours.keys() == theirs.keys()
  names = [name for name in ours if name.startswith(f"{network}/")]
  assert len(names) > 10
  for name in names:
    np.testing.assert_allclose(
      ours[name], theirs[name], atol=1e-5, err_msg=name
    )
  np.testing.assert_allclose(
    losses_of(folder / "host0", network), losses_of(one, network), rtol=1e-5
  )


@long
def test_two_hosts_start_with_the_same_loss_on_stored_teacher_outputs(runs):
  one, folder, _ = runs
  ours, theirs = (losses_of(w, "teacher_vit") for w in (folder / "host0", one))
  assert len(ours) == len(theirs)
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)


@long
def test_two_hosts_score_every_image_once(runs):
  one, folder, _ = runs
  ours, theirs = rows_of(folder / "host0"), rows_of(one)
  keys = ("arm", "seed", "dataset", "id")
  assert [[row[k] for k in keys] for row in ours] == [
    [row[k] for k in keys] for row in theirs
  ]
  exact = [
    (float(a["dice"]), float(b["dice"]))
    for a, b in zip(ours, theirs)
    if a["arm"] in ("teacher_unet", "patch_unet-none")
  ]
  assert len(exact) == 2 * 6
  np.testing.assert_allclose(*zip(*exact), atol=1e-6)
  masks = [
    sorted((w / "predictions" / "teacher_unet-seed0").rglob("*.png"))
    for w in (folder / "host0", one)
  ]
  assert [p.read_bytes() for p in masks[0]] == [
    p.read_bytes() for p in masks[1]
  ]
  assert len(masks[0]) == 6


@long
def test_one_host_writes(runs):
  _, folder, _ = runs
  assert (folder / "host0" / "table.md").exists()
  written = {
    path.relative_to(folder / "host1").parts[0]
    for path in (folder / "host1").rglob("*")
    if path.is_file()
  }
  # The outputs of its frozen networks, which no other host reads.
  assert written == {"cache"}


@long
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_host_stops_both_and_they_resume(
  brief, tmp_path, asked
):
  folder, data = brief
  pair = start_brief(tmp_path, data)
  wait_until_begun(tmp_path)
  pair[asked].send_signal(signal.SIGTERM)
  for process in pair:
    code, out = end(process)
    assert code == preemption.EXIT_CODE, out[-3000:]
  for process in start_brief(tmp_path, data):
    code, out = end(process)
    assert code == 0, out[-3000:]
  ours, theirs = (
    variables_of(tmp_path / "host0"),
    variables_of(folder / "host0"),
  )
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@long
@pytest.mark.parametrize("dead", [0, 1])
def test_a_host_that_dies_makes_the_other_stop(brief, tmp_path, dead):
  _, data = brief
  pair = start_brief(tmp_path, data)
  wait_until_begun(tmp_path)
  pair[dead].send_signal(signal.SIGKILL)
  end(pair[dead])
  died = time.monotonic()
  code, out = end(pair[1 - dead])
  assert code != 0, out[-3000:]
  # Half a minute of silence is allowed in course_run, and some to notice.
  assert time.monotonic() - died < 90


@long
@pytest.mark.parametrize("hung", [0, 1])
def test_a_second_ctrl_c_ends_a_host_that_waits_for_one_that_hangs(
  brief, tmp_path, hung
):
  _, data = brief
  pair = start_brief(tmp_path, data)
  wait_until_begun(tmp_path)
  pair[hung].send_signal(signal.SIGSTOP)
  # It comes to where it waits.
  time.sleep(3)
  asked = time.monotonic()
  for _ in range(2):
    pair[1 - hung].send_signal(signal.SIGINT)
    time.sleep(0.5)
  code, out = end(pair[1 - hung])
  assert code == 128 + signal.SIGINT, out[-3000:]
  assert "kdseg: ended; the same command continues" in out
  # Half a minute of silence would end it too.
  assert time.monotonic() - asked < 10
  pair[hung].send_signal(signal.SIGCONT)
  code, out = end(pair[hung])
  assert code != 0, out[-3000:]


@long
def test_an_error_of_one_host_makes_the_other_stop_soon(brief, tmp_path):
  _, data = brief
  (tmp_path / "host0").mkdir()
  (tmp_path / "host0" / "checkpoints").write_text("in the way of a folder")
  first, other = start_brief(tmp_path, data)
  code, out = end(first)
  failed = time.monotonic()
  assert code == 1
  assert "A file is where a folder has to be" in out
  code, out = end(other)
  assert code != 0, out[-3000:]
  # Python's own end would wait five minutes.
  assert time.monotonic() - failed < 60


def test_on_one_host_an_error_ends_as_in_any_python_program():
  with pytest.raises(SystemExit, match=r"^it says all$"):
    hosts.end(ValueError("x"), "it says all")
  for error in (ValueError("x"), KeyboardInterrupt()):
    with pytest.raises(type(error)):
      hosts.end(error)


def test_arrays_of_any_shape_and_order_can_be_packed():
  arrays = {
    "step": np.int32(7),
    "seed": np.zeros((), np.uint32),
    "turned": np.arange(6.0, dtype=np.float32).reshape(2, 3).T,
  }
  found = safetensors.numpy.load(hosts.pack_arrays(arrays))
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].shape == np.shape(array)
    np.testing.assert_array_equal(found[name], array)


def test_on_one_host_nothing_is_exchanged():
  assert hosts.is_first()
  assert not hosts.are_many()
  assert hosts.on_first(lambda: (1, 2)) == (1, 2)
  assert hosts.gather({"a": 1}) == [{"a": 1}]
  x = np.arange(3)
  assert hosts.arrays_of_first(lambda: {"x": x})["x"] is x
  values = iter([False, True])
  ask = hosts.share_question(lambda: next(values))
  assert [ask(), ask()] == [False, True]
