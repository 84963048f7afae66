"""Frozen networks: their weights on all hosts, their outputs computed once."""

from collections.abc import Callable
import functools
import hashlib
import logging
import time
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.data import loading
from kdseg.experiment.records import Run
from kdseg.runtime import checkpoint
from kdseg.runtime import devices
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import preemption
from kdseg.training import cached_outputs
from kdseg.training import loop
from kdseg.training import settings

_LOG = logging.getLogger("kdseg")

Tree = Any


def expected_variables(network: nn.Module, size: int) -> Tree:
  """Returns the shapes of a network's variables for images of `size` pixels."""
  return jax.eval_shape(
    functools.partial(network.init, jax.random.key(0)),
    jnp.zeros((1, size, size, 3)),
  )


def tree_of_first(load: Callable[[], Tree], expected: Tree) -> Tree:
  """Returns what the first host loads, a tree like `expected`, on all hosts.

  Raises:
    HostError: on the other hosts, if the first cannot load it.
  """
  if not hosts.are_many():
    return load()
  loaded: Tree = None

  def remember() -> bool:
    nonlocal loaded
    loaded = load()
    return True

  hosts.on_first(remember)
  flat = hosts.arrays_of_first(lambda: checkpoint.flatten(loaded))
  return checkpoint.unflatten(flat, expected, "the first host's tree")


def content_key(data: str, tree: Tree, *more: str) -> str:
  """Returns a digest of data, weights and whatever else decides an output."""
  digest = hashlib.sha256(data.encode())
  for leaf in jax.tree.leaves(tree):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  for text in more:
    digest.update(text.encode())
  return digest.hexdigest()


def compute_outputs(
  run: Run,
  function: Callable[..., Any],
  variables: Tree,
  arrays: loading.Arrays,
  *,
  what: str,
  folder: str,
  key: str,
  **options: Any,
) -> dict[str, np.ndarray]:
  """Returns the outputs for every image of a split, computed once, on disk.

  Args:
    run: the experiment.
    function: (variables, images [B, S, S, 3] uint8, and with the option
      `extra` a dict of arrays) -> outputs by name.
    variables: of `function`.
    arrays: the split.
    what: is computed, for messages.
    folder: where in the cache; each host has its own cache, as it reads all.
    key: see `content_key`.
    **options: of `cached_outputs.compute`.

  Raises:
    StoppedError: if `run.stop` says so.
    OutOfMemoryError: if a batch does not fit into memory.
  """
  cached = run.workdir / "cache"
  if not hosts.is_first():
    cached /= f"host{jax.process_index()}"
  batch_size = run.config.evaluation.batch_size
  with memory.enough(
    f"{what} in batches of {batch_size}", settings.LOWER_EVALUATION
  ):
    return cached_outputs.compute(
      _map_over_devices(function, variables),
      arrays.image,
      cached / folder,
      batch_size=batch_size,
      key=key,
      progress=_log_progress(what, run.stop),
      **options,
    )


def _map_over_devices(
  function: Callable[..., Any], variables: Tree
) -> Callable[..., dict[str, np.ndarray]]:
  """Maps function(variables, ...) over this host's devices, numpy to numpy."""
  mapped = devices.parallel(
    lambda variables, arguments: function(variables, *arguments),
    replicated=1,
    out_replicated=False,
    local=True,
  )
  held = devices.replicate(variables, local=True)

  def call(*arguments: Tree) -> dict[str, np.ndarray]:
    outputs = mapped(held, devices.shard(arguments))
    return jax.tree.map(
      lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), dict(outputs)
    )

  return call


def _log_progress(
  what: str, stop: preemption.Stop
) -> Callable[[int, int], None]:
  """Returns a reporter of (done, total) that logs every tenth, with an ETA.

  It raises StoppedError where `stop` says so.
  """
  began: tuple[float, int] | None = None
  shown = 0

  def show(done: int, total: int) -> None:
    nonlocal began, shown
    # Hosts compute at their own pace: one that left would leave the others.
    if not hosts.are_many():
      preemption.check(stop, f"this was under way: {what}")
    now = time.monotonic()
    if began is None:
      # The first call compiles, and a resumed run has not done the rest now.
      began, shown = (now, done), 10 * done // total
    elif 10 * done // total > shown:
      shown = 10 * done // total
      left = (now - began[0]) * (total - done) / (done - began[1])
      _LOG.info("%s: %d/%d  ETA %s", what, done, total, loop.duration(left))

  return show
