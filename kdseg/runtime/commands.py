"""What the commands share: one style of flags, one environment.

Only the standard library is imported, as all this happens before a command
imports what takes seconds.
"""

import argparse
from collections.abc import MutableMapping
from collections.abc import Sequence
import sys
from typing import Any

# XLA allocates a step's scratch memory anew each step, and large blocks come
# from the kernel as zeroed pages of 4 kB: a third of a Lite-U-Net's step on two
# cores. With this value glibc (2.35 or later) asks for pages of 2 MB instead.
# It is read when a process starts and not later. Other C libraries ignore it.
TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def ask_for_huge_pages(environment: MutableMapping[str, str]) -> None:
  """Sets `GLIBC_TUNABLES` for a process to be started, unless the user has.

  Args:
    environment: of that process; changed in place.
  """
  environment.setdefault(TUNABLES, HUGE_PAGES)


def respell(arguments: Sequence[str], old: str, new: str) -> list[str]:
  """Returns arguments with another character between the words of a flag.

  `--manual_dir=a_b` becomes `--manual-dir=a_b`; keys of a config stay.
  """
  found = []
  for argument in arguments:
    flag, equals, value = argument.partition("=")
    if flag.startswith("--") and not flag.startswith("--config."):
      flag = f"--{flag[2:].replace(old, new)}"
    found.append(f"{flag}{equals}{value}")
  return found


class Parser(argparse.ArgumentParser):
  """Parses flags written with dashes, or with underscores in their place."""

  def __init__(self, name: str, description: str | None) -> None:
    """Makes the parser of `kdseg NAME`.

    Args:
      name: of the subcommand.
      description: printed as it stands, with an example.
    """
    super().__init__(
      prog=f"kdseg {name}",
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )

  def parse_known_args(  # type: ignore[override]
    self, args: Sequence[str] | None = None, namespace: Any = None
  ) -> tuple[Any, list[str]]:
    """Parses the arguments, or the process's, as argparse does."""
    given = sys.argv[1:] if args is None else args
    return super().parse_known_args(respell(given, "_", "-"), namespace)
