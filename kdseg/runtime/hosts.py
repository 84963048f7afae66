"""Several hosts that work on one run: who writes, and how all stay agreed.

Every host runs the same program on its share of each batch. The first alone
reads and writes the workdir; what it found there it tells the others, so that
they need no disk in common. On one host all of this does nothing.
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

# After which a host that no longer answers is taken for dead, and the others
# stop with an error.
TIMEOUT_SECONDS = 100
# How many calls of a shared question are answered by one exchange.
ASK_EVERY = 20
# Noted on an error of the first host that the others have heard of.
_TOLD = "The other hosts were told."


class HostError(RuntimeError):
  """The first host cannot go on, so no other can."""


def start(
  coordinator: str = "",
  count: int = 0,
  index: int = -1,
  *,
  timeout: int = TIMEOUT_SECONDS,
) -> None:
  """Joins the hosts of a run; before anything else of JAX.

  Args:
    coordinator: HOST:PORT of the first host. Empty where JAX finds all three
      by itself: TPU pods, SLURM, Open MPI.
    count: of hosts.
    index: of this one, from 0.
    timeout: seconds until a silent host is taken for dead.

  Raises:
    HostError: if they do not come together.
  """
  given: dict[str, Any] = {}
  if coordinator:
    given = {
      "coordinator_address": coordinator,
      "num_processes": count,
      "process_id": index,
    }
  # Read before the backend is there, and only by CPUs.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=timeout,
      heartbeat_timeout_seconds=timeout,
    )
  except (RuntimeError, ValueError) as error:
    raise HostError(
      f"the hosts of this run do not come together: {error}; every host needs "
      "the same --coordinator HOST:PORT and --hosts, and its own --host, from 0"
    ) from error


def is_first() -> bool:
  """Whether this host is the one that writes."""
  return jax.process_index() == 0


def are_many() -> bool:
  """Whether the run has other hosts."""
  return jax.process_count() > 1


def end(error: BaseException, message: str = "") -> NoReturn:
  """Ends this process after an error, with exit code 1.

  Python's own end waits for the other hosts, up to five minutes, and they wait
  for this one's part of a sum; so it only ends like that if they know of the
  error. Otherwise that its connections break tells them.

  Args:
    error: why.
    message: says it all; empty: the traceback does.
  """
  known = isinstance(error, HostError) or _TOLD in getattr(
    error, "__notes__", ()
  )
  # Not `are_many` alone, which would start a backend that is not there yet.
  if known or not (jax.distributed.is_initialized() and are_many()):
    if message:
      sys.exit(message)
    raise error
  if message:
    print(message, file=sys.stderr)
  else:
    traceback.print_exception(error)
    print(
      "kdseg: one of several hosts ends with this error; where it speaks of a "
      "connection, another ended before, and says why",
      file=sys.stderr,
    )
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def on_first(function: Callable[[], T]) -> T:
  """Calls a function on the first host; returns what it returned, on all.

  Args:
    function: returns what JSON can say.

  Raises:
    HostError: on the others, if it raised on the first.
  """
  if not are_many():
    return function()
  answer: dict[str, Any] = {}
  failed: Exception | None = None
  if is_first():
    try:
      answer = {"value": function()}
    except Exception as error:  # Whatever it is, the others wait for an answer.
      error.add_note(_TOLD)
      failed, answer = error, {"error": f"{type(error).__name__}: {error}"}
  answer = json.loads(_from_first(json.dumps(answer).encode()))
  if failed is not None:
    raise failed
  if "error" in answer:
    raise HostError(f"the first host stopped: {answer['error']}")
  return answer["value"]


def arrays_of_first(
  function: Callable[[], Mapping[str, Any]],
) -> dict[str, np.ndarray]:
  """Calls a function on the first host; returns its arrays by name, on all."""
  if not are_many():
    return dict(function())
  content = b""
  if is_first():
    content = pack_arrays(function())
  return safetensors.numpy.load(_from_first(content))


def pack_arrays(arrays: Mapping[str, Any]) -> bytes:
  """Returns arrays of any shape as bytes that safetensors reads."""
  # Not `ascontiguousarray`, which gives a scalar an axis.
  return safetensors.numpy.save(
    {name: np.asarray(array, order="C") for name, array in arrays.items()}
  )


def gather(value: Any) -> list[Any]:
  """Returns what every host says, in order; what JSON can say."""
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
  """Returns a question that all hosts answer alike: yes if any would.

  All of them have to ask it equally often. They speak to each other at every
  `ASK_EVERY`-th time only, and it is no in between.
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
