"""Stops a run at a signal, after saving what was done.

Preemptible machines and schedulers send SIGTERM some seconds before they take
the machine; a person presses Ctrl-C. Inside `on_signals` the first signal only
sets a flag; the training loop polls it after each step, saves and raises
`StoppedError`. A second signal ends the process at once.
"""

from collections.abc import Callable
from collections.abc import Container
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

# EX_TEMPFAIL of sysexits.h, "try again": launchers restart a run on it.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds; a person takes longer to press Ctrl-C again.
ECHO = 0.3

Stop = Callable[[], bool]


class StoppedError(RuntimeError):
  """A signal stopped the run; the same command continues it."""


def never() -> bool:
  """Returns False: the `Stop` of a run that no signal can stop."""
  return False


@contextlib.contextmanager
def on_signals() -> Iterator[Stop]:
  """Yields a function that returns whether SIGTERM or SIGINT has arrived.

  A second signal ends the process, with the exit code of a shell, 128 and the
  signal's number; every file is written whole or not at all, so this loses
  nothing. A signal within `ECHO` seconds of the first is the same one, which a
  scheduler and a launch script have both passed on.

  A signal that was ignored before stays ignored, as Ctrl-C is in the background
  of a shell. Outside the main thread, where Python handles no signals, the
  function returns False.
  """
  if threading.current_thread() is not threading.main_thread():
    yield never
    return
  # Not a threading.Event, whose lock a second handler would wait for for ever.
  asked = False

  def note(*unused: Any) -> None:
    nonlocal asked
    asked = True

  handlers = {
    number: signal.getsignal(number)
    for number in SIGNALS
    if signal.getsignal(number) != signal.SIG_IGN
  }
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  watcher = threading.Thread(
    target=_watch, args=(ours, handlers, note), name="signals", daemon=True
  )

  def end_watch() -> None:
    theirs.close()
    if watcher.ident:
      watcher.join()
    ours.close()

  with contextlib.ExitStack() as stack:
    stack.callback(end_watch)
    watcher.start()
    woken = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    stack.callback(signal.set_wakeup_fd, woken)
    for number, handler in handlers.items():
      signal.signal(number, note)
      stack.callback(signal.signal, number, handler)
    yield lambda: asked


def _watch(
  received: socket.socket,
  handled: Container[int],
  note: Callable[[], None],
) -> None:
  """Notes the first signal and ends the process at the second.

  Runs in a thread, as Python calls handlers between its own instructions only:
  never while the main thread waits for a compiler, or for a host that hangs.

  Args:
    received: yields each signal's number as one byte, until it is closed.
    handled: numbers of the signals to act on.
    note: called once.
  """
  first = 0.0
  while number := received.recv(1):
    now = time.monotonic()
    if number[0] not in handled or (first and now - first < ECHO):
      continue
    if first:
      text = b"kdseg: ended; the same command continues\n"
      _in_background(os.write, 2, text).join(1)
      os._exit(128 + number[0])
    first = now
    note()
    _in_background(
      _LOG.warning,
      "%s: stopping as soon as what was done is saved; once more stops at once",
      signal.Signals(number[0]).name,
    )


def _in_background(
  function: Callable[..., Any], *arguments: Any
) -> threading.Thread:
  """Writes in a thread: the stream may be closed, or its reader not read."""

  def call() -> None:
    with contextlib.suppress(OSError):
      function(*arguments)

  thread = threading.Thread(target=call, name="signals", daemon=True)
  thread.start()
  return thread


def check(stop: Stop, what: str) -> None:
  """Raises if a signal has asked the run to stop.

  Args:
    stop: see `on_signals`.
    what: the work that is interrupted, for the message.

  Raises:
    StoppedError: if `stop` returns True.
  """
  if stop():
    raise StoppedError(
      f"stopped while {what}; the same command continues from there"
    )
