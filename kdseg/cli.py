"""The console script `kdseg`: one command for everything.

A subcommand is imported only once it is chosen, so that `kdseg --help` answers
at once.
"""

from collections.abc import Sequence
import importlib
import os
import sys

from kdseg.runtime import commands
from kdseg.runtime import names

# Each module has main(arguments), which returns an exit code or None.
SUBCOMMANDS = {
  "run": ("kdseg.main", "train teachers and students, score and compare them"),
  "predict": ("kdseg.predict", "write the lesion masks of images"),
  "export": ("kdseg.deploy.export", "write a network as ONNX and LiteRT files"),
  "page": ("kdseg.deploy.page", "make a web page that segments images"),
  "report": ("kdseg.report.__main__", "make the tables of finished runs again"),
  "data": ("kdseg.data.__main__", "verify or prepare a data set"),
  "score": ("kdseg.deploy.score", "score exported files on the test sets"),
  "weights": ("kdseg.deploy.weights", "write a trained network to one file"),
  "doctor": ("kdseg.doctor.__main__", "check the machine and the installation"),
}


def _usage() -> str:
  rows = [f"  {name:<9}{text}" for name, (_, text) in SUBCOMMANDS.items()]
  return "\n".join(
    (
      "usage: kdseg COMMAND [ARGUMENT...]",
      "",
      *rows,
      "",
      "  kdseg predict isic2016-student photo.jpg --out masks",
      "  kdseg run --config configs/quickstart.py --workdir runs/quickstart",
      "",
      "kdseg COMMAND --help explains a command.",
    )
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a subcommand; returns its exit code.

  Args:
    arguments: of the process if None.
  """
  name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
  if name in ("-h", "--help", "help"):
    print(_usage())
    return 0
  try:
    names.check_known("command", [name], SUBCOMMANDS)
  except names.UnknownNameError as error:
    print(f"kdseg: {error}", file=sys.stderr)
    return 2
  module = SUBCOMMANDS[name][0]
  if name == "run":
    commands.ask_for_huge_pages(os.environ)
    # In this process's place, so that it is what a signal reaches.
    flags = commands.respell(rest, "-", "_")
    os.execv(sys.executable, [sys.executable, "-m", module, *flags])
  return importlib.import_module(module).main(rest) or 0
