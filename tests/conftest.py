"""Every test sees four devices, whatever the machine has.

Compilation is most of the time that tests on tiny networks take, and without
LLVM's optimisations it is a tenth.
"""

import os

_FLAG = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

import jax

import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items):
  """Leaves out what takes long and looks at what others look at in parts."""
  if os.environ.get("KDSEG_LONG"):
    return
  for item in items:
    if item.get_closest_marker("long"):
      item.add_marker(pytest.mark.skip(reason="KDSEG_LONG=1 runs it"))
