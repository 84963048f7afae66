import json
import types

import jax
import ml_collections
import numpy as np
import pytest
from tiny_run import FROZEN
from tiny_run import TEACHER
from tiny_run import TOO_MUCH
from tiny_run import allocate_too_much
from tiny_run import make_config
from tiny_run import make_run
from tiny_run import read_rows
from tiny_run import snapshot

from kdseg import networks
from kdseg.data import orientations
from kdseg.distill import method as method_lib
from kdseg.experiment import run
from kdseg.experiment import splits
from kdseg.experiment import students
from kdseg.experiment import teachers as teachers_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import memory
from kdseg.training import cached_outputs


@pytest.fixture(scope="module")
def joint(tmp_path_factory, data_dir):
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
  workdir = tmp_path_factory.mktemp("joint")
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


@pytest.fixture(scope="module")
def more(joint):
  """The same with an arm that is not trained yet, and the images."""
  config = joint.config.copy_and_resolve_references()
  config.teacher_out_tta = "dihedral"
  config.arms.patch_unet.seeds = (0, 1)
  this = make_run(config, joint.workdir)
  data = splits.load(this.config.data)
  return this, data, teachers_lib.train_teachers(this, data)


def test_what_was_computed_is_what_the_teachers_answer(joint, more):
  _, data, teachers = more
  # Finished, and still read through what its frozen blocks gave.
  assert teachers["teacher_vit"].encoder_features["tokens"].shape[:2] == (8, 24)
  assert teachers["teacher_unet"].encoder_features is None
  teacher = teachers_lib.join_teachers(teachers.values())
  [cached] = (joint.workdir / "cache").glob("teacher_out-*")
  stored = {path.stem: np.load(path) for path in cached.glob("*.npy")}
  assert set(stored) == {"logits", "low"}
  assert stored["low"].shape == (8, 24, 8, 8, 3)
  image = orientations.orient(data.train.image[:4], 5)
  out = teacher.network.apply(teacher.variables, image.astype(np.float32) / 255)
  np.testing.assert_allclose(
    stored["logits"][5, :4], out["logits"], rtol=0.02, atol=0.02
  )


def test_a_taught_average_is_that_of_the_eight_orientations(more):
  this, data, teachers = more
  teacher = teachers_lib.join_teachers(teachers.values())
  inputs, _ = students.make_inputs(
    this, data, teacher, [method_lib.make_method({"terms": {"kd": 1.0}})]
  )
  logits = inputs.cached_outputs["teacher_out"]["logits"]
  assert logits.shape == (1, 24, 32, 32)
  each = []
  for o in range(8):
    image = orientations.orient(data.train.image[:2], o)
    out = teacher.network.apply(
      teacher.variables, image.astype(np.float32) / 255
    )
    each.append(orientations.restore_orientation(np.asarray(out["logits"]), o))
  np.testing.assert_allclose(
    logits[0, :2], np.mean(each, 0), rtol=0.02, atol=0.02
  )


def test_teachers_outputs_that_take_too_much_memory_say_what_to_lower(
  more, monkeypatch
):
  this, data, teachers = more
  monkeypatch.setattr(cached_outputs, "compute", allocate_too_much)
  with pytest.raises(
    memory.OutOfMemoryError,
    match=r"^teacher_unet\+teacher_vit: outputs for the training images in "
    rf"batches of 8: {TOO_MUCH}\. Free some, or lower evaluation\.batch_size",
  ):
    students.make_inputs(
      this, data, teachers_lib.join_teachers(teachers.values()), []
    )


def test_a_finished_joint_run_is_left_as_it_is(joint):
  before = snapshot(joint.workdir)
  assert run.run(joint.config, joint.workdir) is False
  assert snapshot(joint.workdir) == before


def make_teacher(config, workdir):
  """Returns the one teacher of a config, which needs no images."""
  config.distil_from, config.arms = (), ml_collections.ConfigDict()
  this = make_run(config, workdir)
  [teacher] = teachers_lib.train_teachers(this, data=None).values()
  return teacher


def test_a_teacher_of_another_run_is_taken_as_it_is(
  finished, tmp_path, data_dir
):
  source = finished.workdir / "teachers" / "teacher_unet"
  config = make_config(
    data_dir, teachers={"teacher_old": {**TEACHER, "checkpoint": str(source)}}
  )
  teacher = make_teacher(config, tmp_path)
  expected, _ = checkpoint.load_variables(source)
  jax.tree.map(np.testing.assert_array_equal, teacher.variables, expected)
  copied, about = checkpoint.load_variables(
    tmp_path / "teachers" / "teacher_old"
  )
  jax.tree.map(np.testing.assert_array_equal, copied, expected)
  assert about["arm"] == "teacher_old"
  assert about["taken_from"] == str(source)


def test_a_teacher_of_no_epochs_is_as_it_was_drawn(tmp_path, data_dir):
  untrained = {**TEACHER, "training": {"epochs": 0.0, "learning_rate": 1.0}}
  config = make_config(data_dir, teachers={"teacher_random": untrained})
  teacher = make_teacher(config, tmp_path)
  drawn = networks.make_variables(
    teacher.network,
    jax.random.fold_in(jax.random.key(0), 0),
    size=32,
    weights=False,
  )
  jax.tree.map(np.testing.assert_array_equal, teacher.variables, drawn)


def test_a_teacher_that_was_drawn_is_no_gate(tmp_path, data_dir):
  untrained = {**TEACHER, "training": {"epochs": 0.0, "learning_rate": 1.0}}
  config = make_config(
    data_dir,
    teachers={"teacher_random": untrained},
    distil_from=("teacher_random",),
    arms={"patch_unet": {"methods": ("none",), "seeds": (0,)}},
    training={"epochs": 1.0, "max_steps": 1, "learning_rate": 1e-2},
  )
  workdir = tmp_path / "run"
  run.run(config, workdir)
  report = json.loads((workdir / "report.json").read_text())
  assert report["teacher"] == ""
  assert "teacher_random" in report["arms"]
  assert "teacher was not trained" in (workdir / "table.md").read_text()


def test_a_teacher_of_another_shape_is_refused_by_its_leaf(
  finished, tmp_path, data_dir
):
  source = finished.workdir / "teachers" / "teacher_unet"
  wide = {**TEACHER, "checkpoint": str(source)}
  wide["options"] = {"widths": (4, 4, 6), "depths": (1, 1, 1)}
  config = make_config(data_dir, teachers={"teacher_wide": wide})
  with pytest.raises(
    checkpoint.CheckpointError, match=r"of another network: \w+/\w+"
  ):
    make_teacher(config, tmp_path)
