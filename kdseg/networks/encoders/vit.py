"""ViT-S/14, the shape and the parameter names of DINOv2-S.

Dosovitskiy et al., ICLR 2021, with LayerScale (Touvron et al., 2021) and
position embeddings that are resized to the grid at hand (Oquab et al., 2024).
Differences from DINOv2: no register tokens, no mask token, no drop path, and
the position table is resized by a cubic with a = -0.5, without antialiasing.
The file the weights are read from (see `vit_weights.load_vit_small`) uses
a = -0.75: from 37 to 18 cells the two tables differ by 2 % in norm.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers

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
    y = layers.exact_gelu(y)
    y = nn.Dense(width, dtype=self.dtype, name="fc2")(y)
    return x + scale("layer_scale2") * y


class ViT(nn.Module):
  """Returns the patch grids [B, side/14, side/14, width] after some blocks.

  `begin` runs the embeddings and the blocks before `trained_from`, whose output
  for an image never changes and can be stored; `resume` runs the other blocks.

  Attributes:
    side: in pixels, to which the image is resized first; a multiple of
      `patch`.
    taps: after which blocks (1 to `depth`) a grid is returned.
    trained_from: blocks before this one (0 to `depth`), and the embeddings if
      it is above 0, receive no gradient; `depth` freezes the whole encoder,
      which then needs no backward pass.
  """

  side: int = 252
  depth: int = 12
  width: int = 384
  heads: int = 6
  patch: int = 14
  taps: tuple[int, ...] = (6, 9, 11)
  trained_from: int = 0
  dtype: Any = jnp.float32

  def setup(self) -> None:
    self.patch_embedding = nn.Conv(
      self.width,
      (self.patch, self.patch),
      (self.patch, self.patch),
      padding="VALID",
      dtype=self.dtype,
    )
    small = nn.initializers.normal(0.02)
    self.class_token = self.param("class_token", small, (1, 1, self.width))
    self.class_position = self.param(
      "class_position", small, (1, 1, self.width)
    )
    self.position = self.param(
      "position", small, (1, TABLE_SIDE, TABLE_SIDE, self.width)
    )
    for i in range(max(self.taps)):
      # Flax names a submodule by its attribute: "block_0" is in the weights.
      setattr(self, f"block_{i}", Block(self.heads, self.dtype))

  def __call__(self, image: Array) -> list[Array]:
    """Maps `image` [B, H, W, 3], float RGB in [0, 1].

    Raises:
      ValueError: if `side` is no multiple of the patch.
    """
    return self.resume(*self.begin(image))

  def begin(self, image: Array) -> tuple[Array, list[Array]]:
    """Runs the embeddings and the frozen blocks.

    Args:
      image: [B, H, W, 3], float RGB in [0, 1].

    Returns:
      (tokens [B, 1 + grid^2, width], grids of the taps before `trained_from`).

    Raises:
      ValueError: if `side` is no multiple of the patch.
    """
    if self.side % self.patch:
      raise ValueError(
        f"side must be a multiple of {self.patch}, not {self.side}"
      )
    batch, grid = image.shape[0], self.side // self.patch
    x = layers.resize_bilinear(image, self.side, self.side)
    x = (x - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_DEVIATION)
    x = self.patch_embedding(x).reshape(batch, grid * grid, self.width)
    position = jax.image.resize(
      self.position, (1, grid, grid, self.width), "cubic", antialias=False
    ).reshape(1, grid * grid, self.width)
    first = self.class_token + self.class_position
    # Added to a padded token, not repeated over the batch, whose size exported
    # graphs do not know.
    x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
    x = (x + jnp.concatenate([first, position], axis=1)).astype(self.dtype)
    return self._run(x, 0, self._split)

  def resume(self, tokens: Array, grids: list[Array]) -> list[Array]:
    """Runs the other blocks on what `begin` returned."""
    # A tap at the split reads the tokens themselves.
    tokens = tokens.astype(self.dtype)
    first = [self._grid(tokens)] if self._split in self.taps else []
    _, rest = self._run(tokens, self._split, max(self.taps))
    return [*grids, *first, *rest]

  @property
  def _split(self) -> int:
    return min(self.trained_from, max(self.taps))

  def _grid(self, tokens: Array) -> Array:
    side = self.side // self.patch
    return tokens[:, 1:].reshape(-1, side, side, self.width)

  def _run(self, x: Array, start: int, end: int) -> tuple[Array, list[Array]]:
    grids = []
    for i in range(start, end):
      x = getattr(self, f"block_{i}")(x)
      if i < self.trained_from:
        # After each frozen block: a tap may read any of them.
        x = jax.lax.stop_gradient(x)
      if i + 1 in self.taps and i + 1 != self._split:
        grids.append(self._grid(x))
    return x, grids


def is_frozen(name: str, trained_from: int) -> bool:
  """Returns whether the part `name` of a `ViT` ("block_3") is not trained."""
  if name.startswith("block_"):
    return int(name.removeprefix("block_")) < trained_from
  return trained_from > 0
