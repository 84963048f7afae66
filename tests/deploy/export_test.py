import io
import json
import pathlib
import platform
import shutil
import sys

from jax import export as jax_export
import numpy as np
import onnx
import pytest
import tiny_model

from kdseg.deploy import export
from kdseg.deploy import formats as formats_lib
from kdseg.deploy import models
from kdseg.deploy import parity
from kdseg.deploy import weights
from kdseg.deploy.formats import record
from kdseg.deploy.formats import stablehlo

FORMATS = {format.name: format for format in formats_lib.FORMATS}
FULL = [format.file for format in FORMATS.values()]
INT8 = ["model.int8.onnx", "model.int8.tflite"]
FILES = {
  "weights.safetensors",
  *FULL,
  *INT8,
  "preprocess.json",
  "golden.npz",
  "PARITY.json",
  "README.md",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
  about = {"arm": "tiny-none", "seed": 4, "threshold": 0.4}
  return models.load_weights(tiny_model.write(path, **about))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
  out = tmp_path_factory.mktemp("export")
  export.export(model, out)
  return out


def test_leaves_every_file_that_is_promised(folder):
  assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("name", ["weights.safetensors", *FULL])
@pytest.mark.parametrize("kind", ["golden", "random"])
def test_every_file_gives_the_golden_outputs(folder, name, kind):
  with np.load(folder / "golden.npz") as golden:
    x, expected = golden[f"{kind}_input"], golden[f"{kind}_output"]
  loaded = models.load(folder / name)
  # Batches of four, of one, and of four again.
  for count in (4, 1, 4):
    np.testing.assert_allclose(
      loaded.probabilities(x[:count]), expected[:count], atol=1e-5
    )
  assert expected.std() > 1e-3


@pytest.mark.parametrize("name", INT8)
def test_int8_weights_are_near_and_their_distance_is_stated(
  model, folder, name
):
  with np.load(folder / "golden.npz") as golden:
    x, expected = golden["golden_input"], golden["golden_output"]
  output = models.load(folder / name).probabilities(x)
  distance = np.abs(output - expected).max()
  assert distance > 0
  assert np.abs(output - expected).mean() < 0.1
  stated = json.loads((folder / "PARITY.json").read_text())[name]
  assert stated["largest_difference"]["golden"] == pytest.approx(distance)
  changed = (output > model.threshold) != (expected > model.threshold)
  assert stated["changed_pixels"] == np.mean(changed)
  assert stated["cpu"] == parity.describe_cpu()
  assert f"an {stated['cpu']}" in (folder / "README.md").read_text()


def test_8_bit_products_do_not_saturate_on_a_cpu_without_vnni(folder):
  graph = onnx.load(folder / "model.int8.onnx").graph
  kernels = [
    onnx.numpy_helper.to_array(tensor)
    for tensor in graph.initializer
    if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
  ]
  assert kernels
  # Two products of uint8 and such a weight fit in an int16.
  assert max(np.abs(kernel.astype(int)).max() for kernel in kernels) <= 64


@pytest.mark.parametrize(
  ("cpuinfo", "said"),
  [
    ("model name\t: a\nflags\t\t: fpu avx512_vnni sse\n", " CPU with VNNI"),
    ("flags\t\t: fpu avx_vnni\n", " CPU with VNNI"),
    ("flags\t\t: fpu avx2\n", " CPU without VNNI"),
    ("Features\t: fp asimd\n", " CPU"),
    ("", " CPU"),
  ],
)
def test_a_cpu_is_described_by_what_8_bit_products_need(cpuinfo, said):
  assert parity.describe_cpu(cpuinfo) == platform.machine() + said


@pytest.mark.parametrize("name", ["weights.safetensors", *FULL, *INT8])
def test_a_file_knows_its_size_and_its_threshold(folder, name):
  loaded = models.load(folder / name)
  assert (loaded.size, loaded.threshold) == (tiny_model.SIZE, 0.4)


def test_a_format_is_added_by_one_record(model, tmp_path):
  def write(function, size, about):
    stream = io.BytesIO()
    program = stablehlo.write(function, size, about)
    np.savez(stream, program=np.frombuffer(program, np.uint8))
    return stream.getvalue()

  def open_file(content, threads):
    with np.load(io.BytesIO(content)) as file:
      return stablehlo.open_file(file["program"].tobytes(), threads)

  npz = record.Format(
    "npz", ".npz", "export", write, open_file, lambda content, images: content
  )
  stated = export.export(model, tmp_path, formats=[npz])
  assert stated["model.npz"]["bytes"] == (tmp_path / "model.npz").stat().st_size
  assert stated["model.int8.npz"]["changed_pixels"] == 0
  assert "model.npz" in (tmp_path / "README.md").read_text()
  loaded = models.load_exported(tmp_path / "model.npz", [npz])
  image = parity.make_inputs(model.size)["golden"]
  np.testing.assert_allclose(
    loaded.probabilities(image), model.probabilities(image), atol=1e-6
  )
  # Replaced by an export that leaves it out.
  export.export(model, tmp_path, formats=[npz._replace(quantize=None)])
  assert not (tmp_path / "model.int8.npz").exists()


def test_formats_that_are_left_out_and_old_scores_do_not_stay(
  model, folder, tmp_path
):
  out = tmp_path / "out"
  shutil.copytree(folder, out)
  for name in ("SCORES.json", "SCORES.md", "scores.csv"):
    (out / name).write_text("of the files before")
  export.export(model, out, formats=[FORMATS["stablehlo"]])
  left = {path.name for path in out.iterdir()}
  assert left == FILES - {"model.onnx", "model.tflite", *INT8}


def test_a_folder_of_something_else_keeps_its_files(model, tmp_path):
  (tmp_path / "scores.csv").write_text("of a run")
  with pytest.raises(export.PlaceError, match=r"holds scores\.csv and is no"):
    export.export(model, tmp_path, formats=[])
  assert (tmp_path / "scores.csv").read_text() == "of a run"
  export.export(model, tmp_path, formats=[], force=True)
  assert not (tmp_path / "scores.csv").exists()


def test_no_file_says_where_its_maker_keeps_the_sources(folder):
  root = str(pathlib.Path(export.__file__).parents[2]).encode()
  for path in folder.iterdir():
    assert root not in path.read_bytes(), path.name
    assert b"site-packages" not in path.read_bytes(), path.name


def test_an_onnx_file_of_another_maker_is_refused(tmp_path):
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


@pytest.mark.parametrize("name", FULL)
def test_a_damaged_file_is_named(folder, tmp_path, name):
  content = (folder / name).read_bytes()
  path = tmp_path / name
  path.write_bytes(content[: len(content) // 3])
  with pytest.raises(weights.WeightsError, match=f"{name} cannot be opened"):
    models.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(weights.WeightsError, match="No such file"):
    models.load(tmp_path / "gone.onnx")


@pytest.mark.parametrize(
  ("times", "said"),
  [
    ((1.0, 2.0), "smaller and slower here"),
    ((2.0, 1.0), "smaller and faster here"),
    ((2.0, 2.1), "smaller and as fast as it here"),
  ],
)
def test_the_verdict_on_int8_weights_is_plain(times, said):
  entries = {
    "model.onnx": {"bytes": 100, "milliseconds": times[0]},
    "model.int8.onnx": {
      "bytes": 40,
      "milliseconds": times[1],
      "changed_pixels": 0.0125,
      "cpu": "x86_64 CPU without VNNI",
    },
  }
  verdict = parity.describe_int8("model.int8.onnx", entries)
  assert verdict.startswith(said)
  assert "40% of the bytes of model.onnx" in verdict
  assert "1.25%" in verdict
  assert "measured on an x86_64 CPU without VNNI" in verdict


def test_the_distances_are_those_that_were_measured(folder):
  stated = json.loads((folder / "PARITY.json").read_text())
  for name in FULL:
    assert stated[name]["bytes"] == (folder / name).stat().st_size
    assert max(stated[name]["largest_difference"].values()) <= 1e-5
  assert stated["tolerance"] == 1e-4


def test_the_card_says_what_it_is_and_what_it_is_not(folder):
  card = (folder / "README.md").read_text()
  for text in ("tiny-none", "not a medical device", "patch_unet", "model.onnx"):
    assert text in card


@pytest.mark.parametrize("stray", [2e-4, np.nan])
def test_a_file_that_strays_is_not_written(model, tmp_path, stray):
  def open_astray(content, threads):
    opened = stablehlo.open_file(content, threads)
    return opened._replace(run=lambda x: opened.run(x) + np.float32(stray))

  astray = FORMATS["stablehlo"]._replace(open=open_astray)
  with pytest.raises(parity.ParityError, match=r"model\.stablehlo is .* away"):
    export.export(model, tmp_path / "out", formats=[astray])
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("package", "name", "extra"),
  [
    ("onnx", "onnx", "export"),
    ("onnxruntime", "onnx", "export"),
    ("ai_edge_litert", "litert", "litert"),
    ("litert_quantizer", "litert", "litert"),
  ],
)
def test_a_missing_package_names_its_extra(
  model, tmp_path, monkeypatch, package, name, extra
):
  for module in list(sys.modules):
    if module.partition(".")[0] == package:
      monkeypatch.delitem(sys.modules, module)
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"pip install 'kdseg\[{extra}\]'"):
    export.export(model, tmp_path / "out", formats=[FORMATS[name]])
  assert not (tmp_path / "out").exists()


def test_without_flatbuffers_the_error_names_its_extra(
  model, tmp_path, monkeypatch
):
  # JAX imports it when it first writes, so hiding it comes too late here.
  def serialize(*_, **__):
    raise ModuleNotFoundError("flatbuffers")

  monkeypatch.setattr(jax_export.Exported, "serialize", serialize)
  with pytest.raises(ImportError, match=r"flatbuffers: pip install 'kdseg\["):
    export.export(model, tmp_path / "out", formats=[FORMATS["stablehlo"]])


def test_the_command_says_how_far_each_file_is(tmp_path, capsys):
  path = tiny_model.write(tmp_path / "a.safetensors")
  out = str(tmp_path / "out")
  assert export.main([str(path), "--out", out, "--formats", "litert"]) == 0
  printed = capsys.readouterr().out
  assert printed.count("from JAX") == 2
  assert printed.count("change sides") == 1
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
