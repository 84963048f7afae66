import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import copy
from tiny_run import make_config
from tiny_run import read_rows
from tiny_run import snapshot
from tiny_run import variables_of

from kdseg.data import archives
from kdseg.experiment import run
from kdseg.experiment import workdir as workdir_lib
from kdseg.report import scores as scores_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import preemption


def assert_same_checkpoints(*workdirs):
  found = []
  for workdir in workdirs:
    folder = workdir / "checkpoints" / "arms" / "000" / "steps"
    with checkpoint.open_checkpoints(folder) as manager:
      found.append(checkpoint.restore_latest(manager))
  (step, tree, extra), (other_step, other_tree, other_extra) = found
  assert step == other_step == 6
  assert extra == other_extra
  jax.tree.map(np.testing.assert_array_equal, tree, other_tree)


def test_leaves_every_file_that_is_promised(finished):
  assert finished.ran is True
  found = {path.name for path in finished.workdir.iterdir()}
  assert found >= {
    "config.json",
    "environment.json",
    "log.jsonl",
    "scores.csv",
    "report.json",
    "table.md",
    "overlays.png",
    "arms",
    "teachers",
    "checkpoints",
    "predictions",
  }
  assert checkpoint.is_finished(finished.workdir / "teachers" / "teacher_unet")
  for arm in ("patch_unet-none-seed0", "patch_unet-mbf-seed0"):
    assert checkpoint.is_finished(finished.workdir / "arms" / arm)


def test_records_what_the_numbers_were_made_from(finished):
  environment = json.loads((finished.workdir / "environment.json").read_text())
  assert set(environment["data"]) == {"train", "validation", "synthetic_test"}
  assert environment["data"]["train"]["images"] == 24
  assert len(environment["data"]["train"]["sha256"]) == 64
  config = json.loads((finished.workdir / "config.json").read_text())
  assert config["training"]["learning_rate"] == 1e-2


def _refuse(token):
  raise ValueError(token)


def test_the_log_is_json_line_by_line(finished):
  records = [
    json.loads(line, parse_constant=_refuse)
    for line in (finished.workdir / "log.jsonl").read_text().splitlines()
  ]
  steps = {r["step"] for r in records if r["stage"] == "teacher_unet"}
  assert max(steps) == 3
  student = [r for r in records if r.get("arm") == "patch_unet-mbf-seed0"]
  assert max(r["step"] for r in student) == 6
  assert any("mbf_low" in r for r in student)
  assert sum("validation_dice" in r for r in student) == 2
  assert records[-1]["stage"] == "run"


def test_a_finished_run_is_left_as_it_is(finished):
  before = snapshot(finished.workdir)
  assert run.run(finished.config, finished.workdir) is False
  assert snapshot(finished.workdir) == before


def test_another_config_is_refused_by_its_key(finished, data_dir):
  before = snapshot(finished.workdir)
  config = make_config(data_dir)
  config.training.learning_rate = 2e-2
  with pytest.raises(
    workdir_lib.WorkdirError, match=r"training\.learning_rate was 0\.01"
  ):
    run.run(config, finished.workdir)
  assert snapshot(finished.workdir) == before


def test_a_second_process_is_refused(finished):
  hold = (
    "import fcntl, sys; file = open(sys.argv[1], 'a');"
    "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True);"
    "sys.stdin.read()"
  )
  other = subprocess.Popen(
    [sys.executable, "-c", hold, str(finished.workdir / ".lock")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  with other:
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(workdir_lib.WorkdirError, match="another process"):
      run.run(finished.config, finished.workdir)
    other.stdin.close()


def test_stopped_twice_and_gone_on_is_as_never_stopped(
  finished, tmp_path, monkeypatch, caplog
):
  workdir = copy(finished, tmp_path / "torn", "config.json", "teachers")
  append_line, append_rows = checkpoint.append_json_line, scores_lib.append

  def stop_in_training(path, record):
    append_line(path, record)
    if record["stage"] == "students" and record["step"] == 4:
      raise KeyboardInterrupt

  def stop_in_scoring(*arguments):
    append_rows(*arguments)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "append_json_line", stop_in_training)
    with pytest.raises(KeyboardInterrupt):
      run.run(finished.config, workdir)
  assert not (workdir / "arms").exists()
  with monkeypatch.context() as patch:
    patch.setattr(scores_lib, "append", stop_in_scoring)
    with (
      caplog.at_level("INFO", logger="kdseg"),
      pytest.raises(KeyboardInterrupt),
    ):
      run.run(finished.config, workdir)
  assert "students: resumes at step 3 of 6" in caplog.text
  assert len(read_rows(workdir)) == 6

  assert run.run(finished.config, workdir) is True
  for name in ("scores.csv", "table.md", "report.json"):
    assert (workdir / name).read_bytes() == (
      finished.workdir / name
    ).read_bytes()
  for arm in ("patch_unet-none-seed0", "patch_unet-mbf-seed0"):
    jax.tree.map(
      np.testing.assert_array_equal,
      variables_of(workdir, arm),
      variables_of(finished.workdir, arm),
    )
  # The last state too, as the best one may be from before the stop.
  assert_same_checkpoints(workdir, finished.workdir)
  assert run.run(finished.config, workdir) is False


@pytest.mark.long
def test_a_clock_that_goes_backwards_changes_nothing(
  finished, tmp_path, monkeypatch, caplog
):
  workdir = copy(
    finished, tmp_path / "clock", "config.json", "teachers", "checkpoints"
  )
  steps = workdir / "checkpoints" / "arms" / "000" / "steps"
  shutil.rmtree(steps / "6")
  with pytest.raises(preemption.StoppedError, match="after step 4 of 6"):
    run.run(finished.config, workdir, stop=lambda: True)
  now = time.time()
  os.utime(steps / "3", (now + 1e9, now + 1e9))
  os.utime(steps / "4", (0, 0))
  monkeypatch.setattr(time, "time", lambda: 1.0)
  with caplog.at_level("INFO", logger="kdseg"):
    assert run.run(finished.config, workdir) is True
  assert "students: resumes at step 4 of 6" in caplog.text
  assert {path.name for path in steps.iterdir() if path.is_dir()} == {"4", "6"}
  for name in ("scores.csv", "table.md"):
    assert (workdir / name).read_bytes() == (
      finished.workdir / name
    ).read_bytes()


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 8 MiB."""
  place = tmp_path / "disk"
  place.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place]
  if not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
    pytest.skip("mounting a disk takes rights that this process lacks")
  yield place
  subprocess.run(["umount", place], check=True)


def test_a_disk_that_may_not_be_written_to_is_named(finished, small_disk):
  subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
  with pytest.raises(files.WriteError) as error:
    run.run(finished.config, small_disk / "run")
  assert str(error.value) == (
    f"{small_disk}/run cannot be written: Read-only file system. Allow it, "
    "then the same command continues, or choose another folder"
  )


@pytest.mark.long
# Python 3.11 tells so of what orbax leaves behind of a save that failed.
@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")
def test_on_a_disk_that_is_full_again_and_again_it_ends_as_never_stopped(
  finished, small_disk
):
  config = finished.config.copy_and_resolve_references()
  workdir = copy(finished, small_disk / "run", "config.json", "teachers")
  filler = small_disk / "filler"
  free = shutil.disk_usage(small_disk).free
  filler.write_bytes(bytes(free))
  named = set()
  while True:
    try:
      assert run.run(config, workdir) is True
      break
    except files.WriteError as error:
      path, _, why = str(error).partition(" cannot be written: ")
      assert why.startswith("the disk is full. Free some space, then the same")
      named.add(str(pathlib.Path(path).relative_to(workdir)))
    assert not list(workdir.rglob("*.part"))
    free -= 700 << 10
    assert free > 0
    os.truncate(filler, free)
  # One thing after the other found no room.
  assert len(named) > 1, named
  for name in ("scores.csv", "table.md", "report.json", "overlays.png"):
    assert (workdir / name).read_bytes() == (
      finished.workdir / name
    ).read_bytes()
  for line in (workdir / "log.jsonl").read_text().splitlines():
    json.loads(line)
  # While these warnings are let pass, and not in the next test.
  gc.collect()


def test_a_slip_in_the_first_command_costs_nothing(data_dir, tmp_path):
  config = make_config(data_dir)
  config.data.name, config.data.tests = "folder", ("folder",)
  config.data.manual_dir = str(tmp_path / "nowhere")
  with pytest.raises(archives.DataError, match="nowhere"):
    run.run(config, tmp_path / "run")
  assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_other_images_in_the_same_workdir_are_refused(finished, tmp_path):
  workdir = copy(finished, tmp_path / "run", "config.json", "environment.json")
  environment = json.loads((workdir / "environment.json").read_text())
  environment["data"]["synthetic_test"]["sha256"] = "0" * 64
  checkpoint.write_json(workdir / "environment.json", environment)
  with pytest.raises(
    workdir_lib.WorkdirError, match="begun with other synthetic_test images"
  ):
    run.run(finished.config, workdir)
