"""What is said when memory runs out, and that freed memory is kept."""

import os
import subprocess
import sys
import types

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
  ("allocate", "message"),
  [
    (allocate_on_a_device, f"RESOURCE_EXHAUSTED: .* {TOO_MUCH} bytes"),
    (allocate_within_a_program, "RESOURCE_EXHAUSTED: .* bytes"),
    (allocate_on_the_host, "Unable to allocate .*"),
  ],
)
def test_the_error_says_what_ran_and_which_setting_to_lower(allocate, message):
  with (
    pytest.raises(
      memory.OutOfMemoryError,
      match=rf"^students: not enough memory \({message}\)\. Lower it$",
    ),
    memory.enough("students", "Lower it"),
  ):
    allocate()


def test_of_two_nested_blocks_the_inner_one_names_the_setting():
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
def test_other_errors_pass_unchanged(error):
  with pytest.raises(type(error)) as found, memory.enough("a", "b"):
    raise error
  assert found.value is error


# Takes 64 MB three times; prints how often the third touched a new page.
_TAKE = """
import ctypes
import resource
from kdseg.runtime import memory

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
  done = subprocess.run(
    [sys.executable, "-c", _TAKE.format(keep=keep)],
    env=kept | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.split()


@pytest.mark.skipif(
  "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc"
)
def test_freed_memory_is_used_again():
  (before,) = _take(keep=False)
  kept, after = _take(keep=True)
  assert int(before) > 1000
  assert kept == "True"
  assert int(after) < 100


@pytest.mark.skipif(
  "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc"
)
@pytest.mark.parametrize(
  ("variables", "kept"),
  [
    ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, True),
    ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
    ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
  ],
)
def test_only_what_the_user_has_chosen_is_left_alone(
  monkeypatch, variables, kept
):
  called = []

  def mallopt(parameter, value):
    called.append((parameter, value))
    return 1

  for name in list(os.environ):
    if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
      monkeypatch.delenv(name)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(
    memory.ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=mallopt)
  )
  assert memory.keep_freed() == kept
  assert bool(called) == kept
