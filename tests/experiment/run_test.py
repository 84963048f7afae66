"""Whole experiments on drawn lesions, with networks of a few hundred weights.

Runs are shared: each one compiles several programs, which is what costs.
"""

import csv
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tiny
from tiny_run import FROZEN
from tiny_run import TEACHER
from tiny_run import make_config

from kdseg import networks
from kdseg.data import archives
from kdseg.data import orientations
from kdseg.distill import extensions as extensions_lib
from kdseg.distill import method as method_lib
from kdseg.evaluation import evaluate
from kdseg.experiment import config as config_lib
from kdseg.experiment import reporting
from kdseg.experiment import run
from kdseg.experiment import scoring
from kdseg.experiment import splits
from kdseg.experiment import students
from kdseg.experiment import teachers as teachers_lib
from kdseg.experiment import workdir as workdir_lib
from kdseg.report import scores as scores_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import stage
from kdseg.training import step as step_lib


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
  with tiny.compile_once(tmp_path_factory.mktemp("compiled")):
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def data_dir(folder):
  return folder / "data"


@pytest.fixture(scope="module")
def finished(folder, data_dir):
  """A run that was never stopped: its config, its folder, what `run` said."""
  config = make_config(data_dir)
  workdir = folder / "finished"
  return types.SimpleNamespace(
    config=config, workdir=workdir, ran=run.run(config, workdir)
  )


def copy(finished, workdir, *parts):
  """Starts a workdir with some of what a finished one holds."""
  workdir.mkdir()
  for part in parts:
    source = finished.workdir / part
    if source.is_dir():
      shutil.copytree(source, workdir / part)
    else:
      shutil.copy2(source, workdir / part)
  return workdir


def snapshot(workdir):
  return {
    str(path.relative_to(workdir)): (path.stat().st_mtime_ns, path.read_bytes())
    for path in sorted(workdir.rglob("*"))
    if path.is_file()
  }


def read_rows(workdir):
  with open(workdir / "scores.csv", newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def variables_of(workdir, arm):
  return checkpoint.load_variables(workdir / "arms" / arm)[0]


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


# ------------------------------------------------------------------ a whole run


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


def test_every_image_is_scored_once_for_every_network(finished):
  rows = read_rows(finished.workdir)
  assert len(rows) == 3 * 6
  keys = {(row["arm"], row["seed"], row["dataset"], row["id"]) for row in rows}
  assert len(keys) == len(rows)
  assert {key[:3] for key in keys} == {
    ("teacher_unet", "0", "synthetic_test"),
    ("patch_unet-none", "0", "synthetic_test"),
    ("patch_unet-mbf", "0", "synthetic_test"),
  }
  assert {key[3] for key in keys} == {f"test_{i:05d}" for i in range(6)}


def test_scores_are_those_of_the_predictions_at_the_images_own_size(finished):
  for row in read_rows(finished.workdir):
    assert (row["height"], row["width"]) == ("40", "40")
    path = (
      finished.workdir
      / "predictions"
      / f"{row['arm']}-seed{row['seed']}"
      / row["dataset"]
      / f"{row['id']}.png"
    )
    with Image.open(path) as image:
      predicted = np.asarray(image.convert("L")) > 0
    counted = int(row["true_positive"]) + int(row["false_positive"])
    assert predicted.shape == (40, 40)
    assert predicted.sum() == counted


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


def test_the_table_says_what_it_is_made_of(finished):
  table = (finished.workdir / "table.md").read_text()
  for text in ("24 of 24", "6 of 6", "teacher_unet", "patch_unet-mbf"):
    assert text in table
  report = json.loads((finished.workdir / "report.json").read_text())
  assert report["teacher"] == "teacher_unet"
  # Both are called "patch_unet", and only one of them is large.
  arms = report["arms"]
  assert arms["teacher_unet"]["macs"] > arms["patch_unet-none"]["macs"] > 0
  assert (
    arms["teacher_unet"]["parameters"] > arms["patch_unet-none"]["parameters"]
  )


def test_the_students_are_the_students_alone(finished):
  none, mbf = (
    variables_of(finished.workdir, f"patch_unet-{method}-seed0")
    for method in ("none", "mbf")
  )
  assert jax.tree.structure(none) == jax.tree.structure(mbf)
  assert set(mbf) == {"params", "batch_stats"}
  assert any(
    (a != b).any() for a, b in zip(jax.tree.leaves(none), jax.tree.leaves(mbf))
  )


def test_an_arm_that_diverged_is_reported_and_holds_nothing_up(finished):
  folder = finished.workdir / "arms" / "patch_unet-boom-seed0"
  failed = json.loads((folder / "failed.json").read_text())
  assert "not finite at step 0, batch of train_" in failed["diverged"]
  [note] = json.loads((finished.workdir / "report.json").read_text())["notes"]
  assert note.startswith("patch_unet-boom, seed 0, diverged: ")
  assert "patch_unet-boom" in (finished.workdir / "table.md").read_text()


def test_the_picture_shows_something(finished):
  with Image.open(finished.workdir / "overlays.png") as image:
    assert min(image.size) > 40
    assert len(image.getcolors(1 << 24)) > 100


def test_the_primary_family_is_written_down_with_what_chooses_in_it(
  finished, folder
):
  workdir = folder / "primary"
  shutil.copytree(finished.workdir, workdir)
  config = finished.config.copy_and_resolve_references()
  config.primary = (("mbf", "none"), ("mbf", ("none", "boom")))
  # The comparisons of a finished run may change: its report is made again.
  assert run.run(config, workdir) is True
  report = json.loads((workdir / "report.json").read_text())
  here = {"dataset": "synthetic_test", "arm": "patch_unet-mbf"}
  assert report["primary"] == [
    {**here, "against": "patch_unet-none"},
    {**here, "against": ["patch_unet-none", "patch_unet-boom"]},
  ]
  about = workdir / "arms" / "patch_unet-mbf-seed0" / "about.json"
  assert report["validation"]["patch_unet-mbf"] == {
    "0": json.loads(about.read_text())["validation_dice"]
  }
  assert "patch_unet-boom" not in report["validation"]
  assert run.run(config, workdir) is False


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"distil_from": ()}, 'method "mbf" has terms, which need a teacher'),
    (
      {"methods": {"none": {}, "mbf": {"terms": {"kd": 1.0},
                                       "teacher_out": "shuffled"}, "boom": {}},
       "data": 4},
      "shuffles the teacher.s outputs, which takes two images a device",
    ),
    ({"seeds_at_once": -1}, "seeds_at_once must be 0 or more: -1"),
    ({"mapping": "vmap"}, "vmap"),
    ({"seeds_at_once": 2.0}, "a value is of another kind than it has to be"),
    (
      {"teachers": {"teacher_unet": {**TEACHER, "precompute": True}}},
      "teacher_unet.precompute: this network has no frozen block",
    ),
  ],
)  # fmt: skip
def test_what_would_fail_after_hours_fails_at_once(
  change, message, data_dir, tmp_path
):
  size = change.pop("data", None)
  config = make_config(data_dir, **change)
  if size:
    config.data.batch_size = size
  with pytest.raises(ValueError, match=message):
    run.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "extensions",
  [
    extensions_lib.Extensions(terms={"fitnet": None}),
    extensions_lib.Extensions(terms={"loss": None}),
    extensions_lib.Extensions(regions={"all": None}),
    extensions_lib.Extensions(students={"enet": None}),
  ],
)
def test_a_name_that_is_taken_is_refused(extensions, data_dir, tmp_path):
  with pytest.raises(ValueError, match="is taken; choose another"):
    run.run(make_config(data_dir), tmp_path / "run", extensions)


def test_a_primary_family_of_unknown_methods_is_refused(data_dir, tmp_path):
  config = make_config(data_dir)
  config.primary = (("mbf", ("none", "kdd")),)
  with pytest.raises(ValueError, match='primary names the method "kdd"'):
    run.run(config, tmp_path / "run")


# --------------------------------------------------------------- a second start


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


def test_a_lost_table_is_written_again_and_nothing_else_is_done(
  finished, folder, monkeypatch
):
  workdir = folder / "lost"
  shutil.copytree(finished.workdir, workdir)
  expected = (workdir / "table.md").read_bytes()
  (workdir / "table.md").unlink()
  scores = (workdir / "scores.csv").stat().st_mtime_ns
  monkeypatch.setattr(stage, "train_together", None)
  monkeypatch.setattr(evaluate, "score", None)
  assert run.run(finished.config, workdir) is True
  assert (workdir / "table.md").read_bytes() == expected
  assert (workdir / "scores.csv").stat().st_mtime_ns == scores


def test_stopped_twice_and_gone_on_is_as_never_stopped(
  finished, folder, monkeypatch, caplog
):
  workdir = copy(finished, folder / "torn", "config.json", "teachers")
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


def test_scoring_that_is_stopped_after_every_batch_is_as_never_stopped(
  finished, folder
):
  config = finished.config.copy_and_resolve_references()
  config.evaluation.batch_size = 4
  config.evaluation.teacher_tta = "dihedral"
  whole, torn = (
    copy(finished, folder / name, "teachers", "arms")
    for name in ("whole", "torn_scores")
  )
  run.run(config, whole)
  said = []
  while True:
    try:
      run.run(config, torn, stop=lambda: True)
      break
    except preemption.StoppedError as error:
      said.append(str(error))
    # And killed as the next was noted.
    with open(torn / "scoring.jsonl", "ab") as file:
      file.write(b'[{"boundary_f1": 0.')
  # Two batches of three networks, none of them twice.
  assert len(said) == 6
  assert said[0] == (
    "stopped while teacher_unet seed 0 was scored on synthetic_test; the same "
    "command continues from there"
  )
  for part in ("scores.csv", "table.md"):
    assert (torn / part).read_bytes() == (whole / part).read_bytes()
  masks = [
    {
      name: content
      for name, (_, content) in snapshot(w / "predictions").items()
    }
    for w in (torn, whole)
  ]
  assert masks[0] == masks[1]
  assert len(masks[0]) == 18
  assert not (torn / "scoring.jsonl").exists()


def test_what_was_noted_of_other_weights_is_not_gone_on_from(tmp_path):
  path = tmp_path / "scoring.jsonl"
  assert scoring._read_noted(path, "old") == []
  checkpoint.append_json_line(path, [{"id": "a"}])
  assert scoring._read_noted(path, "old") == [[{"id": "a"}]]
  assert scoring._read_noted(path, "new") == []
  assert scoring._read_noted(path, "old") == []


@pytest.mark.long
def test_a_clock_that_goes_backwards_changes_nothing(
  finished, folder, monkeypatch, caplog
):
  workdir = copy(
    finished, folder / "clock", "config.json", "teachers", "checkpoints"
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


def test_a_report_is_known_by_what_it_was_made_of_not_by_its_time(
  finished, folder
):
  workdir = folder / "times"
  shutil.copytree(finished.workdir, workdir)
  arm_ids, _ = config_lib.check(finished.config, extensions_lib.Extensions())
  os.utime(workdir / "table.md", (0, 0))
  assert reporting.is_finished(finished.config, workdir, arm_ids)
  # Scores that were changed since, by a clock that went backwards.
  with open(workdir / "scores.csv", "ab") as file:
    file.write(b"x")
  os.utime(workdir / "scores.csv", (0, 0))
  os.utime(workdir / "table.md")
  assert not reporting.is_finished(finished.config, workdir, arm_ids)


# ------------------------------------------------------------ too little memory


def allocate_too_much(*arguments, **options):
  jnp.zeros(2**45, jnp.uint8).block_until_ready()


SAID = r"not enough memory \(RESOURCE_EXHAUSTED: Out of memory .*\d bytes\)"


def test_scores_that_take_too_much_memory_go_on_in_smaller_batches(
  finished, folder, monkeypatch
):
  workdir = copy(finished, folder / "large", "config.json", "teachers", "arms")
  config = finished.config.copy_and_resolve_references()
  with monkeypatch.context() as patch:
    patch.setattr(
      step_lib, "parallel_predict", lambda network: allocate_too_much
    )
    with pytest.raises(
      memory.OutOfMemoryError,
      match=r"^scores: teacher_unet seed 0 on synthetic_test in batches of 8: "
      rf"{SAID}\. Free some, or lower evaluation\.batch_size, then the same "
      "command continues$",
    ):
      run.run(config, workdir)
  config.evaluation.batch_size = 4
  assert run.run(config, workdir) is True
  assert len(read_rows(workdir)) == 3 * 6


@pytest.mark.parametrize(
  ("at_once", "remedy"),
  [
    (0, ""),
    (2, r", or set seeds_at_once to less than 2 \(1: one by one\)"),
    (9, r", or set seeds_at_once to less than 3 \(1: one by one\)"),
  ],
)
def test_a_training_that_takes_too_much_memory_says_what_to_lower(
  finished, folder, monkeypatch, at_once, remedy
):
  workdir = copy(finished, folder / f"wide{at_once}", "config.json", "teachers")
  monkeypatch.setattr(stage.loop, "fit", allocate_too_much)
  config = finished.config.copy_and_resolve_references()
  config.arms.patch_unet = {"methods": ("none",), "seeds": (0, 1, 2)}
  config.seeds_at_once = at_once
  with pytest.raises(
    memory.OutOfMemoryError,
    match=rf"^students: training 3 networks on batches of 8: {SAID}\. Free "
    rf"some{remedy}, then the same command continues; or lower "
    r"data\.batch_size, data\.size or the number of arms, in another "
    r"--workdir$",
  ):
    run.run(config, workdir)


def test_a_validation_that_takes_too_much_memory_says_what_to_lower(
  finished, folder, monkeypatch
):
  workdir = copy(finished, folder / "validated", "config.json", "teachers")
  monkeypatch.setattr(
    step_lib, "parallel_predict", lambda network: allocate_too_much
  )
  with pytest.raises(
    memory.OutOfMemoryError,
    match=rf"^students: validation in batches of 8: {SAID}\. Free some, or "
    r"lower evaluation\.batch_size",
  ):
    run.run(finished.config, workdir)


def test_a_teachers_pass_that_takes_too_much_memory_says_what_to_lower(
  finished,
):
  function = teachers_lib.within_memory(
    allocate_too_much, "teacher_unet: answers", finished.config
  )
  with pytest.raises(
    memory.OutOfMemoryError,
    match=rf"^teacher_unet: answers in batches of 8: {SAID}",
  ):
    function()


# ------------------------------------------------------------------ a full disk


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


# ------------------------------------------------------------------- other arms


def test_arms_that_are_added_are_trained_alone(finished, folder, data_dir):
  workdir = folder / "more"
  shutil.copytree(finished.workdir, workdir)
  config = make_config(data_dir)
  config.arms.patch_unet.seeds = (0, 1)
  before = snapshot(workdir)
  rows = read_rows(workdir)

  assert run.run(config, workdir) is True
  after = snapshot(workdir)
  kept = [
    name
    for name in before
    if name.startswith(("arms/", "teachers/", "checkpoints/", "predictions/"))
  ]
  assert kept
  for name in kept:
    assert after[name] == before[name], name
  assert read_rows(workdir)[: len(rows)] == rows
  added = read_rows(workdir)[len(rows) :]
  assert {(row["arm"], row["seed"]) for row in added} == {
    ("patch_unet-none", "1"),
    ("patch_unet-mbf", "1"),
  }
  assert len(added) == 2 * 6
  assert (workdir / "arms" / "patch_unet-boom-seed1" / "failed.json").exists()
  assert run.run(config, workdir) is False

  # The other seed is another network, and not the old one scored again.
  old, new = (
    variables_of(workdir, f"patch_unet-none-seed{seed}") for seed in (0, 1)
  )
  assert any(
    (a != b).any() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new))
  )


def test_a_group_that_lost_an_arm_half_way_says_which(folder):
  steps = folder / "groups" / "checkpoints" / "arms"
  (steps / "001").mkdir(parents=True)
  path = steps / "001" / "group.json"
  checkpoint.write_json(path, {"a-seed0": {}, "b-seed0": {}})
  config = make_config(folder)
  arm_id = config_lib.ArmId("a", "a", "none", 0)
  with pytest.raises(workdir_lib.WorkdirError, match=r"no more \(b-seed0\)"):
    students._next_group(config, [arm_id], folder / "groups")
  # What is begun anew takes the place of no other.
  checkpoint.write_json(path, {"b-seed0": {}})
  begun = students._next_group(config, [arm_id], folder / "groups")
  assert begun == (["a-seed0"], "002")


def test_a_method_put_back_with_another_weight_is_refused(
  finished, data_dir, tmp_path
):
  workdir = copy(finished, tmp_path / "put_back", "arms", "config.json")
  without = make_config(data_dir)
  del without.methods["mbf"]
  without.arms.patch_unet.methods = ("none", "boom")
  workdir_lib.adopt_config(without, workdir)
  config = make_config(data_dir)
  config.methods.mbf.terms.mbf = 10.0
  with pytest.raises(workdir_lib.WorkdirError) as error:
    run.run(config, workdir)
  assert (
    "holds patch_unet-mbf-seed0 of another method of that name: "
    "methods.mbf.terms.mbf was 1.0 and is 10.0 now"
  ) in str(error.value)


def test_a_method_changed_within_its_training_is_refused(data_dir, tmp_path):
  path = tmp_path / "checkpoints" / "arms" / "000" / "group.json"
  path.parent.mkdir(parents=True)
  checkpoint.write_json(path, {"patch_unet-boom-seed0": {"terms": {"kd": 1.0}}})
  with pytest.raises(workdir_lib.WorkdirError, match=r"boom\.terms\.kd"):
    run.run(make_config(data_dir), tmp_path)


def test_a_slip_in_the_first_command_costs_nothing(data_dir, tmp_path):
  config = make_config(data_dir)
  config.data.name = "folder"
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


def test_a_report_goes_without_predictions_that_were_deleted(
  finished, tmp_path, caplog
):
  workdir = copy(
    finished,
    tmp_path / "run",
    *("config.json", "scores.csv", "arms", "teachers", "predictions"),
  )
  shutil.rmtree(workdir / "predictions" / "patch_unet-mbf-seed0")
  run.run(finished.config, workdir)
  assert "overlays.png goes without" in caplog.text
  assert (workdir / "overlays.png").exists()
  shutil.rmtree(workdir / "predictions")
  (workdir / ".reported").unlink()
  (workdir / "overlays.png").unlink()
  run.run(finished.config, workdir)
  assert "patch_unet-mbf" in (workdir / "table.md").read_text()
  assert not (workdir / "overlays.png").exists()


# -------------------------------------------------- several teachers, computed


@pytest.fixture(scope="module")
def joint(folder, data_dir):
  """Two teachers as one, all their answers computed before the students."""
  config = make_config(
    data_dir,
    teachers={"teacher_unet": TEACHER, "teacher_vit": FROZEN},
    distil_from=("teacher_unet", "teacher_vit"),
    precompute_teacher=True,
    teacher_channels=3,
    arms={"patch_unet": {"methods": ("mbf",), "seeds": (0,)}},
    training={"epochs": 1.0, "learning_rate": 1e-2},
  )
  workdir = folder / "joint"
  run.run(config, workdir)
  return types.SimpleNamespace(config=config, workdir=workdir)


def test_several_teachers_are_scored_apart_and_together(joint):
  rows = read_rows(joint.workdir)
  assert {row["arm"] for row in rows} == {
    "teacher",
    "teacher_unet",
    "teacher_vit",
    "patch_unet-mbf",
  }
  report = json.loads((joint.workdir / "report.json").read_text())
  assert report["teacher"] == "teacher"
  arms = report["arms"]
  for key in ("parameters", "macs"):
    assert arms["teacher"][key] == (
      arms["teacher_unet"][key] + arms["teacher_vit"][key]
    )
  assert any("mean probability" in note for note in report["notes"])


def test_frozen_blocks_are_left_as_they_were_drawn_and_no_others(joint):
  variables, _ = checkpoint.load_variables(
    joint.workdir / "teachers" / "teacher_vit"
  )
  network = networks.make_network("vit_unet", **FROZEN["options"])
  drawn = networks.make_variables(
    network,
    jax.random.fold_in(jax.random.key(0), 0),
    size=32,
    weights=False,
  )
  found, expected = (v["params"]["encoder"] for v in (variables, drawn))
  moved, still = found.pop("block_1"), expected.pop("block_1")
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert (moved["fc1"]["kernel"] != still["fc1"]["kernel"]).any()


def test_what_was_computed_is_what_the_teachers_answer(joint):
  data = splits.load(joint.config)
  teachers = {
    name: teachers_lib.make_teacher(
      name, joint.config, joint.workdir, data, log=None
    )
    for name in joint.config.teachers
  }
  # Finished, and still asked through what its frozen blocks made.
  assert teachers["teacher_vit"].encoder_features["tokens"].shape[:2] == (8, 24)
  teacher = teachers_lib.join_teachers(joint.config, teachers)
  [cached] = (joint.workdir / "cache").glob("taught-*")
  stored = {path.stem: np.load(path) for path in cached.glob("*.npy")}
  assert set(stored) == {"logits", "low"}
  assert stored["low"].shape == (8, 24, 8, 8, 3)
  image = orientations.orient(data.train.image[:4], 5)
  out = teacher.network.apply(teacher.variables, image.astype(np.float32) / 255)
  np.testing.assert_allclose(
    stored["logits"][5, :4], out["logits"], rtol=0.02, atol=0.02
  )


def test_a_taught_average_is_that_of_the_eight_orientations(joint, monkeypatch):
  config = joint.config.copy_and_resolve_references()
  config.teacher_out_tta = "dihedral"
  data = splits.load(config)
  teachers = {
    name: teachers_lib.make_teacher(name, config, joint.workdir, data, log=None)
    for name in config.teachers
  }
  method = method_lib.make_method({"terms": {"kd": 1.0}})
  teaching = students._make_teaching(
    config,
    joint.workdir,
    data,
    teachers_lib.join_teachers(config, teachers),
    [method],
  )
  logits = teaching.computed["teacher_out"]["logits"]
  assert logits.shape == (1, 24, 32, 32)
  teacher = teachers_lib.join_teachers(config, teachers)
  answers = []
  for o in range(8):
    image = orientations.orient(data.train.image[:2], o)
    out = teacher.network.apply(
      teacher.variables, image.astype(np.float32) / 255
    )
    answers.append(
      orientations.restore_orientation(np.asarray(out["logits"]), o)
    )
  np.testing.assert_allclose(
    logits[0, :2], np.mean(answers, 0), rtol=0.02, atol=0.02
  )


def test_a_taught_average_that_nothing_computes_is_refused(data_dir, tmp_path):
  config = make_config(data_dir, teacher_out_tta="dihedral")
  with pytest.raises(ValueError, match="precompute_teacher"):
    run.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_search_scores_the_images_that_choose_and_no_others(finished, folder):
  workdir = copy(finished, folder / "search", "teachers", "arms")
  config = finished.config.copy_and_resolve_references()
  config.data.tests = ("validation",)
  run.run(config, workdir)
  rows = read_rows(workdir)
  assert {row["dataset"] for row in rows} == {"synthetic_validation"}
  assert {row["id"] for row in rows} == {
    f"validation_{i:05d}" for i in range(8)
  }
  by_arm = {}
  for row in rows:
    by_arm.setdefault(row["arm"], []).append(float(row["dice"]))
  about = json.loads(
    (workdir / "arms" / "patch_unet-mbf-seed0" / "about.json").read_text()
  )
  assert "Warning" not in (workdir / "table.md").read_text().split("Gate")[0]
  assert "synthetic_validation, n = 8;" in (workdir / "table.md").read_text()
  # The one at the images' own size, 40 pixels, the other at 32.
  assert (
    abs(np.mean(by_arm["patch_unet-mbf"]) - about["validation_dice"]) < 0.05
  )


def test_a_finished_joint_run_is_left_as_it_is(joint):
  before = snapshot(joint.workdir)
  assert run.run(joint.config, joint.workdir) is False
  assert snapshot(joint.workdir) == before


# --------------------------------------------------------- teachers from before


def test_a_teacher_of_another_run_is_taken_as_it_is(finished, folder, data_dir):
  source = finished.workdir / "teachers" / "teacher_unet"
  config = make_config(
    data_dir, teachers={"teacher_old": {**TEACHER, "checkpoint": str(source)}}
  )
  workdir = folder / "taken"
  teacher = teachers_lib.make_teacher(
    "teacher_old", config, workdir, data=None, log=None
  )
  expected, _ = checkpoint.load_variables(source)
  jax.tree.map(np.testing.assert_array_equal, teacher.variables, expected)
  copied, about = checkpoint.load_variables(
    workdir / "teachers" / "teacher_old"
  )
  jax.tree.map(np.testing.assert_array_equal, copied, expected)
  assert about["arm"] == "teacher_old"
  assert about["taken_from"] == str(source)


def test_a_teacher_of_no_epochs_is_as_it_was_drawn(folder, data_dir):
  untrained = {**TEACHER, "training": {"epochs": 0.0, "learning_rate": 1.0}}
  config = make_config(data_dir, teachers={"teacher_random": untrained})
  teacher = teachers_lib.make_teacher(
    "teacher_random", config, folder / "random", data=None, log=None
  )
  drawn = networks.make_variables(
    teacher.network,
    jax.random.fold_in(jax.random.key(0), 0),
    size=32,
    weights=False,
  )
  jax.tree.map(np.testing.assert_array_equal, teacher.variables, drawn)


def test_a_teacher_that_was_drawn_is_no_gate(folder, data_dir):
  untrained = {**TEACHER, "training": {"epochs": 0.0, "learning_rate": 1.0}}
  config = make_config(
    data_dir,
    teachers={"teacher_random": untrained},
    distil_from=("teacher_random",),
    arms={"patch_unet": {"methods": ("none",), "seeds": (0,)}},
    training={"epochs": 1.0, "max_steps": 1, "learning_rate": 1e-2},
  )
  workdir = folder / "drawn"
  run.run(config, workdir)
  report = json.loads((workdir / "report.json").read_text())
  assert report["teacher"] == ""
  assert "teacher_random" in report["arms"]
  assert "teacher was not trained" in (workdir / "table.md").read_text()


@pytest.mark.parametrize(
  ("changes", "drawn"),
  [
    ({}, False),
    ({"training": {"epochs": 0.0, "learning_rate": 1.0}}, True),
    (
      {
        "training": {"epochs": 0.0, "learning_rate": 1.0},
        "checkpoint": "runs/old/teachers/teacher_unet",
      },
      False,
    ),
  ],
)
def test_a_teacher_from_a_file_was_trained_there(changes, drawn, data_dir):
  config = make_config(data_dir, teachers={"teacher": {**TEACHER, **changes}})
  assert config_lib.is_drawn(config.teachers.teacher) is drawn


def test_a_teacher_of_another_shape_is_refused_by_its_leaf(
  finished, folder, data_dir
):
  source = finished.workdir / "teachers" / "teacher_unet"
  wide = {**TEACHER, "checkpoint": str(source)}
  wide["options"] = {"widths": (4, 4, 6), "depths": (1, 1, 1)}
  config = make_config(data_dir, teachers={"teacher_wide": wide})
  with pytest.raises(
    checkpoint.CheckpointError, match=r"of another network: \w+/\w+"
  ):
    teachers_lib.make_teacher(
      "teacher_wide", config, folder / "wide", data=None, log=None
    )


# ----------------------------------------------------------- what cannot be run


def test_arms_are_planned_seed_by_seed(data_dir):
  arms = {"enet": {"methods": ("none", "mbf"), "seeds": (1, 0)}}
  arm_ids = config_lib.list_arms(make_config(data_dir, arms=arms))
  assert [arm_id.key for arm_id in arm_ids] == [
    "enet-none-seed0",
    "enet-mbf-seed0",
    "enet-none-seed1",
    "enet-mbf-seed1",
  ]


@pytest.mark.parametrize("part", ["data", "evaluation"])
def test_a_batch_that_the_devices_cannot_share_stops_before_anything_is_made(
  part, data_dir, tmp_path
):
  config = make_config(data_dir)
  config[part].batch_size = 6
  with pytest.raises(ValueError, match=rf"{part}\.batch_size is 6.*devices, 4"):
    run.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def options(**changes):
  return {**TEACHER, **changes}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"arms": {"enet": {"methods": ("mbff",), "seeds": (0,)}}},
      'arms.enet: unknown method "mbff".*boom, mbf, none',
    ),
    ({"methods": {"none": {}, "mbf": {"term": 1}, "boom": {}}}, '"term"'),
    ({"teachers": {"unet": TEACHER}}, 'call it "teacher_unet"'),
    ({"distil_from": ("teacher_vit",)}, 'distil_from names "teacher_vit"'),
    ({"training": {"epoch": 1.0}}, 'did you mean "epochs"'),
    ({"students": {"patch_unet": {"width": 3}}}, "patch_unet.*width"),
    ({"teachers": {"teacher_unet": options(network="unet")}}, '"unet"'),
    (
      {
        "teachers": {"teacher_unet": options(training={"epochs": 1.0, "lr": 1})}
      },
      '"lr"',
    ),
    ({"augment": {"rotation": 3.0}}, 'did you mean "rotate"'),
    ({"segmentation": {"bcee": 1.0}}, "bcee"),
    (
      {"arms": {"patch_unet": {"methods": ("none",), "seeds": (0, 1, 0)}}},
      "arms.patch_unet.seeds has 0 twice",
    ),
    (
      {"arms": {"patch_unet": {"methods": ("none", "none"), "seeds": (0,)}}},
      "arms.patch_unet.methods has 'none' twice",
    ),
    (
      {"arms": {"my-net": {"methods": ("none",), "seeds": (0,)}}},
      'arms.my-net: the name of a student has no "-"',
    ),
    (
      {"arms": {"teacher_x": {"methods": ("none",), "seeds": (0,)}}},
      'does not begin with "teacher"',
    ),
    *(
      (
        {"training": {"epochs": 1.0, "learning_rate": 1e-2, **wrong}},
        message,
      )
      for wrong, message in (
        ({"optimizer": "adam"}, "optimizer must be one of"),
        ({"schedule": "cosin"}, "schedule must be one of"),
        ({"on_non_finite": "ignore"}, "'ignore'"),
        ({"warmup": 1.0}, "warmup is the share"),
        ({"epochs": 0.0}, "training.epochs is 0.0"),
      )
    ),
  ],
)
def test_a_name_that_does_not_exist_stops_before_anything_is_made(
  tmp_path, changes, message
):
  config = make_config(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    run.run(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_config_of_another_version_is_refused_by_its_key(data_dir, tmp_path):
  here = f"kdseg {workdir_lib.version()}"
  for key in ("teacher_out_tta", "evaluation.teacher_tta"):
    config = make_config(data_dir)
    outer, _, inner = key.rpartition(".")
    del (config[outer] if outer else config)[inner]
    with pytest.raises(config_lib.ConfigError) as error:
      run.run(config, tmp_path / "run")
    assert str(error.value) == (
      f"the config has no {key}, which {here} reads: it may be for another "
      "version; compare it with those in configs/"
    )
  config = make_config(data_dir, distill_from=())
  with pytest.raises(
    ValueError, match=f'key of a config in {here} "distill_from"; did you mean'
  ):
    run.run(config, tmp_path / "run")
  config = make_config(data_dir, training={"epochs": 1.0})
  with pytest.raises(ValueError, match="a training needs learning_rate"):
    run.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("size", 40, "divisible by 32, not 40"),
    ("name", "isic", 'data set "isic".*isic2016'),
    ("tests", ("synthetic", "ph"), 'data set "ph"'),
    ("tests", (), "data.tests names nothing"),
  ],
)
def test_data_that_do_not_exist_are_refused(tmp_path, key, value, message):
  config = make_config(tmp_path)
  config.data[key] = value
  with pytest.raises(ValueError, match=message):
    run.run(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_tap_that_a_network_lacks_is_named_before_anything_is_trained(
  data_dir, tmp_path
):
  config = make_config(data_dir)
  config.methods.mbf.taps = ("lwo",)
  with pytest.raises(
    config_lib.ConfigError,
    match=r"method \"mbf\" of arms\.patch_unet: the student has no tap 'lwo'",
  ):
    run.run(config, tmp_path / "new")


def test_a_method_that_needs_a_teacher_says_so(finished, data_dir):
  config = make_config(data_dir, distil_from=())
  with pytest.raises(ValueError, match="set distil_from"):
    students._make_teaching(
      config,
      finished.workdir,
      data=None,
      teacher=None,
      methods=[method_lib.make_method({"terms": {"kd": 1.0}})],
    )
