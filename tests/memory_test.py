"""What becomes of memory that was freed."""

import os
import subprocess
import sys

import pytest

# Takes 64 MB three times; prints how often the third touched a new page.
_TAKE = """
import ctypes
import resource
from kdseg import memory

if {keep}:
  print(memory.keep_freed())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  taken = libc.malloc(1 << 26)
  libc.memset(taken, 1, 1 << 26)
  libc.free(taken)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _take(*, keep: bool, **environment: str) -> list[str]:
  kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
  kept.pop("GLIBC_TUNABLES", None)
  answer = subprocess.run(
    [sys.executable, "-c", _TAKE.format(keep=keep)],
    env=kept | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return answer.stdout.split()


@pytest.mark.skipif(
  "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc"
)
def test_memory_that_was_freed_is_used_again():
  (before,) = _take(keep=False)
  kept, after = _take(keep=True)
  assert int(before) > 1000
  assert kept == "True"
  assert int(after) < 100


def test_what_the_user_chose_stays():
  kept, after = _take(keep=True, MALLOC_TRIM_THRESHOLD_="131072")
  assert kept == "False"
  assert int(after) > 1000
