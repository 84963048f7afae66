"""Reads pictures of every kind the same way, here and in `predict`.

One rule of orientation holds for pictures and masks alike, wherever they are
read: each is turned as its own tag says (EXIF of JPEG, PNG and WebP, tag 274 of
TIFF), and sizes are compared after it. What is stored afterwards has no tag.
"""

import io
import threading
import warnings

import numpy as np
from PIL import Image
from PIL import ImageOps
from PIL import UnidentifiedImageError

from kdseg.data import archives
from kdseg.data.archives import DataError
from kdseg.data.pairs import Pair

SUFFIXES = (
  *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff"),
  ".webp",
)
# Twice the largest side of any dermatoscope's camera, squared.
MAX_PIXELS = 100_000_000

# The filters of warnings belong to all threads.
_FILTERS = threading.Lock()
_ORIENTATION = 0x0112  # of EXIF and TIFF
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
_MODES = frozenset({"1", "RGB", "L", "P", "RGBA", "LA", "CMYK", "YCbCr"})


def decode_image(content: bytes, where: str) -> np.ndarray:
  """Decodes an image to uint8 RGB [h, w, 3].

  Turned as its own tag says; of several frames the first is read.

  Raises:
    DataError: if the image is damaged, too large or of an unknown kind.
  """
  return to_rgb(open_image(content, where), where)


def to_rgb(image: Image.Image, where: str) -> np.ndarray:
  """Returns a picture's pixels as uint8 RGB [h, w, 3].

  Grey, palette, CMYK and 16-bit pictures become 8-bit RGB; transparency is
  dropped.

  Raises:
    DataError: if its pixels are of an unknown kind.
  """
  if image.mode.startswith("I"):
    return _from_16_bit(image, where)
  if image.mode not in _MODES:
    raise DataError(
      f"{where} has pixels of kind {image.mode!r}; convert it to 8-bit RGB."
    )
  return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_16_bit(image: Image.Image, where: str) -> np.ndarray:
  """Returns a 16-bit grey picture as uint8 RGB [h, w, 3]."""
  grey = np.asarray(image).astype(np.int64)
  # An image of 32 bits may hold 8-bit values, but does not say so.
  narrow = image.mode == "I" and grey.max() <= 0xFF
  if grey.min() < 0 or grey.max() > 0xFFFF or narrow:
    raise DataError(
      f"{where} has pixels from {grey.min()} to {grey.max()} in a picture of "
      f"kind {image.mode!r}, not 16-bit ones; convert it to 8-bit RGB."
    )
  # 65535 / 255 = 257, without a remainder.
  grey = np.round(grey / 257).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=2)


def orientation(content: bytes, where: str) -> int:
  """How a file says that it is to be turned: 1 (upright) to 8, as in EXIF.

  Raises:
    DataError: if its EXIF data are damaged.
  """
  try:
    with _open_header(content) as header:
      turn = header.getexif().get(_ORIENTATION, 1)
  except Exception as error:
    # Pillow's readers of EXIF raise SyntaxError, struct.error and others.
    raise _damaged_exif(where, error) from error
  return turn if turn in range(1, 9) else 1


def check_fit(pair: Pair, image: np.ndarray, mask: np.ndarray) -> None:
  """Refuses a mask of another size than its image, or perhaps turned otherwise.

  Args:
    pair: the files of both.
    image: [h, w, 3], turned as its tag says.
    mask: [h, w], turned as its tag says.

  Raises:
    DataError: if the sizes differ; or if just one of the two has a tag of
      orientation and the sizes would fit without it, too.
  """
  (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape[:2]
  turns = [orientation(f.read(), f.where) for f in (pair.image, pair.mask)]
  tagged = ("image", "mask")[turns[0] == 1]
  turn = max(turns)
  if image.shape[:2] != mask.shape[:2]:
    hint = (
      f" The {tagged} was turned as its orientation tag says ({turn})."
      if turn > 1
      else ""
    )
    raise DataError(
      f"{pair.id}: the mask is {mask_width}x{mask_height} but the image is"
      f" {width}x{height} ({pair.mask.where}, {pair.image.where}). They must"
      f" come from the same release and be resized, if at all, together.{hint}"
    )
  # 5 to 8 swap height and width.
  if min(turns) == 1 < turn and (turn < 5 or height == width):
    file = pair.image if tagged == "image" else pair.mask
    raise DataError(
      f"{pair.id}: only the {tagged} has an orientation tag ({turn},"
      f" {file.where}), and the sizes fit with and without it, so that it is"
      " not known how the mask lies. Turn the pixels until they lie like those"
      " of the other, and remove the tag."
    )


def encode_png(array: np.ndarray) -> bytes:
  """Encodes uint8 [h, w] or [h, w, 3], without loss."""
  buffer = io.BytesIO()
  # Photographs hardly shrink further at the higher levels, which take 5x.
  Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
  return buffer.getvalue()


def keep_or_encode(content: bytes, image: np.ndarray) -> bytes:
  """The encoded image as it came, if any reader decodes it to RGB; else PNG."""
  with _open_header(content) as header:
    keep = (
      header.format in ("JPEG", "PNG")
      and header.mode == "RGB"
      and header.getexif().get(_ORIENTATION, 1) not in range(2, 9)
    )
  return content if keep else encode_png(image)


def _open_header(content: bytes) -> Image.Image:
  # Pillow warns of what is smaller than our own limit.
  with _FILTERS, warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def count_frames(content: bytes, where: str) -> int:
  """Returns how many frames or pages an image has.

  Raises:
    DataError: if the frames behind the first are damaged.
  """
  try:
    with _open_header(content) as header:
      return getattr(header, "n_frames", 1)
  except Exception as error:
    # Pillow's decoders raise OSError, SyntaxError, struct.error and others.
    raise DataError(
      f"{where} has several pages or frames, of which some are damaged"
      f" ({archives.shown(error)}); save the first by itself."
    ) from error


def open_image(content: bytes, where: str) -> Image.Image:
  """Opens and decodes wholly, so that a cut-off file shows here.

  Args:
    content: of the file.
    where: what to call it in an error.

  Returns:
    The image in the mode that Pillow gives it, turned as its own tag says.

  Raises:
    DataError: if it is empty, damaged, too large or of an unknown kind.
  """
  too_many = (
    f"more pixels than the limit of {MAX_PIXELS}; refusing to decode it."
    " Replace it by the original file, or by a smaller copy."
  )
  try:
    image = _open_header(content)
    width, height = image.size
    if width * height > MAX_PIXELS:
      raise DataError(f"{where} claims {width}x{height} pixels, {too_many}")
    image.load()
  except DataError:
    raise
  except Image.DecompressionBombError:
    # Pillow's own limit is higher, but comes before width and height.
    raise DataError(f"{where} claims {too_many}") from None
  except Exception as error:
    # Pillow's decoders raise OSError, SyntaxError, struct.error and others.
    # Its text for an unknown format names an object in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "of no known format" if unknown else archives.shown(error)
    raise DataError(
      f"{where} cannot be decoded ({reason}): it is empty, cut off, no image,"
      " or none of JPEG, PNG, BMP, TIFF, WebP and GIF. Replace it by the"
      " original file, or convert it."
    ) from None
  try:
    # Does nothing to a TIFF, which Pillow has turned while loading it.
    ImageOps.exif_transpose(image, in_place=True)
  except Exception as error:
    # Pillow's readers of EXIF raise SyntaxError, struct.error and others.
    raise _damaged_exif(where, error) from error
  return image


def _damaged_exif(where: str, error: Exception) -> DataError:
  return DataError(
    f"{where} has damaged EXIF data ({archives.shown(error)}), so that it is "
    "not known which way up it is; save it again without them."
  )
