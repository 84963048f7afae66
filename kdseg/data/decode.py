"""Decodes images; refuses pixels whose meaning is not certain."""

import io
import threading
import warnings

import numpy as np
from PIL import Image
from PIL import UnidentifiedImageError

from kdseg.data import archives
from kdseg.data.archives import DataError
from kdseg.data.pairs import Pair

# Twice the largest side of any dermatoscope's camera, squared.
MAX_PIXELS = 100_000_000

# The filters of warnings belong to all threads.
_FILTERS = threading.Lock()
_ORIENTATION = 0x0112  # of EXIF; 1, and the 0 of careless writers, is upright
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
IMAGE_MODES = frozenset({"RGB", "L", "P", "RGBA", "LA", "CMYK", "YCbCr"})


def decode_image(content: bytes, where: str) -> np.ndarray:
  """Decodes an image to uint8 RGB [h, w, 3].

  Grey, palette and CMYK pictures become RGB, transparency is dropped, and an
  EXIF orientation is ignored, as masks are drawn on the pixels as stored.

  Raises:
    DataError: if the image is damaged, too large or of an unknown kind.
  """
  image = open_image(content, where)
  if image.mode not in IMAGE_MODES:
    raise DataError(
      f"{where} has pixels of kind {image.mode!r}; convert it to 8-bit RGB."
    )
  return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def decode_pairs_image(pair: Pair) -> np.ndarray:
  """Decodes the image of a pair: uint8 [h, w, 3].

  Raises:
    DataError: as `decode_image`, or if it is turned and must not be.
  """
  content = pair.image.read()
  image = decode_image(content, pair.image.where)
  if pair.upright:
    try:
      with _open_header(content) as header:
        turn = header.getexif().get(_ORIENTATION, 1)
    except Exception as error:
      # Pillow's readers of EXIF raise SyntaxError, struct.error and others.
      raise DataError(
        f"{pair.image.where} has damaged EXIF data ({archives.shown(error)}); "
        "save it again without them."
      ) from error
    if turn not in (0, 1):
      raise DataError(
        f"{pair.image.where} is stored turned (EXIF orientation {turn}), and "
        "its mask may be drawn on the pixels as stored or as shown. Turn the "
        "pixels until they lie like the mask, and remove the tag."
      )
  return image


def check_sizes(pair: Pair, image: np.ndarray, mask: np.ndarray) -> None:
  """Raises `DataError` if a mask has another size than its image."""
  if image.shape[:2] == mask.shape[:2]:
    return
  (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape[:2]
  raise DataError(
    f"{pair.id}: the mask is {mask_width}x{mask_height} but the image is"
    f" {width}x{height} ({pair.mask.where}, {pair.image.where}). They must"
    " come from the same release and be resized, if at all, together."
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
    keep = header.format in ("JPEG", "PNG") and header.mode == "RGB"
  return content if keep else encode_png(image)


def _open_header(content: bytes) -> Image.Image:
  # Pillow warns of what is smaller than our own limit.
  with _FILTERS, warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return Image.open(io.BytesIO(content), formats=_FORMATS)


def open_image(content: bytes, where: str) -> Image.Image:
  """Opens and decodes wholly, so that a cut-off file shows here.

  Args:
    content: of the file.
    where: what to call it in an error.

  Returns:
    The image in the mode that Pillow gives it; EXIF is not applied.

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
      " or none of JPEG, PNG, BMP and TIFF. Replace it by the original file, or"
      " convert it."
    ) from None
  return image
