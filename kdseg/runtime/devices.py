"""Maps one function over all devices, and places arrays on them.

`parallel` is the only place that knows how JAX maps a function over devices.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

Tree = Any

AXIS = "devices"
MAPPINGS = ("pmap", "shard_map")

_REPLICATED = jax.sharding.PartitionSpec()
_SPLIT = jax.sharding.PartitionSpec(AXIS)


def parallel(
  function: Callable[..., Any],
  *,
  replicated: int,
  out_replicated: bool,
  donate: bool = False,
  local: bool = False,
  mapping: str = "pmap",
) -> Callable[..., Any]:
  """Maps a function over the devices of all hosts, jitted; one trace.

  The result has an attribute `lower`: called with the same arguments, it traces
  the function and returns a function that compiles it, which another thread
  may call. A call after that compiles nothing.

  Args:
    function: may use collectives over `AXIS`.
    replicated: how many of its first arguments are the same on every device
      and have no device axis (place them with `replicate`); at least one. The
      others have a leading device axis (see `shard`).
    out_replicated: whether the results are the same on every device and come
      back without a device axis.
    donate: whether the memory of the replicated arguments is reused.
    local: whether over this host's devices alone.
    mapping: "pmap", or its twin "shard_map", which JAX advises for new code
      and which gives the same numbers.

  Raises:
    ValueError: on an unknown mapping.
  """
  if mapping not in MAPPINGS:
    raise ValueError(
      f'mapping must be one of {", ".join(MAPPINGS)}, not "{mapping}"'
    )

  def packed(held: tuple[Tree, ...], shared: tuple[Tree, ...]) -> Any:
    return function(*held, *shared)

  make = _pmap if mapping == "pmap" else _shard_map
  mapped = make(
    packed, out_replicated=out_replicated, donate=donate, local=local
  )

  @functools.wraps(function)
  def call(*arguments: Tree) -> Any:
    return mapped(arguments[:replicated], arguments[replicated:])

  def lower(*arguments: Tree) -> Callable[[], Any]:
    return mapped.lower(arguments[:replicated], arguments[replicated:]).compile

  call.lower = lower  # type: ignore[attr-defined]
  return call


def _pmap(
  packed: Callable[[Tree, Tree], Any],
  *,
  out_replicated: bool,
  donate: bool,
  local: bool,
) -> Any:
  """Maps packed(replicated, split) by `jax.pmap`.

  The arguments are packed into two, as pmap miscounts its axes when an argument
  of its own is an empty tree (jax 0.10.2 and 0.12.0).
  """
  return jax.pmap(
    packed,
    axis_name=AXIS,
    in_axes=(None, 0),
    out_axes=None if out_replicated else 0,
    donate_argnums=(0,) if donate else (),
    devices=jax.local_devices() if local else None,
  )


def _shard_map(
  packed: Callable[[Tree, Tree], Any],
  *,
  out_replicated: bool,
  donate: bool,
  local: bool,
) -> Any:
  """Maps packed(replicated, split) by `jax.jit` of `jax.shard_map`."""
  mesh = _mesh(local)

  def on_device(held: Tree, shared: Tree) -> Any:
    out = packed(held, jax.tree.map(lambda x: x[0], shared))
    return out if out_replicated else jax.tree.map(lambda x: x[None], out)

  out_spec = _REPLICATED if out_replicated else _SPLIT
  mapped = jax.jit(
    jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(_REPLICATED, _SPLIT),
      out_specs=out_spec,
      # With the check, gradients of replicated parameters are summed over the
      # devices already, and their `pmean` is wrong by the number of devices.
      check_vma=False,
    ),
    in_shardings=(
      jax.sharding.NamedSharding(mesh, _REPLICATED),
      jax.sharding.NamedSharding(mesh, _SPLIT),
    ),
    donate_argnums=(0,) if donate else (),
  )
  if local or jax.process_count() == 1:
    return mapped

  # As pmap does: every host gives its devices' part, and gets it back.
  @functools.wraps(mapped)
  def call(held: Tree, shared: Tree) -> Any:
    shared = multihost_utils.host_local_array_to_global_array(
      shared, mesh, _SPLIT
    )
    out = mapped(held, shared)
    if out_replicated:
      return out
    return multihost_utils.global_array_to_host_local_array(out, mesh, _SPLIT)

  return call


def _mesh(local: bool) -> jax.sharding.Mesh:
  devices = jax.local_devices() if local else jax.devices()
  return jax.sharding.Mesh(np.array(devices), (AXIS,))


def replicate(tree: Tree, *, local: bool = False) -> Tree:
  """Places a tree of host arrays on every device, without a device axis.

  Args:
    tree: the same on all hosts.
    local: whether on this host's devices alone.
  """
  everywhere = jax.sharding.NamedSharding(_mesh(local), _REPLICATED)
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
