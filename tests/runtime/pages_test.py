"""A process that asks for huge pages is started over, once, as it was."""

import mmap
import os
import pathlib
import resource
import subprocess
import sys
import types

import pytest

from kdseg.runtime import pages

# Prints what a process that was started over must have kept, and what it got.
_SHOW = """
import os
import sys
print("begun", os.getpid(), flush=True)
from kdseg import pages
pages.ask()
print("asked", os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
print(sys.warnoptions, sys.stdin.read())
"""
_ROOT = str(pathlib.Path(pages.__file__).parents[2])
_helps = pytest.mark.skipif(
  not pages._help(), reason="needs glibc 2.35 and huge pages for who asks"
)


def _environment(**more: str) -> dict[str, str]:
  kept = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith(("GLIBC_", "KDSEG_", "MALLOC_", "PYTHON"))
  }
  return kept | {"PYTHONPATH": _ROOT} | more


def _run(
  *arguments: str, folder: pathlib.Path, **environment: str
) -> tuple[list[str], int]:
  process = subprocess.Popen(
    [sys.executable, *arguments],
    cwd=folder,
    env=_environment(**environment),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  answer, _ = process.communicate("typed")
  assert process.returncode == 0
  return answer.splitlines(), process.pid


@_helps
@pytest.mark.parametrize(
  "how",
  [("-W", "error", "show.py"), ("-W", "error", "-m", "show")],
  ids=["script", "module"],
)
def test_number_arguments_options_and_input_stay(tmp_path, how):
  (tmp_path / "show.py").write_text(_SHOW)
  lines, number = _run(*how, "--a=b c", "", folder=tmp_path)
  assert lines == [
    f"begun {number}",
    f"begun {number}",
    f"asked {number} {pages.TUNABLES} ['--a=b c', '']",
    "['error'] typed",
  ]


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("GLIBC_TUNABLES", ""),
    ("GLIBC_TUNABLES", pages.TUNABLES),
    ("MALLOC_TRIM_THRESHOLD_", "131072"),
  ],
)
def test_what_the_user_has_set_is_left(tmp_path, name, value):
  (tmp_path / "show.py").write_text(_SHOW)
  lines, number = _run("show.py", folder=tmp_path, **{name: value})
  set_to = value if name == "GLIBC_TUNABLES" else None
  assert lines[:2] == [f"begun {number}", f"asked {number} {set_to} []"]


def test_it_is_asked_once_whatever_becomes_of_the_variable(tmp_path):
  (tmp_path / "show.py").write_text(_SHOW)
  lines, number = _run("show.py", folder=tmp_path, **{pages._ASKED: "1"})
  assert lines[:2] == [f"begun {number}", f"asked {number} None []"]


def test_without_a_terminal_it_works_too(tmp_path):
  (tmp_path / "say.py").write_text(
    "from kdseg import pages\npages.ask()\nopen('said', 'w').close()"
  )
  subprocess.run(
    f"exec '{sys.executable}' say.py >&- 2>&-",
    shell=True,
    cwd=tmp_path,
    env=_environment(),
    check=True,
  )
  assert (tmp_path / "said").exists()


@_helps
@pytest.mark.parametrize(
  "what",
  [
    ("-m", "kdseg.main"),
    (f"{_ROOT}/benchmarks/arms.py",),
    (f"{_ROOT}/benchmarks/train_step.py",),
  ],
  ids=["main", "arms", "train_step"],
)
def test_what_trains_asks_before_it_imports(tmp_path, what):
  answer = subprocess.run(
    [sys.executable, "-X", "importtime", *what, "--help"],
    cwd=tmp_path,
    env=_environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  # Each start prints a head, then what it imports.
  _, first, second = answer.stderr.split("imported package")
  assert "kdseg.runtime.pages" in first
  assert "jax" not in first
  assert "jax" in second


def _huge_pages_are_given() -> bool:
  size = 1 << 26
  private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
  with mmap.mmap(-1, size, flags=private) as taken:
    taken.madvise(mmap.MADV_HUGEPAGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for place in range(0, size, mmap.PAGESIZE):
      taken[place] = 1
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  return after - before < size // mmap.PAGESIZE / 4


@_helps
def test_large_scratch_memory_comes_in_huge_pages(tmp_path):
  if not _huge_pages_are_given():
    pytest.skip("the kernel has no huge pages at hand")
  (tmp_path / "take.py").write_text("""
import resource, threading
from kdseg import pages
pages.ask()
from kdseg import memory
memory.keep_freed()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def take():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  libc.memset(libc.malloc(1 << 27), 1, 1 << 27)
  after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  print(after - before)
# Not the first thread, whose heap is another.
thread = threading.Thread(target=take)
thread.start()
thread.join()
""")
  (huge,), _ = _run("take.py", folder=tmp_path)
  (small,), _ = _run("take.py", folder=tmp_path, GLIBC_TUNABLES="")
  assert int(small) > (1 << 27) // mmap.PAGESIZE * 0.9
  assert int(huge) < int(small) / 2


@pytest.mark.parametrize(
  ("given", "arguments", "module", "expected"),
  [
    (["-m", "a.b", "x"], ["x"], "a.b", True),
    (["-X", "dev", "-m", "a.b"], [], "a.b", True),
    (["-Iu", "-W", "error", "FILE", "x"], ["x"], None, True),
    (["-m", "pdb", "-m", "a.b"], [], "a.b", False),
    (["-m", "pdb", "FILE", "x"], ["x"], None, False),
    (["-", "x"], ["x"], None, False),
    (["/dev/fd/63", "x"], ["x"], None, False),
    (["-m", "ipykernel_launcher", "-f", "k.json"], [], None, False),
    (["-m", "pytest", "x"], ["x"], "a.b", False),
    (["-m", "a.b", "x"], ["y"], "a.b", False),
    (["-c", "...", "x"], ["x"], None, False),
    ([], [], None, False),
  ],
)
def test_only_what_runs_is_started_again(
  monkeypatch, tmp_path, given, arguments, module, expected
):
  file = tmp_path / "b.py"
  file.touch()
  given = [str(file) if x == "FILE" else x for x in given]
  started = given[0] if given[:1] in (["-"], ["/dev/fd/63"]) else str(file)
  spec = types.SimpleNamespace(name=module) if module else None
  main = types.SimpleNamespace(__spec__=spec)
  monkeypatch.setitem(sys.modules, "__main__", main)
  monkeypatch.setattr(sys, "orig_argv", ["python", *given])
  monkeypatch.setattr(sys, "argv", [started, *arguments])
  assert pages._own_arguments() == (given if expected else None)


@pytest.mark.parametrize(
  ("version", "switch", "expected"),
  [
    ("glibc 2.35", "always [madvise] never", True),
    ("glibc 3.0", "always [madvise] never", True),
    ("glibc 2.34", "always [madvise] never", False),
    ("glibc 2.36", "[always] madvise never", False),
    ("glibc 2.36", "always madvise [never]", False),
    ("glibc 2.36", None, False),
    (None, "always [madvise] never", False),
    ("other", "always [madvise] never", False),
  ],
)
def test_it_is_asked_where_it_helps(
  monkeypatch, tmp_path, version, switch, expected
):
  file = tmp_path / "enabled"
  if switch is not None:
    file.write_text(switch)
  monkeypatch.setattr(pages, "_SWITCH", file)
  monkeypatch.setattr(os, "confstr", lambda _: version)
  assert pages._help() == expected


def test_a_process_that_cannot_be_started_again_goes_on(monkeypatch):
  asked = []

  def refuse(*arguments):
    asked.append(arguments)
    raise PermissionError

  monkeypatch.setattr(pages, "is_chosen", lambda: False)
  monkeypatch.delenv(pages._ASKED, raising=False)
  monkeypatch.setattr(pages, "_help", lambda: True)
  monkeypatch.setattr(pages, "_own_arguments", lambda: ["x.py"])
  monkeypatch.setattr(os, "execve", refuse)
  pages.ask()
  ((path, arguments, environment),) = asked
  assert path == sys.executable
  assert arguments == [sys.executable, "x.py"]
  assert environment["GLIBC_TUNABLES"] == pages.TUNABLES
