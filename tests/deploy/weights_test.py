import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_model

from kdseg.deploy import weights
from kdseg.report import scores
from kdseg.runtime import checkpoint


def test_what_is_read_is_what_was_written(tmp_path):
  path = tiny_model.write(
    tmp_path / "a.safetensors", seed=3, note="1e3", nothing=None
  )
  arrays, about = weights.load(path)
  expected = checkpoint.flatten(tiny_model.variables())
  assert arrays.keys() == expected.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, expected[name])
    assert array.dtype == expected[name].dtype
  assert about["options"] == tiny_model.OPTIONS
  # Text that looks like a number stays text.
  assert (about["seed"], about["note"], about["nothing"]) == (3, "1e3", None)
  assert about["format"] == weights.FORMAT


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
  path = tiny_model.write(tmp_path / "a.safetensors")
  before = path.read_bytes()
  monkeypatch.setattr(
    weights.pathlib.Path,
    "replace",
    lambda self, to: (_ for _ in ()).throw(OSError("disk full")),
  )
  with pytest.raises(OSError, match="disk full"):
    tiny_model.write(path, seed=9)
  assert path.read_bytes() == before


def test_saving_refuses_to_leave_out_required_metadata(tmp_path):
  with pytest.raises(ValueError, match="about lacks size"):
    weights.save(
      tmp_path / "a.safetensors",
      {},
      {k: v for k, v in tiny_model.ABOUT.items() if k != "size"},
    )


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_is_named(tmp_path, content):
  path = tmp_path / "other.safetensors"
  path.write_bytes(content)
  with pytest.raises(weights.WeightsError, match=r"other\.safetensors cannot"):
    weights.load(path)


def test_a_cut_off_file_is_named(tmp_path):
  path = tiny_model.write(tmp_path / "a.safetensors")
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(weights.WeightsError, match=r"a\.safetensors cannot"):
    weights.load(path)


def test_safetensors_of_another_program_are_refused(tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors.numpy.save_file({"x": np.zeros(2)}, path, {"by": "them"})
  with pytest.raises(weights.WeightsError, match="not written by kdseg"):
    weights.load(path)


def test_a_file_of_another_version_says_what_to_do(tmp_path):
  path = tmp_path / "a.safetensors"
  metadata = {k: json.dumps(v) for k, v in tiny_model.ABOUT.items()}
  safetensors.numpy.save_file(
    {"x": np.zeros(2)}, path, metadata | {"format": "99"}
  )
  with pytest.raises(weights.WeightsError, match=r"format 99.*reads 1"):
    weights.load(path)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
  path = tmp_path / "a.safetensors"
  weights.save(path, {"params": {"x": np.array([np.nan])}}, tiny_model.ABOUT)
  with pytest.raises(weights.WeightsError, match=r"params/x .* not of finite"):
    weights.load(path)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"threshold": float("nan")}, "threshold is nan"),
    ({"threshold": 7.0}, "threshold is 7.0"),
    ({"threshold": "abc"}, "threshold is 'abc'"),
    ({"size": None}, "size is None"),
    ({"size": 0}, "size is 0"),
    ({"options": 5}, "options are 5"),
  ],
)
def test_a_wrong_size_threshold_or_options_is_refused(tmp_path, entry, message):
  path = tiny_model.write(tmp_path / "a.safetensors", **entry)
  with pytest.raises(weights.WeightsError, match=message):
    weights.load(path)


@pytest.fixture
def workdir(tmp_path):
  """A workdir with one student and one teacher, of the same network."""
  config = {
    "data": {"size": tiny_model.SIZE, "name": "synthetic"},
    "teachers": {"teacher_x": {"options": tiny_model.OPTIONS}},
    "students": {"patch_unet": tiny_model.OPTIONS},
  }
  checkpoint.write_json(tmp_path / "config.json", config)
  about = {"network": "patch_unet", "seed": 1, "parameters": 7}
  for folder, arm in (
    ("arms/patch_unet-mbf-seed1", "patch_unet-mbf"),
    ("teachers/teacher_x", "teacher_x"),
  ):
    checkpoint.save_variables(
      tmp_path / folder, tiny_model.variables(), {**about, "arm": arm}
    )
  return tmp_path


@pytest.mark.parametrize("arm", ["patch_unet-mbf", "teacher_x"])
def test_options_come_from_the_config_of_the_run(workdir, arm):
  variables, about = weights.read_arm(workdir, arm, 1)
  assert about["options"] == tiny_model.OPTIONS
  assert about["size"] == tiny_model.SIZE
  assert about["arm"] == arm
  jax.tree.map(np.testing.assert_array_equal, variables, tiny_model.variables())


def test_a_network_carries_its_own_scores(workdir):
  row = dict.fromkeys(scores.COLUMNS, 0)
  rows = [
    row | {"arm": arm, "seed": seed, "dataset": "ph2", "id": i, "dice": dice}
    for arm, seed, i, dice in (
      ("patch_unet-mbf", 1, "a", 0.5),
      ("patch_unet-mbf", 1, "b", 0.75),
      ("patch_unet-mbf", 2, "a", 0.1),
      ("patch_unet-none", 1, "a", 0.2),
    )
  ]
  scores.write(workdir / "scores.csv", rows)
  checkpoint.write_json(
    workdir / "report.json",
    {"train": {"name": "isic2016", "found": 751, "official": 900}},
  )
  _, about = weights.read_arm(workdir, "patch_unet-mbf", 1)
  # t of one degree of freedom, 12.706, times half of the distance.
  assert about["scores"] == (
    "ph2: Dice 0.6250 [-0.9633, 2.2133], Jaccard 0.0000 [0.0000, 0.0000] "
    "(n = 2)"
  )
  assert "751 of 900 pairs of isic2016" in about["protocol"]


def test_a_run_that_is_being_scored_gives_its_networks(workdir):
  (workdir / "scores.csv").write_text("arm,seed,datas")
  (workdir / "report.json").write_text("{")
  _, about = weights.read_arm(workdir, "patch_unet-mbf", 1)
  assert not {"scores", "protocol"} & set(about)


def test_a_damaged_config_is_named(workdir):
  (workdir / "config.json").write_text("{")
  with pytest.raises(weights.WeightsError, match="seed1 cannot be used"):
    weights.read_arm(workdir, "patch_unet-mbf", 1)
  (workdir / "config.json").write_text('{"students": {}}')
  with pytest.raises(weights.WeightsError, match="'teachers' is missing"):
    weights.read_arm(workdir, "patch_unet-mbf", 1)


def test_the_command_says_where_it_cannot_write(workdir, capsys):
  (workdir / "file").write_text("")
  arguments = [str(workdir), "--arm", "patch_unet-mbf", "--seed", "1"]
  arguments += ["--out", str(workdir / "file" / "x")]
  assert weights.main(arguments) == 1
  assert capsys.readouterr().err.startswith("kdseg: ")


def test_a_missing_arm_lists_the_finished_ones(workdir):
  with pytest.raises(
    weights.WeightsError,
    match=r"no finished patch_unet-mbf-seed0; it has patch_unet-mbf-seed1, tea",
  ):
    weights.read_arm(workdir, "patch_unet-mbf", 0)


def test_the_command_writes_the_file(workdir, capsys):
  out = workdir / "deep" / "model.safetensors"
  arguments = [str(workdir), "--arm", "patch_unet-mbf", "--seed", "1"]
  assert weights.main([*arguments, "--out", str(out)]) == 0
  arrays, about = weights.load(out)
  assert about["trained_on"] == "synthetic"
  count = sum(a.size for n, a in arrays.items() if n.startswith("params/"))
  assert f"{count:,} parameters" in capsys.readouterr().out


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
  arguments = [str(tmp_path), "--arm", "x", "--out", str(tmp_path / "y")]
  assert weights.main(arguments) == 1
  assert "no finished x-seed0; it has none at all" in capsys.readouterr().err


def test_a_folder_that_is_no_network_says_what_to_name(workdir, tmp_path):
  for folder, message in (
    (workdir, r"is the workdir of a run; name .*arms/NAME-seedN; it has .*mbf"),
    ("/", "has no finished"),
    ("/tmp", "has no finished tmp"),
  ):
    with pytest.raises(weights.WeightsError, match=message):
      weights.read_folder(folder)
  (tmp_path / "weights.safetensors").touch()
  with pytest.raises(weights.WeightsError, match="is an export; name a file"):
    weights.read_folder(tmp_path)
