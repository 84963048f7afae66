"""On a full disk every writer says so, and leaves nothing half-written.

A limit on the size of this process's files stops every writer, those in C++
too, as a full disk would. `experiment/run_test` fills a real one.
"""

import contextlib
import errno
import json
import pathlib
import resource

import numpy as np
from PIL import Image
import pytest
import tiny_model

from kdseg import networks
from kdseg import predict
from kdseg.data import prepare
from kdseg.deploy import export
from kdseg.deploy import models
from kdseg.deploy.page import site
from kdseg.evaluation import metrics
from kdseg.experiment import scoring
from kdseg.report import scores
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.training import cached_outputs


@contextlib.contextmanager
def full(room=64):
  """Lets no file of this process grow beyond `room` bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
  """What lies there under its final name."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and "-tmp" not in str(path.relative_to(folder))
  }


def numbers(seed, count=3000):
  return np.random.default_rng(seed).normal(size=count)


def row(seed, number):
  values = dict.fromkeys(metrics.COLUMNS, 1)
  names = {"arm": "x", "seed": seed, "dataset": "d", "id": f"i{number}"}
  return names | values


def write_json(folder, seed):
  path = folder / "config.json"
  checkpoint.write_json(path, numbers(seed, 20).tolist())
  return path


def write_log(folder, seed):
  path = folder / "log.jsonl"
  checkpoint.append_json_line(path, {"step": seed, "loss": [0.5] * 20})
  return path


def write_checkpoint(folder, seed):
  with checkpoint.open_checkpoints(folder) as manager:
    checkpoint.save(manager, seed, {"w": numbers(seed)}, {"at": seed})
  return folder


def write_network(folder, seed):
  folder = folder / f"arm{seed}"
  checkpoint.save_variables(folder, {"w": numbers(seed)}, {"seed": seed})
  return folder


def write_cache(folder, seed):
  def answer(images):
    return {"a": numbers(seed, len(images) * 90).reshape(len(images), 90)}

  images = np.zeros((4, 2, 2, 3), np.uint8)
  folder = folder / f"taught-{seed}"
  cached_outputs.compute(answer, images, folder, batch_size=2, key=str(seed))
  return folder


def write_scores(folder, seed):
  path = folder / "scores.csv"
  scores.append(path, [row(seed, number) for number in range(9)])
  return path


def write_prediction(folder, seed):
  mask = np.random.default_rng(seed).random((40, 40)) > 0.5
  scoring._save_prediction(folder, ("x", seed, "d"), "image", mask)
  return folder / "predictions" / f"x-seed{seed}" / "d" / "image.png"


def write_weights(folder, seed):
  return tiny_model.write(folder / "student.safetensors", seed=seed)


def write_export(folder, seed):
  about = tiny_model.ABOUT | {"trained_on": f"set {seed}"}
  model = models.Model(
    name="tiny",
    network=networks.make_network(about["network"], **about["options"]),
    variables=tiny_model.variables(),
    size=about["size"],
    threshold=about["threshold"],
    about=about,
  )
  export.export(model, folder / "out", formats=())
  return folder / "out"


def write_page(folder, seed):
  made = {name: numbers(seed, 50).tobytes() for name in ("index.html", "sw.js")}
  site._write(folder / "site", made | {"page.json": b"{}"}, [])
  return folder / "site"


class Answer:
  """A network that says the same of every image."""

  def __init__(self, seed):
    self.seed = seed

  def predict(self, image):
    return np.random.default_rng(self.seed).random(image.shape[:2])


def write_masks(folder, seed):
  picture = folder.parent / "a.png"
  if not picture.exists():
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(picture)
  list(predict.predict(Answer(seed), [picture], folder, threshold=0.5))
  return folder / "masks"


def write_data(folder, seed):
  counts = {"train": 1, "validation": 1, "test": 1, "image_size": 32}
  prepare.prepare("synthetic", data_dir=folder, seed=seed, **counts)
  return folder


WRITERS = (
  write_json,
  write_log,
  write_checkpoint,
  write_network,
  write_cache,
  write_scores,
  write_prediction,
  write_weights,
  write_export,
  write_page,
  write_masks,
  write_data,
)

# Their files have drawn names, or hold the time, or keys in any order.
DRAWN = (write_checkpoint, write_network)
UNEVEN = (*DRAWN, write_weights, write_export, write_data)


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_a_full_disk_leaves_what_was_there_and_the_next_try_is_whole(
  write, tmp_path
):
  here, other = tmp_path / "here", tmp_path / "other"
  for folder in (here, other):
    folder.mkdir()
    write(folder, 1)
  before = contents(here)
  with pytest.raises(files.WriteError) as error, full():
    write(here, 2)
  left = contents(here)
  assert {name: left.get(name) for name in before} == before
  # A record that says that nothing is done may be there.
  assert {n for n in left if not n.endswith("record.json")} <= before.keys()

  path = write(here, 2)
  named = str(error.value).partition(" cannot be written: ")[0]
  assert pathlib.Path(named).is_relative_to(path)
  write(other, 2)
  found = contents(here)
  assert found.keys() > before.keys() or found != before
  assert found.keys() == contents(other).keys() or write in DRAWN
  if write not in UNEVEN:
    assert found == contents(other)
  assert not list(here.rglob("*.part"))
  assert not [p for p in here.rglob("*") if "-tmp" in p.name]


@pytest.mark.parametrize(
  ("code", "text"),
  [
    (errno.ENOSPC, "the disk is full. Free some space, then the same command"),
    (errno.EDQUOT, "the disk quota is used up. Free some space, then"),
    (errno.EACCES, "Permission denied. Allow it, then the same command"),
    (errno.EROFS, "Read-only file system. Allow it, then the same command"),
    (errno.EEXIST, "File exists. A file is where a folder has to be, or a"),
  ],
)
def test_the_error_says_where_and_why_and_what_to_do(code, text):
  with pytest.raises(files.WriteError) as error, files.writing("runs/x"):
    raise OSError(code, "of the system")
  assert str(error.value).startswith(f"runs/x cannot be written: {text}")


def test_the_text_of_a_library_error_is_understood():
  refusal = pytest.raises(
    files.WriteError, match=r"^runs/x .* the disk is full"
  )
  with refusal, files.writing("runs/x"):
    raise ValueError("RESOURCE_EXHAUSTED: a/b: No space left on device [28]")


@pytest.mark.parametrize(
  "error",
  [
    ValueError("no such thing"),
    FileNotFoundError(errno.ENOENT, "x", "elsewhere"),
    # Of an archive that is read while a data set is written.
    PermissionError(errno.EACCES, "x", "/archives/a.zip"),
  ],
)
def test_other_errors_pass_unchanged(error, tmp_path):
  with pytest.raises(type(error)) as found, files.writing(tmp_path / "x"):
    raise error
  assert found.value is error


def test_half_a_line_of_the_log_is_removed(tmp_path):
  path = tmp_path / "log.jsonl"
  for step in (1, 2):
    checkpoint.append_json_line(path, {"step": step})
  whole = path.read_bytes()
  # Killed in the middle of the third, which is longer than one look back.
  path.write_bytes(whole + b'{"step": 3, "x": "' + 9000 * b"x")
  checkpoint.append_json_line(path, {"step": 3})
  steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
  assert steps == [1, 2, 3]


def test_a_log_cut_off_by_a_full_disk_ends_with_a_whole_line(tmp_path):
  path = tmp_path / "log.jsonl"
  checkpoint.append_json_line(path, {"step": 1})
  before = path.read_bytes()
  with pytest.raises(files.WriteError), full(len(before) + 5):
    checkpoint.append_json_line(path, {"step": 2})
  assert path.read_bytes() == before
