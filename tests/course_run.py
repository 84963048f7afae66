"""A run of the smallest networks in a process of its own.

  python tests/course_run.py WORKDIR DATA_DIR [--steps N] [--stop]
      [--coordinator HOST:PORT --hosts N --host I]

For determinism_test and hosts_test. How many devices there are, XLA_FLAGS says.
--stop ends it after the second step of the students. Ends as `kdseg.main` does.
"""

import argparse
import json
import pathlib
import signal
import sys

import tiny
from tiny_run import make_config

from kdseg import networks
from kdseg.experiment import run
from kdseg.runtime import hosts
from kdseg.runtime import preemption


def make_training(steps):
  return {
    # Adam makes full steps of what is rounding noise.
    "optimizer": "sgd",
    "learning_rate": 0.1,
    # Of three steps each.
    "epochs": steps / 3,
    "validate_epochs": 2.0,
    "save_epochs": 2.0,
    "ema_decay": 0.5,
  }


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir", type=pathlib.Path)
  parser.add_argument("data_dir", type=pathlib.Path)
  parser.add_argument("--steps", type=int, default=6)
  parser.add_argument("--stop", action="store_true")
  parser.add_argument("--coordinator", default="")
  parser.add_argument("--hosts", type=int, default=0)
  parser.add_argument("--host", type=int, default=-1)
  options = parser.parse_args()
  # As in a terminal: in the background of a shell it is ignored.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  if options.coordinator:
    hosts.start(options.coordinator, options.hosts, options.host, timeout=30)
  networks.NETWORKS["tiny"] = networks.STUDENTS["tiny"] = tiny.Network
  training = make_training(options.steps)
  teacher = {
    "network": "tiny",
    "options": {"channels": 5},
    "seed": 0,
    "checkpoint": "",
    "precompute": False,
    "training": training,
  }
  config = make_config(
    options.data_dir,
    log_every=1,
    teachers={"teacher_tiny": teacher},
    distil_from=("teacher_tiny",),
    students={"tiny": {"channels": 3}},
    methods={
      "none": {},
      "mbf": {"terms": {"mbf": 1.0}, "taps": ("low",), "generator": "1x1"},
    },
    arms={"tiny": {"methods": ("none", "mbf"), "seeds": (0,)}},
    training=training,
  )
  log = options.workdir / "log.jsonl"

  def students_have_begun():
    lines = log.read_text().splitlines() if log.exists() else []
    return any(json.loads(line)["stage"] == "students" for line in lines)

  try:
    with preemption.on_signals() as asked:
      run.run(
        config,
        options.workdir,
        stop=students_have_begun if options.stop else asked,
      )
  except preemption.StoppedError as error:
    print(error)
    sys.exit(preemption.EXIT_CODE)
  except Exception as error:
    hosts.end(error)


if __name__ == "__main__":
  main()
