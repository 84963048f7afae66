"""What becomes of memory that was freed."""

import ctypes
import os

# Parameters of mallopt(3), by their numbers in <malloc.h>.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed() -> bool:
  """Makes the C library keep what is freed, for the next step to use.

  A step's scratch memory is tens of MB. By default glibc asks the kernel for
  it anew every time, page by page and filled with zeros, which is a quarter to
  a third of a small student's step on a CPU. It changes no number. The process
  stays as large as it ever was. Where a variable of the environment that begins
  with MALLOC_, or GLIBC_TUNABLES, is set, all is left as the user wants it.

  Returns:
    Whether it is so; false without glibc, or if the user chose otherwise.
  """
  if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
    return False
  try:
    os.confstr("CS_GNU_LIBC_VERSION")
  except (AttributeError, ValueError):
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # No buffer on its own, however large, and the heap never made smaller.
  return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
