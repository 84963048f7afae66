"""Random views of a batch, image and mask together, on the device.

Everything here is traced into the jitted function that prepares a batch. The
geometry of an image (flips, quarter turns, a small rotation, a zoom, a shift)
is one matrix, applied once to its pixels and its mask; the colours are a
second matrix and one bend of the tone curve a channel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdseg.runtime import rng as rng_lib

Array = jax.Array

# ITU-R BT.601 luma: what a grey picture of a colour picture shows.
_LUMA = (0.299, 0.587, 0.114)

# Numbers an image draws: 7 for its geometry, 10 for its colours.
_DRAWS = 17

# A factor, because some backends turn a division by 255 into a product: both
# paths, jitted or not, then give the same bits, and 255 gives 1.
_BYTE = 1 / 255


class Colours(NamedTuple):
  """How to recolour each image; see `recolour`.

  Attributes:
    matrix: [B, 3, 3], from an input channel (rows) to an output channel.
    contrast: [B], factor on the distance from the image's mean luma.
    brightness: [B], added to every channel; 1 is white.
    tone: [B, 3] in [-1, 1], the bend of each channel's tone curve.
  """

  matrix: Array
  contrast: Array
  brightness: Array
  tone: Array


class Strengths(NamedTuple):
  """How far `augment` may change an image; 0 or False switches a change off.

  Attributes:
    flips: mirror left-right and top-down, each for every second image.
    quarter_turns: turn by 0, 90, 180 or 270 degrees; square images only.
    rotate: largest rotation, in degrees, either way.
    scale: the zoom lies between 1 / (1 + scale) and 1 + scale.
    translate: largest shift, as a share of the side, along each axis.
    brightness: largest shift of all channels; 1 is from black to white.
    contrast: largest relative change of contrast around the mean luma.
    saturation: largest relative change of the distance from grey.
    hue: largest turn of the colours around the grey axis, in degrees.
    gain: largest relative change of each channel alone (white balance).
    tone: largest bend of a channel's tone curve, x + bend * x * (1 - x). As
      far as 0.2 it is within 0.02 of a gamma between 0.88 and 1.14,
      without the cost of a power.
  """

  flips: bool = True
  quarter_turns: bool = True
  rotate: float = 15.0
  scale: float = 0.15
  translate: float = 0.08
  brightness: float = 0.1
  contrast: float = 0.15
  saturation: float = 0.2
  hue: float = 6.0
  gain: float = 0.06
  tone: float = 0.2

  def without_geometry(self) -> "Strengths":
    """Returns the same colours, with every pixel left in its place."""
    return self._replace(
      flips=False, quarter_turns=False, rotate=0.0, scale=0.0, translate=0.0
    )


DEFAULT = Strengths()
_COLOURS = Strengths._fields.index("brightness")  # and all that follow


def augment(
  rng: Array, image: Array, mask: Array, strengths: Strengths = DEFAULT
) -> tuple[Array, Array]:
  """Draws one random view of each image, its mask moved with it.

  Outside the picture lies its mirror image, in the mask too: black corners
  would look like lesions, and a mirrored lesion without a mask would be learnt
  as skin. With all changes off this only converts, exactly: the bytes over 255,
  the mask to float32.

  Args:
    rng: one key, or one an image [B]. The draws of an image depend on its
      key, or on the one key and its position in the batch; on nothing else.
    image: [B, H, W, 3] uint8, RGB.
    mask: [B, H, W] uint8 in {0, 1}.
    strengths: see there.

  Returns:
    image [B, H, W, 3] float32 in [0, 1], bilinear; mask [B, H, W] float32 in
    {0, 1}, nearest.

  Raises:
    ValueError: on another dtype, on shapes that do not fit, on a strength that
      is negative (or a tone above 1), on quarter turns of images that are not
      square, or on an `rng` of another shape.
  """
  _check(image, mask, strengths)
  batch, height, width = mask.shape
  # All numbers of an image in one draw, each at its own place: switching one
  # change off leaves the others as they are.
  keys = rng_lib.per_image(rng, batch)
  draws = jax.vmap(lambda key: jax.random.uniform(key, (_DRAWS,), minval=-1.0))(
    keys
  )

  if strengths != strengths.without_geometry():
    sides = jnp.array([height, width], jnp.float32)
    shift = draws[:, 5:7] * strengths.translate * sides
    image, mask = warp(image, mask, _affine(draws[:, :5], strengths), shift)
  else:
    image = image.astype(jnp.float32) * _BYTE
    mask = mask.astype(jnp.float32)

  if any(strengths[_COLOURS:]):
    # Without the barrier the mean over an image resamples it a second time.
    image, mask = jax.lax.optimization_barrier((image, mask))
    colours = Colours(
      _colour_matrix(draws[:, 7:12], strengths),
      1 + strengths.contrast * draws[:, 12],
      strengths.brightness * draws[:, 13],
      strengths.tone * draws[:, 14:17],
    )
    image = recolour(image, colours)
  return image, mask


def _check(image: Array, mask: Array, strengths: Strengths) -> None:
  """Raises ValueError on what `augment` does not take."""
  if image.ndim != 4 or image.shape[-1] != 3 or image.dtype != jnp.uint8:
    raise ValueError(
      f"image must be uint8 [B, H, W, 3]: {image.dtype} {image.shape}"
    )
  if mask.shape != image.shape[:3] or mask.dtype != jnp.uint8:
    raise ValueError(
      f"mask must be uint8 {image.shape[:3]}, as the image: "
      f"{mask.dtype} {mask.shape}"
    )
  if strengths.quarter_turns and image.shape[1] != image.shape[2]:
    raise ValueError(
      f"quarter turns need square images, not {image.shape[1:3]}; "
      "pass quarter_turns=False"
    )
  for name, strength in strengths._asdict().items():
    if strength < 0:
      raise ValueError(f"{name} must not be negative: {strength}")
  if strengths.tone > 1:
    raise ValueError(f"tone above 1 folds the curve back: {strengths.tone}")


def _affine(draws: Array, strengths: Strengths) -> Array:
  """Returns the matrices [B, 2, 2] for `warp` from draws [B, 5] in [-1, 1).

  Flips and quarter turns alone are exact: their entries are 0, 1 and -1.
  """
  theta = draws[:, 0] * np.deg2rad(strengths.rotate)
  zoom = jnp.exp(draws[:, 1] * np.log1p(strengths.scale))
  cosine, sine = zoom * jnp.cos(theta), zoom * jnp.sin(theta)
  if strengths.quarter_turns:
    quarter = jnp.floor(2 * draws[:, 2] + 2).astype(jnp.int32)
    across = jnp.array([1.0, 0.0, -1.0, 0.0])[quarter]
    up = jnp.array([0.0, 1.0, 0.0, -1.0])[quarter]
    cosine, sine = across * cosine - up * sine, up * cosine + across * sine
  matrix = jnp.stack(
    [jnp.stack([cosine, -sine], -1), jnp.stack([sine, cosine], -1)], -2
  )
  if strengths.flips:
    matrix *= jnp.where(draws[:, 3:5] < 0, -1.0, 1.0)[:, :, None]
  return matrix


def _mirrored(position: Array, size: int) -> Array:
  """Folds positions outside [-0.5, size - 0.5] back inside, edge repeated."""
  distance = jnp.abs(position + 0.5)
  distance -= 2 * size * jnp.floor(distance / (2 * size))
  return size - jnp.abs(size - distance) - 0.5


def warp(
  image: Array, mask: Array, matrix: Array, shift: Array
) -> tuple[Array, Array]:
  """Resamples image (bilinear) and mask (nearest) through affine maps.

  Args:
    image: [B, H, W, 3] uint8.
    mask: [B, H, W] uint8.
    matrix: [B, 2, 2]; `matrix @ (row, column)`, both counted from the centre
      of the picture in pixels, is where a pixel of the view comes from.
    shift: [B, 2], (rows, columns) in pixels, added to that.

  Returns:
    [B, H, W, 3] float32 in [0, 1] and [B, H, W] float32. The outside is the
    mirrored inside, edge pixels repeated.
  """
  batch, height, width = mask.shape
  rows = (jnp.arange(height) - (height - 1) / 2)[:, None]
  columns = (jnp.arange(width) - (width - 1) / 2)[None, :]
  m, s = matrix[:, :, :, None, None], shift[:, :, None, None]
  row = m[:, 0, 0] * rows + m[:, 0, 1] * columns + s[:, 0] + (height - 1) / 2
  column = m[:, 1, 0] * rows + m[:, 1, 1] * columns + s[:, 1] + (width - 1) / 2
  # Without the barrier XLA computes a position twice and rounds it in two ways,
  # so that a cell may be one pixel off its weights.
  row, column = jax.lax.optimization_barrier(
    (_mirrored(row, height), _mirrored(column, width))
  )
  top, left = jnp.floor(row), jnp.floor(column)
  down, right = row - top, column - left

  pairs = _pack(image, mask)
  cells = (height + 2) * (width + 1)
  index = (
    (jnp.arange(batch) * cells)[:, None, None]
    + (top.astype(jnp.int32) + 1) * (width + 1)
    + left.astype(jnp.int32)
    + 1
  )
  pairs, index = jax.lax.optimization_barrier((pairs, index))
  upper = pairs.at[index].get(mode="promise_in_bounds")
  lower = pairs.at[index + width + 1].get(mode="promise_in_bounds")

  def channel(byte: int) -> Array:
    values = [
      (words[..., side] >> 8 * byte & 255).astype(jnp.float32)
      for words in (upper, lower)
      for side in (0, 1)
    ]
    above = values[0] + right * (values[1] - values[0])
    below = values[2] + right * (values[3] - values[2])
    return (above + down * (below - above)) * _BYTE

  nearest = jnp.where(
    down < 0.5,
    jnp.where(right < 0.5, upper[..., 0], upper[..., 1]),
    jnp.where(right < 0.5, lower[..., 0], lower[..., 1]),
  )
  view = jnp.stack([channel(0), channel(1), channel(2)], -1)
  return view, (nearest >> 24).astype(jnp.float32)


def _pack(image: Array, mask: Array) -> Array:
  """Returns each pixel and its right neighbour as a row, [-1, 2] uint32.

  A pixel's three bytes and its mask are one word, so that a view takes two
  gathers where `map_coordinates` takes sixteen. The edge is repeated once.
  """
  colour = image.astype(jnp.uint32)
  word = colour[..., 0] | colour[..., 1] << 8 | colour[..., 2] << 16
  word |= mask.astype(jnp.uint32) << 24
  word = jnp.pad(word, ((0, 0), (1, 1), (1, 1)), mode="edge")
  return jnp.stack([word[:, :, :-1], word[:, :, 1:]], -1).reshape(-1, 2)


def _colour_matrix(draws: Array, strengths: Strengths) -> Array:
  """Returns [B, 3, 3], from input channels to output, from draws [B, 5]."""
  # Saturation and hue both move a colour around its grey: x = luma + chroma.
  grey = np.outer(_LUMA, np.ones(3)).astype(np.float32)
  chroma = np.eye(3, dtype=np.float32) - grey
  # The turn by theta around (1, 1, 1) (Rodrigues): three fixed matrices, here
  # already behind the projection on the chroma.
  axis = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]) / np.sqrt(3.0)
  whole = np.full((3, 3), 1 / 3)
  theta = draws[:, 0, None, None] * np.deg2rad(strengths.hue)
  turned = (
    chroma @ whole
    + jnp.cos(theta) * (chroma @ (np.eye(3) - whole))
    + jnp.sin(theta) * (chroma @ axis)
  )
  matrix = grey + (1 + strengths.saturation * draws[:, 1, None, None]) * turned
  return matrix * (1 + strengths.gain * draws[:, None, 2:5])


def recolour(image: Array, colours: Colours) -> Array:
  """Recolours `image` [B, H, W, 3] float in [0, 1], staying in [0, 1].

  A linear map of the channels, contrast around the mean luma, brightness,
  clipping, and then each channel's tone curve x + tone * x * (1 - x), which
  keeps black and white.
  """
  mean = jnp.mean(image, axis=(1, 2))
  luma = jnp.sum(mean * jnp.array(_LUMA), axis=-1)
  matrix = colours.matrix * colours.contrast[:, None, None]
  offset = luma * (1 - colours.contrast) + colours.brightness
  red, green, blue = (image[..., i, None] for i in range(3))
  rows = matrix[:, :, None, None, :]
  image = red * rows[:, 0] + green * rows[:, 1] + blue * rows[:, 2]
  image = jnp.clip(image + offset[:, None, None, None], 0.0, 1.0)
  return image * (1 + colours.tone[:, None, None, :] * (1 - image))
