"""The networks of kdseg once more, as one would write them in PyTorch.

What `train_step.py` measures against. Native layers throughout, NCHW, so that
a speed difference is one between frameworks: `nn.Conv2d`, `nn.BatchNorm2d`,
`F.interpolate`, `F.scaled_dot_product_attention`, in-place activations. The
fields are the defaults of kdseg's networks; dropout, which these leave at 0,
and the named maps, which only distillation reads, are left out: a twin returns
its logits, [B, H, W].

Where PyTorch has a better form of the same arithmetic, the twin takes it:
folding a square of pixels into channels and convolving is one strided
convolution, queries, keys and values are one product, the position table of
the transformer is resized when the weights are copied and not in every pass.

Submodules carry kdseg's names, so that `to_state_dict` can copy a network's
variables. One thing differs in training: PyTorch's running variance is that of
a sample (n - 1), flax's that of a population (n). The loss and its gradient
don't depend on it.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from kdseg.networks.encoders import efficientnet_lite

EPSILON = 1e-3
# Of the new value; flax's .9 is that of the old one.
MOMENTUM = 0.1
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class Conv(nn.Conv2d):
  """A convolution padded as TensorFlow's "SAME" has it.

  Where an odd pixel goes to the end, which happens at stride 2, `nn.Conv2d`
  has no padding for it, and the input is padded before (as in timm).
  """

  def __init__(
    self,
    inputs: int,
    features: int,
    kernel_size: int | tuple[int, int] = 3,
    stride: int = 1,
    *,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
  ) -> None:
    sides = kernel_size
    if isinstance(sides, int):
      sides = (sides, sides)
    # Of maps whose sides the stride divides.
    totals = [max(dilation * (k - 1) + 1 - stride, 0) for k in sides]
    even = all(total % 2 == 0 for total in totals)
    super().__init__(
      inputs,
      features,
      sides,
      stride,
      padding=tuple(total // 2 for total in totals) if even else 0,
      dilation=dilation,
      groups=groups,
      bias=bias,
    )
    self.pads: tuple[int, ...] = ()
    if not even:
      rows, columns = ((total // 2, total - total // 2) for total in totals)
      self.pads = (*columns, *rows)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to [B, features, ceil(H / stride), ...]."""
    return super().forward(F.pad(x, self.pads) if self.pads else x)


class DepthwiseConv(Conv):
  """One kernel a channel."""

  def __init__(
    self, channels: int, kernel_size: int, stride: int = 1, dilation: int = 1
  ) -> None:
    super().__init__(
      channels,
      channels,
      kernel_size,
      stride,
      dilation=dilation,
      groups=channels,
    )


def batch_norm(channels: int) -> nn.BatchNorm2d:
  """Makes a BatchNorm with kdseg's constants."""
  return nn.BatchNorm2d(channels, eps=EPSILON, momentum=MOMENTUM)


class ConvBlock(nn.Module):
  """Convolution, BatchNorm, ReLU."""

  def __init__(
    self, inputs: int, features: int, kernel_size: int = 3, stride: int = 1
  ) -> None:
    super().__init__()
    self.conv = Conv(inputs, features, kernel_size, stride)
    self.norm = batch_norm(features)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to [B, features, H / stride, W / stride]."""
    return F.relu(self.norm(self.conv(x)), inplace=True)


def resize(x: Tensor, height: int, width: int) -> Tensor:
  """Bilinear, half-pixel centres."""
  return F.interpolate(
    x, size=(height, width), mode="bilinear", align_corners=False
  )


def upsample(x: Tensor, factor: int = 2) -> Tensor:
  """Enlarges by a power of two, in doublings, as kdseg does."""
  while factor > 1:
    x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
    factor //= 2
  return x


class WholeImage(nn.Module):
  """Adds the projected mean of a map to each of its cells."""

  def __init__(self, channels: int) -> None:
    super().__init__()
    self.project = Conv(channels, channels, 1, bias=True)

  def forward(self, x: Tensor) -> Tensor:
    """Keeps the shape."""
    return x + self.project(x.mean((2, 3), keepdim=True))


class PixelHead(nn.Module):
  """One logit a cell, enlarged, and a linear correction of its pixels."""

  def __init__(self, channels: int, block: int) -> None:
    super().__init__()
    self.block = block
    self.cell = Conv(channels, 1, 1, bias=True)
    self.pixels = Conv(channels, block**2, 1)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, C, h, w] to [B, h * block, w * block]."""
    pixels = F.pixel_shuffle(self.pixels(x), self.block)
    return (upsample(self.cell(x), self.block) + pixels).squeeze(1)


class PatchEncoder(nn.Module):
  """Patches, then one stage a stride."""

  def __init__(self, block: int, widths: Sequence[int]) -> None:
    super().__init__()
    self.block, self.count = block, len(widths)
    self.patches = ConvBlock(3, widths[0], block, block)
    inputs = widths[0]
    for i, width in enumerate(widths):
      self.add_module(f"stage{i}_0", ConvBlock(inputs, width))
      inputs = width
    self.whole = WholeImage(inputs)

  def forward(self, x: Tensor) -> dict[int, Tensor]:
    """Maps [B, 3, H, W] to {stride: map}."""
    x = self.patches(x)
    features = {}
    for i in range(self.count):
      if i:
        x = F.max_pool2d(x, 2)
      x = getattr(self, f"stage{i}_0")(x)
      if i == self.count - 1:
        x = self.whole(x)
      features[self.block * 2**i] = x
    return features


class PatchUNet(nn.Module):
  """The twin of `kdseg.networks.students.patch_unet.PatchUNet`."""

  def __init__(self, widths: Sequence[int], block: int = 4) -> None:
    super().__init__()
    self.encoder = PatchEncoder(block, widths)
    self.strides = [block * 2**i for i in range(len(widths) - 2, -1, -1)]
    inputs = widths[-1]
    for stride, width in zip(self.strides, widths[-2::-1]):
      self.add_module(f"reduce{stride}", ConvBlock(inputs, width, 1))
      self.add_module(f"decode{stride}", ConvBlock(width, width))
      inputs = width
    self.head = PixelHead(inputs, block)

  def forward(self, image: Tensor) -> Tensor:
    """Maps [B, 3, H, W] in [0, 1] to logits [B, H, W]."""
    features = self.encoder((image - 0.5) / 0.25)
    x = features[2 * self.strides[0]]
    for stride in self.strides:
      x = getattr(self, f"reduce{stride}")(x)
      x = upsample(x) + features[stride]
      x = getattr(self, f"decode{stride}")(x)
    return self.head(x)


class InvertedResidual(nn.Module):
  """Expands, filters each channel alone, projects; adds its input."""

  def __init__(
    self,
    inputs: int,
    features: int,
    kernel_size: int,
    stride: int,
    expansion: int,
    dilation: int,
  ) -> None:
    super().__init__()
    self.adds = stride == 1 and inputs == features
    inner = expansion * inputs
    self.expands = expansion != 1
    if self.expands:
      self.expand = Conv(inputs, inner, 1)
      self.expand_norm = batch_norm(inner)
    self.depthwise = DepthwiseConv(inner, kernel_size, stride, dilation)
    self.depthwise_norm = batch_norm(inner)
    self.project = Conv(inner, features, 1)
    self.project_norm = batch_norm(features)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to [B, features, H / stride, W / stride]."""
    y = x
    if self.expands:
      y = F.relu6(self.expand_norm(self.expand(y)), inplace=True)
    y = F.relu6(self.depthwise_norm(self.depthwise(y)), inplace=True)
    y = self.project_norm(self.project(y))
    return x + y if self.adds else y


class EfficientNetLite(nn.Module):
  """The twin of `efficientnet_lite.EfficientNetLite`."""

  def __init__(
    self,
    variant: str,
    stages: int = efficientnet_lite.ALL_STAGES,
    output_stride: int = 32,
  ) -> None:
    super().__init__()
    width = efficientnet_lite.STEM_FEATURES
    self.stem = Conv(3, width, 3, 2)
    self.stem_norm = batch_norm(width)
    # By stride, the channels; and after which block each map is complete.
    self.widths: dict[int, int] = {}
    self.ends: dict[int, int] = {}
    reached, dilation, index = 2, 1, 0
    for stage in efficientnet_lite.stages_of(variant, stages):
      for repeat in range(stage.repeats):
        stride = 1 if repeat else stage.stride
        # The block that would have halved the map is not dilated itself.
        own_dilation = dilation
        if reached * stride > output_stride:
          dilation, stride = dilation * stride, 1
        block = InvertedResidual(
          width,
          stage.features,
          stage.kernel_size,
          stride,
          stage.expansion,
          own_dilation,
        )
        self.add_module(f"block_{index}", block)
        width = stage.features
        reached *= stride
        index += 1
      self.widths[reached], self.ends[reached] = width, index
    self.count = index

  def forward(self, image: Tensor) -> dict[int, Tensor]:
    """Maps [B, 3, H, W] in [0, 1] to {stride: map}."""
    x = (image * 255.0 - 127.0) / 128.0
    x = F.relu6(self.stem_norm(self.stem(x)), inplace=True)
    features = {}
    start = 0
    for stride, end in self.ends.items():
      for index in range(start, end):
        x = getattr(self, f"block_{index}")(x)
      features[stride], start = x, end
    return features


class LiteUNet(nn.Module):
  """The twin of `kdseg.networks.students.lite_unet.LiteUNet`."""

  def __init__(self, stages: int = 4, features: int = 24) -> None:
    super().__init__()
    self.encoder = EfficientNetLite("lite0", stages)
    for stride in (16, 8, 4):
      lateral = ConvBlock(self.encoder.widths[stride], features, 1)
      self.add_module(f"lateral{stride}", lateral)
    self.whole = WholeImage(features)
    self.decode8 = ConvBlock(features, features)
    self.decode4 = ConvBlock(features, features)
    self.head = PixelHead(features, 4)

  def forward(self, image: Tensor) -> Tensor:
    """Maps [B, 3, H, W] in [0, 1] to logits [B, H, W]."""
    encoder_features = self.encoder(image)
    x = self.whole(self.lateral16(encoder_features[16]))
    x = self.decode8(upsample(x) + self.lateral8(encoder_features[8]))
    x = self.decode4(upsample(x) + self.lateral4(encoder_features[4]))
    return self.head(x)


class Bottleneck(nn.Module):
  """ENet's block: a straight branch plus one of a quarter's width."""

  def __init__(
    self,
    inputs: int,
    features: int,
    kernel_size: int = 3,
    dilation: int = 1,
    resize: str = "",
  ) -> None:
    super().__init__()
    inner = features // 4
    self.resize, self.missing = resize, features - inputs
    if resize == "up":
      self.straight = Conv(inputs, features, 1)
      self.straight_norm = batch_norm(features)
    if resize == "down":
      self.reduce = Conv(inputs, inner, 2, 2)
    else:
      self.reduce = Conv(inputs, inner, 1)
    self.reduce_norm = batch_norm(inner)
    self.reduce_prelu = nn.PReLU(inner)
    self.asymmetric = kernel_size == 5
    if self.asymmetric:
      self.rows = Conv(inner, inner, (5, 1))
      self.columns = Conv(inner, inner, (1, 5))
    else:
      self.main = Conv(inner, inner, 3, dilation=dilation)
    self.main_norm = batch_norm(inner)
    self.main_prelu = nn.PReLU(inner)
    self.expand = Conv(inner, features, 1)
    self.expand_norm = batch_norm(features)
    self.prelu = nn.PReLU(features)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to [B, features, ...], halved, doubled or neither."""
    straight = x
    if self.resize == "down":
      straight = F.pad(F.max_pool2d(x, 2), (0, 0, 0, 0, 0, self.missing))
    elif self.resize == "up":
      straight = upsample(self.straight_norm(self.straight(x)))
    y = self.reduce_prelu(self.reduce_norm(self.reduce(x)))
    if self.resize == "up":
      y = upsample(y)
    y = self.columns(self.rows(y)) if self.asymmetric else self.main(y)
    y = self.main_prelu(self.main_norm(y))
    return self.prelu(straight + self.expand_norm(self.expand(y)))


class ENetEncoder(nn.Module):
  """The initial block and stages 1 to 3."""

  # Kernel size and dilation, table 1 of the paper.
  DEEP = ((3, 1), (3, 2), (5, 1), (3, 4), (3, 1), (3, 8), (5, 1), (3, 16))

  def __init__(self) -> None:
    super().__init__()
    self.initial = Conv(3, 13, 3, 2)
    self.initial_norm = batch_norm(16)
    self.initial_prelu = nn.PReLU(16)
    blocks = {"stage1_0": Bottleneck(16, 64, resize="down")}
    blocks |= {f"stage1_{i}": Bottleneck(64, 64) for i in range(1, 5)}
    blocks["stage2_0"] = Bottleneck(64, 128, resize="down")
    for stage in (2, 3):
      for i, (kernel_size, dilation) in enumerate(self.DEEP, 1):
        blocks[f"stage{stage}_{i}"] = Bottleneck(
          128, 128, kernel_size, dilation
        )
    self.names = tuple(blocks)
    for name, block in blocks.items():
      self.add_module(name, block)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, 3, H, W] to [B, 128, H / 8, W / 8]."""
    x = torch.cat([self.initial(x), F.max_pool2d(x, 2)], 1)
    x = self.initial_prelu(self.initial_norm(x))
    for name in self.names:
      x = getattr(self, name)(x)
    return x


class ENet(nn.Module):
  """The twin of `kdseg.networks.students.enet.ENet`."""

  def __init__(self) -> None:
    super().__init__()
    self.encoder = ENetEncoder()
    self.stage4_0 = Bottleneck(128, 64, resize="up")
    self.stage4_1 = Bottleneck(64, 64)
    self.stage4_2 = Bottleneck(64, 64)
    self.stage5_0 = Bottleneck(64, 16, resize="up")
    self.stage5_1 = Bottleneck(16, 16)
    self.head = Conv(16, 1, 3, bias=True)

  def forward(self, image: Tensor) -> Tensor:
    """Maps [B, 3, H, W] in [0, 1] to logits [B, H, W]."""
    x = self.encoder((image - 0.5) / 0.25)
    x = self.stage4_2(self.stage4_1(self.stage4_0(x)))
    x = self.stage5_1(self.stage5_0(x))
    return upsample(self.head(x)).squeeze(1)


class Node(nn.Module):
  """Mixes the maps beside it with the one below, then looks around."""

  def __init__(self, beside: int, below: int, features: int) -> None:
    super().__init__()
    self.mix_beside = Conv(beside, features, 1)
    self.mix_below = Conv(below, features, 1)
    self.mix_norm = batch_norm(features)
    self.conv = ConvBlock(features, features)

  def forward(self, beside: list[Tensor], below: Tensor) -> Tensor:
    """Maps [B, C, H, W] and [B, C', H / 2, W / 2] to [B, features, H, W]."""
    x = self.mix_beside(torch.cat(beside, 1)) + upsample(self.mix_below(below))
    return self.conv(F.relu(self.mix_norm(x), inplace=True))


class UNetPlusPlus(nn.Module):
  """The twin of `kdseg.networks.teachers.unetpp.UNetPlusPlus`."""

  def __init__(
    self, variant: str = "lite2", widths: Sequence[int] = (24, 48, 64, 96)
  ) -> None:
    super().__init__()
    self.encoder = EfficientNetLite(variant)
    channels = [[self.encoder.widths[stride]] for stride in (2, 4, 8, 16, 32)]
    for j in range(1, 5):
      for i in range(5 - j):
        node = Node(sum(channels[i]), channels[i + 1][j - 1], widths[i])
        self.add_module(f"node{i}_{j}", node)
        channels[i].append(widths[i])
    self.head = Conv(widths[0], 1, 1, bias=True)

  def forward(self, image: Tensor) -> Tensor:
    """Maps [B, 3, H, W] in [0, 1] to logits [B, H, W]."""
    encoder_features = self.encoder(image)
    rows = [[encoder_features[stride]] for stride in (2, 4, 8, 16, 32)]
    for j in range(1, 5):
      for i in range(5 - j):
        node = getattr(self, f"node{i}_{j}")
        rows[i].append(node(rows[i], rows[i + 1][j - 1]))
    return upsample(self.head(rows[0][4])).squeeze(1)


class SeparableBlock(nn.Module):
  """A dilated depthwise and a 1x1 convolution, each with BatchNorm and ReLU."""

  def __init__(self, inputs: int, features: int, dilation: int = 1) -> None:
    super().__init__()
    self.depthwise = DepthwiseConv(inputs, 3, dilation=dilation)
    self.depthwise_norm = batch_norm(inputs)
    self.pointwise = ConvBlock(inputs, features, 1)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to [B, features, H, W]."""
    x = F.relu(self.depthwise_norm(self.depthwise(x)), inplace=True)
    return self.pointwise(x)


class AtrousPyramid(nn.Module):
  """One map seen at several scales at once."""

  def __init__(self, inputs: int, features: int, rates: Sequence[int]) -> None:
    super().__init__()
    self.rates = tuple(rates)
    self.point = ConvBlock(inputs, features, 1)
    for rate in rates:
      self.add_module(f"rate{rate}", SeparableBlock(features, features, rate))
    self.whole = Conv(inputs, features, 1, bias=True)

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to [B, (2 + rates) * features, H, W]."""
    point = self.point(x)
    branches = [getattr(self, f"rate{rate}")(point) for rate in self.rates]
    whole = F.relu(self.whole(x.mean((2, 3), keepdim=True)), inplace=True)
    return torch.cat([point, *branches, whole.expand_as(point)], 1)


class DeepLabV3Plus(nn.Module):
  """The twin of `kdseg.networks.teachers.deeplab.DeepLabV3Plus`."""

  def __init__(
    self,
    variant: str = "lite2",
    rates: Sequence[int] = (3, 6, 9),
    pyramid_features: int = 128,
    features: int = 64,
    low_features: int = 48,
  ) -> None:
    super().__init__()
    self.encoder = EfficientNetLite(variant, output_stride=16)
    widths = self.encoder.widths
    self.pyramid = AtrousPyramid(widths[16], pyramid_features, rates)
    pyramid_width = (2 + len(rates)) * pyramid_features
    self.project = ConvBlock(pyramid_width, features, 1)
    self.reduce_low = ConvBlock(widths[4], low_features, 1)
    self.decode0 = SeparableBlock(features + low_features, features)
    self.decode1 = SeparableBlock(features, features)
    self.head = Conv(features, 1, 1, bias=True)

  def forward(self, image: Tensor) -> Tensor:
    """Maps [B, 3, H, W] in [0, 1] to logits [B, H, W]."""
    encoder_features = self.encoder(image)
    x = upsample(self.project(self.pyramid(encoder_features[16])), 4)
    x = torch.cat([x, self.reduce_low(encoder_features[4])], 1)
    x = self.decode1(self.decode0(x))
    return upsample(self.head(x), 4).squeeze(1)


class PyramidPooling(nn.Module):
  """Appends to each cell the means of ever smaller parts of the image."""

  def __init__(self, inputs: int, features: int, bins: Sequence[int]) -> None:
    super().__init__()
    self.bins = tuple(bins)
    for count in bins:
      self.add_module(f"bins{count}", Conv(inputs, features, 1, bias=True))

  def forward(self, x: Tensor) -> Tensor:
    """Maps [B, C, H, W] to [B, C + bins * features, H, W]."""
    parts = [x]
    for count in self.bins:
      part = getattr(self, f"bins{count}")(F.adaptive_avg_pool2d(x, count))
      parts.append(resize(F.relu(part, inplace=True), *x.shape[2:]))
    return torch.cat(parts, 1)


class PSPNet(nn.Module):
  """The twin of `kdseg.networks.teachers.pspnet.PSPNet`."""

  def __init__(
    self,
    variant: str = "lite2",
    bins: Sequence[int] = (1, 2, 3, 6),
    pyramid_features: int = 64,
    features: int = 64,
    low_features: int = 32,
  ) -> None:
    super().__init__()
    self.encoder = EfficientNetLite(variant, output_stride=16)
    widths = self.encoder.widths
    self.pyramid = PyramidPooling(widths[16], pyramid_features, bins)
    pyramid_width = widths[16] + len(bins) * pyramid_features
    self.project = ConvBlock(pyramid_width, features, 1)
    self.mix16 = ConvBlock(features, features)
    inputs = features
    for stride, width in ((8, features), (4, low_features)):
      self.add_module(f"lateral{stride}", Conv(widths[stride], width, 1))
      self.add_module(f"climb{stride}", Conv(inputs, width, 1))
      self.add_module(f"join{stride}_norm", batch_norm(width))
      self.add_module(f"decode{stride}", ConvBlock(width, width))
      inputs = width
    self.head = Conv(inputs, 1, 1, bias=True)

  def forward(self, image: Tensor) -> Tensor:
    """Maps [B, 3, H, W] in [0, 1] to logits [B, H, W]."""
    encoder_features = self.encoder(image)
    x = self.mix16(self.project(self.pyramid(encoder_features[16])))
    for stride in (8, 4):
      x = upsample(getattr(self, f"climb{stride}")(x))
      x = x + getattr(self, f"lateral{stride}")(encoder_features[stride])
      x = F.relu(getattr(self, f"join{stride}_norm")(x), inplace=True)
      x = getattr(self, f"decode{stride}")(x)
    return upsample(self.head(x), 4).squeeze(1)


class Attention(nn.Module):
  """Multi-head self-attention over [B, N, C]."""

  def __init__(self, width: int, heads: int) -> None:
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.output = nn.Linear(width, width)

  def forward(self, x: Tensor) -> Tensor:
    """Keeps the shape."""
    batch, tokens, width = x.shape
    split = (batch, tokens, 3, self.heads, width // self.heads)
    query, key, value = self.qkv(x).view(split).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return self.output(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
  """Pre-norm transformer block with LayerScale."""

  def __init__(self, width: int, heads: int) -> None:
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attention = Attention(width, heads)
    self.layer_scale1 = nn.Parameter(torch.full((width,), 1e-5))
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.fc1 = nn.Linear(width, 4 * width)
    self.fc2 = nn.Linear(4 * width, width)
    self.layer_scale2 = nn.Parameter(torch.full((width,), 1e-5))

  def forward(self, x: Tensor) -> Tensor:
    """Keeps the shape."""
    x = x + self.layer_scale1 * self.attention(self.norm1(x))
    y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
    return x + self.layer_scale2 * y


class ViT(nn.Module):
  """The twin of `kdseg.networks.encoders.vit.ViT`."""

  def __init__(
    self,
    side: int,
    taps: Sequence[int],
    width: int = 384,
    heads: int = 6,
    patch: int = 14,
  ) -> None:
    super().__init__()
    self.side, self.taps, self.grid = side, tuple(taps), side // patch
    self.patch_embedding = nn.Conv2d(3, width, patch, patch)
    self.class_token = nn.Parameter(torch.zeros(1, 1, width))
    self.class_position = nn.Parameter(torch.zeros(1, 1, width))
    self.position = nn.Parameter(torch.zeros(1, self.grid**2, width))
    for i in range(max(taps)):
      self.add_module(f"block_{i}", Block(width, heads))
    channels = (1, 3, 1, 1)
    for name, values in (
      ("mean", IMAGENET_MEAN),
      ("deviation", IMAGENET_DEVIATION),
    ):
      constant = torch.tensor(values).view(channels)
      self.register_buffer(name, constant, persistent=False)

  def forward(self, image: Tensor) -> list[Tensor]:
    """Maps [B, 3, H, W] in [0, 1] to one [B, width, grid, grid] a tap."""
    x = resize(image, self.side, self.side)
    x = self.patch_embedding((x - self.mean) / self.deviation)
    batch, width = x.shape[:2]
    x = x.flatten(2).transpose(1, 2) + self.position
    first = (self.class_token + self.class_position).expand(batch, 1, width)
    x = torch.cat([first, x], 1)
    grids = []
    for i in range(max(self.taps)):
      x = getattr(self, f"block_{i}")(x)
      if i + 1 in self.taps:
        grid = x[:, 1:].reshape(batch, self.grid, self.grid, width)
        grids.append(grid.permute(0, 3, 1, 2))
    return grids


class ImageBranch(nn.Module):
  """Three strided stages; the first reads squares of 2 x 2 pixels."""

  def __init__(self, widths: Sequence[int] = (16, 32, 48)) -> None:
    super().__init__()
    self.stage_0 = ConvBlock(3, widths[0], 6, 2)
    self.stage_1 = ConvBlock(widths[0], widths[1], 3, 2)
    self.stage_2 = ConvBlock(widths[1], widths[2], 3, 2)

  def forward(self, image: Tensor) -> dict[int, Tensor]:
    """Maps [B, 3, H, W] in [0, 1] to {stride: map}."""
    half = self.stage_0((image - 0.5) / 0.25)
    quarter = self.stage_1(half)
    return {2: half, 4: quarter, 8: self.stage_2(quarter)}


class Decoder(nn.Module):
  """Joins the transformer's grids with an image branch."""

  def __init__(self, inputs: int, widths: Sequence[int]) -> None:
    super().__init__()
    self.branch = ImageBranch()
    self.grids_norm = batch_norm(inputs)
    self.project = ConvBlock(inputs, 128, 1)
    self.fuse_8 = ConvBlock(128 + 48, widths[0], 1)
    self.refine_8 = ConvBlock(widths[0], widths[0])
    self.narrow_8 = ConvBlock(widths[0], widths[1], 1)
    self.fuse_4 = ConvBlock(widths[1] + 32, widths[1])
    self.narrow_4 = ConvBlock(widths[1], widths[2], 1)
    self.fuse_2 = ConvBlock(widths[2] + 16, widths[2])
    self.logits = Conv(widths[2], 1, 1, bias=True)

  def forward(self, image: Tensor, grids: list[Tensor]) -> Tensor:
    """Maps [B, 3, H, W] and the grids to logits [B, H, W]."""
    height, width = image.shape[2:]
    local = self.branch(image)
    x = self.project(self.grids_norm(torch.cat(grids, 1)))
    x = resize(x, height // 8, width // 8)
    x = self.fuse_8(torch.cat([x, local[8]], 1))
    x = x + self.refine_8(x)
    x = upsample(self.narrow_8(x))
    x = self.fuse_4(torch.cat([x, local[4]], 1))
    x = upsample(self.narrow_4(x))
    x = self.fuse_2(torch.cat([x, local[2]], 1))
    return upsample(self.logits(x)).squeeze(1)


class ViTUNet(nn.Module):
  """The twin of `kdseg.networks.teachers.vit_unet.ViTUNet`."""

  def __init__(
    self,
    side: int = 252,
    taps: Sequence[int] = (6, 9, 11),
    widths: Sequence[int] = (96, 48, 24),
  ) -> None:
    super().__init__()
    self.encoder = ViT(side, taps)
    self.decoder = Decoder(384 * len(taps), widths)

  def forward(self, image: Tensor) -> Tensor:
    """Maps [B, 3, H, W] in [0, 1] to logits [B, H, W]."""
    return self.decoder(image, self.encoder(image))


TWINS: Mapping[str, Callable[[], nn.Module]] = {
  "patch_unet_12k": lambda: PatchUNet((8, 12, 16, 18)),
  "patch_unet_50k": lambda: PatchUNet((16, 24, 32, 40)),
  "lite_unet": LiteUNet,
  "enet": ENet,
  "vit_unet": ViTUNet,
  "unetpp": UNetPlusPlus,
  "deeplab": DeepLabV3Plus,
  "pspnet": PSPNet,
}

_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "slope": "weight",
  "mean": "running_mean",
  "var": "running_var",
}


def _weight(kernel: np.ndarray, wanted: torch.Size) -> np.ndarray:
  """Brings a kernel to PyTorch's order of axes."""
  if kernel.ndim == 2:
    return kernel.T
  rows, columns, inputs, features = kernel.shape
  block = wanted[-1] // columns
  if block == 1:
    return kernel.transpose(3, 2, 0, 1)
  # kdseg folds squares of pixels into channels, in the order row, column,
  # colour, and convolves; here it is one kernel of as many times the side.
  colours = inputs // block**2
  squares = kernel.reshape(rows, columns, block, block, colours, features)
  return squares.transpose(5, 4, 0, 2, 1, 3).reshape(
    features, colours, rows * block, columns * block
  )


def _position(table: np.ndarray, tokens: int) -> np.ndarray:
  """Resizes a position table as `vit.ViT` does."""
  grid, width = round(tokens**0.5), table.shape[-1]
  resized = jax.image.resize(
    table, (1, grid, grid, width), "cubic", antialias=False
  )
  return np.asarray(resized).reshape(1, tokens, width)


def to_state_dict(
  network: nn.Module, *collections: Mapping[str, Any]
) -> dict[str, Tensor]:
  """Returns arrays of a kdseg network under the names of its twin.

  Args:
    network: the twin, which tells the shapes that are wanted.
    *collections: nested dicts by module, "params" and "batch_stats"; or
      gradients, which have the tree of the parameters.
  """
  shapes = {name: x.shape for name, x in network.state_dict().items()}
  state: dict[str, np.ndarray] = {}
  for collection in collections:
    for keys, leaf in jax.tree_util.tree_flatten_with_path(collection)[0]:
      *parents, name = (key.key for key in keys)
      state[".".join([*parents, _LEAVES.get(name, name)])] = np.asarray(leaf)
  for name in [name for name in state if ".query." in name]:
    parts = [
      state.pop(name.replace(".query.", f".{part}."))
      for part in ("query", "key", "value")
    ]
    state[name.replace(".query.", ".qkv.")] = np.concatenate(parts, -1)
  for name, x in state.items():
    if name.endswith(".weight") and x.ndim > 1:
      state[name] = _weight(x, shapes[name])
    elif re.search(r"(^|\.)position$", name):
      state[name] = _position(x, shapes[name][1])
  return {name: torch.tensor(x) for name, x in state.items()}


def copy_variables(network: nn.Module, variables: Mapping[str, Any]) -> None:
  """Gives a twin the variables of its kdseg network.

  Args:
    network: the twin; changed in place.
    variables: {"params", "batch_stats"} of the kdseg network.

  Raises:
    RuntimeError: if a name or a shape differs.
  """
  network.load_state_dict(
    to_state_dict(network, variables["params"], variables["batch_stats"])
  )
