"""Times k arms trained together against the same k trained one by one.

  python benchmarks/arms.py [--arms 8] [--steps 20] [--repeats 3]
      [--teacher deeplab] [--student patch_unet_12k] [--size 256] [--at-once 0]

The teacher runs once a batch for all arms, so k arms should cost T + k S a
step and not k (T + S): T is augmentation and the teacher's pass, S one arm's
update. Prints milliseconds a step of the loop as `loop.fit` runs it, what
T + k S would be, the overhead over that, and apart / together. Where one
program updates several arms (--at-once; 0 for what suits the backend), k arms
can cost less than T + k S. The ways take turns and the fastest of the repeats
counts, so that other work on the machine disturbs little. Weights are randomly
initialised: they do not change the time.
"""

import argparse
from collections.abc import Callable
import pathlib
import time

import jax
import numpy as np

from kdseg import networks
from kdseg.data import loading
from kdseg.distill import method as method_lib
from kdseg.runtime import devices
from kdseg.runtime import memory
from kdseg.training import arms as arms_lib
from kdseg.training import batches as batches_lib
from kdseg.training import loop
from kdseg.training import prepare as prepare_lib
from kdseg.training import settings

TAPS = ("decoder_high",)


def make_arrays(count: int, size: int) -> loading.Arrays:
  """Makes noise with a disc in it."""
  draw = np.random.default_rng(0)
  y, x = np.mgrid[0:size, 0:size]
  disc = (np.hypot(y - size / 2, x - size / 2) < size / 4).astype(np.uint8)
  return loading.Arrays(
    name="noise",
    split="train",
    ids=tuple(str(i) for i in range(count)),
    image=draw.integers(0, 256, (count, size, size, 3), np.uint8),
    mask=np.broadcast_to(disc, (count, size, size)),
    official_count=count,
    found_count=count,
  )


def fastest(function: Callable[[], object], repeats: int) -> float:
  """Returns the fewest seconds that a call took, the first left out."""
  jax.block_until_ready(function())
  taken = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    taken.append(time.perf_counter() - began)
  return min(taken)


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--arms", type=int, default=8)
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--size", type=int, default=256)
  parser.add_argument("--teacher", default="deeplab")
  parser.add_argument("--student", default="patch_unet_12k")
  parser.add_argument("--at-once", type=int, default=0)
  options = parser.parse_args()
  memory.keep_freed()
  size, steps = options.size, options.steps
  at_once = settings.seeds_at_once(options.at_once)

  arrays = make_arrays(options.batch * 4, size)
  run_config = settings.RunConfig(
    seed=0,
    batch_size=options.batch,
    evaluation_batch_size=options.batch,
    size=size,
    segmentation={"bce": 1.0, "dice": 1.0},
    augment={},
    encoder_weights=False,
    log_every=20,
  )
  training = settings.TrainConfig(epochs=1.0, learning_rate=1e-3)
  teacher = networks.make_network(options.teacher, axis_name=devices.AXIS)
  weights = networks.make_variables(
    teacher, jax.random.key(0), size=size, weights=False
  )
  teach = prepare_lib.make_teach(teacher, TAPS, channels=32)
  prepare = prepare_lib.parallel_prepare(
    run_config, teach, weights, oriented=False
  )
  batches = batches_lib.make_batches(
    arrays, seed=0, batch_size=options.batch, steps=steps
  )
  student = networks.make_network(options.student, axis_name=devices.AXIS)
  method = method_lib.Method(terms={"mbf": 1.0}, taps=TAPS)
  image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
  teacher_out = jax.eval_shape(teach, weights, image)
  distiller, inputs = arms_lib.make_distiller(
    student, teacher_out, method, size=size
  )
  arms = arms_lib.make_arms(
    {
      str(seed): arms_lib.ArmSpec(
        "mbf", student, seed, pathlib.Path(), {}, method, distiller, inputs
      )
      for seed in range(options.arms)
    },
    run_config,
    training,
    steps,
  )

  def fit(names: list[str]) -> object:
    chosen = {name: arms[name] for name in names}
    loop.fit(
      chosen,
      arms_lib.make_groups(chosen, at_once),
      lambda first: ((i, prepare(i, x), info) for i, x, info in batches(first)),
      loop.LoopConfig("benchmark", steps, 2 * steps, 2 * steps),
      loop.Callbacks(
        validate=lambda name, variables: 0.0,
        log=lambda record: None,
        save=lambda step, arms: None,
        save_bad_batch=lambda name, step, batch_info: None,
      ),
    )
    return [arms[name].state.step for name in names]

  everyone = list(arms)
  _, batch, _ = next(iter(batches(0)))
  prepared = prepare(0, batch)

  def update() -> object:
    arm = arms[everyone[0]]
    arm.state, metrics = arm.step(arm.state, prepared)
    return metrics

  once = fastest(lambda: prepare(0, batch), 2 * options.repeats)
  each = fastest(update, 2 * options.repeats)
  stacked = min(at_once, options.arms)
  if stacked > 1:
    chosen = {name: arms[name] for name in everyone[:stacked]}
    [group] = arms_lib.make_groups(chosen, stacked)
    in_stack = (
      fastest(lambda: group.update(prepared), 2 * options.repeats) / stacked
    )
  together = fastest(lambda: fit(everyone), options.repeats) / steps
  apart = (
    fastest(lambda: [fit([name]) for name in everyone], options.repeats) / steps
  )
  expected = once + options.arms * each
  print(
    f"{options.teacher} teaches {options.arms} x {options.student}, {at_once} "
    "at once"
  )
  print(f"T, augmentation and teacher   {1e3 * once:9.1f} ms a step")
  print(f"S, one arm's update           {1e3 * each:9.1f}")
  print(f"T + k S                       {1e3 * expected:9.1f}")
  if stacked > 1:
    print(f"S, of {stacked:2} by one program        {1e3 * in_stack:9.1f}")
  print(f"together, as trained          {1e3 * together:9.1f}")
  print(f"apart, one by one             {1e3 * apart:9.1f}")
  print(f"overhead over T + k S         {together / expected - 1:9.1%}")
  print(f"apart / together              {apart / together:9.2f}")


if __name__ == "__main__":
  main()
