"""Checks the machine and the installation, and says what to do.

  kdseg doctor
  kdseg doctor --manual-dir ARCHIVES --workdir runs/mine --json

Each finding is one of: ok; warning, where something optional is missing or
slow; problem. What to do about it follows an arrow. Nothing is installed,
downloaded or left behind. The self-test compiles one training step and runs it
twice from the same state. The exit code is 1 if there is a problem.
"""

import collections
from collections.abc import Sequence
import functools
import io
import json
import pathlib
import sys

from kdseg.doctor import findings
from kdseg.doctor import installation
from kdseg.doctor import machine
from kdseg.doctor import trial
from kdseg.runtime import commands


def make_checks(
  workdir: pathlib.Path, manual_dir: pathlib.Path | None, self_test: bool
) -> dict[str, findings.Check]:
  """Returns the checks by name, in the order in which they run.

  Args:
    workdir: where a run would write.
    manual_dir: with the official archives, or None.
    self_test: whether a training step is taken.
  """
  checks: dict[str, findings.Check] = {
    "versions": installation.check_versions,
    "packages": installation.check_packages,
    "devices": machine.check_devices,
    "memory": machine.check_memory,
    "huge pages": machine.check_huge_pages,
    "workdir": functools.partial(machine.check_workdir, workdir),
    "compile cache": machine.check_compile_cache,
    "weights": installation.check_weights,
    "models": installation.check_models,
  }
  if manual_dir is not None:
    checks["archives"] = functools.partial(
      installation.check_archives, manual_dir
    )
  if self_test:
    checks["self-test"] = trial.check_training
  return checks


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = commands.Parser("doctor", __doc__)
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    default=pathlib.Path(),
    help="where a run would write; the current folder if unset",
  )
  parser.add_argument(
    "--manual-dir", type=pathlib.Path, help="folder of the official archives"
  )
  parser.add_argument(
    "--no-self-test",
    dest="self_test",
    action="store_false",
    help="take no training step",
  )
  parser.add_argument(
    "--json", action="store_true", help="print the findings as JSON"
  )
  options = parser.parse_args(arguments)
  if isinstance(sys.stdout, io.TextIOWrapper):
    # The names of files need not be text.
    sys.stdout.reconfigure(errors="backslashreplace")
  checks = make_checks(options.workdir, options.manual_dir, options.self_test)
  found = []
  for name, finding in findings.run(checks):
    found.append((name, finding))
    if not options.json:
      print(findings.as_text(name, finding), flush=True)
  levels = collections.Counter(finding.level for _, finding in found)
  problems = levels[findings.Level.PROBLEM]
  warnings = levels[findings.Level.WARNING]
  if options.json:
    print(json.dumps([findings.as_json(*pair) for pair in found], indent=2))
  else:
    print(f"problems: {problems}, warnings: {warnings}")
  return 1 if problems else 0


if __name__ == "__main__":
  sys.exit(main())
