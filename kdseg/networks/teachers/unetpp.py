"""U-Net++ on an EfficientNet-Lite encoder."""

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


class Node(nn.Module):
  """x^{i,j}: 1x1 convolution of the maps beside it and below, then a 3x3 one.

  The 1x1 convolution of the concatenation is written as the sum of its two
  halves: the half for the map below commutes with the upsampling, and runs
  before it on a quarter of the cells.
  """

  features: int
  norm: Callable[..., nn.Module]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, beside: Sequence[Array], below: Array) -> Array:
    def mix(name: str) -> nn.Module:
      return layers.Conv(self.features, 1, dtype=self.dtype, name=name)

    x = mix("mix_beside")(jnp.concatenate(beside, -1))
    x = x + layers.upsample_2x(mix("mix_below")(below))
    x = nn.relu(self.norm(name="mix_norm")(x))
    return layers.ConvBlock(
      self.features, self.norm, dtype=self.dtype, name="conv"
    )(x)


class UNetPlusPlus(nn.Module):
  """U-Net++ (Zhou et al., DLMIA 2018 and IEEE TMI 2020, eq. 1).

  x^{i,0} are the encoder's maps at strides 2 to 32; x^{i,j} joins all of
  x^{i,0} ... x^{i,j-1} with the upsampled x^{i+1,j-1}. Differences from the
  paper: a pretrained encoder; nodes of a 1x1 and a 3x3 convolution in place of
  two 3x3; bilinear upsampling; no row of full size, but the logits of stride 2
  upsampled.

  Attributes:
    encoder_variant: "lite0" or "lite2".
    widths: channels of the nodes at strides 2, 4, 8 and 16.
    deep_supervision: also return "side_logits".
    drop_rate: of the encoder; above 0, training needs `rngs={"dropout": key}`.
  """

  encoder_variant: str = "lite2"
  widths: Sequence[int] = (24, 48, 64, 96)
  deep_supervision: bool = False
  drop_rate: float = 0.0
  dtype: Any = jnp.float32
  axis_name: str | None = None

  def published_weights(self) -> pretrained.Weights:
    """Yields the encoder's ImageNet weights and its path."""
    yield pretrained.load_efficientnet_lite(self.encoder_variant), ("encoder",)

  @nn.compact
  def __call__(self, image: Array, train: bool = False) -> dict[str, Any]:
    """Returns the maps of `networks`.

    decoder_low is x^{1,3} and decoder_high x^{2,2}. With `deep_supervision`,
    also side_logits, the [B, H, W] of x^{0,1}, x^{0,2} and x^{0,3}.

    Raises:
      ValueError: if `widths` are not four, or a side not divisible by 32.
    """
    if len(self.widths) != 4:
      raise ValueError(f"widths must be four, strides 2 to 16: {self.widths}")
    layers.require_divisible(image, 32)
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)
    encoder_features = efficientnet_lite.EfficientNetLite(
      self.encoder_variant,
      drop_rate=self.drop_rate,
      dtype=self.dtype,
      axis_name=self.axis_name,
      name="encoder",
    )(image, train)

    rows = [[encoder_features[stride]] for stride in (2, 4, 8, 16, 32)]
    for j in range(1, 5):
      for i in range(5 - j):
        x = Node(self.widths[i], norm, self.dtype, name=f"node{i}_{j}")(
          rows[i], rows[i + 1][j - 1]
        )
        rows[i].append(x)

    def logits(x: Array, name: str) -> Array:
      x = layers.Conv(1, 1, use_bias=True, dtype=self.dtype, name=name)(x)
      return layers.upsample_2x(x.astype(jnp.float32))[..., 0]

    out: dict[str, Any] = {
      "logits": logits(rows[0][4], "head"),
      "low": encoder_features[4],
      "high": encoder_features[8],
      "s16": encoder_features[16],
      "decoder_low": rows[1][3],
      "decoder_high": rows[2][2],
    }
    if self.deep_supervision:
      out["side_logits"] = [
        logits(rows[0][j], f"side_head{j}") for j in (1, 2, 3)
      ]
    return out
