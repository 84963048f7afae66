"""EfficientNet-Lite: mobile image encoders with published ImageNet weights.

EfficientNet (Tan and Le, ICML 2019) as its authors fitted it to mobile
accelerators ("EfficientNet-Lite", tensorflow/tpu, 2020): no squeeze and
excitation, ReLU6 in place of swish, stem and head of the same width in every
variant. `pretrained.load_efficientnet_lite` reads the weights.
"""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers

Array = jax.Array

STEM_FEATURES = 32


class Stage(NamedTuple):
  """Blocks of one width; only the first of them changes stride and width."""

  repeats: int
  kernel_size: int
  stride: int
  expansion: int
  features: int


# Table 1 of the paper, stages 2 to 8, its depths and widths multiplied by
# (1.0, 1.0) for Lite0 and (1.2, 1.1) for Lite2; the first and the last depth
# stay, widths are rounded to multiples of 8.
_LITE0 = (
  Stage(1, 3, 1, 1, 16),
  Stage(2, 3, 2, 6, 24),
  Stage(2, 5, 2, 6, 40),
  Stage(3, 3, 2, 6, 80),
  Stage(3, 5, 1, 6, 112),
  Stage(4, 5, 2, 6, 192),
  Stage(1, 3, 1, 6, 320),
)
_LITE2 = (
  Stage(1, 3, 1, 1, 16),
  Stage(3, 3, 2, 6, 24),
  Stage(3, 5, 2, 6, 48),
  Stage(4, 3, 2, 6, 88),
  Stage(4, 5, 1, 6, 120),
  Stage(5, 5, 2, 6, 208),
  Stage(1, 3, 1, 6, 352),
)
ALL_STAGES = len(_LITE0)


def stages_of(variant: str, stages: int = ALL_STAGES) -> tuple[Stage, ...]:
  """Returns the first `stages` stages of `variant`, "lite0" or "lite2".

  Raises:
    ValueError: on an unknown variant, or a number of stages it does not have.
  """
  table = {"lite0": _LITE0, "lite2": _LITE2}
  if variant not in table:
    raise ValueError(
      f"EfficientNet-Lite variant must be one of {sorted(table)}: {variant!r}"
    )
  if not 1 <= stages <= ALL_STAGES:
    raise ValueError(f"stages must be 1 to {ALL_STAGES}: {stages}")
  return table[variant][:stages]


class _Block(NamedTuple):
  """A block of a stage, its strides and the stride of the map it returns."""

  stage: Stage
  stride: int
  dilation: int
  reached: int


def _plan_blocks(
  stages: tuple[Stage, ...], output_stride: int
) -> Iterator[_Block]:
  """Yields the blocks behind the stem, whose map has a stride of 2."""
  reached, dilation = 2, 1
  for stage in stages:
    for repeat in range(stage.repeats):
      stride = 1 if repeat else stage.stride
      own_dilation = dilation
      if reached * stride > output_stride:
        # The block that would have halved the map still sees neighbours one
        # pixel apart; those after it see every second one.
        dilation, stride = dilation * stride, 1
      reached *= stride
      yield _Block(stage, stride, own_dilation, reached)


class InvertedResidual(nn.Module):
  """Expands, filters each channel alone, projects; adds its input if it can.

  Attributes:
    features: output channels.
    kernel_size: side of the depthwise kernel.
    stride: of the depthwise convolution.
    expansion: hidden channels per input channel; 1 leaves the expansion out.
    norm: makes a BatchNorm.
    dilation: of the depthwise convolution.
    drop_rate: probability that an image skips the block in training.
  """

  features: int
  kernel_size: int
  stride: int
  expansion: int
  norm: Callable[..., nn.Module]
  dilation: int = 1
  drop_rate: float = 0.0
  dtype: Any = jnp.float32
  implementation: str = ""

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    def pointwise(features: int, name: str) -> nn.Module:
      return layers.Conv(
        features,
        1,
        dtype=self.dtype,
        implementation=self.implementation,
        name=name,
      )

    y = x
    if self.expansion != 1:
      y = pointwise(self.expansion * x.shape[-1], "expand")(y)
      y = nn.relu6(self.norm(name="expand_norm")(y))
    y = layers.DepthwiseConv(
      self.kernel_size,
      self.stride,
      self.dilation,
      dtype=self.dtype,
      implementation=self.implementation,
      name="depthwise",
    )(y)
    y = nn.relu6(self.norm(name="depthwise_norm")(y))
    y = pointwise(self.features, "project")(y)
    y = self.norm(name="project_norm")(y)
    if self.stride != 1 or x.shape[-1] != self.features:
      return y
    if self.drop_rate:
      y = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3))(
        y, deterministic=not train
      )
    return x + y


class EfficientNetLite(nn.Module):
  """The encoder: `image` in, the last features of each stride out.

  Attributes:
    variant: "lite0" (2.9 M parameters with all stages) or "lite2" (4.4 M).
    stages: how many of the seven stages to keep. 3 end at stride 8, 4 and 5
      at stride 16, 6 and 7 at stride 32.
    output_stride: 32, or 16 to dilate the convolutions of stage 6 and 7
      instead of halving the map once more; the parameters are the same.
    drop_rate: probability that the last block is skipped in training, falling
      linearly to 0 at the first one; above 0 it needs `rngs={"dropout": key}`.
    dtype: of the computation; parameters and statistics stay float32.
    axis_name: mapped axis over which BatchNorm shares its statistics.
    implementation: see `layers`.
  """

  variant: str = "lite2"
  stages: int = ALL_STAGES
  output_stride: int = 32
  drop_rate: float = 0.0
  dtype: Any = jnp.float32
  axis_name: str | None = None
  implementation: str = ""

  @nn.compact
  def __call__(self, image: Array, train: bool = False) -> dict[int, Array]:
    """Encodes a batch of images.

    Args:
      image: [B, H, W, 3] float RGB in [0, 1].
      train: whether BatchNorm uses the batch's statistics.

    Returns:
      {stride: [B, ceil(H / stride), ceil(W / stride), C]}, the last map of each
      stride of 2, 4, 8, 16, 32 that the kept stages reach, `output_stride` at
      most.

    Raises:
      ValueError: on an unknown variant, number of stages or output stride.
    """
    if self.output_stride not in (16, 32):
      raise ValueError(f"output_stride must be 16 or 32: {self.output_stride}")
    table = stages_of(self.variant, self.stages)
    norm = layers.batch_norm(
      train, dtype=self.dtype, axis_name=self.axis_name, epsilon=1e-3
    )
    x = (image.astype(jnp.float32) * 255.0 - 127.0) / 128.0
    x = layers.Conv(
      STEM_FEATURES,
      3,
      2,
      dtype=self.dtype,
      implementation=self.implementation,
      name="stem",
    )(x.astype(self.dtype))
    x = nn.relu6(norm(name="stem_norm")(x))

    features = {}
    # Over the blocks of the whole network, so that a block is skipped as often
    # whatever stages follow it.
    total = sum(stage.repeats for stage in stages_of(self.variant))
    for index, block in enumerate(_plan_blocks(table, self.output_stride)):
      x = InvertedResidual(
        block.stage.features,
        block.stage.kernel_size,
        block.stride,
        block.stage.expansion,
        norm,
        dilation=block.dilation,
        drop_rate=self.drop_rate * index / total,
        dtype=self.dtype,
        implementation=self.implementation,
        name=f"block_{index}",
      )(x, train)
      features[block.reached] = x
    return features
