"""Huge pages, for a process whose steps take much scratch memory.

XLA asks the C library for the scratch memory of every step anew. What is larger
than 64 MB comes from the kernel each time, filled with zeros in pages of 4 kB:
for a Lite-U-Net 118,000 of them, a third of the processors' time of a step.
Pages of 2 MB make that a twentieth of it. glibc asks for them if a variable of
the environment says so when the process starts, and not later.

Nothing but the standard library is imported here: this is to run before what
takes seconds to import.
"""

import contextlib
import os
import pathlib
import sys

# What the variable GLIBC_TUNABLES is set to.
TUNABLES = "glibc.malloc.hugetlb=1"
# Of the kernel: "always", "madvise" (where a process asks for it) or "never",
# the one that holds in brackets.
_SWITCH = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
# The first glibc that knows the variable's value.
_GLIBC = (2, 35)


def ask() -> None:
  """Starts this process over, once, with huge pages for its memory.

  Process number, files, signals and the interpreter's options stay. Nothing is
  done, and the call returns, where it would not help (another kernel or C
  library, or one that gives or refuses huge pages whatever is asked), where
  the user has set GLIBC_TUNABLES, and where the process was not started as
  the script or module that `sys.argv` names, as in a notebook or a test.
  """
  if "GLIBC_TUNABLES" in os.environ or not _help():
    return
  arguments = _own_arguments()
  if arguments is None:
    return
  sys.stdout.flush()
  sys.stderr.flush()
  # If it cannot be started again, it goes on as it is.
  with contextlib.suppress(OSError):
    os.execve(
      sys.executable,
      [sys.executable, *arguments],
      os.environ | {"GLIBC_TUNABLES": TUNABLES},
    )


def _help() -> bool:
  """Whether there are huge pages for those who ask, and glibc can ask."""
  try:
    version = os.confstr("CS_GNU_LIBC_VERSION") or ""
    switch = _SWITCH.read_text(encoding="ascii")
    numbers = tuple(int(x) for x in version.split()[-1].split(".")[:2])
  except (AttributeError, IndexError, OSError, ValueError):
    return False
  return "[madvise]" in switch and numbers >= _GLIBC


def _own_arguments() -> list[str] | None:
  """What the interpreter was started with, if that is what runs now."""
  given, arguments = sys.orig_argv[1:], sys.argv[1:]
  first = len(given) - len(arguments)
  if not sys.executable or first < 1 or given[first:] != arguments:
    return None
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  if spec is None:
    return given if given[first - 1] == sys.argv[0] else None
  return given if given[:first][-2:] == ["-m", spec.name] else None
