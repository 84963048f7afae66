import os
import stat
import struct
import tracemalloc
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


def test_a_link_to_a_folder_is_named_and_not_passed_over(tmp_path):
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "site").symlink_to(tmp_path / "elsewhere")
  with pytest.raises(archives.DataError, match="site is a link to a folder"):
    archives.list_files(tmp_path / "set")
  # The folder itself may be one; so may what is left out.
  (tmp_path / "set" / "site").rename(tmp_path / "set" / ".site")
  (tmp_path / "link").symlink_to(tmp_path / "set")
  assert archives.list_files(tmp_path / "link") == ()


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


def test_a_rar_is_refused_with_the_command_to_unpack_it(tmp_path):
  path = tmp_path / "PH2Dataset.rar"
  path.write_bytes(b"Rar!\x1a\x07\x01\x00")
  with pytest.raises(DataError, match=r"unrar x '.*PH2Dataset\.rar'"):
    archives.list_files(path)


def test_a_path_that_is_not_there_is_named(tmp_path):
  with pytest.raises(DataError, match=r"nowhere\.zip does not exist"):
    archives.list_files(tmp_path / "nowhere.zip")


def test_a_cut_off_zip_is_named(tmp_path):
  path = tiny.write_zip(tmp_path / "A.zip", FILES)
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(DataError, match=r"A\.zip is no readable zip.*again"):
    archives.list_files(path)


def test_a_damaged_member_is_named(tmp_path):
  path = tiny.write_zip(tmp_path / "A.zip", {"A/x.png": b"payload"})
  path.write_bytes(path.read_bytes().replace(b"payload", b"Payload"))
  (file,) = archives.list_files(path)
  with pytest.raises(DataError, match=r"A\.zip: A/x\.png is damaged"):
    file.read()


def test_a_member_with_a_password_is_named(tmp_path):
  path = tiny.write_zip(tmp_path / "A.zip", {"x": b"payload"})
  content = bytearray(path.read_bytes())
  content[content.index(b"PK\3\4") + 6] |= 1  # flag of the member
  content[content.index(b"PK\1\2") + 8] |= 1  # and of its directory entry
  path.write_bytes(content)
  (file,) = archives.list_files(path)
  with pytest.raises(DataError, match=r"A\.zip: x cannot be read.*password"):
    file.read()


@pytest.mark.parametrize(
  "name",
  ["../x.png", "A/../../x.png", "/etc/x.png", "A\\x.png", "..\\x.png", "C:/x"],
)
def test_a_member_that_points_outside_is_refused(tmp_path, name):
  path = tiny.write_zip(tmp_path / "A.zip", {"A/ok.png": b"", name: b""})
  with pytest.raises(DataError, match="points outside"):
    archives.list_files(path)


def test_a_symbolic_link_in_an_archive_is_refused(tmp_path):
  link = zipfile.ZipInfo("A/link.png")
  link.external_attr = (stat.S_IFLNK | 0o777) << 16
  with zipfile.ZipFile(tmp_path / "A.zip", "w") as archive:
    archive.writestr(link, "/etc/passwd")
  with pytest.raises(DataError, match=r"link\.png.* symbolic link"):
    archives.list_files(tmp_path / "A.zip")


def test_a_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
  files = {"A/bomb.png": bytes(1001)}
  for path in (
    tiny.write_zip(tmp_path / "A.zip", files),
    tiny.write_folder(tmp_path / "B", files),
  ):
    with pytest.raises(DataError, match=r"bomb\.png'? would take"):
      archives.list_files(path)


def test_a_member_larger_than_it_claims_is_refused(tmp_path, monkeypatch):
  path = tiny.write_zip(tmp_path / "A.zip", {"A/x.png": bytes(1001)})
  (file,) = archives.list_files(path)
  monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
  with pytest.raises(DataError, match=r"x\.png would take"):
    file.read()


def test_too_many_members_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, "MAX_FILES", 2)
  for path in (
    tiny.write_zip(tmp_path / "A.zip", FILES),
    tiny.write_folder(tmp_path / "B", FILES),
  ):
    with pytest.raises(DataError, match="more than 2"):
      archives.list_files(path)


def _claim(path, size: int) -> None:
  """Makes the directory of a zip say that every member has this size."""
  content = bytearray(path.read_bytes())
  at = content.find(b"PK\1\2")
  while at >= 0:
    content[at + 24 : at + 28] = struct.pack("<I", size)
    at = content.find(b"PK\1\2", at + 4)
  path.write_bytes(content)


def test_a_small_archive_that_claims_gigabytes_is_refused(tmp_path):
  files = {f"A/{n}.png": b"" for n in range(80)}
  path = tiny.write_zip(tmp_path / "A.zip", files)
  _claim(path, archives.MAX_FILE_BYTES)
  with pytest.raises(DataError, match=r"A\.zip would unpack to 20 GiB, more"):
    archives.list_files(path)


def test_a_member_is_unpacked_no_further_than_it_claims(tmp_path):
  path = tmp_path / "A.zip"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("A/x.png", bytes(32 * 2**20))
  _claim(path, 10)
  (file,) = archives.list_files(path)
  tracemalloc.start()
  try:
    with pytest.raises(DataError, match=r"A/x\.png is damaged"):
      file.read()
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 2**20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_may_become_any_size_is_refused(tmp_path, method):
  path = tmp_path / "A.zip"
  with zipfile.ZipFile(path, "w", method) as archive:
    archive.writestr("A/x.png", b"")
  with pytest.raises(DataError, match=r"x\.png is compressed by .*Unpack the"):
    archives.list_files(path)


@pytest.mark.parametrize(
  ("offset", "value", "message"),
  [(6, 99, "no readable zip"), (10, 9, "compressed by method 9")],
  ids=["version", "method"],
)
def test_an_archive_of_a_newer_kind_is_named(tmp_path, offset, value, message):
  path = tiny.write_zip(tmp_path / "A.zip", FILES)
  content = bytearray(path.read_bytes())
  content[content.index(b"PK\1\2") + offset] = value
  path.write_bytes(content)
  with pytest.raises(DataError, match=rf"A\.zip.*{message}"):
    archives.list_files(path)


def test_a_file_that_is_no_archive_is_named(tmp_path):
  path = tmp_path / "A.zip"
  path.write_bytes(b"<html>404</html>")
  with pytest.raises(DataError, match=r"A\.zip is no readable zip"):
    archives.list_files(path)


@pytest.mark.parametrize(
  ("name", "escaped"),
  [
    ("A/\x1b[2Jx.png", r"\x1b[2Jx.png"),
    ("A/a\nok: b.png", r"a\nok: b.png"),
    ("A/c1\x9b2J.png", r"c1\x9b2J.png"),
    ("A/line\u2028.png", r"line\u2028.png"),
  ],
)
def test_a_name_that_steers_a_terminal_is_refused_and_escaped(
  tmp_path, name, escaped
):
  for path in (
    tiny.write_zip(tmp_path / "A.zip", {name: b"."}),
    tiny.write_folder(tmp_path / "B", {name: b"."}),
  ):
    with pytest.raises(DataError, match="control character") as error:
      archives.list_files(path)
    assert escaped in str(error.value)
    assert str(error.value).isprintable()


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
  (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
  with pytest.raises(DataError, match=r"caf\\udce9\.png has a name .*UTF-8"):
    archives.list_files(tmp_path)


def test_names_of_other_scripts_and_of_formulas_are_none_of_its_business(
  tmp_path,
):
  names = ["läsion 7.png", "皮膚.png", "=cmd().png", "a,b.png", '"q".png']
  names += ["a|b`c.png", "<script>.png", "nbsp\xa0.png"]
  files = dict.fromkeys(names, b".")
  for path in (
    tiny.write_zip(tmp_path / "A.zip", files),
    tiny.write_folder(tmp_path / "B", files),
  ):
    found = [file.path for file in archives.list_files(path)]
    assert found == sorted(names)


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


def test_a_file_that_grew_after_it_was_listed_is_refused(tmp_path, monkeypatch):
  (file,) = archives.list_files(
    tiny.write_folder(tmp_path / "A", {"x.png": b"12"})
  )
  monkeypatch.setattr(archives, "MAX_FILE_BYTES", 4)
  (tmp_path / "A" / "x.png").write_bytes(b"12345")
  with pytest.raises(DataError, match=r"x\.png would take"):
    file.read()


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(DataError, match="cannot be listed: Permission denied"):
    archives.list_files(tmp_path)
