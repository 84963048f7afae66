"""ENet: a student of .36 M parameters, used by EMKD (Qin et al., TMI 2021)."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers

Array = jax.Array

# Stages 2 and 3 of the paper's table 1, one (kernel, dilation) a bottleneck;
# 5 stands for the asymmetric pair of 5x1 and 1x5.
_DEEP = ((3, 1), (3, 2), (5, 1), (3, 4), (3, 1), (3, 8), (5, 1), (3, 16))


class PReLU(nn.Module):
  """max(x, 0) + slope * min(x, 0), one slope a channel."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    slope = self.param(
      "slope", nn.initializers.constant(0.25), (x.shape[-1],)
    ).astype(self.dtype)
    return jnp.where(x >= 0, x, slope * x)


class Bottleneck(nn.Module):
  """ENet's block: a straight branch plus a narrow one of a quarter's width.

  Attributes:
    features: output channels.
    norm: makes a BatchNorm.
    kernel_size: 3, or 5 for 5x1 and then 1x5.
    dilation: of the 3x3 convolution.
    resize: "" to keep the stride, "down" to double it, "up" to halve it.
    drop_rate: probability that a channel of the narrow branch is dropped.
    dtype: of the computation.
  """

  features: int
  norm: Callable[..., nn.Module]
  kernel_size: int = 3
  dilation: int = 1
  resize: str = ""
  drop_rate: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    def conv(features: int, kernel_size: Any, name: str, **options: Any) -> Any:
      return layers.Conv(
        features, kernel_size, dtype=self.dtype, name=name, **options
      )

    def activate(y: Array, name: str) -> Array:
      y = self.norm(name=f"{name}_norm")(y)
      return PReLU(self.dtype, name=f"{name}_prelu")(y)

    straight = x
    if self.resize == "down":
      straight = layers.max_pool_2x(x)
      missing = self.features - x.shape[-1]
      straight = jnp.pad(straight, ((0, 0), (0, 0), (0, 0), (0, missing)))
    elif self.resize == "up":
      straight = conv(self.features, 1, "straight")(x)
      straight = self.norm(name="straight_norm")(straight)
      straight = layers.upsample_2x(straight)

    inner = self.features // 4
    if self.resize == "down":
      y = conv(inner, 2, "reduce", stride=2)(x)
    else:
      y = conv(inner, 1, "reduce")(x)
    y = activate(y, "reduce")
    if self.resize == "up":
      y = layers.upsample_2x(y)
    if self.kernel_size == 5:
      y = conv(inner, (5, 1), "rows")(y)
      y = conv(inner, (1, 5), "columns")(y)
    else:
      y = conv(inner, 3, "main", dilation=self.dilation)(y)
    y = activate(y, "main")
    y = conv(self.features, 1, "expand")(y)
    y = self.norm(name="expand_norm")(y)
    if self.drop_rate:
      y = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2))(
        y, deterministic=not train
      )
    return PReLU(self.dtype, name="prelu")(straight + y)


class ENetEncoder(nn.Module):
  """The initial block and stages 1 to 3: {2: x, 4: x, 8: x}."""

  drop_rate: float = 0.0
  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> dict[int, Array]:
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)
    filtered = layers.Conv(13, 3, 2, dtype=self.dtype, name="initial")(x)
    x = jnp.concatenate([filtered, layers.max_pool_2x(x)], -1)
    x = norm(name="initial_norm")(x)
    x = PReLU(self.dtype, name="initial_prelu")(x)
    features = {2: x}

    for i in range(5):
      x = Bottleneck(
        64,
        norm,
        resize="" if i else "down",
        drop_rate=self.drop_rate / 10,
        dtype=self.dtype,
        name=f"stage1_{i}",
      )(x, train)
    features[4] = x

    x = Bottleneck(
      128,
      norm,
      resize="down",
      drop_rate=self.drop_rate,
      dtype=self.dtype,
      name="stage2_0",
    )(x, train)
    for stage in (2, 3):
      for i, (kernel_size, dilation) in enumerate(_DEEP, 1):
        x = Bottleneck(
          128,
          norm,
          kernel_size,
          dilation,
          drop_rate=self.drop_rate,
          dtype=self.dtype,
          name=f"stage{stage}_{i}",
        )(x, train)
    features[8] = x
    return features


class ENet(nn.Module):
  """ENet (Paszke et al., 2016, arXiv:1606.02147, table 1).

  Differences from the paper: the decoder upsamples bilinearly in place of
  max-unpooling (main branch), whose indices edge runtimes lack, and of
  transposed convolutions (narrow branch, and the last layer, here a 3x3
  convolution at stride 2 whose logit is upsampled); no dropout by default (.01
  in stage 1 and .1 later there).

  Attributes:
    drop_rate: of whole channels from stage 2 on, a tenth of it in stage 1;
      above 0, training needs `rngs={"dropout": key}`.
  """

  drop_rate: float = 0.0
  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, image: Array, train: bool = False) -> dict[str, Array]:
    """Returns the maps of `networks`.

    low and high are the ends of stages 1 and 3; s16 is high, mean-pooled, as
    the encoder ends at stride 8; decoder_low is the end of stage 4;
    decoder_high is high, the decoder's only map of stride 8.
    """
    layers.require_divisible(image, 32)
    norm = layers.batch_norm(train, dtype=self.dtype, axis_name=self.axis_name)
    x = layers.normalize(image).astype(self.dtype)
    features = ENetEncoder(
      self.drop_rate, self.dtype, self.axis_name, name="encoder"
    )(x, train)

    x = features[8]
    for stage, (width, count) in ((4, (64, 3)), (5, (16, 2))):
      for i in range(count):
        x = Bottleneck(
          width,
          norm,
          resize="" if i else "up",
          drop_rate=self.drop_rate,
          dtype=self.dtype,
          name=f"stage{stage}_{i}",
        )(x, train)
      if stage == 4:
        decoder_low = x
    logits = layers.Conv(1, 3, use_bias=True, dtype=self.dtype, name="head")(x)
    return {
      "logits": layers.upsample_2x(logits.astype(jnp.float32))[..., 0],
      "low": features[4],
      "high": features[8],
      "s16": layers.mean_pool_2x(features[8]),
      "decoder_low": decoder_low,
      "decoder_high": features[8],
    }
