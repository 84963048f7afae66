"""A ViT-S/14 with a convolutional decoder and an image branch."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers
from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import pretrained
from kdseg.networks.encoders import vit
from kdseg.networks.encoders import vit_weights

Array = jax.Array


class ImageBranch(nn.Module):
  """Three strided stages for details smaller than a patch of 14 pixels."""

  widths: tuple[int, int, int]
  norm: Any
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image: Array) -> dict[int, Array]:
    x = (image - 0.5) / 0.25
    x = layers.space_to_depth(x, 2)
    features = {}
    for i, width in enumerate(self.widths):
      x = layers.ConvBlock(
        width,
        self.norm,
        stride=1 if i == 0 else 2,
        dtype=self.dtype,
        name=f"stage_{i}",
      )(x)
      features[2 ** (i + 1)] = x
    return features


class ViTUNet(nn.Module):
  """A ViT's patch grids recognise the lesion, an image branch places its edge.

  The grids after some transformer blocks are projected, resized to stride 8 and
  decoded together with an image branch's features at strides 8, 4 and 2. The
  output of frozen blocks can be stored, see `encode`.

  Attributes:
    side: of the image as the transformer sees it, in pixels.
    taps: the blocks after which grids are read.
    trained_from: first transformer block to be trained; 12 trains none.
    branch: the image branch, "conv" (not pretrained), or "lite0" / "lite2", an
      EfficientNet-Lite with ImageNet weights.
    widths: of the decoder at strides 8, 4 and 2.
    dropout: share of the projected grids' channels dropped in training, if a
      "dropout" key is given.
  """

  side: int = 252
  taps: tuple[int, ...] = (6, 9, 11)
  trained_from: int = 12
  branch: str = "conv"
  widths: tuple[int, int, int] = (96, 48, 24)
  dropout: float = 0.0
  dtype: Any = jnp.float32
  axis_name: str | None = None

  def setup(self) -> None:
    self.encoder = vit.ViT(
      side=self.side,
      taps=self.taps,
      trained_from=self.trained_from,
      dtype=self.dtype,
    )
    self.decoder = Decoder(
      branch=self.branch,
      widths=self.widths,
      dropout=self.dropout,
      dtype=self.dtype,
      axis_name=self.axis_name,
    )

  def published_weights(self) -> pretrained.Weights:
    """Yields the encoders' published weights and their paths."""
    yield vit_weights.load_vit_small(blocks=max(self.taps)), ("encoder",)
    if self.branch != "conv":
      lite = pretrained.load_efficientnet_lite(self.branch)
      yield lite, ("decoder", "encoder")

  def encode(self, image: Array) -> dict[str, Array]:
    """Returns the output of the frozen blocks, which can be stored.

    Args:
      image: [B, H, W, 3] float in [0, 1].

    Returns:
      "grids" [B, side/14, side/14, C], the frozen taps concatenated; and, if
      any block is trained, "tokens" [B, 1 + (side/14)^2, 384], the input of
      the first of these.
    """
    tokens, grids = self.encoder.begin(image)
    if self.trained_from >= max(self.taps):
      return {"grids": jnp.concatenate(self.encoder.resume(tokens, grids), -1)}
    encoder_features = {"tokens": tokens}
    if grids:
      encoder_features["grids"] = jnp.concatenate(grids, axis=-1)
    return encoder_features

  def is_frozen(self, path: tuple[str, ...]) -> bool:
    """Returns whether the parameter at `path` is before `trained_from`.

    Its gradient is 0, but weight decay would move it.
    """
    return path[0] == "encoder" and vit.is_frozen(path[1], self.trained_from)

  def __call__(
    self,
    image: Array,
    train: bool = False,
    encoder_features: dict[str, Array] | None = None,
  ) -> dict[str, Array]:
    """Maps `image` [B, H, W, 3] to the named outputs of `networks`.

    Args:
      image: float RGB in [0, 1], sides divisible by 32.
      train: whether to use the batch's statistics, and dropout.
      encoder_features: of these images, from `encode`; None runs it here.

    Raises:
      ValueError: if a side is not divisible by 32.
    """
    layers.require_divisible(image, 32)
    if encoder_features is None:
      encoder_features = self.encode(image)
    grids = [encoder_features["grids"]] if "grids" in encoder_features else []
    if "tokens" in encoder_features:
      grids = self.encoder.resume(encoder_features["tokens"], grids)
    return self.decoder(image, jnp.concatenate(grids, axis=-1), train)


class Decoder(nn.Module):
  """Joins the transformer's grids with an image branch; see `ViTUNet`."""

  branch: str
  widths: tuple[int, int, int]
  dropout: float
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, image: Array, grids: Array, train: bool
  ) -> dict[str, Array]:
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)

    def block(width: int, name: str, kernel: int = 3) -> layers.ConvBlock:
      return layers.ConvBlock(
        width, norm, kernel_size=kernel, dtype=self.dtype, name=name
      )

    height, width = image.shape[1:3]
    image = image.astype(self.dtype)
    if self.branch == "conv":
      local = ImageBranch((16, 32, 48), norm, dtype=self.dtype, name="branch")(
        image
      )
    else:
      # Named "encoder": all pretrained parts have one learning-rate scale.
      local = efficientnet_lite.EfficientNetLite(
        variant=self.branch,
        dtype=self.dtype,
        axis_name=self.axis_name,
        name="encoder",
      )(image, train)

    grids = grids.astype(self.dtype)
    x = norm(name="grids_norm")(grids)
    x = block(128, "project", 1)(x)
    if self.dropout and train and self.has_rng("dropout"):
      x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=False)(
        x
      )
    s16 = layers.resize_bilinear(x, height // 16, width // 16)
    x = layers.resize_bilinear(x, height // 8, width // 8)
    high = jnp.concatenate([x, local[8]], axis=-1)
    if 16 in local:
      deep = block(64, "deep", 1)(local[16])
      high = jnp.concatenate([high, layers.upsample_2x(deep)], axis=-1)
    x = block(self.widths[0], "fuse_8", 1)(high)
    x = x + block(self.widths[0], "refine_8")(x)
    decoder_high = x
    x = layers.upsample_2x(block(self.widths[1], "narrow_8", 1)(x))
    x = block(self.widths[1], "fuse_4")(jnp.concatenate([x, local[4]], axis=-1))
    decoder_low = x
    x = layers.upsample_2x(block(self.widths[2], "narrow_4", 1)(x))
    x = block(self.widths[2], "fuse_2")(jnp.concatenate([x, local[2]], axis=-1))
    logits = layers.Conv(1, 1, use_bias=True, dtype=jnp.float32, name="logits")(
      x.astype(jnp.float32)
    )
    return {
      "logits": layers.upsample_2x(logits)[..., 0],
      "low": local[4],
      "high": high,
      "s16": s16,
      "decoder_low": decoder_low,
      "decoder_high": decoder_high,
    }
