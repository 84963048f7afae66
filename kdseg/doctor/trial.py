"""Takes one training step twice: finite, the same bits, how fast."""

from collections.abc import Iterator
import math
import pathlib
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
    same: whether the second step from the same state gave the same bits.
    images: in the batch, over all devices.
    compile_seconds: what the first step took longer than the second.
    step_seconds: of the second.
  """

  loss: float
  same: bool
  images: int
  compile_seconds: float
  step_seconds: float


def check_training() -> Iterator[Finding]:
  """Takes a training step twice; see `try_step`."""
  import jax

  trial = try_step(SIZE)
  name = f"{STUDENT} on {trial.images} drawn lesions of {SIZE} x {SIZE}"
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
  """Takes one training step, as a run does, twice from the same state.

  Args:
    size: side of the images in pixels, divisible by 32.
  """
  import jax
  import numpy as np

  from kdseg import networks
  from kdseg.data.sets import synthetic
  from kdseg.runtime import devices
  from kdseg.training import arms as arms_lib
  from kdseg.training import settings

  images = 4 * jax.local_device_count()
  generator = np.random.default_rng(0)
  lesions = [synthetic.draw(generator, size) for _ in range(images)]
  batch = devices.shard(
    {
      "image": np.stack([image for image, _ in lesions]) / np.float32(255),
      "mask": np.stack([mask for _, mask in lesions]).astype(np.float32),
    }
  )
  spec = arms_lib.ArmSpec(
    kind="none",
    network=networks.make_network(STUDENT, axis_name=devices.AXIS),
    seed=0,
    destination=pathlib.Path(),
    about={},
  )
  run_config = settings.RunConfig(
    seed=0,
    batch_size=images,
    evaluation_batch_size=images,
    size=size,
    segmentation={"bce": 1.0, "dice": 1.0},
    augment={},
    encoder_weights=False,
    log_every=1,
  )
  training = settings.TrainConfig(epochs=1.0, learning_rate=1e-3, warmup=0.0)
  [arm] = arms_lib.make_arms(
    {"student": spec}, run_config, training, 1
  ).values()
  state = jax.device_get(arm.state)

  def take() -> tuple[Any, float]:
    # A copy, as the step donates the memory of its state.
    given = devices.replicate(jax.tree.map(np.array, state))
    began = time.perf_counter()
    result = jax.block_until_ready(arm.step(given, batch))
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
    images=images,
    compile_seconds=max(first_seconds - second_seconds, 0.0),
    step_seconds=second_seconds,
  )
