"""A pretrained student: a decoder on the first stages of EfficientNet-Lite0."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers
from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import pretrained

Array = jax.Array


class LiteUNet(nn.Module):
  """Truncated EfficientNet-Lite0 with a decoder of few channels.

  The decoder upsamples to stride 4, adding the encoder's map of each stride
  through a 1x1 convolution, and ends as `PatchUNet` does: one logit a cell,
  upsampled, and a correction of its 16 pixels.

  Attributes:
    stages: 3 to 5 of the encoder's stages; .06, .25 or .7 M parameters. With
      3 the encoder ends at stride 8, and pooling and a 3x3 convolution that is
      not pretrained make the map of stride 16.
    features: channels of the decoder.
    drop_rate: of the encoder; above 0, training needs `rngs={"dropout": key}`.
  """

  stages: int = 4
  features: int = 24
  drop_rate: float = 0.0
  dtype: Any = jnp.float32
  axis_name: str | None = None

  def published_weights(self) -> pretrained.Weights:
    """Yields the encoder's ImageNet weights and its path."""
    yield pretrained.load_efficientnet_lite("lite0", self.stages), ("encoder",)

  @nn.compact
  def __call__(self, image: Array, train: bool = False) -> dict[str, Array]:
    """Returns the maps of `networks`.

    Raises:
      ValueError: on another number of stages, or a side not divisible by 32.
    """
    if not 3 <= self.stages <= 5:
      raise ValueError(f"stages must be 3, 4 or 5: {self.stages}")
    layers.require_divisible(image, 32)
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)
    encoder_features = efficientnet_lite.EfficientNetLite(
      "lite0",
      self.stages,
      drop_rate=self.drop_rate,
      dtype=self.dtype,
      axis_name=self.axis_name,
      name="encoder",
    )(image, train)
    s16 = encoder_features.get(16)
    if s16 is None:
      s16 = layers.ConvBlock(
        encoder_features[8].shape[-1], norm, dtype=self.dtype, name="deepen"
      )(layers.max_pool_2x(encoder_features[8]))

    def lateral(y: Array, stride: int) -> Array:
      return layers.ConvBlock(
        self.features, norm, 1, dtype=self.dtype, name=f"lateral{stride}"
      )(y)

    x = layers.WholeImage(dtype=self.dtype, name="whole")(lateral(s16, 16))
    decoded = {}
    for stride in (8, 4):
      x = layers.upsample_2x(x) + lateral(encoder_features[stride], stride)
      x = layers.ConvBlock(
        self.features, norm, dtype=self.dtype, name=f"decode{stride}"
      )(x)
      decoded[stride] = x
    logits = layers.PixelHead(4, dtype=self.dtype, name="head")(x)
    return {
      "logits": logits,
      "low": encoder_features[4],
      "high": encoder_features[8],
      "s16": s16,
      "decoder_low": decoded[4],
      "decoder_high": decoded[8],
    }
