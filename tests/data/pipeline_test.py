import itertools
import threading
import time

import numpy as np
import pytest

from kdseg.data import loading
from kdseg.data import pipeline


def _arrays() -> loading.Arrays:
  rng = np.random.default_rng(0)
  return loading.Arrays(
    name="drawn",
    split="train",
    ids=tuple(f"id_{n}" for n in range(7)),
    image=rng.integers(0, 256, (7, 4, 4, 3), np.uint8),
    mask=rng.integers(0, 2, (7, 4, 4), np.uint8),
    official_count=900,
    found_count=751,
  )


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
  return sum(t.name.startswith("kdseg-prefetch") for t in threading.enumerate())


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
