"""Memory: what to say where there is too little; what becomes of freed one."""

from collections.abc import Iterator
import contextlib
import ctypes
import os

import jax

from kdseg.runtime import pages

_SHOWN = 160  # characters of what XLA says
# Parameters of mallopt(3), by their numbers in <malloc.h>.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


class OutOfMemoryError(RuntimeError):
  """Work that takes more memory than there is; says which setting to lower."""


@contextlib.contextmanager
def enough(what: str, remedy: str) -> Iterator[None]:
  """Names what was being done, if there is not enough memory for it.

  Args:
    what: is being done.
    remedy: a sentence without its full stop.

  Raises:
    OutOfMemoryError: in the place of Python's error, and XLA's; others pass.
  """
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    said = str(error).strip()
    # A device, or its compiler, only says it in words.
    words = ("resource_exhausted", "out of memory", "out_of_memory")
    if not isinstance(error, MemoryError) and not any(
      word in said.lower() for word in words
    ):
      raise
    said = said.splitlines()[0][:_SHOWN].rstrip(".") if said else "MemoryError"
    raise OutOfMemoryError(
      f"{what}: not enough memory ({said}). {remedy}"
    ) from error


def keep_freed() -> bool:
  """Makes the C library keep what is freed, for the next step to use.

  A small student's step takes tens of MB of scratch memory. By default glibc
  asks the kernel for it anew every time, page by page and filled with zeros,
  which is a quarter to a third of such a step on a CPU. It changes no number.
  The process stays as large as it ever was. Where the user has set a variable
  of the environment that begins with MALLOC_, or GLIBC_TUNABLES, all is left as
  it is.

  Returns:
    Whether it is so; false without glibc, or if the user chose otherwise.
  """
  if pages.is_chosen():
    return False
  try:
    os.confstr("CS_GNU_LIBC_VERSION")
  except (AttributeError, ValueError):
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # No buffer on its own, and the heap never made smaller. What is larger than
  # 64 MB is a buffer on its own all the same, as JAX's threads have heaps of
  # that size. One heap for all would take that too, but then a small student's
  # step takes a sixth longer, and the process half as much memory again: see
  # `kdseg.runtime.pages` instead.
  return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
