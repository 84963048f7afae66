"""A U-Net that starts at a quarter of the resolution: the smallest students.

The cost of a segmentation network lies where its maps are large, in training
and on a phone. This one moves each 4x4 square of pixels into channels first
and never convolves at full size, so that a training step on 8 images of
256 x 256 takes about 50 ms on two cores.
"""

from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers

Array = jax.Array


class PatchEncoder(nn.Module):
  """Returns one map a stride of 4, 8, 16 and 32 (with a block of 4)."""

  block: int
  widths: Sequence[int]
  depths: Sequence[int]
  context: bool
  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> dict[int, Array]:
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)
    x = layers.space_to_depth(x, self.block)
    x = layers.ConvBlock(
      self.widths[0], norm, kernel_size=1, dtype=self.dtype, name="patches"
    )(x)
    features = {}
    for i, (width, depth) in enumerate(zip(self.widths, self.depths)):
      if i:
        x = layers.max_pool_2x(x)
      for j in range(depth):
        y = layers.ConvBlock(
          width, norm, dtype=self.dtype, name=f"stage{i}_{j}"
        )(x)
        x = x + y if j else y
      if self.context and i == len(self.widths) - 1:
        x = layers.WholeImage(dtype=self.dtype, name="whole")(x)
      features[self.block * 2**i] = x
    return features


class PatchUNet(nn.Module):
  """A U-Net over `block` x `block` patches.

  The encoder halves the map after each stage; the decoder upsamples it to the
  stride of the patches, adding the encoder's map of each stride. The head
  computes one logit a cell, upsampled bilinearly, and a linear correction of
  the cell's block * block pixels.

  Attributes:
    block: side of a patch in pixels; with 4, strides are 4, 8, 16, 32.
    widths: channels of each stage; at least three.
    depths: 3x3 convolutions of each stage, residual from the second on.
    context: whether to add the projected mean of the deepest map to its cells.
  """

  block: int = 4
  widths: Sequence[int] = (16, 24, 32, 40)
  depths: Sequence[int] = (1, 1, 1, 1)
  context: bool = True
  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, image: Array, train: bool = False) -> dict[str, Array]:
    """Returns the maps of `networks`."""
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)
    x = layers.normalize(image).astype(self.dtype)
    features = PatchEncoder(
      self.block,
      self.widths,
      self.depths,
      self.context,
      self.dtype,
      self.axis_name,
      name="encoder",
    )(x, train=train)

    strides = sorted(features)
    decoded = {}
    x = features[strides[-1]]
    for stride, width in zip(strides[-2::-1], self.widths[-2::-1]):
      x = layers.ConvBlock(
        width, norm, kernel_size=1, dtype=self.dtype, name=f"reduce{stride}"
      )(x)
      x = layers.upsample_2x(x) + features[stride]
      x = layers.ConvBlock(
        width, norm, dtype=self.dtype, name=f"decode{stride}"
      )(x)
      decoded[stride] = x

    logits = layers.PixelHead(self.block, dtype=self.dtype, name="head")(x)
    return {
      "logits": logits,
      "low": features[4],
      "high": features[8],
      "s16": features[16],
      "decoder_low": decoded[4],
      "decoder_high": decoded[8],
    }


# Of at most 50,000 and at most 12,000 parameters.
patch_unet_50k = functools.partial(PatchUNet, widths=(16, 24, 32, 40))
patch_unet_12k = functools.partial(PatchUNet, widths=(8, 12, 16, 18))
