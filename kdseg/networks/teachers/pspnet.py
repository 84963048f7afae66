"""PSPNet on an EfficientNet-Lite encoder."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.networks import layers
from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import pretrained

Array = jax.Array


def _bin_weights(size: int, bins: int) -> np.ndarray:
  """Returns [bins, size]; bin i averages floor(i s/b) to ceil((i + 1) s/b)."""
  cell = np.arange(size)
  index = np.arange(bins)[:, None]
  inside = cell >= index * size // bins
  inside &= cell < -(-(index + 1) * size // bins)
  return inside / inside.sum(1, keepdims=True)


def adaptive_mean_pool(x: Array, bins: int) -> Array:
  """Averages `x` [B, H, W, C] over a grid of bins: [B, bins, bins, C].

  Where `bins` does not divide a side, neighbouring bins share a row or a
  column, as in PyTorch's `adaptive_avg_pool2d`.
  """
  rows = jnp.asarray(_bin_weights(x.shape[1], bins), x.dtype)
  columns = jnp.asarray(_bin_weights(x.shape[2], bins), x.dtype)
  return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x)


class PyramidPooling(nn.Module):
  """Appends to each cell the means of ever smaller parts of the image.

  The pooled maps have a bias and no BatchNorm: the coarsest has one value a
  channel and image, too few for statistics in a small batch.
  """

  features: int
  bins: Sequence[int]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    parts = [x]
    for bins in self.bins:
      part = layers.Conv(
        self.features, 1, use_bias=True, dtype=self.dtype, name=f"bins{bins}"
      )(adaptive_mean_pool(x, bins))
      parts.append(layers.resize_bilinear(nn.relu(part), *x.shape[1:3]))
    return jnp.concatenate(parts, -1)


class PSPNet(nn.Module):
  """PSPNet (Zhao et al., CVPR 2017), a teacher of EMKD (Qin et al., TMI 2021).

  Differences from the paper: pyramid at stride 16 in place of 8 (a quarter of
  the cost); and in place of upsampling the logits eightfold at once, the map is
  upsampled to stride 4 in two steps, adding the encoder's maps (as in UPerNet,
  Xiao et al., ECCV 2018), without which a lesion's edge is lost.

  Attributes:
    encoder_variant: "lite0" or "lite2".
    bins: sides of the pyramid's grids.
    pyramid_features: channels of each pooled map.
    features: channels of the pyramid's output and of stride 8.
    low_features: channels of stride 4.
    drop_rate: of the encoder; above 0, training needs `rngs={"dropout": key}`.
  """

  encoder_variant: str = "lite2"
  bins: Sequence[int] = (1, 2, 3, 6)
  pyramid_features: int = 64
  features: int = 64
  low_features: int = 32
  drop_rate: float = 0.0
  dtype: Any = jnp.float32
  axis_name: str | None = None

  def published_weights(self) -> pretrained.Weights:
    """Yields the encoder's ImageNet weights and its path."""
    yield pretrained.load_efficientnet_lite(self.encoder_variant), ("encoder",)

  @nn.compact
  def __call__(self, image: Array, train: bool = False) -> dict[str, Array]:
    """Returns the maps of `networks`; s16 is the dilated encoder's last."""
    layers.require_divisible(image, 32)
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)
    encoder_features = efficientnet_lite.EfficientNetLite(
      self.encoder_variant,
      output_stride=16,
      drop_rate=self.drop_rate,
      dtype=self.dtype,
      axis_name=self.axis_name,
      name="encoder",
    )(image, train)

    x = PyramidPooling(
      self.pyramid_features, self.bins, self.dtype, name="pyramid"
    )(encoder_features[16])
    x = layers.ConvBlock(
      self.features, norm, 1, dtype=self.dtype, name="project"
    )(x)
    x = layers.ConvBlock(self.features, norm, dtype=self.dtype, name="mix16")(x)
    decoded = {}
    for stride, width in ((8, self.features), (4, self.low_features)):
      lateral = layers.Conv(
        width, 1, dtype=self.dtype, name=f"lateral{stride}"
      )(encoder_features[stride])
      climbing = layers.Conv(width, 1, dtype=self.dtype, name=f"climb{stride}")(
        x
      )
      x = layers.upsample_2x(climbing) + lateral
      x = nn.relu(norm(name=f"join{stride}_norm")(x))
      x = layers.ConvBlock(
        width, norm, dtype=self.dtype, name=f"decode{stride}"
      )(x)
      decoded[stride] = x
    logits = layers.Conv(1, 1, use_bias=True, dtype=self.dtype, name="head")(x)
    return {
      "logits": layers.upsample(logits.astype(jnp.float32), 4)[..., 0],
      "low": encoder_features[4],
      "high": encoder_features[8],
      "s16": encoder_features[16],
      "decoder_low": decoded[4],
      "decoder_high": decoded[8],
    }
