"""Too much memory asked for, and memory that was freed."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.runtime import memory

TOO_MUCH = 2**45


def allocate_on_a_device():
  jnp.zeros(TOO_MUCH, jnp.uint8).block_until_ready()


def allocate_within_a_program():
  program = jax.pmap(lambda x: jnp.cumsum(jnp.broadcast_to(x, (TOO_MUCH,)))[-1])
  program(np.ones(4, np.float32)).block_until_ready()


def allocate_on_the_host():
  np.zeros(2**60, np.uint8)


@pytest.mark.parametrize(
  ("allocate", "said"),
  [
    (allocate_on_a_device, f"RESOURCE_EXHAUSTED: .* {TOO_MUCH} bytes"),
    (allocate_within_a_program, "RESOURCE_EXHAUSTED: .* bytes"),
    (allocate_on_the_host, "Unable to allocate .*"),
  ],
)
def test_it_is_said_what_was_done_and_what_to_lower(allocate, said):
  with (
    pytest.raises(
      memory.OutOfMemoryError,
      match=rf"^students: not enough memory \({said}\)\. Lower it$",
    ),
    memory.enough("students", "Lower it"),
  ):
    allocate()


def test_the_narrower_of_two_speaks():
  with (
    pytest.raises(
      memory.OutOfMemoryError, match=r"^validation: .*\)\. Lower a$"
    ),
    memory.enough("training", "Lower b"),
    memory.enough("validation", "Lower a"),
  ):
    raise MemoryError


@pytest.mark.parametrize(
  "error",
  [jax.errors.JaxRuntimeError("INTERNAL: something else"), KeyError("x")],
)
def test_other_errors_stay_what_they_are(error):
  with pytest.raises(type(error)) as found, memory.enough("a", "b"):
    raise error
  assert found.value is error


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
