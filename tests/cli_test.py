"""The console script `kdseg`."""

import argparse
import importlib
import os
import re
import subprocess
import sys

import pytest

from kdseg import cli
from kdseg.runtime import commands


def test_help_fits_a_screen_and_names_every_command(capsys):
  assert cli.main([]) == 0
  text = capsys.readouterr().out
  lines = text.splitlines()
  assert len(lines) <= 24
  assert max(map(len, lines)) <= 80
  assert re.findall(r"^  (\w+) {2,}\S", text, re.MULTILINE) == list(
    cli.SUBCOMMANDS
  )


def test_help_imports_nothing_that_takes_long():
  code = (
    "import sys; from kdseg import cli; cli.main(['--help'])\n"
    "assert not {'jax', 'numpy', 'absl', 'flax'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_command_gets_the_nearest(capsys):
  assert cli.main(["exprot"]) == 2
  assert 'did you mean "export"?' in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_the_help_of_a_command_has_an_example(name, capsys):
  module = importlib.import_module(cli.SUBCOMMANDS[name][0])
  text = module.__doc__
  if name != "run":  # whose help is absl's, and begins with the docstring
    with pytest.raises(SystemExit) as stop:
      module.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: kdseg {name}")
    assert not re.search("--[a-z0-9]+_", text), text
  assert re.search(rf"^ +kdseg {name} \S", text, re.MULTILINE), text


@pytest.fixture
def execute(monkeypatch):
  """Runs `kdseg run`; returns the process it becomes, (argv, environment)."""
  monkeypatch.setattr(os, "environ", {"HOME": "/home/a"})

  def execute(*flags):
    become = []

    def execv(path, argv):
      become.extend((argv, dict(os.environ)))
      sys.exit()

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
      cli.main(["run", *flags])
    return become

  return execute


def test_run_is_the_program_with_the_same_flags(execute):
  argv, _ = execute("--config=c.py", "--host-timeout=9", "--config.a-b=(1, 2)")
  assert argv == [
    *(sys.executable, "-m", "kdseg.main"),
    *("--config=c.py", "--host_timeout=9", "--config.a-b=(1, 2)"),
  ]


def test_run_asks_for_huge_pages_unless_the_user_has_chosen(execute):
  assert execute()[1]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
  os.environ["GLIBC_TUNABLES"] = "glibc.malloc.check=3"
  assert execute()[1]["GLIBC_TUNABLES"] == "glibc.malloc.check=3"


def test_flags_are_parsed_with_dashes_and_with_underscores():
  parser = commands.Parser("x", "")
  parser.add_argument("--manual-dir")
  parser.add_argument("rest", nargs="*")
  for flags in (["--manual_dir=a_b"], ["--manual-dir", "a_b"]):
    assert parser.parse_args([*flags, "c_d"]) == argparse.Namespace(
      manual_dir="a_b", rest=["c_d"]
    )
