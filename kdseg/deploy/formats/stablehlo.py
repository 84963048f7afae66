"""StableHLO files: JAX's own export, for CPU, GPU and TPU."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
from typing import Any

import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from kdseg.deploy.formats import record


def write(
  function: record.Function, size: int, about: Mapping[str, Any]
) -> bytes:
  """Returns a StableHLO file of any batch; it has no room for `about`."""
  del about
  [batch] = jax_export.symbolic_shape("batch")
  shape = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
  with _no_folders():
    exported = jax_export.export(
      jax.jit(function), platforms=("cpu", "cuda", "tpu")
    )(shape)
  return bytes(exported.serialize())


@contextlib.contextmanager
def _no_folders() -> Iterator[None]:
  """Keeps file names of sources, but not their folders, in what is traced."""
  name = "jax_hlo_source_file_canonicalization_regex"
  before = getattr(jax.config, name)
  jax.config.update(name, ".*/")
  try:
    yield
  finally:
    jax.config.update(name, before)


def open_file(content: bytes, threads: int) -> record.Opened:
  """Opens a StableHLO file; JAX chooses the threads."""
  del threads
  restored = jax_export.deserialize(bytearray(content))
  [image] = restored.in_avals
  return record.Opened(
    lambda batch: np.asarray(restored.call(batch)), int(image.shape[1]), {}
  )
