import itertools
import shutil
import threading
import time

import numpy as np
import pytest
import tiny_archives as tiny

from kdseg.data import pipeline
from kdseg.data.archives import DataError


def _arrays(count: int = 7, size: int = 4, **changes) -> pipeline.Arrays:
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
  return pipeline.Arrays(**{**values, **changes})


# Resizing.


def test_a_mask_pixel_is_lesion_from_half_its_area_on():
  # Blocks of 2x2 with 0, 1, 2, 3 and 4 pixels of lesion.
  rows = np.array(
    [[0, 0, 1, 0, 1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 0, 1, 1]], bool
  )
  square = np.concatenate([rows] * 5)
  np.testing.assert_array_equal(
    pipeline.resize_mask(square, 5), [[0, 0, 1, 1, 1]] * 5
  )


def test_a_mask_shrunk_by_three_counts_five_of_nine():
  mask = np.zeros((3, 9), bool)
  mask[:, 0] = True  # 3 of 9
  mask[:2, 3:5] = True  # 4 of 9
  mask[:, 6], mask[:2, 7] = True, True  # 5 of 9
  square = np.concatenate([mask] * 3)
  np.testing.assert_array_equal(
    pipeline.resize_mask(square, 3), [[0, 0, 1]] * 3
  )


def test_enlarging_a_mask_repeats_its_pixels():
  mask = np.array([[0, 1], [1, 0]], bool)
  np.testing.assert_array_equal(
    pipeline.resize_mask(mask, 4), np.kron(mask, np.ones((2, 2)))
  )


def test_the_size_it_has_changes_nothing():
  image, mask = tiny.picture(0, 9, 9), tiny.lesion(0, 9, 9)
  np.testing.assert_array_equal(pipeline.resize_image(image, 9), image)
  np.testing.assert_array_equal(pipeline.resize_mask(mask, 9), mask)
  assert pipeline.resize_mask(mask, 9).dtype == np.uint8


def test_shrinking_an_image_averages_instead_of_skipping():
  stripes = np.zeros((32, 32, 3), np.uint8)
  stripes[:, ::2] = 255
  small = pipeline.resize_image(stripes, 4)
  assert small.shape == (4, 4, 3)
  assert np.abs(small.astype(int) - 127).max() < 20


def test_a_wide_frame_is_squashed_to_the_square():
  wide = np.zeros((4, 8, 3), np.uint8)
  wide[:, 4:] = 200
  square = pipeline.resize_image(wide, 4)
  assert (square[:, 0] == 0).all()
  assert (square[:, 3] == 200).all()


# Order.


@pytest.mark.parametrize("n", [1, 2, 31])
def test_an_epoch_holds_every_example_once(n):
  order = pipeline.epoch_order(3, 5, n)
  assert sorted(order) == list(range(n))
  assert order.dtype == np.int32


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
  order = pipeline.epoch_order(0, 0, 50)
  np.testing.assert_array_equal(order, pipeline.epoch_order(0, 0, 50))
  assert (order != pipeline.epoch_order(0, 1, 50)).any()
  assert (order != pipeline.epoch_order(1, 0, 50)).any()
  # (1, 0) and (0, 1) are two things, as a sum of both would not have it.
  assert (
    pipeline.epoch_order(1, 0, 50) != pipeline.epoch_order(0, 1, 50)
  ).any()


def test_the_order_is_the_same_in_every_release():
  # Written down from the first run; another value would break resuming.
  assert pipeline.epoch_order(0, 0, 8).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [0, 3, 7, 5, 1, 2, 6, 4]


@pytest.mark.parametrize(("batch_size", "n"), [(4, 10), (3, 9), (7, 3), (1, 1)])
def test_batches_are_the_epochs_laid_end_to_end(batch_size, n):
  steps = 12
  joined = np.concatenate(
    [pipeline.batch_indices(1, step, batch_size, n) for step in range(steps)]
  )
  epochs = (
    index
    for epoch in itertools.count()
    for index in pipeline.epoch_order(1, epoch, n)
  )
  expected = list(itertools.islice(epochs, steps * batch_size))
  assert joined.tolist() == expected


@pytest.mark.parametrize(
  ("step", "batch_size", "n"), [(-1, 4, 4), (0, 0, 4), (0, 4, 0)]
)
def test_impossible_batches_are_refused(step, batch_size, n):
  with pytest.raises(ValueError, match="above 0"):
    pipeline.batch_indices(0, step, batch_size, n)


def test_steps_for_epochs_show_everything_at_least_that_often():
  assert pipeline.steps_for_epochs(2, 4, 10) == 5
  assert pipeline.steps_for_epochs(1, 4, 10) == 3
  assert pipeline.steps_for_epochs(0.5, 4, 10) == 2


def test_hosts_share_a_batch_without_overlap_in_order():
  indices = np.arange(12)[::-1]
  shares = [pipeline.shard_for_process(indices, i, 3) for i in range(3)]
  np.testing.assert_array_equal(np.concatenate(shares), indices)
  assert {len(share) for share in shares} == {4}


def test_a_batch_that_hosts_cannot_share_is_refused():
  with pytest.raises(ValueError, match=r"batch of 10 .* 4 hosts"):
    pipeline.shard_for_process(np.arange(10), 0, 4)
  with pytest.raises(ValueError, match="process_index 2"):
    pipeline.shard_for_process(np.arange(10), 2, 2)


# Batches.


def test_a_batch_holds_what_its_indices_say():
  arrays = _arrays()
  for step, batch in pipeline.batches(
    arrays, seed=5, batch_size=3, first_step=0, last_step=6
  ):
    index = pipeline.batch_indices(5, step, 3, 7)
    np.testing.assert_array_equal(batch["index"], index)
    np.testing.assert_array_equal(batch["image"], arrays.image[index])
    np.testing.assert_array_equal(batch["mask"], arrays.mask[index])
    assert batch["index"].dtype == np.int32
    assert batch["image"].dtype == batch["mask"].dtype == np.uint8


def test_a_resumed_run_sees_what_the_uninterrupted_one_saw():
  def indices(first_step):
    return [
      (step, batch["index"].tolist())
      for step, batch in pipeline.batches(
        _arrays(), seed=0, batch_size=4, first_step=first_step, last_step=9
      )
    ]

  assert indices(4) == indices(0)[4:]
  assert [step for step, _ in indices(4)] == [4, 5, 6, 7, 8]
  assert indices(9) == []


def test_two_hosts_see_together_what_one_sees():
  kwargs = {"seed": 0, "batch_size": 4, "first_step": 0, "last_step": 3}
  arrays = _arrays()
  whole = pipeline.batches(arrays, **kwargs)
  halves = [
    pipeline.batches(arrays, process_index=i, process_count=2, **kwargs)
    for i in range(2)
  ]
  for (_, batch), (_, first), (_, second) in zip(whole, *halves, strict=True):
    for key, values in batch.items():
      np.testing.assert_array_equal(
        np.concatenate([first[key], second[key]]), values
      )


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_evaluation_counts_every_image_once(batch_size):
  arrays = _arrays()
  batches = list(pipeline.eval_batches(arrays, batch_size))
  for batch in batches:
    assert {len(values) for values in batch.values()} == {batch_size}
    padding = batch["_mask"] == 0
    assert (batch["index"][padding] == -1).all()
    assert not batch["image"][padding].any()
    assert not batch["mask"][padding].any()
  joined = {
    key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]
  }
  real = joined["_mask"] == 1
  assert joined["_mask"].dtype == np.float32
  np.testing.assert_array_equal(joined["index"][real], np.arange(7))
  np.testing.assert_array_equal(joined["image"][real], arrays.image)
  np.testing.assert_array_equal(joined["mask"][real], arrays.mask)


def test_an_empty_evaluation_batch_is_refused():
  with pytest.raises(ValueError, match="batch_size is 0"):
    next(pipeline.eval_batches(_arrays(), 0))


# Prefetching.


def _prefetch_threads() -> int:
  return sum(t.name == "kdseg-prefetch" for t in threading.enumerate())


def test_prefetch_keeps_order_and_applies_put_once():
  calls = []

  def put(item):
    calls.append(item)
    return item * 10

  assert list(pipeline.prefetch(range(20), put)) == list(range(0, 200, 10))
  assert calls == list(range(20))
  assert _prefetch_threads() == 0


def test_put_runs_ahead_in_another_thread_but_not_further_than_depth():
  seen = []
  stream = pipeline.prefetch(
    range(100), lambda item: seen.append(threading.current_thread()), depth=2
  )
  next(stream)
  time.sleep(0.3)
  # One taken, two waiting, one in hand.
  assert 2 <= len(seen) <= 4
  assert threading.current_thread() not in seen
  stream.close()
  assert _prefetch_threads() == 0


@pytest.mark.parametrize("where", ["items", "put"])
def test_an_error_comes_out_where_its_element_would_have(where):
  def items():
    yield 1
    yield 2
    if where == "items":
      raise KeyError("broken source")
    yield 3

  def put(item):
    if item == 3:
      raise KeyError("broken device")
    return item

  stream = pipeline.prefetch(items(), put)
  assert [next(stream), next(stream)] == [1, 2]
  with pytest.raises(KeyError, match="broken"):
    next(stream)
  assert _prefetch_threads() == 0


def test_leaving_a_loop_early_stops_the_thread():
  for item in pipeline.prefetch(itertools.count(), lambda item: item):
    if item == 3:
      break
  deadline = time.time() + 5
  while _prefetch_threads() and time.time() < deadline:
    time.sleep(0.05)
  assert _prefetch_threads() == 0


def test_a_depth_of_nothing_is_refused():
  with pytest.raises(ValueError, match="depth is 0"):
    next(pipeline.prefetch([1], lambda item: item, depth=0))


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
  assert pipeline.fingerprint(arrays) == pipeline.fingerprint(
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
  assert pipeline.fingerprint(changed) != pipeline.fingerprint(arrays)


# Loading.


def test_load_names_the_splits_and_data_sets_there_are(tmp_path, make_folder):
  own = make_folder(tmp_path / "own", ["a", "b"])
  kwargs = {"size": 8, "data_dir": tmp_path / "data", "manual_dir": own}
  with pytest.raises(DataError, match=r"has no split 'tset', only "):
    pipeline.load("folder", "tset", **kwargs)
  with pytest.raises(DataError, match=r"'isic2017'; there are isic2016, ph2"):
    pipeline.load("isic2017", "train", **kwargs)
  with pytest.raises(ValueError, match="size is 0"):
    pipeline.load("folder", "train", size=0)


def test_loading_twice_gives_the_same_arrays_without_the_source(tmp_path):
  kwargs = {
    "size": 16,
    "data_dir": tmp_path,
    "train": 70,
    "validation": 1,
    "test": 1,
    "image_size": 24,
  }
  first = pipeline.load("synthetic", "train", **kwargs)
  second = pipeline.load("synthetic", "train", **kwargs)
  assert pipeline.fingerprint(first) == pipeline.fingerprint(second)
  # More than one piece of 64, in order, each resized from its own record.
  assert first.ids == tuple(f"train_{n:05d}" for n in range(70))
  for index in (0, 63, 64, 69):
    np.testing.assert_array_equal(
      first.mask[index], pipeline.resize_mask(first.native_mask(index), 16)
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
  pipeline.prepare("folder", data_dir=root / "data", manual_dir=root / "own")
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
    pipeline.load(
      "folder", "train", size=8, data_dir=data, manual_dir=whole / "own"
    )


@pytest.mark.parametrize("feature", ["image", "mask"])
def test_a_prepared_picture_that_is_damaged_is_named_by_its_id(
  tmp_path, whole, monkeypatch, feature
):
  spoilt = pipeline.Record(
    "7", tiny.encode(tiny.picture(0), "PNG"), tiny.mask_bytes(tiny.lesion(0))
  )._replace(**{feature: b"no image"})
  monkeypatch.setattr(pipeline, "read_records", lambda *_: iter([spoilt]))
  with pytest.raises(DataError, match=r"train/7.* cannot be decoded"):
    pipeline.load(
      "folder",
      "train",
      size=8,
      data_dir=whole / "data",
      manual_dir=whole / "own",
    )
