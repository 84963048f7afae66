"""Says which setting to lower when memory runs out; keeps freed memory."""

from collections.abc import Iterator
import contextlib
import ctypes
import os

import jax

from kdseg.runtime import commands

_SHOWN = 160  # characters of XLA's message
# Parameters of mallopt(3), by their numbers in <malloc.h>.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


class OutOfMemoryError(RuntimeError):
  """Work needs more memory than there is; names the setting to lower."""


@contextlib.contextmanager
def enough(what: str, remedy: str) -> Iterator[None]:
  """Turns errors of exhausted memory into one that says what to lower.

  Args:
    what: the work inside the `with` block.
    remedy: a sentence without its full stop.

  Raises:
    OutOfMemoryError: in place of Python's or XLA's error; others pass.
  """
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    message = str(error).strip()
    # A device, or its compiler, reports it in the message alone.
    words = ("resource_exhausted", "out of memory", "out_of_memory")
    if not isinstance(error, MemoryError) and not any(
      word in message.lower() for word in words
    ):
      raise
    first = message.splitlines()[0] if message else "MemoryError"
    raise OutOfMemoryError(
      f"{what}: not enough memory ({first[:_SHOWN].rstrip('.')}). {remedy}"
    ) from error


def keep_freed() -> bool:
  """Makes glibc keep freed memory for the next step, on a CPU.

  A small student's step takes tens of MB of scratch memory. By default glibc
  gets it from the kernel each time, page by page and filled with zeros, which
  is a quarter to a third of such a step. No number of a result changes; the
  process never shrinks.

  Returns:
    Whether glibc does; false for another C library, or where the user has set
    a `MALLOC_*` variable or GLIBC_TUNABLES to something of their own.
  """
  tunables = os.environ.get(commands.TUNABLES, commands.HUGE_PAGES)
  if tunables != commands.HUGE_PAGES or any(
    name.startswith("MALLOC_") for name in os.environ
  ):
    return False
  try:
    os.confstr("CS_GNU_LIBC_VERSION")
  except (AttributeError, ValueError):
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # No block outside the heaps, and no heap made smaller. Blocks above 64 MB,
  # the size of a thread's heap, lie outside all the same; huge pages (see
  # `commands`) help there. One heap for all threads would hold them too, but a
  # small student's step then took a sixth longer and half as much memory again.
  return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
