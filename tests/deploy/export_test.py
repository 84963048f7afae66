import dataclasses
import json
import pathlib

from jax import export as jax_export
import numpy as np
import pytest
import tiny_model

from kdseg.deploy import artefacts
from kdseg.deploy import export
from kdseg.deploy import models
from kdseg.deploy import weights

FULL = ("model.onnx", "model.tflite", "model.stablehlo")
FILES = {
  "weights.safetensors",
  *FULL,
  *export.INT8,
  "preprocess.json",
  "golden.npz",
  "PARITY.json",
  "README.md",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
  return models.load_weights(tiny_model.write(path, arm="tiny-none", seed=4))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  out = tmp_path_factory.mktemp("export")
  export.export(model, out)
  return out


def test_leaves_every_file_that_is_promised(folder):
  assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("name", ["weights.safetensors", *FULL])
@pytest.mark.parametrize("kind", ["golden", "random"])
def test_every_file_gives_the_golden_answers(folder, name, kind):
  with np.load(folder / "golden.npz") as golden:
    x, expected = golden[f"{kind}_input"], golden[f"{kind}_output"]
  form = models.load(folder / name)
  np.testing.assert_allclose(form.probabilities(x), expected, atol=1e-5)
  # One image is as good as four, before and after.
  np.testing.assert_allclose(form.probabilities(x[:1]), expected[:1], atol=1e-5)
  np.testing.assert_allclose(form.probabilities(x), expected, atol=1e-5)
  assert expected.std() > 1e-3


@pytest.mark.parametrize("name", export.INT8)
def test_an_int8_form_is_near_and_its_distance_is_told(folder, name):
  with np.load(folder / "golden.npz") as golden:
    x, expected = golden["golden_input"], golden["golden_output"]
  answer = models.load(folder / name).probabilities(x)
  distance = np.abs(answer - expected).max()
  assert distance > 0
  assert np.abs(answer - expected).mean() < 0.1
  told = json.loads((folder / "PARITY.json").read_text())[name]
  assert told["largest_difference"]["golden"] == pytest.approx(distance)
  assert told["changed_pixels"] == np.mean((answer > 0.5) != (expected > 0.5))


@pytest.mark.parametrize("name", [*FULL, *export.INT8])
def test_a_file_knows_its_size_and_its_threshold(model, folder, name):
  form = models.load(folder / name)
  assert (form.size, form.threshold) == (model.size, model.threshold)


def test_forms_can_be_left_out_and_old_ones_do_not_stay(model, tmp_path):
  export.export(model, tmp_path, forms=["litert", "stablehlo"])
  left = {path.name for path in tmp_path.iterdir()}
  assert left == FILES - {"model.onnx", "model.int8.onnx"}
  for name in ("SCORES.json", "SCORES.md", "scores.csv"):
    (tmp_path / name).write_text("of the forms before")
  export.export(model, tmp_path, forms=["stablehlo"])
  left = {path.name for path in tmp_path.iterdir()}
  assert left == FILES - {"model.onnx", "model.tflite", *export.INT8}


def test_a_folder_of_something_else_keeps_its_files(model, tmp_path):
  (tmp_path / "scores.csv").write_text("of a run")
  with pytest.raises(export.PlaceError, match=r"holds scores\.csv and is no"):
    export.export(model, tmp_path, forms=["stablehlo"])
  assert (tmp_path / "scores.csv").read_text() == "of a run"
  export.export(model, tmp_path, forms=["stablehlo"], force=True)
  assert not (tmp_path / "scores.csv").exists()


def test_no_form_says_where_its_maker_keeps_the_sources(folder):
  root = str(pathlib.Path(export.__file__).parents[2]).encode()
  for path in folder.iterdir():
    assert root not in path.read_bytes(), path.name
    assert b"site-packages" not in path.read_bytes(), path.name


def test_a_threshold_is_kept_by_every_form(model, tmp_path):
  odd = dataclasses.replace(
    model, threshold=0.25, about={**model.about, "threshold": 0.25}
  )
  export.export(odd, tmp_path)
  for name in ("weights.safetensors", *FULL, *export.INT8):
    assert models.load(tmp_path / name).threshold == 0.25, name


def test_a_network_of_somebody_else_is_refused(tmp_path):
  from onnx import helper

  path = tmp_path / "other.onnx"
  values = [
    helper.make_tensor_value_info(name, 1, [1, 3, 8, 8]) for name in "xy"
  ]
  graph = helper.make_graph(
    [helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:]
  )
  opset = helper.make_opsetid("", 13)
  made = helper.make_model(graph, opset_imports=[opset], ir_version=8)
  path.write_bytes(made.SerializeToString())
  with pytest.raises(weights.WeightsError, match=r"no file of kdseg\.deploy"):
    models.load(path)


def test_an_unknown_form_is_named(model, tmp_path):
  with pytest.raises(ValueError, match="onxx"):
    export.export(model, tmp_path / "out", forms=["onxx"])


@pytest.mark.parametrize("suffix", artefacts.SUFFIXES)
def test_a_damaged_file_is_named(folder, tmp_path, suffix):
  content = (folder / f"model{suffix}").read_bytes()
  path = tmp_path / f"cut{suffix}"
  path.write_bytes(content[: len(content) // 3])
  with pytest.raises(weights.WeightsError, match=f"cut{suffix} cannot be"):
    models.load(path)


@pytest.mark.parametrize("suffix", artefacts.SUFFIXES)
def test_a_file_that_is_not_there_is_named(tmp_path, suffix):
  with pytest.raises(weights.WeightsError, match="No such file"):
    models.load(tmp_path / f"gone{suffix}")


@pytest.mark.parametrize(
  ("times", "said"),
  [
    ((1.0, 2.0), "smaller and slower here"),
    ((2.0, 1.0), "smaller and faster here"),
    ((2.0, 2.1), "smaller and as fast as it here"),
  ],
)
def test_the_verdict_on_an_int8_form_is_plain(times, said):
  parity = {
    "model.onnx": {"bytes": 100, "milliseconds": times[0]},
    "model.int8.onnx": {
      "bytes": 40,
      "milliseconds": times[1],
      "changed_pixels": 0.0125,
    },
  }
  verdict = export.describe_int8("model.int8.onnx", parity)
  assert verdict.startswith(said)
  assert "40% of the bytes" in verdict
  assert "1.25%" in verdict


def test_the_distances_are_those_that_were_measured(folder):
  record = json.loads((folder / "PARITY.json").read_text())
  for name in FULL:
    assert record[name]["bytes"] == (folder / name).stat().st_size
    assert max(record[name]["largest_difference"].values()) <= 1e-5
  assert record["tolerance"] == 1e-4


def test_the_card_says_what_it_is_and_what_it_is_not(folder):
  card = (folder / "README.md").read_text()
  for text in ("tiny-none", "not a medical device", "patch_unet", "model.onnx"):
    assert text in card


@pytest.mark.parametrize(
  ("name", "stray"), [("tflite", 2e-4), ("onnx", np.nan)]
)
def test_a_form_that_strays_is_not_written(
  model, tmp_path, monkeypatch, name, stray
):
  open_content = artefacts.open_content

  def open_astray(file, content, **options):
    run, *rest = open_content(file, content, **options)
    if file != f"model.{name}":
      return run, *rest
    return lambda x: run(x) + np.float32(stray), *rest

  monkeypatch.setattr(artefacts, "open_content", open_astray)
  with pytest.raises(export.ParityError, match=rf"model\.{name} is .* away"):
    export.export(model, tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("package", "form", "extra"),
  [
    ("onnx", "onnx", "export"),
    ("onnxruntime", "onnx", "export"),
    ("ai_edge_litert", "litert", "litert"),
    ("litert_quantizer", "litert", "litert"),
  ],
)
def test_a_missing_package_names_its_extra(
  model, tmp_path, monkeypatch, package, form, extra
):
  for name in list(export.sys.modules):
    if name.partition(".")[0] == package:
      monkeypatch.delitem(export.sys.modules, name)
  monkeypatch.setitem(export.sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"pip install 'kdseg\[{extra}\]'"):
    export.export(model, tmp_path / "out", forms=[form])
  assert not (tmp_path / "out").exists()


def test_without_flatbuffers_the_error_names_its_extra(
  model, tmp_path, monkeypatch
):
  # JAX imports it when it first writes, so hiding it comes too late here.
  def serialize(*_, **__):
    raise ModuleNotFoundError("flatbuffers")

  monkeypatch.setattr(jax_export.Exported, "serialize", serialize)
  with pytest.raises(ImportError, match=r"pip install 'kdseg\[export\]'"):
    export.export(model, tmp_path / "out", forms=["stablehlo"])


def test_the_command_says_how_far_each_form_is(tmp_path, capsys):
  path = tiny_model.write(tmp_path / "a.safetensors")
  assert export.main([str(path), "--out", str(tmp_path / "out")]) == 0
  printed = capsys.readouterr().out
  assert printed.count("from JAX") == 5
  assert printed.count("change sides") == 2
  assert (tmp_path / "out" / "PARITY.json").exists()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
  assert export.main(["nothing", "--out", str(tmp_path / "out")]) == 1
  assert capsys.readouterr().err.startswith("kdseg: nothing is no file")


def test_an_arm_of_a_workdir_is_named_as_in_its_scores(tmp_path, capsys):
  arms = tmp_path / "run" / "arms"
  arms.mkdir(parents=True)
  seen = weights.arm_folder(tmp_path / "run", "tiny-none", 4)
  assert seen == arms / "tiny-none-seed4"
  code = export.main(
    [str(tmp_path / "run"), "--arm", "other", "--out", str(tmp_path / "out")]
  )
  assert code == 1
  assert "has no finished other-seed0; it has none" in capsys.readouterr().err


def test_what_a_file_says_survives_the_export(folder):
  _, about = weights.load(folder / "weights.safetensors")
  assert about["arm"] == "tiny-none"
  assert about["seed"] == 4
