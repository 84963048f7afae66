"""Huge pages, for a process whose steps take much scratch memory.

XLA asks the C library for the scratch memory of every step anew. What is larger
than 64 MB comes from the kernel each time, filled with zeros in pages of 4 kB:
for a Lite-U-Net 118,000 of them, a third of the processors' time of a step.
Pages of 2 MB make that a tenth of it. glibc asks for them if a variable of
the environment says so when the process starts, and not later.

Nothing but the standard library is imported here: this is to run before what
takes seconds to import.
"""

import contextlib
import os
import pathlib
import sys

TUNABLES = "glibc.malloc.hugetlb=1"  # what GLIBC_TUNABLES is set to
# Set beside it: some systems take GLIBC_TUNABLES away from a new process.
_ASKED = "KDSEG_ASKED_FOR_HUGE_PAGES"
# Of the kernel: "always", "madvise" (where a process asks for it) or "never",
# the one that holds in brackets.
_SWITCH = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
# The first glibc that knows the variable's value.
_GLIBC = (2, 35)
# Options of Python that are followed by a value.
_VALUED = ("-W", "-X", "--check-hash-based-pycs")


def ask() -> None:
  """Starts this process over, once, with huge pages for its memory.

  Process number, files, signals and the interpreter's options stay. Nothing is
  done, and the call returns, where it would not help (another kernel or C
  library, or one that gives or refuses huge pages whatever is asked), where
  the user has set how memory is allocated (`is_chosen`), and where Python was
  not told to run just the script or module that runs, as in a notebook, a
  debugger or a test.
  """
  if _ASKED in os.environ or is_chosen() or not _help():
    return
  arguments = _own_arguments()
  if arguments is None:
    return
  for stream in (sys.stdout, sys.stderr):
    # None where the process was started without.
    if stream is not None:
      stream.flush()
  # If it cannot be started again, it goes on as it is.
  with contextlib.suppress(OSError):
    os.execve(
      sys.executable,
      [sys.executable, *arguments],
      os.environ | {"GLIBC_TUNABLES": TUNABLES, _ASKED: "1"},
    )


def is_chosen() -> bool:
  """Whether the user has set how the C library allocates memory."""
  if any(name.startswith("MALLOC_") for name in os.environ):
    return True
  return "GLIBC_TUNABLES" in os.environ and _ASKED not in os.environ


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
  """Python's arguments, if they are to run what runs now and nothing else."""
  given = sys.orig_argv[1:]
  first = 0
  while first < len(given) and given[first].startswith("-"):
    if given[first] in ("-", "-c", "-m"):
      break
    first += 2 if given[first] in _VALUED else 1
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  # A pipe could not be read again.
  if spec is None and os.path.isfile(sys.argv[0]):
    program = [sys.argv[0]]
  elif spec is not None:
    program = ["-m", spec.name]
  else:
    return None
  own = given[first:] == program + sys.argv[1:]
  return given if own and sys.executable else None
