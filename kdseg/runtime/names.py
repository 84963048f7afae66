"""Checks names of a config, and suggests the nearest known one."""

from collections.abc import Iterable
import difflib


class UnknownNameError(ValueError):
  """A config uses a name that does not exist."""


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
  """Checks that all of `names` are known.

  Args:
    what: the kind of thing they name, for the message.
    names: as typed.
    known: all names of that kind.

  Raises:
    UnknownNameError: that suggests the known name nearest to the first unknown.
  """
  known = list(known)
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f'; did you mean "{near[0]}"?' if near else "."
      raise UnknownNameError(
        f'unknown {what} "{name}"{hint} Known: {", ".join(known)}'
      )
