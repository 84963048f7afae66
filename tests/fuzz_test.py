"""Readers given damaged files at random: a documented error, or an answer.

The draws are the same in every run. A property takes a few seconds.
"""

import contextlib
import copy
import importlib.util
import io
import json
import math
import pathlib
import warnings
import zipfile

import hypothesis
from hypothesis import strategies as st
import ml_collections
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy
import tiny_model

from kdseg.data import archives
from kdseg.data import decode
from kdseg.data import masks
from kdseg.deploy import pictures
from kdseg.deploy import weights
from kdseg.evaluation import metrics
from kdseg.experiment import config as config_lib
from kdseg.report import scores
from kdseg.runtime import names

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


def fuzz(examples):
  return hypothesis.settings(
    max_examples=examples,
    derandomize=True,
    database=None,
    deadline=None,
    # Shrinking has no end that could be set.
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    suppress_health_check=list(hypothesis.HealthCheck),
  )


def damaged(whole):
  """Bytes at random, and each of `whole` cut, overwritten or added to."""

  def spoil(parts):
    content, edits, length = parts
    content = bytearray(content)
    for place, patch in edits:
      at = int(place * len(content))
      content[at : at + len(patch)] = patch
    return bytes(content[: math.ceil(length * len(content))])

  place = st.floats(0, 1, exclude_max=True)
  edits = st.lists(
    st.tuples(place, st.binary(min_size=1, max_size=8)), max_size=4
  )
  length = st.one_of(st.just(1.0), st.floats(0, 1))
  mutated = st.tuples(st.sampled_from(whole), edits, length).map(spoil)
  return st.one_of(mutated, mutated, mutated, st.binary(max_size=200))


@contextlib.contextmanager
def lenient():
  """Pillow's warnings are no errors, as in production."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz") / "file"


# ------------------------------------------------------------------- pictures


def _encode(mode, kind, **options):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
  buffer = io.BytesIO()
  image.convert(mode).save(buffer, format=kind, **options)
  return buffer.getvalue()


def _turned():
  exif = Image.Exif()
  exif[0x0112] = 6
  return exif


PICTURES = (
  _encode("RGB", "JPEG"),
  _encode("RGB", "JPEG", exif=_turned(), progressive=True),
  _encode("CMYK", "JPEG"),
  _encode("RGB", "PNG", exif=_turned()),
  _encode("P", "PNG", transparency=b"\0\1\2"),
  _encode("LA", "PNG"),
  _encode("I;16", "PNG"),
  _encode("1", "PNG"),
  _encode("RGB", "BMP"),
  _encode("P", "BMP"),
  _encode("RGB", "TIFF"),
  _encode("RGB", "TIFF", compression="tiff_lzw"),
  _encode("L", "TIFF", compression="tiff_adobe_deflate"),
  _encode("1", "TIFF", compression="group4"),
  _encode("I", "TIFF"),
)


@pytest.fixture
def small_limit(monkeypatch):
  """So that a claim of many pixels costs no time before it is refused."""
  monkeypatch.setattr(decode, "MAX_PIXELS", 10**6)


@fuzz(400)
@hypothesis.given(content=damaged(PICTURES))
def test_a_picture_is_read_or_refused(small_limit, path, content):
  path.write_bytes(content)
  with lenient(), contextlib.suppress(archives.DataError):
    image = pictures.read(path)
    assert image.dtype == np.uint8
    assert image.ndim == image.shape[-1] == 3
    assert image.size


@fuzz(300)
@hypothesis.given(content=damaged(PICTURES))
def test_an_image_and_a_mask_are_decoded_or_refused(small_limit, content):
  with lenient(), contextlib.suppress(archives.DataError):
    image = decode.decode_image(content, "here")
    assert image.dtype == np.uint8
    assert image.shape[-1] == 3
    decode.keep_or_encode(content, image)
  with lenient(), contextlib.suppress(archives.DataError):
    mask = masks.decode_mask(content, "here", masks.MaskRule("threshold"))
    assert mask.dtype == bool
    assert mask.ndim == 2


# ------------------------------------------------------------------- archives


def _zip(method):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w", method) as archive:
    for name in ("A/x.png", "A/deep/\u00e9.png", "readme.txt"):
      archive.writestr(zipfile.ZipInfo(name), name * 9, method)
  return buffer.getvalue()


ARCHIVES = tuple(
  map(_zip, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
)


@fuzz(600)
@hypothesis.given(content=damaged(ARCHIVES))
def test_an_archive_is_read_or_refused(path, content):
  path.write_bytes(content)
  with lenient(), contextlib.suppress(archives.DataError):
    for file in archives.list_files(path):
      assert file.where.isprintable()
      with contextlib.suppress(archives.DataError):
        assert len(file.read()) <= archives.MAX_FILE_BYTES


# -------------------------------------------------------------------- weights

METADATA = {
  key: json.dumps(value) for key, value in tiny_model.ABOUT.items()
} | {"format": weights.FORMAT}
TENSORS = safetensors.numpy.save(
  {"params/a": np.ones((2, 3), np.float32), "batch_stats/b": np.zeros(4)},
  METADATA,
)


@fuzz(600)
@hypothesis.given(content=damaged([TENSORS]))
def test_weights_are_read_or_refused(path, content):
  path.write_bytes(content)
  with contextlib.suppress(weights.WeightsError):
    arrays, about = weights.load(path)
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert set(weights.REQUIRED) <= set(about)


@pytest.mark.parametrize("key", ["size", "threshold", "options"])
@pytest.mark.parametrize(
  "text", ["[" * 100_000, "9" * 5000], ids=["nested", "digits"]
)
def test_metadata_at_the_limits_of_json_are_refused(path, key, text):
  path.write_bytes(
    safetensors.numpy.save({"x": np.zeros(2)}, METADATA | {key: text})
  )
  with pytest.raises(weights.WeightsError):
    weights.load(path)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "C64"])
def test_weights_of_a_type_that_no_network_has_are_refused(path, kind):
  width = 8 if kind == "C64" else 1
  entry = {"dtype": kind, "shape": [2], "data_offsets": [0, 2 * width]}
  header = json.dumps({"__metadata__": METADATA, "x": entry}).encode()
  length = len(header).to_bytes(8, "little")
  path.write_bytes(length + header + bytes(2 * width))
  with pytest.raises(weights.WeightsError):
    weights.load(path)


# --------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def whole_scores(path):
  rng = np.random.default_rng(0)
  rows = [
    {
      "arm": arm,
      "seed": 0,
      "dataset": "ph2",
      "id": identity,
      **metrics.score(rng.random((6, 7)), rng.random((6, 7)) > 0.5),
    }
    for arm in ("teacher", "student-none")
    for identity in ("=a,b", "two\nlines", "c")
  ]
  scores.write(path, rows)
  return path.read_bytes()


def _read_whole(path):
  return scores.recover(path)[0]


@fuzz(400)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("read", [scores.read, _read_whole])
def test_scores_are_read_or_refused(path, whole_scores, read, data):
  path.write_bytes(data.draw(damaged([whole_scores])))
  try:
    rows = read(path)
  except ValueError as error:
    message = str(error)
  else:
    assert all(math.isfinite(row["dice"]) for row in rows)
    return
  # Not one of int(), decode() and their like, which name no file.
  assert str(path) in message
  assert message.isprintable()


TEXTS = st.text(
  st.characters(codec=None, exclude_characters="\0"), min_size=1, max_size=12
)


@fuzz(150)
@hypothesis.given(arm=TEXTS, ids=st.lists(TEXTS, min_size=1, unique=True))
def test_any_names_come_back_from_scores(path, arm, ids):
  # A half of a character is what a name that is not UTF-8 has in it, and only
  # those that stand for bytes are names of files.
  def is_name(text):
    try:
      return (
        text.encode("utf-8", "surrogateescape").decode(
          "utf-8", "surrogateescape"
        )
        == text
      )
    except UnicodeEncodeError:
      return False

  hypothesis.assume(all(map(is_name, (arm, *ids))))
  rest = dict.fromkeys(metrics.COLUMNS, 0)
  rows = [
    {"arm": arm, "seed": 0, "dataset": "x", "id": identity, **rest}
    for identity in ids
  ]
  scores.write(path, rows)
  assert scores.read(path) == rows


# --------------------------------------------------------------------- config


def _quickstart():
  spec = importlib.util.spec_from_file_location("quickstart", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config().to_dict()


QUICKSTART = _quickstart()


def _places(tree, outer=()):
  for key, value in tree.items():
    yield (*outer, key)
    if isinstance(value, dict):
      yield from _places(value, (*outer, key))


LEAVES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.floats(),
  st.sampled_from(["", "none", "mbf", "teacher_unet", "patch_unet_12k"]),
  st.text(max_size=5),
)
VALUES = st.recursive(
  LEAVES,
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(["terms", "heads", "x"]), inner),
  ),
  max_leaves=6,
)


@fuzz(300)
@hypothesis.given(
  place=st.sampled_from(list(_places(QUICKSTART))), value=VALUES
)
def test_a_config_is_accepted_or_refused(place, value):
  tree = copy.deepcopy(QUICKSTART)
  inner = tree
  for key in place[:-1]:
    inner = inner[key]
  inner[place[-1]] = value
  with contextlib.suppress(config_lib.ConfigError, names.UnknownNameError):
    config_lib.parse(ml_collections.ConfigDict(tree))
