import shutil

import numpy as np
import pytest
import tiny_archives as tiny

from kdseg.data import loading
from kdseg.data import prepare
from kdseg.data.archives import DataError


def _arrays(count: int = 7, size: int = 4, **changes) -> loading.Arrays:
  rng = np.random.default_rng(0)
  masks = [tiny.lesion(n) for n in range(count)]
  values = {
    "name": "drawn",
    "split": "train",
    "ids": tuple(f"id_{n}" for n in range(count)),
    "image": rng.integers(0, 256, (count, size, size, 3), np.uint8),
    "mask": rng.integers(0, 2, (count, size, size), np.uint8),
    "official_count": 900,
    "found_count": 751,
    "native_masks": tuple(tiny.mask_bytes(mask) for mask in masks),
  }
  return loading.Arrays(**{**values, **changes})


# Resizing.


def test_a_mask_pixel_is_lesion_from_half_its_area_on():
  # Blocks of 2x2 with 0, 1, 2, 3 and 4 pixels of lesion.
  rows = np.array(
    [[0, 0, 1, 0, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 0, 1, 1]], bool
  )
  square = np.concatenate([rows] * 5)
  np.testing.assert_array_equal(
    loading.resize_mask(square, 5), [[0, 0, 1, 1, 1]] * 5
  )


def test_a_mask_shrunk_by_three_counts_five_of_nine():
  mask = np.zeros((3, 9), bool)
  mask[:, 0] = True  # 3 of 9
  mask[:2, 3:5] = True  # 4 of 9
  mask[:, 6], mask[:2, 7] = True, True  # 5 of 9
  square = np.concatenate([mask] * 3)
  np.testing.assert_array_equal(loading.resize_mask(square, 3), [[0, 0, 1]] * 3)


def test_enlarging_a_mask_repeats_its_pixels():
  mask = np.array([[0, 1], [1, 0]], bool)
  np.testing.assert_array_equal(
    loading.resize_mask(mask, 4), np.kron(mask, np.ones((2, 2)))
  )


def test_the_size_it_has_changes_nothing():
  image, mask = tiny.picture(0, 9, 9), tiny.lesion(0, 9, 9)
  np.testing.assert_array_equal(loading.resize_image(image, 9), image)
  np.testing.assert_array_equal(loading.resize_mask(mask, 9), mask)
  assert loading.resize_mask(mask, 9).dtype == np.uint8


def test_shrinking_an_image_averages_instead_of_skipping():
  stripes = np.zeros((32, 32, 3), np.uint8)
  stripes[:, ::2] = 255
  small = loading.resize_image(stripes, 4)
  assert small.shape == (4, 4, 3)
  assert np.abs(small.astype(int) - 127).max() < 20


def test_a_wide_frame_is_squashed_to_the_square():
  wide = np.zeros((4, 8, 3), np.uint8)
  wide[:, 4:] = 200
  square = loading.resize_image(wide, 4)
  assert (square[:, 0] == 0).all()
  assert (square[:, 3] == 200).all()


# Arrays.


def test_native_masks_decode_at_their_own_size():
  arrays = _arrays()
  for index in range(len(arrays)):
    mask = arrays.native_mask(index)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, tiny.lesion(index))
    assert arrays.native_size(index) == mask.shape
  assert arrays.coverage == "751 of 900"


def test_equal_arrays_have_equal_fingerprints_however_packed():
  arrays = _arrays()
  repacked = tuple(
    tiny.encode(np.asarray(arrays.native_mask(i), np.uint8) * 255, "BMP")
    for i in range(len(arrays))
  )
  assert loading.fingerprint(arrays) == loading.fingerprint(
    _arrays(native_masks=repacked)
  )


def _changed(values: np.ndarray) -> np.ndarray:
  values = values.copy()
  values.flat[-1] ^= 1
  return values


CHANGES = {
  "name": lambda a: "other",
  "split": lambda a: "test",
  "ids": lambda a: ("id_x", *a.ids[1:]),
  "image": lambda a: _changed(a.image),
  "mask": lambda a: _changed(a.mask),
  "native_masks": lambda a: (*a.native_masks[:-1], a.native_masks[0]),
}


@pytest.mark.parametrize("field", CHANGES)
def test_any_change_changes_the_fingerprint(field):
  arrays = _arrays()
  changed = _arrays(**{field: CHANGES[field](arrays)})
  assert loading.fingerprint(changed) != loading.fingerprint(arrays)


# Loading.


def test_load_names_the_splits_sets_and_options_there_are(
  tmp_path, make_folder
):
  own = make_folder(tmp_path / "own", ["a", "b"])
  kwargs = {"size": 8, "data_dir": tmp_path / "data", "manual_dir": own}
  with pytest.raises(DataError, match=r"has no split 'tset', only "):
    loading.load("folder", "tset", **kwargs)
  with pytest.raises(ValueError, match='"isic2017"; did you mean "isic2016'):
    loading.load("isic2017", "train", **kwargs)
  with pytest.raises(ValueError, match='unknown option of folder "seed"'):
    loading.load("folder", "train", seed=1, **kwargs)
  with pytest.raises(ValueError, match="size is 0"):
    loading.load("folder", "train", size=0)


def test_loading_twice_gives_the_same_arrays_without_the_source(tmp_path):
  kwargs = {
    "size": 16,
    "data_dir": tmp_path,
    "train": 70,
    "validation": 1,
    "test": 1,
    "image_size": 24,
  }
  first = loading.load("synthetic", "train", **kwargs)
  second = loading.load("synthetic", "train", **kwargs)
  assert loading.fingerprint(first) == loading.fingerprint(second)
  # More than one piece of 64, in order, each resized from its own record.
  assert first.ids == tuple(f"train_{n:05d}" for n in range(70))
  for index in (0, 63, 64, 69):
    np.testing.assert_array_equal(
      first.mask[index], loading.resize_mask(first.native_mask(index), 16)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Prepared data of six pairs, to be copied and damaged."""
  root = tmp_path_factory.mktemp("prepared")
  for seed in range(6):
    tiny.write_folder(
      root / "own" / "train",
      {
        f"images/{seed}.png": tiny.encode(tiny.picture(seed), "PNG"),
        f"masks/{seed}.png": tiny.mask_bytes(tiny.lesion(seed)),
      },
    )
  prepare.prepare("folder", data_dir=root / "data", manual_dir=root / "own")
  return root


@pytest.mark.parametrize(
  ("pattern", "spoil"),
  [
    ("*array_record*", lambda content: content[: len(content) // 2]),
    ("*array_record*", lambda content: content[:300] + content[330:]),
    ("*array_record*", lambda _: b""),
    ("dataset_info.json", lambda _: b"{"),
    ("dataset_info.json", lambda _: b"\xff\xfe"),
    ("dataset_info.json", lambda _: b"[]"),
    ("metadata.json", lambda _: b"{}"),
  ],
  ids=[
    "cut",
    "gap",
    "empty",
    "info cut",
    "info bytes",
    "info list",
    "no stamp",
  ],
)
def test_prepared_data_that_are_damaged_are_named(
  tmp_path, whole, pattern, spoil
):
  data = shutil.copytree(whole / "data", tmp_path / "data")
  (path,) = data.rglob(pattern)
  path.write_bytes(spoil(path.read_bytes()))
  with pytest.raises(DataError, match=r"data/folder.* is damaged .*Delete"):
    loading.load(
      "folder", "train", size=8, data_dir=data, manual_dir=whole / "own"
    )


@pytest.mark.parametrize("feature", ["image", "mask"])
def test_a_prepared_picture_that_is_damaged_is_named_by_its_id(
  tmp_path, whole, monkeypatch, feature
):
  spoilt = prepare.Record(
    "7", tiny.encode(tiny.picture(0), "PNG"), tiny.mask_bytes(tiny.lesion(0))
  )._replace(**{feature: b"no image"})
  monkeypatch.setattr(prepare, "read_records", lambda *_: iter([spoilt]))
  with pytest.raises(DataError, match=r"train/7.* cannot be decoded"):
    loading.load(
      "folder",
      "train",
      size=8,
      data_dir=whole / "data",
      manual_dir=whole / "own",
    )
