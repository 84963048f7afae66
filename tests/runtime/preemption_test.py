"""The first signal stops a run after saving, the second at once."""

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
  """Handles Ctrl-C as in a terminal; background shells ignore it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_the_first_signal_sets_a_flag(number):
  with preemption.on_signals() as stop:
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()


# Waits outside of Python as for a compiler: no signal interrupts it.
WAITING = """
import ctypes, logging, signal, sys
from kdseg.runtime import preemption
logging.basicConfig(stream=sys.stdout, format="%(message)s")
# In the background of a shell it would be ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, (ctypes.c_long * 16)()
lock(mutex)
with preemption.on_signals():
  print("ready", flush=True)
  lock(mutex)
"""


@contextlib.contextmanager
def waiting_process(**options):
  process = subprocess.Popen(
    [sys.executable, "-c", WAITING],
    stdout=subprocess.PIPE,
    text=True,
    **options,
  )
  # Bounds how long a read from its pipe waits.
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
def test_the_second_signal_ends_the_process_at_once(first, second):
  with waiting_process() as process:
    process.send_signal(signal.Signals[first])
    said = process.stdout.readline()
    assert said.startswith(f"{first}: stopping as soon as what was done is")
    time.sleep(2 * preemption.ECHO)
    process.send_signal(signal.Signals[second])
    assert process.wait() == 128 + signal.Signals[second]


def test_a_signal_passed_on_twice_counts_once():
  with waiting_process() as process:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    time.sleep(2 * preemption.ECHO)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_the_second_signal_ends_it_with_standard_error_closed():
  with waiting_process(stderr=subprocess.PIPE) as process:
    process.stderr.close()
    for _ in range(2):
      process.send_signal(signal.SIGINT)
      time.sleep(2 * preemption.ECHO)
    assert process.wait() == 128 + signal.SIGINT


def test_the_second_signal_ends_it_with_a_full_pipe():
  with waiting_process(stderr=subprocess.PIPE) as process:
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


def test_threads_and_files_are_closed_at_the_end():
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


def test_an_ignored_signal_stays_ignored():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with preemption.on_signals() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert not stop()
  assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_handlers_are_restored_at_the_end():
  before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
  with preemption.on_signals():
    assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
  after = {number: signal.getsignal(number) for number in preemption.SIGNALS}
  assert after == before


def test_in_another_thread_no_signal_is_handled():
  seen = []

  def work():
    with preemption.on_signals() as stop:
      seen.append(stop())

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [False]


def test_the_error_names_the_work_and_how_to_continue():
  preemption.check(preemption.never, "anything")
  with pytest.raises(preemption.StoppedError, match=r"while x.*same command"):
    preemption.check(lambda: True, "x")
