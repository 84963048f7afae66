import csv
import os
import struct
import zlib

import numpy as np
from PIL import Image
import pytest
import tiny_model

from kdseg import predict
from kdseg.data import archives
from kdseg.deploy import pictures

# Grey runs from left to right, so that turns and inversions show.
GREY = np.tile(np.linspace(0, 255, 12).astype(np.uint8), (8, 1))
COLOUR = np.stack([GREY, GREY[:, ::-1], np.full_like(GREY, 40)], -1)


def save(path, array, mode=None, **options):
  image = Image.fromarray(array)
  (image.convert(mode) if mode else image).save(path, **options)
  return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_colour_is_read_as_it_is(tmp_path, suffix):
  path = save(tmp_path / f"a{suffix}", COLOUR, lossless=True)
  np.testing.assert_array_equal(pictures.read(path), COLOUR)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1", "P"])
def test_grey_of_any_kind_becomes_three_channels(tmp_path, mode):
  path = tmp_path / "a.png"
  # Black and white survive a picture of one bit.
  grey = np.where(GREY > 127, 255, 0).astype(np.uint8) if mode == "1" else GREY
  if mode == "I;16":
    save(path, grey.astype(np.uint16) * 257)
  else:
    save(path, grey, mode)
  found = pictures.read(path)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, np.repeat(grey[..., None], 3, -1))


def test_transparency_is_dropped(tmp_path):
  alpha = np.zeros((8, 12, 1), np.uint8)
  path = save(tmp_path / "a.png", np.concatenate([COLOUR, alpha], -1))
  np.testing.assert_array_equal(pictures.read(path), COLOUR)


def test_a_damaged_exif_block_is_named(tmp_path):
  path = save(tmp_path / "a.png", COLOUR, exif=b"neither II nor MM")
  with pytest.raises(archives.DataError, match=r"a\.png has damaged EXIF"):
    pictures.read(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty"),
    (b"<html>", "cannot be decoded"),
    (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be decoded"),
  ],
)
def test_a_file_that_is_not_an_image_is_named(tmp_path, content, message):
  path = tmp_path / "a.png"
  path.write_bytes(content)
  with pytest.raises(archives.DataError, match=rf"a\.png.*{message}"):
    pictures.read(path)


def test_a_cut_off_image_is_named(tmp_path):
  path = save(tmp_path / "a.jpg", np.tile(COLOUR, (20, 20, 1)))
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(archives.DataError, match=r"a\.jpg"):
    pictures.read(path)


def test_an_image_of_absurd_size_is_refused_before_it_is_decoded(tmp_path):
  path = tmp_path / "a.png"
  Image.new("1", (12_000, 12_000)).save(path)
  with pytest.raises(archives.DataError, match="12000x12000"):
    pictures.read(path)


def test_floating_point_pixels_are_refused(tmp_path):
  path = tmp_path / "a.tif"
  save(path, np.linspace(0, 1, 96, dtype=np.float32).reshape(8, 12))
  with pytest.raises(archives.DataError, match="kind 'F'"):
    pictures.read(path)


@pytest.mark.parametrize("value", [70_000, 200, -1])
def test_32_bit_pixels_outside_16_bits_are_refused(tmp_path, value):
  path = save(tmp_path / "a.tif", np.full((4, 4), value, np.int32))
  with pytest.raises(archives.DataError, match=str(value)):
    pictures.read(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(archives.DataError, match=r"gone\.png cannot be read"):
    pictures.read(tmp_path / "gone.png")


def test_files_folders_and_patterns_are_found_once_each(tmp_path):
  for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png"):
    (tmp_path / name).touch()
  a, b = tmp_path / "a.JPG", tmp_path / "b.png"
  assert pictures.find([str(tmp_path)]) == [a, b]
  assert pictures.find([str(tmp_path / "*.png"), str(b), str(a)]) == [b, a]
  # Asked for by name, it is tried, whatever its suffix.
  assert pictures.find([str(tmp_path.parent / f"{tmp_path.name[:-1]}?")]) == [
    a, b,
  ]  # fmt: skip
  text = tmp_path / "notes.txt"
  assert pictures.find([str(text)]) == [text]


def test_pictures_that_are_not_read_are_named_and_not_passed_over(tmp_path):
  for name in ("a.jfif", "b.heic", "notes.txt"):
    (tmp_path / name).write_bytes(b"....ftypheic")
  found = pictures.find([str(tmp_path)])
  assert [path.name for path in found] == ["a.jfif", "b.heic"]
  with pytest.raises(archives.DataError, match=r"none of JPEG, .* GIF"):
    pictures.read(found[1])


def test_a_name_that_matches_nothing_is_returned_as_it_is(tmp_path):
  gone = tmp_path / "gone.png"
  empty = tmp_path / "empty"
  empty.mkdir()
  assert pictures.find([str(gone), str(empty)]) == [gone, empty]
  with pytest.raises(archives.DataError, match="folder without images"):
    pictures.read(empty)


def chunk(kind, content):
  length, checksum = len(content), zlib.crc32(kind + content)
  return (
    struct.pack(">I", length) + kind + content + struct.pack(">I", checksum)
  )


def bomb(path, side=100_000):
  """A PNG of 70 bytes whose header claims a picture of `side` squared."""
  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  path.write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(b"\0"))
    + chunk(b"IEND", b"")
  )
  return path


def test_ten_gigapixels_are_refused_with_what_to_do(tmp_path):
  path = bomb(tmp_path / "a.png")
  with pytest.raises(
    archives.DataError, match=r"a\.png claims more pixels than .*Replace it"
  ):
    pictures.read(path)


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  (tmp_path / "zero.png").symlink_to("/dev/zero")
  for name in ("pipe.png", "zero.png"):
    with pytest.raises(archives.DataError, match=f"{name} is no plain file"):
      pictures.read(tmp_path / name)


def test_a_file_larger_than_any_picture_is_not_read(tmp_path):
  path = tmp_path / "a.png"
  with path.open("wb") as file:
    file.truncate(archives.MAX_FILE_BYTES + 1)  # takes no room on the disk
  with pytest.raises(archives.DataError, match=r"a\.png would take 256 MiB"):
    pictures.read(path)


def test_a_name_too_long_to_be_one_is_read_as_missing(tmp_path):
  name = str(tmp_path / ("x" * 5000))
  (path,) = pictures.find([name])
  with pytest.raises(
    archives.DataError, match=r"xxx cannot be read: .*too long"
  ):
    pictures.read(path)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
  def refuse(self):
    raise PermissionError(13, "Permission denied", str(self))

  monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
  assert pictures.find([str(tmp_path)]) == [tmp_path]
  with pytest.raises(archives.DataError, match="may not be listed"):
    pictures.read(tmp_path)


def test_control_characters_are_escaped_in_the_message(tmp_path):
  path = tmp_path / "\x1b[2J\nok.png"
  path.write_bytes(b"no image")
  with pytest.raises(archives.DataError) as error:
    pictures.read(path)
  assert str(error.value).isprintable()
  assert r"\x1b[2J\nok.png cannot be decoded" in str(error.value)


def test_no_picture_however_hostile_stops_the_command(tmp_path, capsys):
  model = tiny_model.write(tmp_path / "tiny.safetensors")
  folder = tmp_path / "in"
  folder.mkdir()
  bomb(folder / "bomb.png")
  os.mkfifo(folder / "pipe.png")
  (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
  good = ("=cmd().png", "a,b.png", '"q".png', "a|b`c.png", "<script>.png")
  for name in good:
    save(folder / name, COLOUR)
  arguments = [str(model), str(folder / "*"), "--out", str(tmp_path / "out")]
  assert predict.main(arguments) == 1
  assert "5 of 8 segmented" in capsys.readouterr().out
  with open(tmp_path / "out" / "predictions.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  failed = {row["file"].rpartition("/")[2] for row in rows if row["error"]}
  assert failed == {"bomb.png", "pipe.png", "cut.jpg"}
  assert not any(
    cell.startswith(("=", "+", "-", "@"))
    for row in rows
    for cell in row.values()
  )
