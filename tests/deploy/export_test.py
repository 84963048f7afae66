import json

from jax import export as jax_export
import numpy as np
import onnxruntime
import pytest
import tiny_model

from kdseg.deploy import export
from kdseg.deploy import models
from kdseg.deploy import weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
  return models.load(tiny_model.write(path, arm="tiny-none", seed=4))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  out = tmp_path_factory.mktemp("export")
  export.export(model, out)
  return out


def test_leaves_every_file_that_is_promised(folder):
  assert {path.name for path in folder.iterdir()} == {
    "weights.safetensors",
    "model.onnx",
    "model.stablehlo",
    "preprocess.json",
    "golden.npz",
    "PARITY.json",
    "README.md",
  }


def run_onnx(folder, x):
  session = onnxruntime.InferenceSession(
    folder / "model.onnx", providers=["CPUExecutionProvider"]
  )
  return session.run(["probability"], {"image": x})[0]


def run_stablehlo(folder, x):
  content = bytearray((folder / "model.stablehlo").read_bytes())
  return np.asarray(jax_export.deserialize(content).call(x))


def run_weights(folder, x):
  model = models.load(folder / "weights.safetensors")
  return np.stack([model.predict(image) for image in x])


@pytest.mark.parametrize("run", [run_onnx, run_stablehlo, run_weights])
@pytest.mark.parametrize("kind", ["golden", "random"])
def test_every_file_gives_the_golden_answers(folder, run, kind):
  with np.load(folder / "golden.npz") as golden:
    x, expected = golden[f"{kind}_input"], golden[f"{kind}_output"]
  np.testing.assert_allclose(run(folder, x), expected, atol=1e-5)
  # One image is as good as four.
  np.testing.assert_allclose(run(folder, x[:1]), expected[:1], atol=1e-5)
  assert expected.std() > 1e-3


def test_the_distances_are_those_that_were_measured(folder):
  record = json.loads((folder / "PARITY.json").read_text())
  for name in ("model.onnx", "model.stablehlo"):
    assert record[name]["bytes"] == (folder / name).stat().st_size
    assert max(record[name]["largest_difference"].values()) <= 1e-5
  assert record["tolerance"] == 1e-4


def test_the_card_says_what_it_is_and_what_it_is_not(folder):
  card = (folder / "README.md").read_text()
  for text in ("tiny-none", "not a medical device", "patch_unet", "model.onnx"):
    assert text in card


def test_a_form_that_strays_is_not_written(model, tmp_path, monkeypatch):
  make = export._make_onnx

  def stray(*arguments):
    content, run = make(*arguments)
    return content, lambda x: run(x) + 2e-4

  monkeypatch.setattr(export, "_make_onnx", stray)
  with pytest.raises(export.ParityError, match=r"model\.onnx is 0\.0002 away"):
    export.export(model, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_form_that_gives_no_number_is_not_written(
  model, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    export,
    "_make_stablehlo",
    lambda *_: (b"", lambda x: np.full(x.shape[:3], np.nan)),
  )
  with pytest.raises(export.ParityError, match="nan away"):
    export.export(model, tmp_path / "out")


def test_a_missing_converter_names_the_extra(model, tmp_path, monkeypatch):
  monkeypatch.setitem(export.sys.modules, "onnxruntime", None)
  with pytest.raises(ImportError, match=r"pip install 'kdseg\[export\]'"):
    export.export(model, tmp_path / "out")


def test_the_command_says_how_far_each_form_is(tmp_path, capsys):
  path = tiny_model.write(tmp_path / "a.safetensors")
  assert export.main([str(path), "--out", str(tmp_path / "out")]) == 0
  printed = capsys.readouterr().out
  assert printed.count("from JAX") == 2
  assert (tmp_path / "out" / "PARITY.json").exists()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
  assert export.main(["nothing", "--out", str(tmp_path / "out")]) == 1
  assert capsys.readouterr().err.startswith("kdseg: nothing is no file")


def test_what_a_file_says_survives_the_export(folder):
  _, about = weights.load(folder / "weights.safetensors")
  assert about["arm"] == "tiny-none"
  assert about["seed"] == 4
