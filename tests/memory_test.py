"""Programs that ask for more memory than any machine has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg import memory

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
