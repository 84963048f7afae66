"""Every test sees four devices, whatever the machine has.

Compilation is most of the time that tests on tiny networks take, and without
LLVM's optimisations it is a tenth.
"""

import os

_FLAG = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
