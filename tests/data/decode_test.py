import io
import struct
import zlib

import numpy as np
from PIL import Image
import pytest
import tiny_archives as tiny

from kdseg.data import archives
from kdseg.data import decode
from kdseg.data import masks
from kdseg.data import pairs
from kdseg.data.archives import DataError

MASK = tiny.lesion(0)


def _grey(*values: int) -> bytes:
  return tiny.encode(np.array([values], np.uint8), "PNG")


def test_lesion_is_above_128():
  mask = masks.decode_mask(
    _grey(0, 127, 128, 129, 255), "here", masks.MaskRule("threshold")
  )
  np.testing.assert_array_equal(mask, [[False, False, False, True, True]])


def test_a_mask_of_0_and_1_has_its_lesion_at_1():
  np.testing.assert_array_equal(
    masks.decode_mask(_grey(0, 1, 1), "here"), [[False, True, True]]
  )


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_of_one_value_is_all_or_nothing(value):
  mask = masks.decode_mask(_grey(value, value), "here")
  assert mask.tolist() == [[value == 255] * 2]


def test_masks_of_1_8_and_24_bits_and_palettes_are_the_same():
  palette = Image.fromarray(MASK).convert("P")
  buffer = io.BytesIO()
  palette.save(buffer, format="PNG")
  grey = MASK.astype(np.uint8) * 255
  for content in (
    tiny.encode(MASK, "BMP"),
    tiny.encode(grey, "BMP"),
    tiny.encode(np.repeat(grey[..., None], 3, -1), "BMP"),
    tiny.encode(grey, "TIFF"),
    buffer.getvalue(),
  ):
    np.testing.assert_array_equal(masks.decode_mask(content, "here"), MASK)


@pytest.mark.parametrize("values", [(0, 254, 255), (0, 77), (1, 255)])
def test_grey_values_are_refused_with_the_way_out(values):
  with pytest.raises(DataError, match=r"here is a mask with grey.*=threshold"):
    masks.decode_mask(_grey(*values), "here")


def test_a_coloured_mask_is_refused():
  content = tiny.encode(tiny.picture(0), "PNG")
  with pytest.raises(DataError, match="here has colours"):
    masks.decode_mask(content, "here", masks.MaskRule("threshold"))


def test_a_16_bit_mask_is_refused():
  content = tiny.encode(np.full((4, 4), 65535, np.uint16), "PNG")
  with pytest.raises(DataError, match="here has pixels of kind 'I;16'"):
    masks.decode_mask(content, "here")


def encode(image):
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return buffer.getvalue()


def test_a_transparent_mask_is_refused_and_an_opaque_one_read():
  alpha = Image.new("L", (4, 4), 255)
  lesion = Image.fromarray(np.eye(4, dtype=np.uint8) * 255)
  for mode, channels in (("RGBA", [lesion] * 3), ("LA", [lesion])):
    opaque = encode(Image.merge(mode, [*channels, alpha]))
    np.testing.assert_array_equal(masks.decode_mask(opaque, "m"), np.eye(4))
    clear = encode(Image.merge(mode, [*channels, lesion]))
    with pytest.raises(DataError, match="m is partly transparent"):
      masks.decode_mask(clear, "m")
  palette = lesion.convert("P")
  palette.info["transparency"] = 0
  with pytest.raises(DataError, match="m is partly transparent"):
    masks.decode_mask(encode(palette), "m")


def test_an_unknown_rule_for_grey_masks_is_refused():
  with pytest.raises(ValueError, match="grey_masks is 'maybe'"):
    masks.decode_mask(_grey(0), "here", masks.MaskRule("maybe"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_an_image_cut_anywhere_is_refused(kind):
  whole = tiny.encode(tiny.picture(0, 64, 64), kind)
  decode.decode_image(whole, "here")
  for length in (0, 4, 40, len(whole) // 2, len(whole) - 30):
    with pytest.raises(DataError, match="here cannot be decoded"):
      decode.decode_image(whole[:length], "here")


def test_what_is_no_image_is_told_by_its_name_alone():
  with pytest.raises(DataError, match="of no known format") as error:
    decode.decode_image(b"<html></html>", "here")
  assert "BytesIO" not in str(error.value)


def _png_that_claims(width: int, height: int) -> bytes:
  def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return (
      struct.pack(">I", len(content))
      + kind
      + content
      + struct.pack(">I", checksum)
    )

  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(b"\0"))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_a_picture_that_claims_too_many_pixels_is_never_decoded(side):
  with pytest.raises(DataError, match=r"here claims .*Replace it"):
    decode.decode_image(_png_that_claims(side, side), "here")


def test_a_large_honest_picture_brings_no_warning():
  # Pillow warns from 89 megapixels on; the limit here is 100.
  with pytest.raises(DataError, match="cannot be decoded"):
    decode.decode_image(_png_that_claims(9_900, 9_900), "here")


def test_grey_and_palette_images_become_rgb():
  grey = np.array([[0, 100, 255]], np.uint8)
  rgb = np.repeat(grey[..., None], 3, -1)
  np.testing.assert_array_equal(
    decode.decode_image(tiny.encode(grey, "PNG"), "here"), rgb
  )


def _file(name: str, content: bytes) -> archives.File:
  where = f"A.zip: {name}"
  return archives.File(name, "A.zip", where, len(content), lambda: content)


def test_a_mask_of_another_size_is_refused_by_id_and_both_sizes():
  pair = pairs.Pair(
    "ISIC_1",
    _file("image.png", tiny.encode(tiny.picture(0, 8, 12), "PNG")),
    _file("mask.png", tiny.mask_bytes(tiny.lesion(0, 9, 12))),
  )
  with pytest.raises(DataError, match=r"ISIC_1: the mask is 12x9 .* 12x8"):
    masks.decode_pair(pair)


def test_a_jpeg_keeps_its_bytes_and_a_bitmap_its_pixels():
  image = tiny.picture(0)
  jpeg = tiny.encode(image, "JPEG")
  assert decode.keep_or_encode(jpeg, decode.decode_image(jpeg, "")) is jpeg
  kept = decode.keep_or_encode(tiny.encode(image, "BMP"), image)
  assert kept.startswith(b"\x89PNG")
  np.testing.assert_array_equal(decode.decode_image(kept, ""), image)


def test_a_grey_jpeg_is_stored_as_rgb():
  grey = tiny.encode(np.full((8, 8), 100, np.uint8), "JPEG")
  kept = decode.keep_or_encode(grey, decode.decode_image(grey, ""))
  with Image.open(io.BytesIO(kept)) as image:
    assert image.mode == "RGB"


def test_the_header_of_a_large_honest_picture_is_read_without_a_warning():
  image = tiny.picture(0)
  kept = decode.keep_or_encode(_png_that_claims(9_900, 9_900), image)
  np.testing.assert_array_equal(decode.decode_image(kept, ""), image)
