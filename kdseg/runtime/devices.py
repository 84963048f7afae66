"""Maps one function over all devices, and places arrays on them.

`parallel` is the only place that knows how JAX maps a function over devices.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

Tree = Any

AXIS = "devices"


def parallel(
  function: Callable[..., Any],
  *,
  replicated: int,
  out_replicated: bool,
  donate: bool = False,
  local: bool = False,
) -> Callable[..., Any]:
  """Maps a function over the devices of all hosts, jitted; one trace.

  This is `jax.pmap`, kept behind one function. JAX calls pmap the old way and
  advises `jax.shard_map`; that move is an edit of these lines. On one host its
  program is compiled ahead of time at the first call with arguments of these
  shapes, and called itself after that: what pmap does in Python at every call
  takes 1 ms for a small student's 200 arrays, and a GPU's step waits for it.

  What it returns has a function of its own, `lower`: of the same arguments, it
  traces now and returns what compiles, which can be called in another thread.

  Args:
    function: may use collectives over `AXIS`.
    replicated: how many of its first arguments are the same on every device
      and have no device axis (place them with `replicate`); at least one. The
      others have a leading device axis (see `shard`).
    out_replicated: whether the results are the same on every device and come
      back without a device axis.
    donate: whether the memory of the replicated arguments is reused.
    local: whether over this host's devices alone.
  """

  def packed(held: tuple[Tree, ...], shared: tuple[Tree, ...]) -> Any:
    return function(*held, *shared)

  # Two tuples, as pmap miscounts its axes when an argument of its own is an
  # empty tree (seen in jax 0.10.2 and 0.12.0).
  mapped = jax.pmap(
    packed,
    axis_name=AXIS,
    in_axes=(None, 0),
    out_axes=None if out_replicated else 0,
    donate_argnums=(0,) if donate else (),
    devices=jax.local_devices() if local else None,
  )

  programs: dict[Any, Callable[..., Any]] = {}

  def key_of(given: tuple[Any, Any]) -> Any:
    """Names the program for these arguments; None where pmap is to run."""
    leaves, structure = jax.tree.flatten(given)
    config = jax.config
    # pmap joins what several hosts have, and knows how to look for NaNs.
    if (
      jax.process_count() > 1 or config.jax_debug_nans or config.jax_debug_infs
    ):
      return None
    if config.jax_disable_jit or any(
      isinstance(x, jax.core.Tracer) for x in leaves
    ):
      return None
    return structure, tuple((x.shape, x.dtype) for x in leaves)

  def lower(*arguments: Tree) -> Callable[[], None]:
    given = arguments[:replicated], arguments[replicated:]
    key = key_of(given)
    if key is None or key in programs:
      return lambda: None
    lowered = mapped.lower(*given)

    def finish() -> None:
      programs[key] = lowered.compile()

    return finish

  @functools.wraps(function)
  def call(*arguments: Tree) -> Any:
    given = arguments[:replicated], arguments[replicated:]
    key = key_of(given)
    if key is None:
      return mapped(*given)
    if key not in programs:
      lower(*arguments)()
    return programs[key](*given)

  call.lower = lower
  return call


def replicate(tree: Tree, *, local: bool = False) -> Tree:
  """Places a tree of host arrays on every device, without a device axis.

  Args:
    tree: the same on all hosts.
    local: whether on this host's devices alone.
  """
  devices = jax.local_devices() if local else jax.devices()
  mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.device_put(tree, everywhere)


def shard(batch: Tree) -> Tree:
  """Splits the leading axis of host arrays over this host's devices.

  Raises:
    ValueError: if the batch does not split evenly.
  """
  devices = jax.local_device_count()

  def split(x: np.ndarray) -> np.ndarray:
    if x.shape[0] % devices:
      raise ValueError(
        f"a batch of {x.shape[0]} does not split over {devices} devices; "
        "choose a data.batch_size that they divide"
      )
    return x.reshape((devices, x.shape[0] // devices, *x.shape[1:]))

  return jax.tree.map(split, batch)
