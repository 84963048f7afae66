"""Takes one training step twice: finite, the same bits, how fast."""

from collections.abc import Iterator
import math
import time
from typing import Any
from typing import NamedTuple

from kdseg.doctor.findings import Finding
from kdseg.doctor.findings import ok
from kdseg.doctor.findings import problem
from kdseg.doctor.findings import warning

# What is not of Python itself is imported inside the checks, as in `machine`.

STUDENT = "patch_unet_12k"
SIZE = 64  # pixels


class Trial(NamedTuple):
  """What a training step did.

  Attributes:
    loss: of the first step.
    same: whether a second step from the same state gave the same bits.
    compile_seconds: what the first step took longer than the second.
    step_seconds: of the second.
  """

  loss: float
  same: bool
  compile_seconds: float
  step_seconds: float


def check_training() -> Iterator[Finding]:
  """Takes a training step twice; see `try_step`."""
  import jax

  trial = try_step(SIZE)
  name = f"{STUDENT} on drawn lesions of {SIZE} x {SIZE}"
  if math.isfinite(trial.loss):
    yield ok(f"{name}: loss {trial.loss:.4f}")
  else:
    yield problem(
      f"{name}: the loss is {trial.loss}",
      "this JAX computes wrong numbers on this device: try other versions of "
      "JAX and of the driver",
    )
  if trial.same:
    yield ok("two steps from the same state: the same bits")
  elif jax.default_backend() == "cpu":
    yield problem(
      "two steps from the same state: other bits",
      "the numbers of a run cannot be repeated here: look at XLA_FLAGS",
    )
  else:
    yield warning(
      "two steps from the same state: other bits",
      "export XLA_FLAGS=--xla_gpu_deterministic_ops=true makes the numbers of "
      "a run repeatable on a GPU",
    )
  yield ok(
    f"compiled in {trial.compile_seconds:.1f} s, a step takes "
    f"{1e3 * trial.step_seconds:.1f} ms"
  )


def try_step(size: int) -> Trial:
  """Takes one training step without a teacher twice from the same state.

  Args:
    size: side of the images in pixels, divisible by 32.
  """
  import jax
  import numpy as np
  import optax

  from kdseg import networks
  from kdseg.data.sets import synthetic
  from kdseg.runtime import devices
  from kdseg.training import state as state_lib
  from kdseg.training import step as step_lib

  generator = np.random.default_rng(0)
  images, masks = zip(
    *(synthetic.draw(generator, size) for _ in range(jax.local_device_count()))
  )
  batch = devices.shard(
    {
      "image": np.stack(images) / np.float32(255),
      "mask": np.stack(masks).astype(np.float32),
    }
  )
  network = networks.make_network(STUDENT, axis_name=devices.AXIS)
  tx = optax.adamw(1e-3)
  variables = networks.make_initializer(network, size=size)(jax.random.key(0))
  state = devices.replicate(state_lib.make_state(variables, {}, tx, seed=0))
  step = devices.parallel(
    step_lib.make_train_step(
      network, tx, segmentation={"bce": 1.0, "dice": 1.0}, steps=1
    ),
    replicated=1,
    out_replicated=True,
  )

  def take() -> tuple[Any, float]:
    began = time.perf_counter()
    result = jax.block_until_ready(step(state, batch))
    return jax.device_get(result), time.perf_counter() - began

  first, first_seconds = take()
  second, second_seconds = take()
  leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second))
  return Trial(
    loss=float(first[1]["loss"]),
    # Bytes, as NaN does not equal itself.
    same=all(
      np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves
    ),
    compile_seconds=max(first_seconds - second_seconds, 0.0),
    step_seconds=second_seconds,
  )
