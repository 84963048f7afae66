"""Signals that ask a run to stop."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kdseg.runtime import preemption


@pytest.fixture(autouse=True)
def usual_signals():
  """As in a terminal; in the background of a shell Ctrl-C is ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_the_first_signal_only_leaves_word(number):
  with preemption.on_signals() as stop:
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()


# Waits as for a compiler: outside of Python, and no signal interrupts it.
DEAF = """
import ctypes, logging, signal, sys
from kdseg.runtime import preemption as stopping
logging.basicConfig(stream=sys.stdout, format="%(message)s")
# In the background of a shell it would be ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, (ctypes.c_long * 16)()
lock(mutex)
with stopping.on_signals():
  print("ready", flush=True)
  lock(mutex)
"""


@contextlib.contextmanager
def deaf(**options):
  process = subprocess.Popen(
    [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True, **options
  )
  # Whoever reads of it waits no longer.
  late = threading.Timer(100, process.kill)
  late.start()
  try:
    assert process.stdout.readline() == "ready\n"
    yield process
  finally:
    late.cancel()
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
  ("first", "second"),
  [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")],
)
def test_the_second_signal_ends_it_at_once_whatever_it_waits_for(first, second):
  with deaf() as process:
    process.send_signal(signal.Signals[first])
    said = process.stdout.readline()
    assert said.startswith(f"{first}: stopping as soon as what was done is")
    time.sleep(2 * preemption.ECHO)
    process.send_signal(signal.Signals[second])
    assert process.wait() == 128 + signal.Signals[second]


def test_a_signal_that_is_passed_on_twice_is_one():
  with deaf() as process:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(2 * preemption.ECHO)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_it_ends_where_nobody_reads_what_it_says():
  with deaf(stderr=subprocess.PIPE) as process:
    process.stderr.close()
    for _ in range(2):
      process.send_signal(signal.SIGINT)
      time.sleep(2 * preemption.ECHO)
    assert process.wait() == 128 + signal.SIGINT


def test_it_ends_where_what_it_says_is_not_read():
  with deaf(stderr=subprocess.PIPE) as process:
    # Full: what is written next waits.
    filled = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
      while True:
        os.write(filled, b"x" * 4096)
    os.close(filled)
    for _ in range(2):
      process.send_signal(signal.SIGINT)
      time.sleep(2 * preemption.ECHO)
    assert process.wait() == 128 + signal.SIGINT


def test_nothing_is_left_of_it():
  files = len(os.listdir("/proc/self/fd"))
  with preemption.on_signals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop()
  deadline = time.monotonic() + 50
  while any(thread.name == "signals" for thread in threading.enumerate()):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert len(os.listdir("/proc/self/fd")) == files
  assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_that_was_ignored_stays_so():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with preemption.on_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert not stop()
  assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_afterwards_signals_are_as_before():
  before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
  with preemption.on_signals():
    assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
  after = {number: signal.getsignal(number) for number in preemption.SIGNALS}
  assert after == before


def test_in_another_thread_nobody_is_asked():
  seen = []

  def work():
    with preemption.on_signals() as stop:
      seen.append(stop())

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [False]


def test_the_error_says_what_was_done_and_how_to_go_on():
  preemption.check(preemption.never, "anything")
  with pytest.raises(preemption.StoppedError, match=r"while x.*same command"):
    preemption.check(lambda: True, "x")
