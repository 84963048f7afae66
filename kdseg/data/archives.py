"""Reads files out of archives and folders, without unpacking or trusting them.

An official download is a zip; a user may have unpacked it already. Both become
a list of `File`, so that what is built on top never asks which one it was.
Nothing is ever extracted to disk: members are read one by one into memory,
up to a limit, which leaves a hostile archive nothing to overwrite or to fill.
"""

from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import functools
import hashlib
import os
import pathlib
import stat
import unicodedata
import zipfile

# A 50-megapixel 24-bit bitmap has 150 MB; the largest official image has 37.
MAX_FILE_BYTES = 256 * 2**20
# What an archive may claim to unpack to; the largest official one has 0.7 GB.
MAX_ARCHIVE_BYTES = 16 * 2**30
MAX_FILES = 200_000

# Of the others zipfile unpacks a piece whole, however much it becomes: 400
# bytes of bzip2 are 300 MB.
_BOUNDED_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
# Controls, halves of characters (a name that is not UTF-8) and line ends: they
# steer terminals, break tables, or cannot be stored.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_IGNORED_DIRECTORIES = frozenset({"__MACOSX"})
# The last one is how macOS calls a folder's own icon.
_IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})
_IGNORED_STEMS = (
  "readme",
  "license",
  "licence",
  "copying",
  "attribution",
  "citation",
  "md5sum",
  "sha256sum",
)


class DataError(ValueError):
  """Something is wrong with the data; the message says what to do about it."""


@dataclasses.dataclass(frozen=True)
class File:
  """One file of an archive or a folder, read only when asked for.

  Attributes:
    path: where it lies inside the archive or folder, with forward slashes.
    source: the archive or folder it comes from.
    where: names the file in error messages.
    size: its length in bytes.
    read: returns its content; raises `DataError` if it cannot.
  """

  path: str
  source: str
  where: str
  size: int
  read: Callable[[], bytes] = dataclasses.field(repr=False, compare=False)

  @property
  def name(self) -> str:
    """The last part of the path."""
    return self.path.rsplit("/", 1)[-1]

  @property
  def stem(self) -> str:
    """The name without its suffix."""
    return self.name.rsplit(".", 1)[0]

  @property
  def suffix(self) -> str:
    """The suffix in lower case, with its dot; empty if there is none."""
    return pathlib.PurePosixPath(self.name).suffix.lower()


def shown(text: object) -> str:
  r"""A name as it may be printed anywhere: `\x1b[2J` and not what it does."""
  return "".join(
    character
    if character.isprintable()
    else character.encode("unicode_escape").decode()
    for character in str(text)
  )


def in_memory(path: str, source: str, content: bytes) -> File:
  """A file whose content is already there."""
  return File(path, source, f"{source}: {path}", len(content), lambda: content)


def list_files(path: str | os.PathLike[str]) -> tuple[File, ...]:
  """Lists what a zip archive or a folder holds, sorted by path.

  Left out are folders, hidden files, `__MACOSX`, and files that describe
  rather than belong (readme, licence, attribution).

  Args:
    path: a `.zip` file or a folder.

  Returns:
    The files, unread.

  Raises:
    DataError: if there is no such path, if it is a `.rar` or another kind of
      file, if the archive is damaged, if a member's name, kind or size is not
      what an honest archive contains, or if a name cannot be printed.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    files = _list_folder(path)
  elif not path.exists():
    raise DataError(f"{path} does not exist; check the path.")
  elif path.suffix.lower() == ".rar":
    raise DataError(
      f"{path} is a RAR archive, which Python cannot open. Unpack it first:\n"
      f"  unrar x '{path}' '{path.parent}{os.sep}'\n"
      "(or `7z x`, or `bsdtar -xf`) and leave the folder beside it."
    )
  else:
    files = _list_zip(path)
  kept = (file for file in files if not _is_ignored(file.path))
  return tuple(sorted(kept, key=lambda file: file.path))


def stamp(files: Iterable[File]) -> str:
  """A short hash of the names and sizes of files, in any order.

  Equal for an archive and the folder it unpacks to; cheap, as nothing is read.
  Made for releases, whose names say what is in the files: one that is replaced
  by another of the same name and length goes unnoticed once it was prepared.
  """
  digest = hashlib.sha256()
  for line in sorted(f"{file.name}\t{file.size}\n" for file in files):
    digest.update(line.encode())
  return digest.hexdigest()[:16]


def sha256(path: str | os.PathLike[str]) -> str:
  """The SHA-256 of a file, in hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _is_ignored(path: str) -> bool:
  *directories, name = path.split("/")
  return (
    any(d in _IGNORED_DIRECTORIES or d.startswith(".") for d in directories)
    or name.startswith(".")
    or name.lower() in _IGNORED_NAMES
    or name.lower().startswith(_IGNORED_STEMS)
  )


def _list_folder(root: pathlib.Path) -> list[File]:
  files = []
  for directory, folders, names in os.walk(root, onerror=_raise_unlisted):
    for name in folders:
      path = pathlib.Path(directory, name)
      inside = path.relative_to(root) / "file"
      if path.is_symlink() and not _is_ignored(inside.as_posix()):
        raise DataError(
          f"{shown(path)} is a link to a folder, which is not followed; put "
          "the folder itself in its place."
        )
    for name in names:
      path = pathlib.Path(directory, name)
      relative = path.relative_to(root).as_posix()
      if _is_ignored(relative):
        continue
      _refuse_unprintable(shown(path), relative)
      size = _size_on_disk(path)
      read = functools.partial(read_path, path)
      files.append(File(relative, str(root), str(path), size, read))
      if len(files) > MAX_FILES:
        raise DataError(
          f"{root} holds more than {MAX_FILES} files; name the folder of the"
          " data set itself."
        )
  return files


def _raise_unlisted(error: OSError) -> None:
  raise DataError(
    f"{shown(error.filename)} cannot be listed: {error.strerror}."
  ) from None


def _size_on_disk(path: pathlib.Path) -> int:
  try:
    status = path.stat()
  except OSError as error:
    raise DataError(
      f"{shown(path)} cannot be read: {error.strerror}."
    ) from None
  if not stat.S_ISREG(status.st_mode):
    # A pipe is waited for, and a device has no end.
    raise DataError(f"{shown(path)} is no plain file; remove it.")
  if status.st_size > MAX_FILE_BYTES:
    raise DataError(_too_large(shown(path), status.st_size))
  return status.st_size


def read_path(path: pathlib.Path) -> bytes:
  """Reads a plain file; raises `DataError` if it is none, or too large."""
  _size_on_disk(path)
  try:
    with path.open("rb") as file:
      content = file.read(MAX_FILE_BYTES + 1)
  except OSError as error:
    raise DataError(
      f"{shown(path)} cannot be read: {error.strerror}."
    ) from None
  if len(content) > MAX_FILE_BYTES:
    raise DataError(_too_large(shown(path), len(content)))
  return content


def _list_zip(path: pathlib.Path) -> list[File]:
  try:
    archive = zipfile.ZipFile(path)
  except Exception as error:
    # BadZipFile is the one that zipfile documents; damaged headers raise
    # NotImplementedError, struct.error and others.
    raise DataError(
      f"{path} is no readable zip archive ({error}); it may be cut off:"
      " download it again."
    ) from None
  members = archive.infolist()
  if len(members) > MAX_FILES:
    raise DataError(
      f"{path} lists {len(members)} members, more than {MAX_FILES}: this is"
      " not an archive of this data set."
    )
  claimed = sum(member.file_size for member in members)
  if claimed > MAX_ARCHIVE_BYTES:
    raise DataError(
      f"{path} would unpack to {claimed / 2**30:.0f} GiB, more than the limit"
      f" of {MAX_ARCHIVE_BYTES // 2**30} GiB; refusing it. Download the archive"
      " again from its official page."
    )
  files = []
  for member in members:
    if member.is_dir():
      continue
    _refuse_unsafe(path, member)
    if _is_ignored(member.filename):
      continue
    where = f"{path}: {shown(member.filename)}"
    _refuse_unprintable(where, member.filename)
    if member.compress_type not in _BOUNDED_METHODS:
      raise DataError(
        f"{where} is compressed by method {member.compress_type}, which may"
        " unpack to any size; only stored and deflated members are read."
        " Unpack the archive and leave its folder in its place."
      )
    read = functools.partial(_read_member, archive, member, where)
    files.append(
      File(member.filename, str(path), where, member.file_size, read)
    )
  return files


def _refuse_unprintable(where: str, name: str) -> None:
  if any(unicodedata.category(c) in _REFUSED_CATEGORIES for c in name):
    raise DataError(
      f"{where} has a name with a control character, a line end, or bytes that"
      " are not UTF-8; rename it."
    )


def _refuse_unsafe(path: pathlib.Path, member: zipfile.ZipInfo) -> None:
  where = f"{path}: {member.filename!r}"
  # `orig_filename` still has what zipfile has tidied away: a NUL, a backslash.
  name = member.orig_filename
  parts = name.replace("\\", "/").split("/")
  if (
    ".." in parts
    or name.startswith(("/", "\\"))
    or "\\" in name
    or "\0" in name
    or parts[0].endswith(":")
  ):
    raise DataError(
      f"{where} points outside the archive; refusing it. Download the archive"
      " again from its official page."
    )
  if stat.S_ISLNK(member.external_attr >> 16):
    raise DataError(
      f"{where} is a symbolic link; refusing it. Download the archive again"
      " from its official page."
    )
  if member.file_size > MAX_FILE_BYTES:
    raise DataError(_too_large(where, member.file_size))


def _read_member(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str
) -> bytes:
  if member.flag_bits & 1:
    raise DataError(
      f"{where} cannot be read, as it is encrypted; the official archives have"
      " no password."
    )
  # The size in the directory is a claim: no more than it is unpacked.
  limit = min(member.file_size, MAX_FILE_BYTES) + 1
  try:
    with archive.open(member) as file:
      content = file.read(limit)
  except Exception as error:
    # BadZipFile, zlib.error, EOFError, UnicodeDecodeError, struct.error, ...
    raise DataError(
      f"{where} is damaged ({shown(error)}); download the archive again."
    ) from None
  if len(content) > MAX_FILE_BYTES:
    raise DataError(_too_large(where, len(content)))
  return content


def _too_large(where: str, size: int) -> str:
  return (
    f"{where} would take {size / 2**20:.0f} MiB, more than the limit of"
    f" {MAX_FILE_BYTES // 2**20} MiB for one file; refusing it."
  )
