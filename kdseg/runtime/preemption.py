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
import os
import signal
import socket
import threading
import time
from typing import Any

_LOG = logging.getLogger("kdseg")

# EX_TEMPFAIL of sysexits.h, "try again": what to restart on.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds; a person who presses Ctrl-C again takes longer.
ECHO = 0.3

Stop = Callable[[], bool]


class StoppedError(RuntimeError):
  """A run that was asked to stop, and can be continued."""


def never() -> bool:
  """Says that nobody asked."""
  return False


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
  """Yields a function that says whether SIGTERM or SIGINT came.

  A second one ends the process, with the exit code of a shell, 128 and the
  signal's number: nothing that is being written is lost by that, see
  `docs/failures.md`. What comes within `ECHO` seconds of the first is the same
  one, which a scheduler and a launch script both passed on.

  Outside the main thread, where Python lets nobody listen to signals, it never
  does; nor of a signal that was ignored before, as Ctrl-C is in the background
  of a shell.
  """
  if threading.current_thread() is not threading.main_thread():
    yield never
    return
  # No threading.Event: a handler may be interrupted by another.
  asked = False

  def note(number: int, frame: Any) -> None:
    nonlocal asked
    del number, frame
    asked = True

  def watch() -> None:
    # Python calls handlers between its own instructions alone: of a main thread
    # that waits for a compiler, or for a host that hangs, nobody would hear.
    nonlocal asked
    first = None
    while received := ours.recv(1):
      now = time.monotonic()
      if received[0] not in before or (first and now - first < ECHO):
        continue
      if first:
        said = _say(os.write, 2, b"kdseg: ended; the same command continues\n")
        said.join(1)
        os._exit(128 + received[0])
      first, asked = now, True
      _say(
        _LOG.warning,
        "%s: stopping as soon as what was done is saved; once more stops at "
        "once",
        signal.Signals(received[0]).name,
      )

  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  watcher = threading.Thread(target=watch, name="signals", daemon=True)

  def end_watch() -> None:
    theirs.close()
    if watcher.ident:
      watcher.join()
    ours.close()

  with contextlib.ExitStack() as stack:
    stack.callback(end_watch)
    before = {
      number: signal.getsignal(number)
      for number in SIGNALS
      if signal.getsignal(number) != signal.SIG_IGN
    }
    watcher.start()
    woken = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    stack.callback(signal.set_wakeup_fd, woken)
    for number, handler in before.items():
      signal.signal(number, note)
      stack.callback(signal.signal, number, handler)
    yield lambda: asked


def _say(function: Callable[..., Any], *arguments: Any) -> threading.Thread:
  """Calls what may wait for a reader for ever, or find none, on the side."""

  def call() -> None:
    with contextlib.suppress(OSError):
      function(*arguments)

  thread = threading.Thread(target=call, name="signals", daemon=True)
  thread.start()
  return thread


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
