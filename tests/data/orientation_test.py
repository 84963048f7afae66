"""The rule of orientation: each file is turned by its own tag, once."""

import numpy as np
from PIL import Image
from PIL import ImageOps
import pytest
import tiny_archives as tiny

from kdseg.data import decode
from kdseg.data import loading
from kdseg.data import masks
from kdseg.data import prepare
from kdseg.data.archives import DataError
from kdseg.deploy import pictures

# What a viewer shows of the pixels of a file with each tag.
SHOWN = {
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.swapaxes(0, 1),
  6: lambda a: np.rot90(a, -1),
  7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
  8: lambda a: np.rot90(a),
}
LOSSLESS = {".png": {}, ".tif": {}, ".webp": {"lossless": True}}

BLOCKS = np.kron(
  np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3), np.ones((16, 16))
).astype(np.uint8)


def write(path, array, turn=1, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  exif = Image.Exif()
  if turn != 1:
    exif[0x0112] = turn
  Image.fromarray(array).save(path, exif=exif, **options)
  return path


@pytest.mark.parametrize("suffix", [".jpg", *LOSSLESS])
@pytest.mark.parametrize("turn", SHOWN)
def test_a_picture_and_a_mask_are_read_as_they_are_shown(
  tmp_path, suffix, turn
):
  path = tmp_path / f"a{suffix}"
  write(path, np.stack([BLOCKS] * 3, -1), turn, **LOSSLESS.get(suffix, {}))
  for image in (
    decode.decode_image(path.read_bytes(), ""),
    pictures.read(path),
  ):
    found = image[..., 0].astype(int)
    np.testing.assert_allclose(found, SHOWN[turn](BLOCKS), atol=3)
  if suffix in LOSSLESS:
    mask = (BLOCKS > 100).astype(np.uint8) * 255
    write(path, mask, turn, **LOSSLESS[suffix])
    found = masks.decode_mask(path.read_bytes(), "")
    np.testing.assert_array_equal(found, SHOWN[turn](BLOCKS > 100))


def load(tmp_path):
  return loading.load(
    "folder", "train", size=32, data_dir=tmp_path / "data",
    manual_dir=tmp_path / "own",
  )  # fmt: skip


@pytest.mark.parametrize("turns", [(6, 6), (6, 8), (3, 3), (6, 1), (1, 8)])
@pytest.mark.parametrize("suffix", LOSSLESS)
def test_a_pair_is_stored_as_shown_without_a_tag(tmp_path, turns, suffix):
  # Stored so that picture and mask are shown alike, whatever their tags.
  stored = {1: SHOWN[1], 3: SHOWN[3], 6: SHOWN[8], 8: SHOWN[6]}
  root = tmp_path / "own" / "train"
  picture, lesion = tiny.picture(0), tiny.lesion(0).astype(np.uint8) * 255
  kinds = (("images", picture), ("masks", lesion))
  for turn, (kind, array) in zip(turns, kinds, strict=True):
    path = root / kind / f"a{suffix}"
    write(path, stored[turn](array), turn, **LOSSLESS[suffix])
  arrays = load(tmp_path)
  np.testing.assert_array_equal(arrays.native_mask(0), tiny.lesion(0))
  builder = prepare.prepare(
    "folder", data_dir=tmp_path / "data", manual_dir=tmp_path / "own"
  )
  [record] = prepare.read_records(builder, "train")
  np.testing.assert_array_equal(decode.decode_image(record.image, ""), picture)
  assert decode.orientation(record.image, "") == 1


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("tagged", ["image", "mask"])
@pytest.mark.parametrize("side", [8, 12])
def test_one_tag_alone_is_refused_where_the_sizes_do_not_decide(
  tmp_path, turn, tagged, side
):
  root = tmp_path / "own" / "train"
  turns = (turn, 1) if tagged == "image" else (1, turn)
  write(root / "images" / "a.png", tiny.picture(0, 8, side), turns[0])
  mask = tiny.lesion(0, 8, side).astype(np.uint8) * 255
  write(root / "masks" / "a.png", mask, turns[1])
  decided = turn >= 5 and side != 8
  message = (
    rf"a: the mask is .* The {tagged} was turned as its orientation tag says"
    if decided
    else rf"a: only the {tagged} has an orientation tag \({turn}, .*{tagged}s/a"
  )
  with pytest.raises(DataError, match=message):
    load(tmp_path)


def test_the_official_archives_follow_the_rule(tmp_path, isic):
  path = isic.path("test_image", "ISIC_0000003")
  write(tmp_path / "a.jpg", tiny.picture(3), 3)
  isic.files["test_image"][path] = (tmp_path / "a.jpg").read_bytes()
  with pytest.raises(DataError, match="ISIC_0000003: only the image has an or"):
    prepare.prepare(
      "isic2016",
      data_dir=tmp_path / "data",
      manual_dir=isic.write(tmp_path / "manual"),
    )


def test_the_table_of_turns_is_that_of_pillow(tmp_path):
  for turn, show in SHOWN.items():
    with Image.open(write(tmp_path / "a.png", BLOCKS, turn)) as image:
      expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(show(BLOCKS), expected)


# Frames and kinds.


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".png", ".webp"])
def test_a_mask_of_several_frames_is_refused_and_a_picture_is_its_first(
  tmp_path, suffix
):
  path = tmp_path / f"a{suffix}"
  first, second = (
    Image.fromarray(tiny.lesion(n).astype(np.uint8) * 255) for n in (0, 1)
  )
  options = LOSSLESS.get(suffix, {})
  first.save(path, save_all=True, append_images=[second], **options)
  with pytest.raises(DataError, match="here has 2 pages or frames"):
    masks.decode_mask(path.read_bytes(), "here")
  image = decode.decode_image(path.read_bytes(), "here")
  np.testing.assert_array_equal(image[..., 0] > 128, tiny.lesion(0))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif", ".bmp"])
def test_a_folder_and_predict_read_the_same_kinds_alike(tmp_path, suffix):
  root = tmp_path / "own" / "train"
  grey = np.linspace(0, 255, 96).reshape(8, 12).astype(np.uint8)
  mask = tiny.lesion(0).astype(np.uint8) * 255
  for kind, array in (("images", grey), ("masks", mask)):
    path = root / kind / f"a{suffix}"
    write(path, array, **LOSSLESS.get(suffix, {}))
  deep = root / "images" / "b.png"
  write(deep, grey.astype(np.uint16) * 257)
  write(root / "masks" / "b.png", mask)
  builder = prepare.prepare(
    "folder", data_dir=tmp_path / "data", manual_dir=tmp_path / "own"
  )
  a, b = prepare.read_records(builder, "train")
  image = root / "images" / f"a{suffix}"
  for record, path in ((a, image), (b, deep)):
    found = decode.decode_image(record.image, "")
    np.testing.assert_array_equal(found, pictures.read(path))
    np.testing.assert_array_equal(found[..., 0], grey)
