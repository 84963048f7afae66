import errno
import functools
import json
import operator
import os
import subprocess
import sys

import jax
import pytest

from kdseg.experiment import workdir as workdir_lib
from kdseg.runtime import files

HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
  fcntl.flock(file, fcntl.LOCK_EX)
  print("held", flush=True)
  sys.stdin.read()
"""


def make_config(**changes):
  config = {
    "seed": 0,
    "training": {"epochs": 2.0, "learning_rate": 0.1},
    "methods": {"none": {}, "mbf": {"terms": {"mbf": 1.0}}},
    "arms": {"patch_unet": {"methods": ["none"], "seeds": [0, 1]}},
  }
  for key, value in changes.items():
    *outer, last = key.split(".")
    functools.reduce(operator.getitem, outer, config)[last] = value
  return config


def test_one_process_at_a_time(tmp_path):
  other = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path / ".lock")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  with other:
    assert other.stdout.readline() == b"held\n"
    refusal = pytest.raises(workdir_lib.WorkdirError, match="another process")
    with refusal as error, workdir_lib.locked(tmp_path):
      pass
    assert str(tmp_path) in str(error.value)
    other.stdin.close()
  with workdir_lib.locked(tmp_path):
    pass


def test_a_lock_is_given_back_after_an_error(tmp_path):
  with pytest.raises(KeyError), workdir_lib.locked(tmp_path):
    raise KeyError
  with workdir_lib.locked(tmp_path):
    pass


def test_the_config_is_written_and_read_as_the_same(tmp_path):
  workdir_lib.adopt_config(make_config(), tmp_path)
  path = tmp_path / "config.json"
  assert json.loads(path.read_text())["training"]["epochs"] == 2.0
  before = path.stat().st_mtime_ns, path.read_bytes()
  workdir_lib.adopt_config(make_config(), tmp_path)
  assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_another_value_is_refused_by_its_key(tmp_path):
  workdir_lib.adopt_config(make_config(), tmp_path)
  old = (tmp_path / "config.json").read_bytes()
  other = make_config(**{"training.learning_rate": 0.2})
  with pytest.raises(workdir_lib.WorkdirError) as error:
    workdir_lib.adopt_config(other, tmp_path)
  assert "training.learning_rate was 0.1 and is 0.2 now" in str(error.value)
  assert (tmp_path / "config.json").read_bytes() == old


def test_a_methods_switch_is_refused_where_it_is_in_use(tmp_path):
  workdir_lib.adopt_config(make_config(), tmp_path)
  other = make_config(**{"methods.mbf.terms.mbf": 2.0})
  with pytest.raises(workdir_lib.WorkdirError, match=r"methods\.mbf\.terms"):
    workdir_lib.adopt_config(other, tmp_path)


def test_a_method_does_not_change_by_gaining_a_switch(tmp_path):
  workdir_lib.adopt_config(make_config(), tmp_path)
  other = make_config()
  other["methods"]["mbf"]["heads"] = 2
  with pytest.raises(workdir_lib.WorkdirError, match=r"methods\.mbf\.heads"):
    workdir_lib.adopt_config(other, tmp_path)


def test_arms_and_methods_may_be_added(tmp_path):
  workdir_lib.adopt_config(make_config(), tmp_path)
  more = make_config()
  more["methods"]["kd"] = {"terms": {"kd": 1.0}}
  more["arms"]["enet"] = {"methods": ["none", "kd"], "seeds": [0]}
  more["arms"]["patch_unet"]["seeds"] = [0, 1, 2]
  workdir_lib.adopt_config(more, tmp_path)
  written = json.loads((tmp_path / "config.json").read_text())
  assert set(written["arms"]) == {"patch_unet", "enet"}
  assert written["arms"]["patch_unet"]["seeds"] == [0, 1, 2]


def test_the_data_may_lie_elsewhere_if_they_are_the_same(tmp_path):
  config = make_config()
  config["data"] = {"manual_dir": "here", "data_dir": "", "size": 32}
  workdir_lib.adopt_config(config, tmp_path)
  assert workdir_lib.check_config(config, tmp_path)
  facts = {"train": {"images": 3, "sha256": "abc"}}
  workdir_lib.check_data(tmp_path, facts)
  workdir_lib.write_environment(tmp_path, facts)

  config["data"]["manual_dir"] = "there"
  assert not workdir_lib.check_config(config, tmp_path)
  workdir_lib.adopt_config(config, tmp_path)
  assert workdir_lib.check_config(config, tmp_path)
  workdir_lib.check_data(tmp_path, facts)
  facts = {"train": {"images": 2, "sha256": "abd"}}
  with pytest.raises(
    workdir_lib.WorkdirError,
    match=r"begun with other train images \(3 then, 2 now\)",
  ):
    workdir_lib.check_data(tmp_path, facts)


def refusal(config, tmp_path):
  with pytest.raises(workdir_lib.WorkdirError) as error:
    workdir_lib.adopt_config(config, tmp_path)
  return str(error.value)


def test_a_workdir_of_another_version_is_refused(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(make_config()))
  assert refusal(make_config(), tmp_path) == (
    f"{tmp_path} was written by another version of kdseg, which its "
    "environment.json names: continue it with that one, or choose another "
    "--workdir"
  )


def test_a_key_that_came_or_went_is_said_to_have(tmp_path):
  workdir_lib.adopt_config(make_config(), tmp_path)
  assert refusal(make_config(extra=1), tmp_path) == (
    f"{tmp_path} holds a run of another config: extra was not there and is 1 "
    "now; choose another --workdir, or leave it out"
  )
  less = make_config()
  del less["seed"]
  assert "seed was 0 and is not there now" in refusal(less, tmp_path)


def test_a_damaged_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": ')
  text = refusal(make_config(), tmp_path)
  assert text.startswith(f"{tmp_path}/config.json is damaged (")


def test_a_workdir_that_may_not_be_written_to_is_named(tmp_path, monkeypatch):
  def refuse(path, *arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

  monkeypatch.setattr(workdir_lib, "open", refuse, raising=False)
  with pytest.raises(files.WriteError) as error, workdir_lib.locked(tmp_path):
    pass
  assert str(error.value) == (
    f"{tmp_path} cannot be written: Permission denied. Allow it, then the same "
    "command continues, or choose another folder"
  )


def test_the_batches_of_the_evaluation_may_change_size(tmp_path):
  config = make_config()
  config["evaluation"] = {"batch_size": 8, "tta": "none"}
  workdir_lib.adopt_config(config, tmp_path)
  config["evaluation"]["batch_size"] = 4
  workdir_lib.adopt_config(config, tmp_path)
  written = json.loads((tmp_path / "config.json").read_text())
  assert written["evaluation"]["batch_size"] == 4
  config["evaluation"]["tta"] = "dihedral"
  with pytest.raises(workdir_lib.WorkdirError, match=r"evaluation\.tta"):
    workdir_lib.adopt_config(config, tmp_path)


def test_how_many_seeds_are_updated_at_once_may_come_change_and_go(tmp_path):
  config = make_config()
  workdir_lib.adopt_config(config, tmp_path)
  for at_once in (0, 4):
    config["seeds_at_once"] = at_once
    workdir_lib.adopt_config(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["seeds_at_once"] == at_once
  workdir_lib.adopt_config(make_config(), tmp_path)
  assert "seeds_at_once" not in (tmp_path / "config.json").read_text()


def test_differences_name_nested_keys():
  old = {"a": {"b": 1, "c": 2}, "d": [1]}
  new = {"a": {"b": 1, "c": 3}, "d": [1, 2], "e": 0}
  assert workdir_lib.differences(old, new) == [
    ("a.c", 2, 3),
    ("d", [1], [1, 2]),
    ("e", workdir_lib.ABSENT, 0),
  ]
  assert workdir_lib.differences(old, old) == []


def test_the_environment_says_what_the_numbers_were_made_with(
  tmp_path, monkeypatch
):
  command = "/home/somebody/kdseg/main.py"
  monkeypatch.setattr(sys, "argv", [command, "--workdir", "runs/x"])
  workdir_lib.write_environment(tmp_path, {"train": {"sha256": "abc"}})
  found = json.loads((tmp_path / "environment.json").read_text())
  assert found["versions"]["jax"] == jax.__version__
  assert found["versions"].keys() >= {"flax", "optax", "numpy"}
  assert len(found["devices"]) == 4
  assert found["data"] == {"train": {"sha256": "abc"}}
  # Nobody's home folder goes into a record that is published.
  assert found["argv"] == ["main.py", "--workdir", "runs/x"]


def test_the_commit_is_the_packages_own(monkeypatch, tmp_path):
  here = workdir_lib.commit()
  monkeypatch.chdir(tmp_path)
  assert workdir_lib.commit() == here


def test_a_repository_that_the_package_is_installed_in_has_no_say(
  monkeypatch, tmp_path
):
  package = tmp_path / "lib" / "site-packages" / "kdseg"
  package.mkdir(parents=True)
  for arguments in (
    ["init", "-q"],
    ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x",
     "--allow-empty"],
  ):  # fmt: skip
    subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
  monkeypatch.setattr(
    workdir_lib, "__file__", str(package / "experiment" / "workdir.py")
  )
  monkeypatch.setenv("KDSEG_COMMIT", "0123456789ab")
  assert workdir_lib.commit() == "0123456789ab"
  # The same repository, of which it is a part.
  (tmp_path / "kdseg").mkdir()
  monkeypatch.setattr(
    workdir_lib,
    "__file__",
    str(tmp_path / "kdseg" / "experiment" / "workdir.py"),
  )
  assert len(workdir_lib.commit()) == 12
  assert workdir_lib.commit() != "0123456789ab"


@pytest.mark.parametrize("said", ["", "0123456789ab"])
def test_without_git_the_commit_is_what_the_launcher_says(monkeypatch, said):
  monkeypatch.setenv("PATH", "/nowhere")
  monkeypatch.setenv("KDSEG_COMMIT", said)
  assert workdir_lib.commit() == said
