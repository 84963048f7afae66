"""Trains teachers and students, scores and compares them.

  kdseg run --config configs/quickstart.py --workdir runs/quickstart
  kdseg run --config configs/isic2016.py --workdir runs/isic2016 --plan

The same command again resumes a run that was stopped. `python -m kdseg.main`
takes the same flags, and leaves the environment as it is.
"""

from collections.abc import Sequence
import logging
import re
import sys

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from kdseg.data import archives
from kdseg.experiment import config as config_lib
from kdseg.experiment import estimate
from kdseg.experiment import run
from kdseg.experiment import workdir as workdir_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import hosts
from kdseg.runtime import memory
from kdseg.runtime import names
from kdseg.runtime import preemption
from kdseg.training import loop

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment, a file of configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where everything goes that the experiment makes."
)
flags.register_validator(
  "workdir",
  lambda workdir: workdir != "",
  message="it is empty: name a folder",
)
_PLAN = flags.DEFINE_bool(
  "plan", False, "Measure what is left to do, print it, and do nothing of it."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other hosts of a TPU pod, a SLURM job or an Open MPI one.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of the first of several hosts, elsewhere."
)
_HOSTS = flags.DEFINE_integer("hosts", 0, "How many; with --coordinator.")
_HOST = flags.DEFINE_integer(
  "host", -1, "Which one this is, from 0; with --coordinator."
)
_HOST_TIMEOUT = flags.DEFINE_integer(
  "host_timeout",
  hosts.TIMEOUT_SECONDS,
  "Seconds until a silent host is taken for dead, and the others stop.",
)
# Errors whose message says it all; anything else keeps its traceback.
_EXPECTED = (
  archives.DataError,
  checkpoint.CheckpointError,
  names.UnknownNameError,
  files.WriteError,
  config_lib.ConfigError,
  hosts.HostError,
  memory.OutOfMemoryError,
  loop.DivergedError,
  workdir_lib.WorkdirError,
  ImportError,
)


def main(argv: Sequence[str]) -> None:
  """Runs the experiment of the flags; exit code 1 says why it could not.

  Exit code 75: stopped by SIGTERM or Ctrl-C, to be started again.
  """
  if len(argv) > 1:
    raise app.UsageError(f"what is {argv[1]!r}? Flags only.")
  workdir = _WORKDIR.value or ""  # never: the flag is required
  _show_progress()
  memory.keep_freed()
  try:
    if _DISTRIBUTED.value or _COORDINATOR.value:
      hosts.start(
        _COORDINATOR.value,
        _HOSTS.value,
        _HOST.value,
        timeout=_HOST_TIMEOUT.value,
      )
      if not hosts.is_first():
        # One host speaks; the others only of what is wrong.
        logging.getLogger("kdseg").setLevel(logging.WARNING)
    if _PLAN.value:
      items = estimate.estimate(_CONFIG.value, workdir)
      print(estimate.format_items(items))
      return
    with preemption.on_signals() as stop:
      worked = run.run(_CONFIG.value, workdir, stop=stop)
    if not worked:
      print(f"{workdir} is finished: nothing was changed.")
  except preemption.StoppedError as error:
    print(f"kdseg: {error}", file=sys.stderr)
    sys.exit(preemption.EXIT_CODE)
  except _EXPECTED as error:
    hosts.end(error, f"kdseg: {error}")
  except (Exception, KeyboardInterrupt) as error:
    # Whatever it is, other hosts must not wait.
    hosts.end(error)


def _parse(arguments: list[str]) -> list[str]:
  """Parses the flags; ends with exit code 1 on a key that a config lacks."""
  try:
    return app.parse_flags_with_usage(arguments)
  except AttributeError as error:
    # ml_collections gives the key, and at times the nearest known one.
    said = str(error)
    key, near = (
      re.search(pattern, said) for pattern in (r"\w+", r'Did you mean "(\w+)"')
    )
    if key is None:
      raise
    hint = (
      f'Did you mean "{near[1]}"?' if near else "Its file has those it has."
    )
    sys.exit(
      f'kdseg: the config has no key "{key[0]}", which a flag sets. {hint}'
    )


def _show_progress() -> None:
  """Sends the package's log to the terminal, one line an event."""
  # tfds tells of every option that is not its default, and orbax of every
  # frame of an error which it raises too.
  absl_logging.set_verbosity(absl_logging.FATAL)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  log = logging.getLogger("kdseg")
  log.handlers = [handler]
  log.setLevel(logging.INFO)
  log.propagate = False


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  jax.config.config_with_absl()
  app.run(main, flags_parser=_parse)
