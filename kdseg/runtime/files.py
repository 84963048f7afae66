"""Writes files whole or not at all, and says why a disk refuses to."""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
from typing import BinaryIO

_FULL = {
  errno.ENOSPC: "the disk is full",
  errno.EDQUOT: "the disk quota is used up",
  errno.EFBIG: "the file would be larger than is allowed",
}
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


class WriteError(OSError):
  """A file or folder cannot be written; says which, why and what to do."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns errors of writing into one that names the file and the cause.

  Args:
    path: the file or the folder that the `with` block writes.

  Raises:
    WriteError: if the disk is full or read-only, permission is missing, or a
      file is where a folder has to be; other errors pass.
  """
  path = pathlib.Path(path)
  try:
    yield
  except WriteError:
    raise
  except Exception as error:
    code = _code(error)
    if code in _FULL:
      raise WriteError(
        f"{path} cannot be written: {_FULL[code]}. Free some space, then the "
        "same command continues"
      ) from error
    if code in _DENIED and _concerns(error, path):
      raise WriteError(
        f"{path} cannot be written: {os.strerror(code)}. Allow it, then the "
        "same command continues, or choose another folder"
      ) from error
    if code in _IN_THE_WAY and _concerns(error, path):
      raise WriteError(
        f"{path} cannot be written: {os.strerror(code)}. A file is where a "
        "folder has to be, or a folder where a file: choose another name"
      ) from error
    raise


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Yields a file that replaces `path` at the end of the `with` block.

  An error removes it, and leaves an earlier file of that name as it was.

  Args:
    path: of the file, in an existing folder.

  Raises:
    WriteError: see `writing`.
  """
  path = pathlib.Path(path)
  scratch = path.with_name(path.name + ".part")
  with writing(path):
    try:
      with open(scratch, "wb") as file:
        yield file
      scratch.replace(path)
    except BaseException:
      with contextlib.suppress(OSError):
        scratch.unlink()
      raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes UTF-8, whole or not at all; escapes what UTF-8 cannot encode.

  Raises:
    WriteError: see `writing`.
  """
  with whole(path) as file:
    file.write(text.encode("utf-8", "backslashreplace"))


def _code(error: Exception) -> int | None:
  """Returns the errno that an exception reports, None if it reports none."""
  if isinstance(error, OSError):
    return error.errno
  # Libraries in C++ put the system's text in exceptions of any class.
  found = [code for code in _FULL if os.strerror(code) in str(error)]
  return found[0] if found else None


def _concerns(error: Exception, path: pathlib.Path) -> bool:
  """Returns whether an error is about `path`, not about a file that is read."""
  filename = getattr(error, "filename", None)
  if filename is None:
    return True
  named = pathlib.Path(os.fsdecode(filename)).absolute()
  path = path.absolute()
  return named.is_relative_to(path.parent) or path.is_relative_to(named)
