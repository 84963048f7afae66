"""Several hosts that train one run: joining, agreeing, ending.

Every host runs the same program on its share of each batch. Only the first
reads and writes the workdir; it sends what it reads to the others, which so
need no common disk. On one host all of this does nothing.
"""

from collections.abc import Callable
from collections.abc import Mapping
import json
import os
import sys
import traceback
from typing import Any
from typing import NoReturn
from typing import TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np
import safetensors.numpy

T = TypeVar("T")

# Until a silent host is considered dead, and the others stop with an error.
TIMEOUT_SECONDS = 100
# Calls of `share_question`'s function from one exchange to the next.
ASK_EVERY = 20
# A note on those errors of the first host that the others know of.
_TOLD = "The other hosts were told."


class HostError(RuntimeError):
  """The hosts cannot continue together."""


def start(
  coordinator: str = "",
  count: int = 0,
  index: int = -1,
  *,
  timeout: int = TIMEOUT_SECONDS,
) -> None:
  """Joins the hosts of a run; call it before any other function of JAX.

  Args:
    coordinator: HOST:PORT of the first host. Empty where JAX finds all three
      itself: TPU pods, SLURM, Open MPI.
    count: of hosts.
    index: of this one, from 0.
    timeout: seconds until a silent host is considered dead.

  Raises:
    HostError: if they do not connect.
  """
  given: dict[str, Any] = {}
  if coordinator:
    given = {
      "coordinator_address": coordinator,
      "num_processes": count,
      "process_id": index,
    }
  # Read when the backend starts, and only by that of CPUs.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=timeout,
      heartbeat_timeout_seconds=timeout,
    )
  except (RuntimeError, ValueError) as error:
    raise HostError(
      f"the hosts of this run do not connect: {error}; every host needs "
      "the same --coordinator HOST:PORT and --hosts, and its own --host, from 0"
    ) from error


def is_first() -> bool:
  """Returns whether this host is the one that writes."""
  return jax.process_index() == 0


def are_many() -> bool:
  """Returns whether the run has other hosts."""
  return jax.process_count() > 1


def end(error: BaseException, message: str = "") -> NoReturn:
  """Ends this process after an error, with exit code 1.

  Python's own exit waits up to five minutes for the other hosts, which wait for
  this one's part of a sum, so it serves only if they know of the error.
  Otherwise the process ends at once: its broken connections stop the others.

  Args:
    error: the cause.
    message: printed in place of the traceback, unless it is empty.
  """
  known = isinstance(error, HostError) or _TOLD in getattr(
    error, "__notes__", ()
  )
  # Not `are_many` alone, which would start a backend where there is none yet.
  if known or not (jax.distributed.is_initialized() and are_many()):
    if message:
      sys.exit(message)
    raise error
  if message:
    print(message, file=sys.stderr)
  else:
    traceback.print_exception(error)
    print(
      "kdseg: one of several hosts ends with this error; if it is about a "
      "connection, another host has ended before, and its log says why",
      file=sys.stderr,
    )
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def on_first(function: Callable[[], T]) -> T:
  """Calls a function on the first host; returns its result on all.

  Args:
    function: returns a value that JSON can encode.

  Raises:
    HostError: on the others, if it raised on the first.
  """
  if not are_many():
    return function()
  result: dict[str, Any] = {}
  failed: Exception | None = None
  if is_first():
    try:
      result = {"value": function()}
    except Exception as error:  # The others wait for a result, whatever it is.
      error.add_note(_TOLD)
      failed, result = error, {"error": f"{type(error).__name__}: {error}"}
  result = json.loads(_from_first(json.dumps(result).encode()))
  if failed is not None:
    raise failed
  if "error" in result:
    raise HostError(f"the first host stopped: {result['error']}")
  return result["value"]


def arrays_of_first(
  function: Callable[[], Mapping[str, Any]],
) -> dict[str, np.ndarray]:
  """Calls a function on the first host; returns its named arrays on all."""
  if not are_many():
    return dict(function())
  content = b""
  if is_first():
    content = pack_arrays(function())
  return safetensors.numpy.load(_from_first(content))


def pack_arrays(arrays: Mapping[str, Any]) -> bytes:
  """Returns named arrays of any shape as the bytes of a safetensors file."""
  # Not `ascontiguousarray`, which gives a scalar an axis.
  return safetensors.numpy.save(
    {name: np.asarray(array, order="C") for name, array in arrays.items()}
  )


def gather(value: Any) -> list[Any]:
  """Returns the values of all hosts, in order; JSON has to encode them."""
  if not are_many():
    return [value]
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([content.size], np.int32))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: content.size] = content
  every = multihost_utils.process_allgather(padded)
  return [
    json.loads(bytes(row[: int(size)]))
    for row, size in zip(every, sizes.ravel())
  ]


def share_question(ask: Callable[[], bool]) -> Callable[[], bool]:
  """Returns a function that is true on all hosts where it would be on any.

  All hosts have to call it equally often. They exchange values at every
  `ASK_EVERY`-th call only; the calls between return False.
  """
  if not are_many():
    return ask
  asked = 0

  def ask_all() -> bool:
    nonlocal asked
    asked += 1
    return asked % ASK_EVERY == 0 and any(gather(ask()))

  return ask_all


def _from_first(content: bytes) -> bytes:
  sent = np.frombuffer(content, np.uint8)
  size = multihost_utils.broadcast_one_to_all(np.array([sent.size], np.int32))
  padded = sent if is_first() else np.zeros(int(size[0]), np.uint8)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))
