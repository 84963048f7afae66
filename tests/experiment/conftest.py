"""One whole run, and one cache of compiled programs, for all of these tests."""

import types

import pytest
import tiny
from tiny_run import make_config

from kdseg.experiment import run


@pytest.fixture(scope="session")
def compiled_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def compiled(compiled_dir):
  with tiny.compile_once(compiled_dir):
    yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_dir, compiled_dir):
  """A run that was never stopped: its config, its folder, what `run` returned.

  Tests leave it as it is: see `tiny_run.copy`.
  """
  config = make_config(data_dir)
  workdir = tmp_path_factory.mktemp("finished") / "run"
  with tiny.compile_once(compiled_dir):
    ran = run.run(config, workdir)
  return types.SimpleNamespace(config=config, workdir=workdir, ran=ran)
