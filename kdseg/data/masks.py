"""Decodes masks; refuses values whose meaning is not certain."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdseg.data import decode
from kdseg.data.archives import DataError
from kdseg.data.pairs import Pair

GREY_MASKS = ("error", "threshold")
LESIONS = ("white", "black", "any")

# Labels up to here are taken for classes, higher ones for grey values.
_MAX_CLASS = 31
_MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "LA"})


class MaskRule(NamedTuple):
  """Which values of a mask are lesion.

  Attributes:
    grey_masks: `"error"` refuses values between black and white, `"threshold"`
      takes those above 128 as lesion.
    lesion: `"white"`; `"black"`, if masks are inverted; `"any"` class above 0;
      or the number of one class, as `"2"`.
    data_set: names the data set in the flags of messages.
  """

  grey_masks: str = "error"
  lesion: str = "white"
  data_set: str = "folder"

  def check(self) -> None:
    """Raises ValueError on a value that an option does not have."""
    if self.grey_masks not in GREY_MASKS:
      raise ValueError(
        f"grey_masks is {self.grey_masks!r}, not one of {GREY_MASKS}."
      )
    if not isinstance(self.lesion, str):
      raise ValueError(f'lesion is {self.lesion!r}; write "{self.lesion}".')
    is_class = self.lesion.isascii() and self.lesion.isdigit()
    if self.lesion not in LESIONS and not (
      is_class and 0 < int(self.lesion) < 256
    ):
      raise ValueError(
        f"lesion is {self.lesion!r}, neither one of {LESIONS} nor the number"
        " of a class, 1 to 255."
      )

  def flags(self, key: str, value: str) -> str:
    """Returns the flags that set one option, of a run and of `kdseg data`."""
    return (
      f"--config.data.options.{self.data_set}.{key}={value} (`kdseg data`:"
      f" --option {key}={value})"
    )


def decode_mask(
  content: bytes,
  where: str,
  rule: MaskRule = MaskRule(),  # noqa: B008  (an immutable tuple)
) -> np.ndarray:
  """Decodes a mask to bool [h, w].

  A clean mask has one or two values: 0 and 255 (or 0 and 1, then 1 is lesion).
  A few small values are classes, of which `rule.lesion` picks. Others come from
  resizing with interpolation or from lossy compression, which has moved the
  border; they are refused unless `rule.grey_masks` is `"threshold"`: above 128
  is lesion, the official rule.

  Args:
    content: the encoded mask; 1-bit, 8-bit, palette or 24-bit without colour.
    where: names the file in errors.
    rule: which values are lesion.

  Raises:
    DataError: if the mask is damaged, too large, coloured, grey, or one of
      classes of which `rule` picks none.
  """
  rule.check()
  values = mask_values(content, where)
  counts = np.bincount(values.ravel(), minlength=256)
  found = [int(value) for value in np.flatnonzero(counts)]
  highest = found[-1]
  if rule.lesion not in ("white", "black"):
    return _pick_class(values, counts, where, rule)
  # Tools mark what they leave out with 255.
  classes = [value for value in found if 0 < value < 255]
  if (1 < highest <= _MAX_CLASS) or 1 < len(classes) <= classes[
    -1
  ] <= _MAX_CLASS:
    raise DataError(
      f"{where} is a mask of classes: its values are"
      f" {', '.join(map(str, found))}. To take every class above 0 as lesion,"
      f" pass {rule.flags('lesion', 'any')}; to take one class, pass"
      f" {rule.flags('lesion', str(classes[-1]))}, with its number."
    )
  if highest > 1:
    _check_grey(counts, where, rule)
  lesion = values == 1 if highest == 1 else values > 128
  return ~lesion if rule.lesion == "black" else lesion


def _pick_class(
  values: np.ndarray, counts: np.ndarray, where: str, rule: MaskRule
) -> np.ndarray:
  """Returns which pixels are of the class, or classes, that are lesion."""
  known = counts.copy()
  known[: _MAX_CLASS + 1] = 0
  known[255] = 0
  if rule.lesion != "any":
    known[int(rule.lesion)] = 0
  if known.any():
    raise DataError(
      f"{where} has the value {int(np.flatnonzero(known)[0])}, which is no"
      f" class (0 to {_MAX_CLASS}, or 255), so that lesion={rule.lesion} does"
      " not fit it. Use the original mask, saved without loss."
    )
  return values > 0 if rule.lesion == "any" else values == int(rule.lesion)


def _check_grey(counts: np.ndarray, where: str, rule: MaskRule) -> None:
  """Raises DataError on values between black and white, unless asked for."""
  between = counts[1:255]
  if rule.grey_masks == "error" and between.any():
    raise DataError(
      f"{where} is a mask with grey values: {between.sum()} of {counts.sum()}"
      " pixels are neither 0 nor 255 (the lowest is"
      f" {1 + int(np.flatnonzero(between)[0])}). Use the original mask; or, to"
      " count everything above 128 as lesion, pass"
      f" {rule.flags('grey_masks', 'threshold')}."
    )


def mask_values(content: bytes, where: str) -> np.ndarray:
  """The values of a mask, uint8 [h, w], before any rule.

  Those of a palette with colours are its indices, if there are few and the
  first is black, as tools store classes.

  Raises:
    DataError: if the mask is damaged, too large, or coloured, or if it has
      several pages or frames.
  """
  image = decode.open_image(content, where)
  if (frames := decode.count_frames(content, where)) > 1:
    raise DataError(
      f"{where} has {frames} pages or frames, and a mask has one. Save the one"
      " that is the mask by itself."
    )
  if image.mode not in _MODES:
    raise DataError(
      f"{where} has pixels of kind {image.mode!r}; a mask has 1, 8 or 24 bits;"
      " convert it."
    )
  if image.mode in ("1", "L"):
    return np.array(image.convert("L"))
  if image.has_transparency_data:
    alpha = np.array(image.convert("RGBA"))[..., 3]
    if (alpha != 255).any():
      raise DataError(
        f"{where} is partly transparent; a mask is black and white. Flatten it "
        "onto black, with the lesion white."
      )
  channels = np.array(image.convert("RGB"))
  if (channels == channels[..., :1]).all():
    return channels[..., 0]
  if image.mode == "P":
    indices = np.array(image)
    is_first_black = not any((image.getpalette() or [1])[:3])
    if is_first_black and indices.max() <= _MAX_CLASS:
      return indices
  raise DataError(
    f"{where} has colours; a mask is black and white. Is it the image?"
  )


def decode_pair(
  pair: Pair,
  rule: MaskRule = MaskRule(),  # noqa: B008  (an immutable tuple)
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes image and mask: uint8 [h, w, 3] and bool [h, w].

  Raises:
    DataError: as `decode.decode_image`, `decode_mask` and `decode.check_fit`.
  """
  image = decode.decode_image(pair.image.read(), pair.image.where)
  mask = decode_mask(pair.mask.read(), pair.mask.where, rule)
  decode.check_fit(pair, image, mask)
  return image, mask


def frame_share(mask: np.ndarray) -> float:
  """Returns the share of a mask's outermost rows and columns that is lesion."""
  inner = mask[1:-1, 1:-1]
  return float((mask.sum() - inner.sum()) / max(1, mask.size - inner.size))


def warn_of_inverted(
  shares: Sequence[float], rule: MaskRule
) -> tuple[str, ...]:
  """Returns a warning if nearly all masks have lesion along their frame.

  Args:
    shares: the `frame_share` of each mask.
    rule: names the data set.
  """
  along = sum(share > 0.5 for share in shares)
  if len(shares) < 3 or along < 0.8 * len(shares):
    return ()
  other = "white" if rule.lesion == "black" else "black"
  return (
    f"{rule.data_set}: {along} of {len(shares)} masks are lesion along most of"
    " the frame, so they may be inverted. If they are, pass"
    f" {rule.flags('lesion', other)}",
  )
