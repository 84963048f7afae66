"""Names that people type, held against the names there are."""

from collections.abc import Iterable
import difflib


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
  """Raises ValueError on the first of `names` that is not in `known`.

  Args:
    what: what they are names of, for the message.
    names: as typed.
    known: all there are.
  """
  known = list(known)
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f'; did you mean "{near[0]}"?' if near else "."
      raise ValueError(
        f'unknown {what} "{name}"{hint} Known: {", ".join(known)}'
      )
