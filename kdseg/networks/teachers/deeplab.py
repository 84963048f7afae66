"""DeepLabV3+ on an EfficientNet-Lite encoder."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers
from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import pretrained

Array = jax.Array


class SeparableBlock(nn.Module):
  """A dilated depthwise and a 1x1 convolution, each with BatchNorm and ReLU."""

  features: int
  norm: Callable[..., nn.Module]
  dilation: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = layers.DepthwiseConv(
      3, dilation=self.dilation, dtype=self.dtype, name="depthwise"
    )(x)
    x = nn.relu(self.norm(name="depthwise_norm")(x))
    return layers.ConvBlock(
      self.features, self.norm, 1, dtype=self.dtype, name="pointwise"
    )(x)


class AtrousPyramid(nn.Module):
  """Atrous spatial pyramid pooling: one map filtered at several dilations.

  The branch of the whole image has a bias and no BatchNorm: it has one value a
  channel and image, too few for statistics in a small batch.
  """

  features: int
  rates: Sequence[int]
  norm: Callable[..., nn.Module]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # The dilated branches start from this narrow map, not from the encoder's
    # several hundred channels.
    point = layers.ConvBlock(
      self.features, self.norm, 1, dtype=self.dtype, name="point"
    )(x)
    branches = [point]
    for rate in self.rates:
      branches.append(
        SeparableBlock(
          self.features, self.norm, rate, self.dtype, name=f"rate{rate}"
        )(point)
      )
    whole = jnp.mean(x, axis=(1, 2), keepdims=True)
    whole = nn.relu(
      layers.Conv(
        self.features, 1, use_bias=True, dtype=self.dtype, name="whole"
      )(whole)
    )
    branches.append(jnp.broadcast_to(whole, point.shape))
    return jnp.concatenate(branches, -1)


class DeepLabV3Plus(nn.Module):
  """DeepLabV3+ (Chen et al., ECCV 2018), separable throughout.

  Differences from the paper: a narrower pyramid and decoder (256 channels
  there), the dilated branches start from the narrowed map, and dilations of
  3, 6, 9 in place of 6, 12, 18, which were made for maps of 33 x 33: a 256 px
  image leaves 16 x 16, on which a dilation of 18 has only its centre inside.

  Attributes:
    encoder_variant: "lite0" or "lite2".
    output_stride: 16, the encoder's last stages dilated, or 32.
    rates: dilations of the pyramid, in cells of the output stride.
    pyramid_features: channels of each branch of the pyramid.
    features: channels of the pyramid's output and of the decoder.
    low_features: channels kept of the encoder's map at stride 4.
    drop_rate: of the encoder; above 0, training needs `rngs={"dropout": key}`.
  """

  encoder_variant: str = "lite2"
  output_stride: int = 16
  rates: Sequence[int] = (3, 6, 9)
  pyramid_features: int = 128
  features: int = 64
  low_features: int = 48
  drop_rate: float = 0.0
  dtype: Any = jnp.float32
  axis_name: str | None = None

  def published_weights(self) -> pretrained.Weights:
    """Yields the encoder's ImageNet weights and its path."""
    yield pretrained.load_efficientnet_lite(self.encoder_variant), ("encoder",)

  @nn.compact
  def __call__(self, image: Array, train: bool = False) -> dict[str, Array]:
    """Returns the maps of `networks`.

    decoder_high is the pyramid's output, upsampled to stride 8.
    """
    layers.require_divisible(image, 32)
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)
    encoder_features = efficientnet_lite.EfficientNetLite(
      self.encoder_variant,
      output_stride=self.output_stride,
      drop_rate=self.drop_rate,
      dtype=self.dtype,
      axis_name=self.axis_name,
      name="encoder",
    )(image, train)

    x = AtrousPyramid(
      self.pyramid_features, self.rates, norm, self.dtype, name="pyramid"
    )(encoder_features[self.output_stride])
    x = layers.ConvBlock(
      self.features, norm, 1, dtype=self.dtype, name="project"
    )(x)
    high = layers.upsample(x, self.output_stride // 8)
    low = layers.ConvBlock(
      self.low_features, norm, 1, dtype=self.dtype, name="reduce_low"
    )(encoder_features[4])
    x = jnp.concatenate([layers.upsample_2x(high), low], -1)
    for i in range(2):
      x = SeparableBlock(
        self.features, norm, dtype=self.dtype, name=f"decode{i}"
      )(x)
    logits = layers.Conv(1, 1, use_bias=True, dtype=self.dtype, name="head")(x)
    return {
      "logits": layers.upsample(logits.astype(jnp.float32), 4)[..., 0],
      "low": encoder_features[4],
      "high": encoder_features[8],
      "s16": encoder_features[16],
      "decoder_low": x,
      "decoder_high": high,
    }
