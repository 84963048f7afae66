import logging
import pathlib
import subprocess
import sys

from absl import app
from absl import flags
import pytest

from kdseg import main
from kdseg.data import archives
from kdseg.experiment import config as config_lib
from kdseg.experiment import estimate
from kdseg.experiment import run as run_lib
from kdseg.experiment import workdir as workdir_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import files
from kdseg.runtime import memory
from kdseg.runtime import names
from kdseg.runtime import preemption
from kdseg.training import loop

ROOT = pathlib.Path(__file__).parents[1]
# ml_collections loads a config by a method that Python wants to retire.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

CONFIG = "--config=configs/quickstart.py"


@pytest.fixture
def started(monkeypatch):
  """Runs `main` with flags in this process; the experiment is a stand-in."""
  monkeypatch.chdir(ROOT)
  calls = []
  log = logging.getLogger("kdseg")
  before = log.handlers[:], log.level, log.propagate

  def start(*arguments, outcome=True):
    def run(config, workdir, *, stop):
      del stop
      calls.append((config, workdir))
      if isinstance(outcome, Exception):
        raise outcome
      return outcome

    monkeypatch.setattr(run_lib, "run", run)
    monkeypatch.setattr(sys, "argv", ["kdseg.main", *arguments])
    main.main(flags.FLAGS(sys.argv))
    return calls[-1]

  yield start
  flags.FLAGS.unparse_flags()
  log.handlers, log.level, log.propagate = before


def test_flags_change_the_config(started):
  config, workdir = started(
    CONFIG,
    "--workdir=runs/x",
    "--config.training.learning_rate=0.25",
    "--config.arms.patch_unet_12k.seeds=(0, 1)",
  )
  assert workdir == "runs/x"
  assert config.training.learning_rate == 0.25
  assert config.arms.patch_unet_12k.seeds == (0, 1)
  assert config.data.name == "synthetic"


def test_a_finished_workdir_is_said_to_be_so(started, capsys):
  started(CONFIG, "--workdir=runs/x", outcome=False)
  assert "runs/x is finished: nothing was changed." in capsys.readouterr().out


def test_a_plan_is_printed_and_nothing_run(started, capsys, monkeypatch):
  seen = []
  monkeypatch.setattr(
    main.estimate,
    "estimate",
    lambda config, workdir: (
      seen.append(workdir) or [estimate.Item("x", 2, 3.0)]
    ),
  )
  with pytest.raises(IndexError):  # `run` was not called
    started(CONFIG, "--workdir=runs/x", "--plan")
  assert seen == ["runs/x"]
  assert "2 x    3.000 s" in capsys.readouterr().out


def test_a_run_says_nothing_of_the_kind(started, capsys):
  started(CONFIG, "--workdir=runs/x", outcome=True)
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  "error",
  [
    archives.DataError("no such folder"),
    checkpoint.CheckpointError("another network"),
    names.UnknownNameError("did you mean"),
    files.WriteError("x cannot be written: the disk is full"),
    config_lib.ConfigError("no such method"),
    memory.OutOfMemoryError("students: not enough memory"),
    loop.DivergedError("no arm is left"),
    workdir_lib.WorkdirError("in use"),
    ImportError("pip install it"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_an_expected_error_is_one_line(started, error):
  with pytest.raises(SystemExit) as stop:
    started(CONFIG, "--workdir=runs/x", outcome=error)
  assert stop.value.code == f"kdseg: {error}"


def test_a_run_that_was_stopped_can_be_told_from_one_that_failed(
  started, capsys
):
  with pytest.raises(SystemExit) as stop:
    started(
      CONFIG, "--workdir=x", outcome=preemption.StoppedError("after step 3")
    )
  assert stop.value.code == 75
  assert "kdseg: after step 3" in capsys.readouterr().err


def test_a_fault_keeps_its_traceback(started):
  with pytest.raises(ZeroDivisionError):
    started(CONFIG, "--workdir=runs/x", outcome=ZeroDivisionError())


def test_a_word_that_is_no_flag_is_asked_about(started):
  with pytest.raises(app.UsageError, match="what is 'quickstart'"):
    started(CONFIG, "--workdir=runs/x", "quickstart")


def test_progress_goes_to_the_terminal(started, capsys):
  started(CONFIG, "--workdir=runs/x")
  logging.getLogger("kdseg").info("step 3 of 4")
  assert capsys.readouterr().err.endswith(" step 3 of 4\n")


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "kdseg.main", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_no_workdir_is_not_the_folder_one_is_in():
  done = command(CONFIG, "--workdir=")
  assert done.returncode == 1
  assert "--workdir=: it is empty: name a folder" in done.stderr


def test_a_misspelt_key_stops_with_a_suggestion(tmp_path):
  done = command(
    CONFIG, f"--workdir={tmp_path}/x", "--config.training.learning_rat=0.1"
  )
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == (
    'kdseg: the config has no key "learning_rat", which a flag sets. Did you '
    'mean "learning_rate"?'
  )
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "x").exists()


def test_missing_data_stop_with_one_line(tmp_path):
  done = command(
    CONFIG,
    f"--workdir={tmp_path}/x",
    "--config.data.name=folder",
    "--config.data.tests=('folder',)",
    f"--config.data.manual_dir={tmp_path}/nowhere",
    f"--config.data.data_dir={tmp_path}",
  )
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert last.startswith(f"kdseg: manual_dir {tmp_path}/nowhere is no folder")
  assert "Traceback" not in done.stderr
