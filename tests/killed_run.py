"""A small run in a process of its own, for kill_test and hosts_test.

  python tests/killed_run.py WORKDIR DATA_DIR [--die-at-rename N]
      [--coordinator HOST:PORT --hosts N --host I]

Every file that has to be whole gets its name by a rename, so that dying at one
is dying in the middle of a save. Ends as `kdseg.main` does.
"""

import argparse
import logging
import os
import pathlib
import signal
import sys

import jax
from tiny_run import FROZEN
from tiny_run import TEACHER
from tiny_run import make_config

from kdseg.experiment import run
from kdseg.runtime import hosts
from kdseg.runtime import preemption


def die_at_rename(number):
  """Makes the process kill itself before its rename of that number, from 1."""
  count = 0

  def watch(rename):
    def watched(*arguments, **keywords):
      nonlocal count
      count += 1
      if count == number:
        print("killed: at a rename", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
      return rename(*arguments, **keywords)

    return watched

  # pathlib's methods call these.
  os.rename, os.replace = watch(os.rename), watch(os.replace)
  return lambda: count


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir", type=pathlib.Path)
  parser.add_argument("data_dir", type=pathlib.Path)
  parser.add_argument("--die-at-rename", type=int, default=0)
  parser.add_argument("--coordinator", default="")
  parser.add_argument("--hosts", type=int, default=0)
  parser.add_argument("--host", type=int, default=-1)
  options = parser.parse_args()
  if options.coordinator:
    hosts.start(options.coordinator, options.hosts, options.host, timeout=10)
  logging.basicConfig(stream=sys.stdout, format="%(message)s", force=True)
  logging.getLogger("kdseg").setLevel(logging.INFO)
  # Half of a run this small would be compilation.
  jax.config.update("jax_compilation_cache_dir", str(options.data_dir / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  config = make_config(
    options.data_dir,
    # One whose answers are kept, and one that is asked for every batch.
    teachers={
      name: teacher | {"training": teacher["training"] | {"epochs": 10.0}}
      for name, teacher in (("teacher_vit", FROZEN), ("teacher_unet", TEACHER))
    },
    distil_from=("teacher_vit",),
    precompute_teacher=True,
    training={
      "epochs": 30.0,
      "learning_rate": 3e-3,
      "ema_decay": 0.5,
      "validate_epochs": 1.0,
      "save_epochs": 1.0,
    },
  )
  renames = die_at_rename(options.die_at_rename)
  try:
    with preemption.on_signals() as stop:
      run.run(config, options.workdir, stop=stop)
  except preemption.StoppedError as error:
    print(error)
    sys.exit(preemption.EXIT_CODE)
  except Exception as error:
    hosts.end(error)
  finally:
    print(f"renames: {renames()}")


if __name__ == "__main__":
  main()
