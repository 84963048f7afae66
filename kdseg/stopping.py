"""Stopping a run when asked to, with what was done saved.

Preemptible machines and schedulers send SIGTERM some seconds before they take
the machine; a person presses Ctrl-C. Inside `on_signals` the first of either
only leaves word; whoever works asks now and then, saves and raises
`StoppedError`. A second signal ends the process at once.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import logging
import signal
import threading
from typing import Any

_LOG = logging.getLogger("kdseg")

# EX_TEMPFAIL of sysexits.h, "try again": what to restart on.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)

Stop = Callable[[], bool]


class StoppedError(RuntimeError):
  """A run that was asked to stop, and can be continued."""


def never() -> bool:
  """Says that nobody asked."""
  return False


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
  """Yields a function that says whether SIGTERM or SIGINT came.

  Outside the main thread, where Python lets nobody listen to signals, it never
  does; nor of a signal that was ignored before, as Ctrl-C is in the background
  of a shell.
  """
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield never
    return

  def note(number: int, frame: Any) -> None:
    del frame
    asked.set()
    for other, handler in before.items():
      signal.signal(other, handler)
    _LOG.warning(
      "%s: stopping as soon as what was done is saved; once more stops at once",
      signal.Signals(number).name,
    )

  before = {
    number: signal.signal(number, note)
    for number in SIGNALS
    if signal.getsignal(number) != signal.SIG_IGN
  }
  try:
    yield asked.is_set
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def check(stop: Stop, what: str) -> None:
  """Raises if somebody asked to stop.

  Args:
    stop: see `on_signals`.
    what: was being done, for the message.

  Raises:
    StoppedError: if `stop` says so.
  """
  if stop():
    raise StoppedError(
      f"stopped while {what}; the same command continues from there"
    )
