"""ViT-S/14, the shape and the parameter names of DINOv2-S.

Dosovitskiy et al., ICLR 2021, with LayerScale (Touvron et al., 2021) and
position embeddings that are resized to the grid at hand (Oquab et al., 2024).
Differences from DINOv2: no register tokens, no mask token, no drop path, and
the position table is resized by bicubic interpolation without antialiasing, as
in the file the weights are read from (see `pretrained.load_vit_small`).
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
# Side of the position table in the published weights, in patches.
TABLE_SIDE = 37


class Attention(nn.Module):
  """Multi-head self-attention over [B, N, C]."""

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, tokens, width = x.shape
    split = (batch, tokens, self.heads, width // self.heads)
    dense = functools.partial(nn.Dense, width, dtype=self.dtype)
    query = dense(name="query")(x).reshape(split)
    key = dense(name="key")(x).reshape(split)
    value = dense(name="value")(x).reshape(split)
    scale = (width // self.heads) ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key)
    shares = jax.nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", shares, value)
    return dense(name="output")(mixed.reshape(batch, tokens, width))


class Block(nn.Module):
  """Pre-norm transformer block with LayerScale."""

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)

    def scale(name: str) -> Array:
      initial = nn.initializers.constant(1e-5)
      return self.param(name, initial, (width,)).astype(self.dtype)

    y = Attention(self.heads, self.dtype, name="attention")(
      norm(name="norm1")(x)
    )
    x = x + scale("layer_scale1") * y
    y = nn.Dense(4 * width, dtype=self.dtype, name="fc1")(norm(name="norm2")(x))
    y = jax.nn.gelu(y, approximate=False)
    y = nn.Dense(width, dtype=self.dtype, name="fc2")(y)
    return x + scale("layer_scale2") * y


class ViT(nn.Module):
  """Returns the patch grids [B, side/14, side/14, width] after some blocks.

  Attributes:
    side: the image is resized to this side first, in pixels; a multiple of
      the patch.
    taps: after which blocks (1 to `depth`) a grid is returned.
    trained_from: blocks before this one (0 to `depth`), and the embeddings if
      it is above 0, receive no gradient; `depth` freezes the whole encoder
      at no cost of a backward pass.
  """

  side: int = 252
  depth: int = 12
  width: int = 384
  heads: int = 6
  patch: int = 14
  taps: tuple[int, ...] = (6, 9, 11)
  trained_from: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image: Array) -> list[Array]:
    """Maps `image` [B, H, W, 3], float RGB in [0, 1].

    Raises:
      ValueError: if `side` is no multiple of the patch.
    """
    if self.side % self.patch:
      raise ValueError(
        f"side must be a multiple of {self.patch}, not {self.side}"
      )
    batch, grid = image.shape[0], self.side // self.patch
    shape = (batch, self.side, self.side, 3)
    x = jax.image.resize(image, shape, "bilinear", antialias=False)
    x = (x - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_DEVIATION)
    x = nn.Conv(
      self.width,
      (self.patch, self.patch),
      (self.patch, self.patch),
      padding="VALID",
      dtype=self.dtype,
      name="patch_embedding",
    )(x).reshape(batch, grid * grid, self.width)
    small = nn.initializers.normal(0.02)
    class_token = self.param("class_token", small, (1, 1, self.width))
    class_position = self.param("class_position", small, (1, 1, self.width))
    table = self.param(
      "position", small, (1, TABLE_SIDE, TABLE_SIDE, self.width)
    )
    position = jax.image.resize(
      table, (1, grid, grid, self.width), "cubic", antialias=False
    ).reshape(1, grid * grid, self.width)
    first = jnp.broadcast_to(
      class_token + class_position, (batch, 1, self.width)
    )
    x = jnp.concatenate([first, x + position], axis=1).astype(self.dtype)
    grids = []
    for i in range(max(self.taps)):
      x = Block(self.heads, self.dtype, name=f"block_{i}")(x)
      if i < self.trained_from:
        # After each frozen block, as a tap may read the first of several.
        x = jax.lax.stop_gradient(x)
      if i + 1 in self.taps:
        grids.append(x[:, 1:].reshape(batch, grid, grid, self.width))
    return grids
