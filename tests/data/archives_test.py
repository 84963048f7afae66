import os
import zipfile

import pytest
import tiny_archives as tiny

from kdseg.data import archives
from kdseg.data.archives import DataError

FILES = {"A/x.png": b"one", "A/deep/y.png": b"three", "A/z.png": b""}


def test_a_zip_and_the_folder_it_unpacks_to_are_the_same(tmp_path):
  packed = archives.list_files(tiny.write_zip(tmp_path / "A.zip", FILES))
  unpacked = archives.list_files(tiny.write_folder(tmp_path / "B", FILES))
  assert [file.path for file in packed] == [file.path for file in unpacked]
  assert [file.read() for file in packed] == [file.read() for file in unpacked]
  assert [file.size for file in packed] == [5, 3, 0]
  assert archives.stamp(packed) == archives.stamp(unpacked)


def test_stamp_changes_with_a_name_and_with_a_size(tmp_path):
  whole = archives.list_files(tiny.write_folder(tmp_path / "a", FILES))
  longer = archives.list_files(
    tiny.write_folder(tmp_path / "b", {**FILES, "A/x.png": b"longer"})
  )
  renamed = archives.list_files(
    tiny.write_folder(
      tmp_path / "c",
      {"A/w.png" if k == "A/x.png" else k: v for k, v in FILES.items()},
    )
  )
  stamps = {archives.stamp(files) for files in (whole, longer, renamed)}
  assert len(stamps) == 3
  assert archives.stamp(reversed(whole)) == archives.stamp(whole)


@pytest.mark.parametrize(
  "name",
  [
    "__MACOSX/A/._x.png",
    "A/.DS_Store",
    "A/Thumbs.db",
    "README.txt",
    "A/readme.md",
    "LICENSE",
    "CITATION.cff",
    "attribution.csv",
    "A/.hidden/x.png",
  ],
)
def test_leaves_out_what_does_not_belong(tmp_path, name):
  files = {**FILES, name: b"."}
  for path in (
    tiny.write_zip(tmp_path / "A.zip", files),
    tiny.write_folder(tmp_path / "B", files),
  ):
    assert [file.path for file in archives.list_files(path)] == sorted(FILES)


@pytest.mark.parametrize("stem", ["license_7", "readme", "Copying_1"])
@pytest.mark.parametrize("suffix", [".png", ".JPG", ".bmp", ".tif"])
def test_a_picture_is_never_taken_for_a_document(tmp_path, stem, suffix):
  name = f"A/{stem}{suffix}"
  for path in (
    tiny.write_zip(tmp_path / "A.zip", {name: b"."}),
    tiny.write_folder(tmp_path / "B", {name: b"."}),
  ):
    assert [file.path for file in archives.list_files(path)] == [name]


def test_members_with_backslashes_are_read(tmp_path):
  path = tmp_path / "a.zip"
  with zipfile.ZipFile(path, "w") as archive:
    for name in ("A\\", "A\\x.png", "__MACOSX\\._x.png"):
      archive.writestr(zipfile.ZipInfo(name), b"content")
  [file] = archives.list_files(path)
  assert (file.path, file.name, file.read()) == ("A/x.png", "x.png", b"content")


def test_a_rar_is_refused_with_the_command_to_unpack_it(tmp_path):
  path = tmp_path / "PH2Dataset.rar"
  path.write_bytes(b"Rar!\x1a\x07\x01\x00")
  with pytest.raises(DataError, match=r"unrar x '.*PH2Dataset\.rar'"):
    archives.list_files(path)


def test_a_path_that_is_not_there_is_named(tmp_path):
  with pytest.raises(DataError, match=r"nowhere\.zip does not exist"):
    archives.list_files(tmp_path / "nowhere.zip")


def test_folders_that_are_links_are_followed(tmp_path):
  tiny.write_folder(tmp_path / "elsewhere", {"x.png": b"."})
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "site").symlink_to(tmp_path / "elsewhere")
  [file] = archives.list_files(tmp_path / "set")
  assert (file.path, file.read()) == ("site/x.png", b".")


def test_a_cut_off_zip_is_named(tmp_path):
  path = tiny.write_zip(tmp_path / "A.zip", FILES)
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(DataError, match=r"A\.zip is no readable zip.*again"):
    archives.list_files(path)


def test_a_damaged_member_is_named(tmp_path):
  path = tiny.write_zip(tmp_path / "A.zip", {"A/x.png": b"payload"})
  path.write_bytes(path.read_bytes().replace(b"payload", b"Payload"))
  (file,) = archives.list_files(path)
  with pytest.raises(DataError, match=r"A\.zip: A/x\.png cannot be read"):
    file.read()


def test_a_member_with_a_password_is_named(tmp_path):
  path = tiny.write_zip(tmp_path / "A.zip", {"x": b"payload"})
  content = bytearray(path.read_bytes())
  content[content.index(b"PK\3\4") + 6] |= 1  # flag of the member
  content[content.index(b"PK\1\2") + 8] |= 1  # and of its directory entry
  path.write_bytes(content)
  (file,) = archives.list_files(path)
  with pytest.raises(DataError, match=r"A\.zip: x cannot be read .*password"):
    file.read()


def test_a_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
  files = {"A/bomb.png": bytes(1001)}
  for path in (
    tiny.write_zip(tmp_path / "A.zip", files),
    tiny.write_folder(tmp_path / "B", files),
  ):
    with pytest.raises(DataError, match=r"bomb\.png'? would take"):
      archives.list_files(path)


def test_a_file_that_is_no_archive_is_named(tmp_path):
  path = tmp_path / "A.zip"
  path.write_bytes(b"<html>404</html>")
  with pytest.raises(DataError, match=r"A\.zip is no readable zip"):
    archives.list_files(path)


def test_a_pipe_and_a_device_in_a_folder_are_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  with pytest.raises(DataError, match=r"pipe\.png is no plain file"):
    archives.list_files(tmp_path)
  (tmp_path / "pipe.png").unlink()
  # It has no bytes by its size, and no end when it is read.
  (tmp_path / "zero.png").symlink_to("/dev/zero")
  with pytest.raises(DataError, match=r"zero\.png is no plain file"):
    archives.list_files(tmp_path)


def test_a_link_in_a_folder_to_nothing_is_named(tmp_path):
  (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
  with pytest.raises(DataError, match=r"link\.png cannot be read: No such"):
    archives.list_files(tmp_path)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(DataError, match="cannot be listed: Permission denied"):
    archives.list_files(tmp_path)
