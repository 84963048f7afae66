"""Batches of a split in memory, a pure function of (seed, step).

Which examples a step sees is arithmetic on the step, so a resumed run needs no
saved position and two arms of a comparison see the same batches.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent import futures
from typing import TypeVar

import numpy as np

from kdseg.data import loading

T = TypeVar("T")
U = TypeVar("U")
Batch = dict[str, np.ndarray]


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of `n` examples in one epoch, int32 [n].

  Sorts the raw output of a counter-based generator, which numpy promises not
  to change; its `permutation` comes without that promise.
  """
  bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
  return np.argsort(bits.random_raw(n), kind="stable").astype(np.int32)


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
  """The examples of one step, int32 [batch_size].

  Epochs follow each other without a gap: a batch may end one epoch and begin
  the next, so every example is seen equally often and no batch is short. (Such
  a batch can hold an example twice, as can any batch larger than `n`.)

  Args:
    seed: of the run.
    step: counts from 0.
    batch_size: examples in a step, over all devices and hosts.
    n: examples in the split.

  Raises:
    ValueError: if `step` is negative, or a count is not positive.
  """
  if step < 0 or batch_size <= 0 or n <= 0:
    raise ValueError(
      f"step {step} must be 0 or more, batch_size {batch_size} and n {n} above"
      " 0."
    )
  positions = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, within = np.divmod(positions, n)
  orders = {
    epoch: epoch_order(seed, int(epoch), n) for epoch in np.unique(epochs)
  }
  return np.array(
    [orders[epoch][i] for epoch, i in zip(epochs, within, strict=True)],
    np.int32,
  )


def steps_for_epochs(epochs: float, batch_size: int, n: int) -> int:
  """Steps that show every example `epochs` times, rounded up."""
  return int(np.ceil(epochs * n / batch_size))


def shard_for_process(
  indices: np.ndarray, process_index: int, process_count: int
) -> np.ndarray:
  """The part of a batch that one host loads: its block, in process order.

  Raises:
    ValueError: if the batch cannot be divided evenly.
  """
  if len(indices) % process_count:
    raise ValueError(
      f"a batch of {len(indices)} cannot be divided over {process_count}"
      " hosts; choose a multiple as batch_size."
    )
  share = len(indices) // process_count
  return indices[process_index * share : (process_index + 1) * share]


def batches(
  arrays: loading.Arrays,
  *,
  seed: int,
  batch_size: int,
  first_step: int,
  last_step: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[tuple[int, Batch]]:
  """Yields (step, batch) for the steps `first_step` to `last_step - 1`.

  Args:
    arrays: the split to train on.
    seed: of the run.
    batch_size: examples in a step, over all devices and hosts.
    first_step: the step to begin with; 0, or where a run was stopped.
    last_step: one past the last step.
    process_index: which host this is.
    process_count: how many there are.

  Yields:
    The step, and `image` [B, S, S, 3] uint8, `mask` [B, S, S] uint8 and
    `index` [B] int32 (position in `arrays.ids`) of this host's share.
  """
  for step in range(first_step, last_step):
    index = shard_for_process(
      batch_indices(seed, step, batch_size, len(arrays)),
      process_index,
      process_count,
    )
    yield (
      step,
      {
        "image": arrays.image[index],
        "mask": arrays.mask[index],
        "index": index,
      },
    )


def eval_batches(arrays: loading.Arrays, batch_size: int) -> Iterator[Batch]:
  """Yields every example once, in order, in batches of one size.

  The last batch is filled up with black images of no lesion, index -1 and
  `_mask` 0, so that any number of devices counts every image once.

  Yields:
    `image` [B, S, S, 3] uint8, `mask` [B, S, S] uint8, `index` [B] int32,
    `_mask` [B] float32.
  """
  if batch_size <= 0:
    raise ValueError(f"batch_size is {batch_size}; it must be above 0.")
  for start in range(0, len(arrays), batch_size):
    index = np.arange(start, min(start + batch_size, len(arrays)))
    missing = batch_size - len(index)

    def pad(
      values: np.ndarray, fill: int = 0, missing: int = missing
    ) -> np.ndarray:
      width = [(0, missing)] + [(0, 0)] * (values.ndim - 1)
      return np.pad(values, width, constant_values=fill)

    yield {
      "image": pad(arrays.image[index]),
      "mask": pad(arrays.mask[index]),
      "index": pad(index.astype(np.int32), fill=-1),
      "_mask": pad(np.ones(len(index), np.float32)),
    }


def prefetch(
  items: Iterable[T], put: Callable[[T], U], *, depth: int = 2
) -> Iterator[U]:
  """Applies `put` ahead of the consumer, in one background thread.

  `put` is where arrays go to the devices, so copies overlap with steps. An
  error of `items` or `put` is raised where its element would have come.
  Closing or leaving the iterator stops the thread.

  Args:
    items: what to prepare, in order.
    put: called once on each, in the thread.
    depth: how many results may wait.

  Yields:
    `put(item)` for each item, in order.
  """
  if depth <= 0:
    raise ValueError(f"depth is {depth}; it must be above 0.")
  source = iter(items)

  def work() -> tuple[U] | None:
    for item in source:
      return (put(item),)
    return None

  pool = futures.ThreadPoolExecutor(1, thread_name_prefix="kdseg-prefetch")
  try:
    waiting = collections.deque(pool.submit(work) for _ in range(depth))
    while (result := waiting.popleft().result()) is not None:
      waiting.append(pool.submit(work))
      yield result[0]
  finally:
    pool.shutdown(cancel_futures=True)
