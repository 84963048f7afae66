"""Names that people type, held against the names there are."""

from collections.abc import Iterable
import difflib


class UnknownNameError(ValueError):
  """A name in a config that nothing answers to."""


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
  """Holds `names` against `known`.

  Args:
    what: what they are names of, for the message.
    names: as typed.
    known: all there are.

  Raises:
    UnknownNameError: on the first that is not known, with the nearest that is.
  """
  known = list(known)
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f'; did you mean "{near[0]}"?' if near else "."
      raise UnknownNameError(
        f'unknown {what} "{name}"{hint} Known: {", ".join(known)}'
      )
