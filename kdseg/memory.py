"""What becomes of memory that was freed."""

import ctypes
import os

# Parameters of mallopt(3), by their numbers in <malloc.h>.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3

# Larger buffers are given back when they are freed.
_KEPT = 1 << 30


def keep_freed() -> bool:
  """Makes the C library keep what is freed, for the next step to use.

  A step's scratch memory is tens of MB. By default glibc asks the kernel for
  it anew every time, page by page and filled with zeros, which is a quarter to
  a third of a small student's step on a CPU. It changes no number. Where
  MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES is set, it
  stays as the user wants it.

  Returns:
    Whether it is so; false without glibc, or if the user chose otherwise.
  """
  chosen = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
  if any(name in os.environ for name in (*chosen, "GLIBC_TUNABLES")):
    return False
  try:
    os.confstr("CS_GNU_LIBC_VERSION")
  except (AttributeError, ValueError):
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return bool(
    mallopt(_MMAP_THRESHOLD, _KEPT) and mallopt(_TRIM_THRESHOLD, 2 * _KEPT - 1)
  )
