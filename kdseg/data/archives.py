"""Reads files out of zip archives and folders, without unpacking them.

An official download is a zip; a user may have unpacked it already. Both become
a list of `File`, so that the callers do not tell one from the other.
Members of an archive are read one by one into memory; nothing is extracted to
disk.
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

# The last one is how macOS calls a folder's own icon.
_IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})
# What describes a data set begins so and is a document, never a picture.
_DOCUMENT_STEMS = (
  *("readme", "license", "licence", "copying", "attribution", "citation"),
  *("md5sum", "sha256sum"),
)
_DOCUMENT_SUFFIXES = frozenset(
  {
    *("", ".txt", ".md", ".rst", ".pdf", ".html", ".htm", ".rtf"),
    *(".doc", ".docx", ".odt", ".csv", ".json", ".bib", ".cff", ".yaml"),
  }
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
  def suffix(self) -> str:
    """The suffix in lower case, with its dot; empty if there is none."""
    return pathlib.PurePosixPath(self.name).suffix.lower()

  def held(self) -> "File":
    """Returns the same file with its content held in memory."""
    content = self.read()
    return dataclasses.replace(self, read=lambda: content)


def shown(text: object) -> str:
  r"""Escapes what a terminal would obey or cannot print, as `\x1b[2J`."""
  return "".join(
    character
    if character.isprintable()
    else character.encode("unicode_escape").decode()
    for character in str(text)
  )


def list_files(path: str | os.PathLike[str]) -> tuple[File, ...]:
  """Lists what a zip archive or a folder holds, sorted by path.

  Left out are folders, hidden files, `__MACOSX`, and files that describe the
  data set (readme, licence, attribution).

  Args:
    path: a `.zip` file or a folder; links to folders in it are followed.

  Returns:
    The files, unread.

  Raises:
    DataError: if there is no such path, if it is a `.rar` or another kind of
      file, if the archive is damaged, or if a file is too large.
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
  return tuple(sorted(files, key=lambda file: file.path))


def stamp(files: Iterable[File]) -> str:
  """Hashes the names and sizes of files, in any order, to 16 hex digits.

  Equal for an archive and the folder it unpacks to. No file is read, so that a
  file replaced by another one of the same name and length goes unnoticed.
  """
  digest = hashlib.sha256()
  for line in sorted(f"{file.name}\t{file.size}\n" for file in files):
    digest.update(line.encode())
  return digest.hexdigest()[:16]


def read_path(path: pathlib.Path) -> bytes:
  """Reads a plain file; raises `DataError` if it is none, or too large."""
  _size_on_disk(path)
  try:
    return path.read_bytes()
  except OSError as error:
    raise DataError(
      f"{shown(path)} cannot be read: {error.strerror}."
    ) from None


def _is_ignored(path: str) -> bool:
  *directories, name = path.split("/")
  return (
    any(d == "__MACOSX" or d.startswith(".") for d in directories)
    or name.startswith(".")
    or name.lower() in _IGNORED_NAMES
    or (
      name.lower().startswith(_DOCUMENT_STEMS)
      and pathlib.PurePosixPath(name).suffix.lower() in _DOCUMENT_SUFFIXES
    )
  )


def _list_folder(root: pathlib.Path) -> list[File]:
  def refuse(error: OSError) -> None:
    raise DataError(
      f"{shown(error.filename)} cannot be listed: {error.strerror}."
    ) from None

  files = []
  for directory, _, names in os.walk(root, onerror=refuse, followlinks=True):
    for name in names:
      path = pathlib.Path(directory, name)
      relative = path.relative_to(root).as_posix()
      if not _is_ignored(relative):
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in relative):
          raise DataError(
            f"{shown(path)} has a control character in its name, or bytes that"
            " are not UTF-8, which would break tables; rename it."
          )
        size, read = _size_on_disk(path), functools.partial(read_path, path)
        files.append(File(relative, str(root), shown(path), size, read))
  return files


def _size_on_disk(path: pathlib.Path) -> int:
  try:
    status = path.stat()
  except OSError as error:
    raise DataError(
      f"{shown(path)} cannot be read: {error.strerror}."
    ) from None
  if not stat.S_ISREG(status.st_mode):
    # Reading a pipe waits for its writer, and a device has no end.
    raise DataError(f"{shown(path)} is no plain file; remove it.")
  _check_size(shown(path), status.st_size)
  return status.st_size


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
  files = []
  for member in archive.infolist():
    # Some packers of Windows write backslashes, against the format.
    name, size = member.filename.replace("\\", "/"), member.file_size
    if not name.endswith("/") and not _is_ignored(name):
      where = f"{path}: {shown(name)}"
      _check_size(where, size)
      read = functools.partial(_read_member, archive, member, where)
      files.append(File(name, str(path), where, size, read))
  return files


def _read_member(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str
) -> bytes:
  try:
    return archive.read(member)
  except Exception as error:
    # BadZipFile, zlib.error, EOFError, a password, an unknown compression, ...
    raise DataError(
      f"{where} cannot be read ({shown(error)}); download the archive again,"
      " or unpack it and leave its folder in its place."
    ) from None


def _check_size(where: str, size: int) -> None:
  if size > MAX_FILE_BYTES:
    raise DataError(
      f"{where} would take {size / 2**20:.0f} MiB, more than the limit of"
      f" {MAX_FILE_BYTES // 2**20} MiB for one file; refusing it."
    )
