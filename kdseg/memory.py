"""What to say if there is not enough memory."""

from collections.abc import Iterator
import contextlib

import jax

_SHOWN = 160  # characters of what XLA says


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
