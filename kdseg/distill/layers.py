"""Layers that distillation trains beside the student; the export drops them.

The student's features are aligned with the teacher's (grid and channels), and
small generators restore what `losses.masking` hides; the receptive tokens of
`losses.attention` say which cells to look at. All of it lies in one subtree of
the parameters, {tap: {"align": ..., "generator_0": ...}}, and none of it is
part of the exported student.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.networks import layers

Array = jax.Array

GENERATORS = ("c3rc3", "c3rc3_norm", "dwconv", "1x1", "identity")


def target_channels(
  channels: int, *, widest: int = 256, bottleneck: int = 128
) -> int:
  """Returns how many channels of a teacher's tap are compared.

  A generator costs 18 channels^2 multiplications a cell, so a tap with more
  than `widest` channels is projected to `bottleneck`; see `project`.
  """
  return channels if channels <= widest else bottleneck


def project(teacher_feat: Array, channels: int, *, seed: int = 0) -> Array:
  """Projects a wide tap to `channels` along fixed orthonormal directions.

  The directions are random, so that they favour neither the teacher nor the
  student, and orthonormal, so that distances are kept up to a factor and no
  channel counts twice. A tap that already has `channels` is returned unchanged.

  Args:
    teacher_feat: [B, h, w, C].
    channels: at most C.
    seed: of the directions.

  Returns:
    [B, h, w, channels], in the type of `teacher_feat`.

  Raises:
    ValueError: if there are fewer than `channels` channels.
  """
  have = teacher_feat.shape[-1]
  if have == channels:
    return teacher_feat
  if have < channels:
    raise ValueError(f"cannot project {have} channels to {channels}")
  normal = np.random.default_rng(seed).standard_normal((have, channels))
  directions, triangle = np.linalg.qr(normal)
  # QR leaves the sign of each column to the implementation.
  directions = directions * np.sign(np.diag(triangle))
  return jnp.einsum(
    "bhwc,cd->bhwd",
    teacher_feat,
    jnp.asarray(directions, teacher_feat.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )


def matched_width(channels: int, heads: int) -> int:
  """Returns the width of one "c3rc3" generator with as many weights as `heads`.

  A generator of width w has w (18 C + 1) + C parameters; `heads` of width C
  have heads (18 C^2 + 2 C). For the control "a cascade, or just capacity".
  """
  together = heads * (18 * channels**2 + 2 * channels)
  return round((together - channels) / (18 * channels + 1))


class Align(nn.Module):
  """Gives features the teacher's grid and channels.

  Bilinear resizing if the grids differ, then a 1x1 convolution with bias if
  the numbers of channels do; nothing, and no parameter, if neither does.
  """

  channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array, height: int, width: int) -> Array:
    """Maps [B, h, w, c] to [B, height, width, channels]."""
    x = layers.resize_bilinear(x.astype(self.dtype), height, width)
    if x.shape[-1] == self.channels:
      return x
    return layers.Conv(
      self.channels, 1, use_bias=True, dtype=self.dtype, name="conv"
    )(x)


class Generator(nn.Module):
  """Restores hidden features from the visible ones; keeps the shape.

  Attributes:
    kind: "c3rc3", 3x3 convolution, ReLU, 3x3 convolution, with biases and no
      norm (MGD); "c3rc3_norm", a LayerNorm over the channels before the ReLU
      (not a BatchNorm: a distiller has no state, and an image no neighbours);
      "dwconv", each 3x3 convolution as a depthwise and a 1x1 one; "1x1", 1x1
      convolutions, which see no neighbour; "identity", no generator.
    width: channels between the two; 0 for as many as come in.
    dtype: of the computation.
  """

  kind: str = "c3rc3"
  width: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps [B, h, w, C] to the same shape."""
    if self.kind not in GENERATORS:
      raise ValueError(
        f"generator must be one of {', '.join(GENERATORS)}: {self.kind!r}"
      )
    if self.kind == "identity":
      return x
    channels = x.shape[-1]
    x = self._conv(x, self.width or channels, "0")
    if self.kind == "c3rc3_norm":
      x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
    return self._conv(nn.relu(x), channels, "1")

  def _conv(self, x: Array, features: int, index: str) -> Array:
    size = 3 if self.kind.startswith("c3rc3") else 1
    if self.kind == "dwconv":
      x = layers.DepthwiseConv(dtype=self.dtype, name=f"depthwise_{index}")(x)
    return layers.Conv(
      features, size, use_bias=True, dtype=self.dtype, name=f"conv_{index}"
    )(x)


class TapHeads(nn.Module):
  """The parameters of one tap: alignment, generators, carry, tokens, probe.

  `carry` takes the output of the deeper tap's head to this tap. The tokens are
  vectors of the teacher's channels; the probe predicts the lesion from the
  teacher's features under their masks.
  """

  channels: int
  generators: int
  kind: str
  width: int
  carries: bool
  token_count: int
  dtype: Any

  def setup(self) -> None:
    self.align = Align(self.channels, self.dtype)
    self.generator = [
      Generator(self.kind, self.width, self.dtype)
      for _ in range(self.generators)
    ]
    if self.carries:
      self.carry = Align(self.channels, self.dtype)
    if self.token_count:
      self.tokens = self.param(
        "tokens",
        nn.initializers.normal(self.channels**-0.5),
        (self.token_count, self.channels),
      )
      self.probe = nn.Dense(1, dtype=self.dtype)


class Distiller(nn.Module):
  """Alignments, generators and tokens of all taps.

  Attributes:
    taps: {tap: channels compared}; see `target_channels`. In a "multiscale"
      topology the deepest tap comes first.
    heads: generators a tap; a "multiscale" topology has one, whatever this
      says.
    generator: kind of generator, see `Generator`.
    width: of the generators; 0 for the tap's channels.
    share_generators: all heads of a tap use its "generator_0".
    topology: "cascade", "parallel" or "multiscale"; the first two have the
      same parameters.
    tokens: receptive tokens a tap, with one probe; 0 for neither.
    dtype: of the computation.
  """

  taps: Mapping[str, int]
  heads: int = 1
  generator: str = "c3rc3"
  width: int = 0
  share_generators: bool = False
  topology: str = "cascade"
  tokens: int = 0
  dtype: Any = jnp.float32

  def setup(self) -> None:
    if self.topology not in ("cascade", "parallel", "multiscale"):
      raise ValueError(
        "topology must be one of cascade, parallel, multiscale: "
        f"{self.topology!r}"
      )
    multiscale = self.topology == "multiscale"
    one = multiscale or self.share_generators
    for index, (tap, channels) in enumerate(self.taps.items()):
      heads = TapHeads(
        channels,
        generators=1 if one else self.heads,
        kind=self.generator,
        width=self.width,
        carries=multiscale and index > 0,
        token_count=self.tokens,
        dtype=self.dtype,
      )
      # Flax names a submodule by the attribute it is bound to, so this makes
      # the tap's name the key of its parameters.
      setattr(self, tap, heads)

  def _tap(self, tap: str) -> TapHeads:
    if tap not in self.taps:
      raise ValueError(f"tap must be one of {', '.join(self.taps)}: {tap!r}")
    return getattr(self, tap)

  def align(self, tap: str, feature: Array, height: int, width: int) -> Array:
    """Maps the student's [B, h, w, c] to [B, height, width, channels]."""
    return self._tap(tap).align(feature, height, width)

  def generate(self, tap: str, head: int, x: Array) -> Array:
    """Runs the generator of `head` (0 first) on x [B, h, w, channels]."""
    generators = self._tap(tap).generator
    if not 0 <= head < self.heads:
      raise ValueError(f"there is no head {head}, only 0 to {self.heads - 1}")
    return generators[0 if len(generators) == 1 else head](x)

  def carry(self, tap: str, x: Array, height: int, width: int) -> Array:
    """Maps the output of the deeper tap's head to the shape of `tap`.

    Exists in a "multiscale" topology alone, for all taps but the first.
    """
    return self._tap(tap).carry(x, height, width)

  def receptive_tokens(self, tap: str) -> Array:
    """Returns the tokens of `tap`, [tokens, channels]."""
    return self._tap(tap).tokens

  def probe(self, tap: str, x: Array) -> Array:
    """Maps the teacher's masked features [..., channels] to logits [..., 1]."""
    return self._tap(tap).probe(x)

  def __call__(
    self, features: Mapping[str, Array], grids: Mapping[str, tuple[int, int]]
  ) -> dict[str, Array]:
    """Runs every layer once, to initialise its parameters.

    Args:
      features: {tap: the student's [B, h, w, c]}.
      grids: {tap: (height, width)} of the teacher.

    Returns:
      {tap: [B, height, width, channels]}, what the last head made.
    """
    restored: dict[str, Array] = {}
    deeper: Array | None = None
    for tap in self.taps:
      x = self.align(tap, features[tap], *grids[tap])
      if self.topology == "multiscale" and deeper is not None:
        x = x + self.carry(tap, deeper, *grids[tap])
      for head in range(len(self._tap(tap).generator)):
        x = self.generate(tap, head, x)
      if self.tokens:
        self.probe(tap, x)
      restored[tap] = deeper = x
    return restored
