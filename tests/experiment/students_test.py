import json

import jax
import pytest
from tiny_run import TOO_MUCH
from tiny_run import allocate_too_much
from tiny_run import copy
from tiny_run import make_config
from tiny_run import make_run
from tiny_run import read_rows
from tiny_run import snapshot
from tiny_run import variables_of

from kdseg.experiment import jobs
from kdseg.experiment import run
from kdseg.experiment import workdir as workdir_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import memory
from kdseg.training import stage
from kdseg.training import step as step_lib


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
  notes = json.loads((finished.workdir / "report.json").read_text())["notes"]
  assert any(n.startswith("patch_unet-boom, seed 0, diverged: ") for n in notes)
  assert "patch_unet-boom" in (finished.workdir / "table.md").read_text()


@pytest.mark.parametrize(
  ("at_once", "remedy"),
  [
    (0, ""),
    (2, r", or set seeds_at_once to less than 2 \(1: one by one\)"),
    (9, r", or set seeds_at_once to less than 3 \(1: one by one\)"),
  ],
)
def test_a_training_that_takes_too_much_memory_says_what_to_lower(
  finished, tmp_path, monkeypatch, at_once, remedy
):
  workdir = copy(
    finished, tmp_path / f"wide{at_once}", "config.json", "teachers"
  )
  monkeypatch.setattr(stage.loop, "fit", allocate_too_much)
  config = finished.config.copy_and_resolve_references()
  config.arms.patch_unet = {"methods": ("none",), "seeds": (0, 1, 2)}
  config.seeds_at_once = at_once
  with pytest.raises(
    memory.OutOfMemoryError,
    match=rf"^students: training 3 networks on batches of 8: {TOO_MUCH}\. Free "
    rf"some{remedy}, then the same command continues; or lower "
    r"data\.batch_size, data\.size or the number of arms, in another "
    r"--workdir$",
  ):
    run.run(config, workdir)


def test_a_validation_that_takes_too_much_memory_says_what_to_lower(
  finished, tmp_path, monkeypatch
):
  workdir = copy(finished, tmp_path / "validated", "config.json", "teachers")
  monkeypatch.setattr(
    step_lib, "parallel_predict", lambda *network: allocate_too_much
  )
  with pytest.raises(
    memory.OutOfMemoryError,
    match=rf"^students: validation in batches of 8: {TOO_MUCH}\. Free some, or "
    r"lower evaluation\.batch_size",
  ):
    run.run(finished.config, workdir)


def test_arms_that_are_added_are_trained_alone(finished, tmp_path, data_dir):
  workdir = tmp_path / "more"
  copy(finished, workdir)
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


def test_a_group_that_lost_an_arm_half_way_says_which(tmp_path):
  steps = tmp_path / "checkpoints" / "arms"
  (steps / "001").mkdir(parents=True)
  path = steps / "001" / "group.json"
  checkpoint.write_json(path, {"patch_unet-none-seed0": {}, "b-seed0": {}})
  arms = {"patch_unet": {"methods": ("none",), "seeds": (0,)}}
  this = make_run(make_config(tmp_path, arms=arms), tmp_path)
  with pytest.raises(workdir_lib.WorkdirError, match=r"longer has \(b-seed0"):
    jobs.list_jobs(this)
  # A new group does not take the folder of another.
  checkpoint.write_json(path, {"b-seed0": {}})
  [job] = [j for j in jobs.list_jobs(this) if j.kind == jobs.STUDENTS]
  assert (job.name, job.arms) == ("002", ("patch_unet-none-seed0",))


def test_a_method_put_back_with_another_weight_is_refused(
  finished, data_dir, tmp_path
):
  workdir = copy(finished, tmp_path / "put_back", "arms", "config.json")
  without = make_config(data_dir)
  del without.methods["mbf"]
  without.arms.patch_unet.methods = ("none", "boom")
  workdir_lib.adopt_config(make_run(without, workdir).config.tree, workdir)
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
  begun = {"terms": {"kd": 1.0}, "distill_ramp": 0.0}
  checkpoint.write_json(path, {"patch_unet-boom-seed0": begun})
  with pytest.raises(workdir_lib.WorkdirError, match=r"boom\.terms\.kd"):
    run.run(make_config(data_dir), tmp_path)
