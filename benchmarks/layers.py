"""Times each layer's two implementations on this machine.

  python benchmarks/layers.py [--batch 8] [--side 64] [--repeats 15]

Prints one row an operation and pass: milliseconds as "cpu" and as "portable",
and portable / cpu. Above 1 the "cpu" form is the faster one here; on a CPU it
should be, on a GPU or a TPU it should not. The two take turns, and the fastest
of the repeats counts, so that other work on the machine disturbs little.
"""

import argparse
from collections.abc import Callable
import functools
import time

import jax
import jax.numpy as jnp

from kdseg.networks import layers
from kdseg.networks.students import patch_unet

Array = jax.Array
Function = Callable[[Array], Array]


def conv(kernel_size: int, channels: int) -> Callable[[str], Function]:
  """Makes a dense convolution by implementation."""
  return lambda name: _bound(
    layers.Conv(channels, kernel_size, implementation=name), channels
  )


def depthwise(
  kernel_size: int, stride: int, channels: int
) -> Callable[[str], Function]:
  """Makes a depthwise convolution by implementation."""
  return lambda name: _bound(
    layers.DepthwiseConv(kernel_size, stride, implementation=name), channels
  )


def _bound(
  module: layers.Conv | layers.DepthwiseConv, channels: int
) -> Function:
  variables = module.init(
    jax.random.key(0), jnp.zeros((1, 2 * module.stride, 4, channels))
  )
  return functools.partial(module.apply, variables)


def resample(function: Callable[..., Array]) -> Callable[[str], Function]:
  """Makes a pooling or an upsampling by implementation."""
  return lambda name: functools.partial(function, implementation=name)


def with_gradient(function: Function) -> Function:
  """Returns the gradient of a sum over `function` that is not linear."""
  return jax.grad(lambda x: jnp.sum(jnp.square(function(x))))


def fastest(
  functions: dict[str, Function], x: Array, repeats: int
) -> dict[str, float]:
  """Returns the least milliseconds of each function, called in turns."""
  compiled = {name: jax.jit(f) for name, f in functions.items()}
  for f in compiled.values():
    jax.block_until_ready(f(x))
  least = dict.fromkeys(compiled, float("inf"))
  for _ in range(repeats):
    for name, f in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(f(x))
      least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
  return least


def student_step(batch: int, repeats: int) -> float:
  """Returns milliseconds of the 50 k student's forward and backward pass."""
  image = jax.random.uniform(jax.random.key(1), (batch, 256, 256, 3))
  student = patch_unet.patch_unet_50k()
  variables = jax.jit(student.init)(jax.random.key(0), image)

  def loss(params: dict, image: Array) -> Array:
    out, _ = student.apply(
      {**variables, "params": params}, image, True, mutable=["batch_stats"]
    )
    return jnp.mean(jnp.square(out["logits"]))

  step = functools.partial(jax.grad(loss), variables["params"])
  return fastest({"step": step}, image, repeats)["step"]


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--side", type=int, default=64, help="side of the maps")
  parser.add_argument("--channels", type=int, default=24)
  parser.add_argument("--repeats", type=int, default=15)
  options = parser.parse_args()

  channels = options.channels
  operations = {
    "conv 1x1": conv(1, channels),
    "conv 3x3": conv(3, channels),
    "depthwise 3x3": depthwise(3, 1, channels),
    "depthwise 5x5": depthwise(5, 1, channels),
    "depthwise 3x3, stride 2": depthwise(3, 2, channels),
    "max_pool_2x": resample(layers.max_pool_2x),
    "mean_pool_2x": resample(layers.mean_pool_2x),
    "upsample_2x": resample(layers.upsample_2x),
  }
  x = jax.random.normal(
    jax.random.key(0), (options.batch, options.side, options.side, channels)
  )
  print(f"jax {jax.__version__}, {jax.default_backend()}, x {x.shape}")
  print(f"{'':34}{'cpu ms':>9}{'portable':>9}{'ratio':>8}")
  for title, make in operations.items():
    functions = {name: make(name) for name in ("cpu", "portable")}
    for suffix, change in (("forward", lambda f: f), ("grad", with_gradient)):
      changed = {name: change(f) for name, f in functions.items()}
      least = fastest(changed, x, options.repeats)
      print(
        f"{title + ', ' + suffix:34}{least['cpu']:9.2f}"
        f"{least['portable']:9.2f}{least['portable'] / least['cpu']:8.2f}",
        flush=True,
      )
  step = student_step(options.batch, options.repeats)
  print(f"patch_unet_50k, forward and gradient at 256 px: {step:.1f} ms")


if __name__ == "__main__":
  main()
