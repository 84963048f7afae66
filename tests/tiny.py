"""The smallest networks that keep the contract, and synthetic data for them."""

import contextlib
from typing import Any

from flax import linen as nn
import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np

from kdseg import networks
from kdseg.distill import layers as layers_lib

SIDE = 32


class Encoder(nn.Module):
  """Pools to strides 4, 8 and 16, and mixes channels after each."""

  channels: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, image, train):
    maps = []
    x = nn.avg_pool((image - 0.5).astype(self.dtype), (2, 2), (2, 2))
    for i in range(3):
      x = nn.avg_pool(x, (2, 2), (2, 2))
      x = nn.Dense(
        self.channels + i, use_bias=False, dtype=self.dtype, name=f"mix{i}"
      )(x)
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        dtype=self.dtype,
        axis_name=self.axis_name,
        name=f"norm{i}",
      )(x)
      x = nn.relu(x)
      maps.append(x)
    return maps


def _upsample(x, times):
  return jnp.repeat(jnp.repeat(x, times, 1), times, 2)


class Network(nn.Module):
  """Classifies each cell by its colours; compiles in a moment."""

  channels: int = 3
  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, image, train=False):
    low, high, s16 = Encoder(
      self.channels, self.dtype, self.axis_name, name="encoder"
    )(image, train)
    cells = jnp.concatenate(
      [_upsample(x, times) for times, x in ((1, low), (2, high), (4, s16))], -1
    )
    cells = nn.Dense(1, dtype=self.dtype, name="head")(cells)
    logits = _upsample(cells, 4)[..., 0]
    return {
      "logits": logits.astype(jnp.float32),
      "low": low,
      "high": high,
      "s16": s16,
    }


def draw_lesions(count, seed=0):
  """Dark discs on bright skin: images uint8, masks uint8."""
  draw = np.random.default_rng(seed)
  y, x = np.mgrid[0:SIDE, 0:SIDE]
  images, masks = [], []
  for _ in range(count):
    cy, cx = draw.uniform(0.3 * SIDE, 0.7 * SIDE, 2)
    mask = np.hypot(y - cy, x - cx) < draw.uniform(0.15, 0.3) * SIDE
    image = np.where(mask[..., None], (90, 60, 50), (230, 190, 170))
    noise = draw.normal(0, 8, image.shape)
    images.append(np.clip(image + noise, 0, 255).astype(np.uint8))
    masks.append(mask.astype(np.uint8))
  return np.stack(images), np.stack(masks)


@contextlib.contextmanager
def compile_once(directory):
  """Compiles equal programs once, as a second start of a run has them all."""
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  # Whether there is a cache is looked up once, and again after a reset.
  compilation_cache.reset_cache()
  for name, value in zip(names, (str(directory), 0.0)):
    jax.config.update(name, value)
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def make_distiller(method, *, student=3, teacher=5):
  """The distiller between two `Network`s, and its first parameters."""
  order = {"low": 0, "high": 1, "s16": 2}
  module = layers_lib.Distiller(
    taps={tap: teacher + order[tap] for tap in method.taps},
    heads=method.generator_heads,
    generator=method.generator,
    width=method.generator_width,
    share_generators=method.share_generators,
    topology=method.topology,
  )
  sides = {tap: SIDE // networks.STRIDES[tap] for tap in method.taps}
  features = {
    tap: jnp.zeros((1, side, side, student + order[tap]))
    for tap, side in sides.items()
  }
  grids = {tap: (side, side) for tap, side in sides.items()}
  variables = module.init(jax.random.key(5), features, grids)
  return module, variables.get("params", {})
