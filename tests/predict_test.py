import csv
import os
import pathlib
import sys

import numpy as np
from PIL import Image
import pytest
import tiny_model

from kdseg import predict
from kdseg.deploy import models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
  return tiny_model.write(path)


@pytest.fixture
def images(tmp_path):
  folder = tmp_path / "images"
  (folder / "more").mkdir(parents=True)
  draw = np.random.default_rng(0)
  for name, shape in (("a.png", (40, 70)), ("more/a.jpg", (33, 20))):
    pixels = draw.integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
  return folder


def run(model, *images, out, **options):
  flags = [f"--{key}={value}" for key, value in options.items()]
  arguments = [str(model), *map(str, images), "--out", str(out), *flags]
  code = predict.main(arguments)
  path = out / "predictions.csv"
  if not path.exists():
    return code, []
  with open(path, newline="", encoding="utf-8") as file:
    return code, list(csv.DictReader(file))


def test_leaves_a_mask_an_overlay_and_a_row_an_image(model, images, tmp_path):
  out = tmp_path / "out"
  code, [first, second] = run(model, images, images / "more", out=out)
  assert code == 0
  # Of the same name: neither is lost.
  assert (first["mask"], second["mask"]) == ("a.png", "a_2.png")
  for row, size in ((first, (70, 40)), (second, (20, 33))):
    with Image.open(out / "masks" / row["mask"]) as mask:
      assert mask.size == size
      share = np.asarray(mask.convert("L")).mean() / 255
    assert (int(row["width"]), int(row["height"])) == size
    assert float(row["area_share"]) == pytest.approx(share, abs=1e-5)
    assert 0 <= float(row["confidence"]) <= 1
    assert float(row["milliseconds"]) > 0
    with Image.open(out / "overlays" / row["mask"]) as overlay:
      assert overlay.mode == "RGB"


def test_masks_are_those_of_the_api(model, images, tmp_path):
  run(model, images / "a.png", out=tmp_path / "out")
  with Image.open(images / "a.png") as image:
    expected = models.load(model).segment(np.asarray(image))
  with Image.open(tmp_path / "out" / "masks" / "a.png") as mask:
    np.testing.assert_array_equal(np.asarray(mask) > 0, expected)


def test_one_bad_file_stops_no_other_and_shows_in_the_exit_code(
  model, images, tmp_path, capsys
):
  (images / "b.png").write_bytes(b"no image")
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(images / "c.png")
  code, rows = run(model, images, images / "gone.png", out=tmp_path / "out")
  assert code == 1
  assert [bool(row["error"]) for row in rows] == [False, True, False, True]
  assert "b.png cannot be decoded" in rows[1]["error"]
  printed = capsys.readouterr()
  assert "2 of 4 segmented" in printed.out
  assert printed.err.count("kdseg: ") == 2


def test_ctrl_c_keeps_the_rows_of_what_was_done(
  model, images, tmp_path, capsys, monkeypatch
):
  read = predict.pictures.read

  def read_or_stop(path):
    if path.name == "b.png":
      raise KeyboardInterrupt
    return read(path)

  monkeypatch.setattr(predict.pictures, "read", read_or_stop)
  gone = images / "b.png"
  code, rows = run(model, images / "a.png", gone, out=tmp_path / "out")
  assert code == 130
  assert [row["mask"] for row in rows] == ["a.png"]
  assert (tmp_path / "out" / "masks" / "a.png").exists()
  printed = capsys.readouterr()
  assert "1 of 2 segmented" in printed.out
  assert "stopped by Ctrl-C" in printed.err


def test_a_given_threshold_replaces_the_models(model, images, tmp_path):
  with Image.open(images / "a.png") as image:
    probability = models.load(model).predict(np.asarray(image))
  shares = []
  for threshold in (0.3, 0.9):
    _, [row] = run(
      model,
      images / "a.png",
      out=tmp_path / str(threshold),
      threshold=threshold,
    )
    shares.append(float(row["area_share"]))
    assert shares[-1] == pytest.approx(
      (probability > threshold).mean(), abs=1e-5
    )
  assert shares[0] > shares[1]


@pytest.mark.parametrize("threshold", ["0", "1", "-1", "nan"])
def test_a_threshold_outside_0_to_1_is_refused(
  model, images, tmp_path, threshold
):
  with pytest.raises(SystemExit) as stop:
    run(model, images, out=tmp_path / "out", threshold=threshold)
  assert stop.value.code == 2
  assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_one_line_of_error(images, tmp_path, capsys):
  code, _ = run("no-such-model", images, out=tmp_path / "out")
  assert code == 2
  assert "no shipped model" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line_of_error(
  model, images, tmp_path, capsys
):
  (tmp_path / "out").write_text("a file")
  arguments = [str(model), str(images), "--out", str(tmp_path / "out")]
  assert predict.main(arguments) == 2
  assert "cannot be written" in capsys.readouterr().err


def test_a_name_that_a_spreadsheet_would_run_is_kept_as_text(
  model, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  name = "=HYPERLINK(1).png"
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(name)
  _, [row] = run(model, name, out=tmp_path / "out")
  assert row["file"] == f"'{name}"


def test_a_file_name_that_is_not_unicode_stops_no_other(model, tmp_path):
  for name in (b"l\xe4sion.png", b"z.png"):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
      Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file, "PNG")
  code, [first, second] = run(model, tmp_path, out=tmp_path / "out")
  assert code == 0
  assert first["file"].endswith("l\\udce4sion.png")
  assert second["file"].endswith("z.png")


def test_a_mask_of_an_earlier_run_does_not_pass_for_this_ones(
  model, images, tmp_path
):
  run(model, images / "a.png", out=tmp_path / "out")
  (images / "a.png").write_bytes(b"damaged")
  run(model, images / "a.png", out=tmp_path / "out")
  assert not list((tmp_path / "out").glob("*/a.png"))


def test_files_of_something_else_are_neither_replaced_nor_deleted(
  model, images, tmp_path, capsys
):
  (tmp_path / "masks").mkdir()
  (tmp_path / "masks" / "a.png").write_bytes(b"drawn by hand")
  assert run(model, images / "a.png", out=tmp_path) == (2, [])
  (images / "a.png").write_bytes(b"damaged")
  assert run(model, images / "a.png", out=tmp_path) == (2, [])
  assert (tmp_path / "masks" / "a.png").read_bytes() == b"drawn by hand"
  assert "a.png is there already" in capsys.readouterr().err
  # Others beside them are in nobody's way.
  assert run(model, images / "more", out=tmp_path / "other")[0] == 0


def test_what_is_read_is_not_replaced_even_among_results(
  model, images, tmp_path, capsys
):
  out = tmp_path / "out"
  run(model, images / "a.png", out=out)
  before = (out / "masks" / "a.png").read_bytes()
  assert predict.main([str(model), str(out / "masks"), "--out", str(out)]) == 2
  assert (out / "masks" / "a.png").read_bytes() == before
  assert "masks/a.png is there already" in capsys.readouterr().err


def test_a_run_resumes_in_the_folder_of_one_that_was_killed(
  model, images, tmp_path
):
  out = tmp_path / "out"
  run(model, images / "a.png", out=out)
  (out / "predictions.csv").unlink()
  assert run(model, images / "a.png", out=out)[0] == 0


def test_a_reader_of_the_output_that_ends_stops_nothing(
  model, images, tmp_path, monkeypatch
):
  reader, writer = os.pipe()
  os.close(reader)
  # Closed at the end without an error: nothing is left in its buffer.
  with os.fdopen(writer, "w") as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    code, rows = run(model, images, images / "more", out=tmp_path / "out")
  assert code == 0
  assert len(rows) == 2


def test_outputs_differ_by_more_than_the_case_of_their_names():
  paths = [pathlib.Path(p) for p in ("a.png", "A.jpg", "x/a_2.png", "a.bmp")]
  assert predict.name_outputs(paths) == [
    "a.png",
    "A_2.png",
    "a_2_2.png",
    "a_3.png",
  ]


def test_confidence_is_the_mean_probability_of_the_predicted_class():
  probability = np.array([[0.9, 0.7], [0.1, 0.3]])
  assert predict.confidence(probability, probability > 0.5) == pytest.approx(
    0.8
  )
  nothing = np.zeros((2, 2), bool)
  # One minus the mean of .9, .7, .1 and .3.
  assert predict.confidence(probability, nothing) == pytest.approx(0.5)
