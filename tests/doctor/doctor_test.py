from importlib import metadata
import json
import math
import pathlib
import shutil
import subprocess
import sys
import types
import zipfile

import jax
import pytest
import tiny

from kdseg import networks
from kdseg.data.sets import isic2016
from kdseg.data.sets import ph2
from kdseg.deploy import models
from kdseg.doctor import __main__ as doctor
from kdseg.doctor import findings
from kdseg.doctor import installation
from kdseg.doctor import machine
from kdseg.doctor import trial
from kdseg.experiment import workdir as workdir_lib
from kdseg.networks.encoders import pretrained
from kdseg.networks.encoders import vit_weights

OK, WARNING, PROBLEM = findings.Level


@pytest.fixture
def nvidia_smi(monkeypatch):
  """Makes up what nvidia-smi answers, if it is there."""
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

  def answer(text):
    def run(command, **options):
      assert command[0] == "nvidia-smi"
      if text is None:
        raise FileNotFoundError(command[0])
      return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(subprocess, "run", run)

  answer(None)
  return answer


@pytest.fixture
def install(monkeypatch):
  """Makes up which packages are installed, and what kdseg requires."""

  def make_up(requirements, versions):
    def version(name):
      if name not in versions:
        raise metadata.PackageNotFoundError(name)
      return versions[name]

    extras = types.SimpleNamespace(get_all=lambda key: ["draw"])
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(metadata, "metadata", lambda name: extras)
    monkeypatch.setattr(metadata, "version", version)

  return make_up


def only(found):
  [finding] = found
  return finding


# ------------------------------------------------------------------ the command


def test_a_check_that_raises_is_a_problem_and_stops_no_other():
  def fail():
    yield findings.ok("so far so good")
    raise RuntimeError("lost\n  its way")

  checks = {"first": fail, "second": lambda: [findings.ok("fine")]}
  found = list(findings.run(checks))
  assert [(name, x.level) for name, x in found] == [
    ("first", OK),
    ("first", PROBLEM),
    ("second", OK),
  ]
  assert "RuntimeError: lost its way" in found[1][1].text


def test_without_any_package_it_starts_and_names_what_fails():
  code = (
    "import sys\n"
    "sys.modules.update(dict.fromkeys(('jax', 'flax', 'numpy')))\n"
    "from kdseg.doctor import __main__\n"
    "sys.exit(__main__.main([]))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  assert "devices       problem  this check failed" in done.stdout
  assert "workdir       ok" in done.stdout


@pytest.fixture
def found(monkeypatch):
  """Puts findings in the place of those of the machine."""

  def replace(*given):
    checks = {"legs": lambda: given}
    monkeypatch.setattr(doctor, "make_checks", lambda *options: checks)

  return replace


def test_advice_stands_below_and_a_problem_shows_in_the_exit_code(
  found, capsys
):
  found(findings.warning("slow", "run faster"))
  assert doctor.main([]) == 0
  first, second, last = capsys.readouterr().out.splitlines()
  assert first.split() == ["legs", "warning", "slow"]
  assert second.strip() == "-> run faster"
  assert last == "problems: 0, warnings: 1"
  found(findings.problem("none"))
  assert doctor.main([]) == 1


def test_json_holds_every_finding_and_nothing_else(found, capsys):
  found(findings.warning("slow", "run faster"), findings.problem("none"))
  assert doctor.main(["--json"]) == 1
  assert json.loads(capsys.readouterr().out) == [
    {
      "check": "legs",
      "level": "warning",
      "text": "slow",
      "advice": "run faster",
    },
    {"check": "legs", "level": "problem", "text": "none", "advice": ""},
  ]


def test_a_file_name_that_is_no_text_is_printed(found, capsys):
  found(findings.ok("l\udce4sion can be written"))
  assert doctor.main([]) == 0
  assert "l\\udce4sion" in capsys.readouterr().out


def test_this_installation_has_no_problem(tmp_path, capsys):
  code = doctor.main(["--no-self-test", "--workdir", str(tmp_path)])
  printed = capsys.readouterr().out
  assert code == 0, printed
  assert f"jax {jax.__version__}, " in printed
  assert "isic2016-student: loads, " in printed
  assert "self-test" not in printed
  assert not list(tmp_path.iterdir())


# ------------------------------------------------------------- the installation


def test_a_commit_that_is_unknown_is_a_warning(monkeypatch):
  monkeypatch.setattr(workdir_lib, "commit", lambda: "")
  *_, last = installation.check_versions()
  assert last.level == WARNING
  assert "KDSEG_COMMIT" in last.advice


@pytest.mark.parametrize(
  ("version", "level", "text"),
  [
    ("1.10.0rc1+cpu", OK, "core: installed"),
    ("1.1.9", PROBLEM, "core: missing pen>=1.2 (here: 1.1.9)"),
    (None, PROBLEM, "core: missing pen"),
  ],
)
def test_a_package_that_is_missing_or_too_old_is_a_problem(
  install, version, level, text
):
  install(["pen>=1.2"], {"pen": version} if version else {})
  core, _ = installation.check_packages()
  assert (core.level, core.text) == (level, text)


def test_what_an_extra_lacks_is_a_warning_with_the_command(install):
  install(['pen>=1.2; extra == "draw"', 'ink; extra == "draw"'], {"pen": "1.2"})
  core, extra = installation.check_packages()
  assert core.level == OK
  assert (extra.level, extra.text) == (WARNING, "extra draw: missing ink")
  assert extra.advice == "pip install 'kdseg[draw]'"


def test_published_weights_are_whole_missing_or_damaged(monkeypatch):
  def read_lite(kind):
    if kind == "lite2":
      raise ValueError("x.pth: SHA-256 starts with 0, the name says 1.")

  def read_vit():
    raise ImportError("they are not installed: pip install 'kdseg[some]'")

  monkeypatch.setattr(pretrained, "load_efficientnet_lite", read_lite)
  monkeypatch.setattr(vit_weights, "load_vit_small", read_vit)
  whole, damaged, missing = installation.check_weights()
  assert whole.level == OK
  assert damaged.level == PROBLEM
  assert damaged.text.startswith("EfficientNet-Lite2: x.pth: SHA-256")
  assert missing == findings.warning(
    "they are not installed", "pip install 'kdseg[some]'"
  )


def test_a_damaged_model_and_a_package_without_one_are_problems(
  monkeypatch, tmp_path
):
  path = tmp_path / "worn.safetensors"
  path.write_text("nothing")
  monkeypatch.setattr(models, "shipped", lambda: {"worn": path})
  damaged = only(installation.check_models())
  assert damaged.level == PROBLEM
  assert "worn.safetensors" in damaged.text
  monkeypatch.setattr(models, "shipped", dict)
  assert only(installation.check_models()).level == PROBLEM


def write_archives(folder, train=900, without_ph2=""):
  train_ids = [f"ISIC_{90000 + number:07d}" for number in range(train)]
  ids = {"train": train_ids, "test": isic2016.TEST_IDS}
  for part, stem in isic2016.ARCHIVES.items():
    release, _, kind = part.partition("_")
    end = ".jpg" if kind == "image" else "_Segmentation.png"
    with zipfile.ZipFile(folder / f"{stem}.zip", "w") as archive:
      for id_ in ids[release]:
        archive.writestr(f"{stem}/{id_}{end}", b"")
  with zipfile.ZipFile(folder / "PH2Dataset.zip", "w") as archive:
    for id_ in ph2.IDS:
      if id_ != without_ph2:
        archive.writestr(f"PH2Dataset/{id_}.bmp", b"")
        archive.writestr(f"PH2Dataset/{id_}_lesion.bmp", b"")


def test_archives_that_are_whole_are_counted(tmp_path):
  write_archives(tmp_path)
  assert [x[:2] for x in installation.check_archives(tmp_path)] == [
    (OK, "isic2016: pairs: train 900 of 900, test 379 of 379"),
    (OK, "ph2: pairs: test 200 of 200"),
  ]


def test_a_part_to_train_on_is_a_warning_a_part_to_test_on_a_problem(tmp_path):
  write_archives(tmp_path, train=2, without_ph2=ph2.IDS[0])
  train, test = installation.check_archives(tmp_path)
  assert train.level == WARNING
  assert "train 2 of 900" in train.text
  assert f"verify isic2016 --manual-dir '{tmp_path}'" in train.advice
  assert test.level == PROBLEM
  assert ph2.IDS[0] in test.text


def test_archives_that_are_missing_are_a_warning_damaged_ones_a_problem(
  tmp_path,
):
  missing = installation.check_archives(tmp_path)
  assert [x.level for x in missing] == [WARNING, WARNING]
  (tmp_path / "PH2Dataset.zip").write_text("cut off")
  (tmp_path / f"{isic2016.ARCHIVES['train_image']}.zip").touch()
  damaged = installation.check_archives(tmp_path)
  assert [x.level for x in damaged] == [PROBLEM, PROBLEM]
  assert only(installation.check_archives(tmp_path / "gone")).level == PROBLEM


# ------------------------------------------------------------------ the machine


@pytest.mark.parametrize(
  ("driver", "advice"),
  [
    ("580.65.06", 'pip install "jax[cuda13]"'),
    ("579.99", 'pip install "jax[cuda12]"'),
    ("525.60.13", 'pip install "jax[cuda12]"'),
    ("470.82.01", "install a driver of 525 or later"),
  ],
)
def test_a_gpu_that_jax_does_not_see_gets_the_jax_of_its_driver(
  nvidia_smi, driver, advice
):
  nvidia_smi(f"{driver}\n{driver}\n")
  finding = only(machine.find_gpu("", "0.10.2"))
  assert finding.level == PROBLEM
  assert finding.text == "a GPU is present but JAX sees none"
  assert finding.advice.startswith(advice)


def test_a_gpu_whose_jax_is_installed_is_not_told_to_install_it(
  nvidia_smi, install
):
  nvidia_smi("535.104.05\n")
  install([], {"jax-cuda12-plugin": "0.10.2"})
  assert "LD_LIBRARY_PATH" in only(machine.find_gpu("", "0.10.2")).advice


def test_a_gpu_that_the_user_has_hidden_is_a_warning(monkeypatch, nvidia_smi):
  nvidia_smi("580.65.06\n")
  told = only(machine.find_gpu("cpu", ""))
  assert (told.level, told.advice) == (WARNING, "unset JAX_PLATFORMS")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
  hidden = only(machine.find_gpu("", ""))
  assert (hidden.level, hidden.advice) == (
    WARNING,
    "unset CUDA_VISIBLE_DEVICES",
  )


def test_accelerators_are_looked_for_where_jax_uses_none(
  monkeypatch, nvidia_smi
):
  assert only(machine.check_devices()).text == "backend cpu: 4 x cpu"
  nvidia_smi("535.104.05\n")
  _, hidden = machine.check_devices()
  assert "a GPU is present" in hidden.text
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert only(machine.check_devices()).level == OK


def test_a_jax_that_cannot_start_is_a_problem_and_the_gpu_still_looked_for(
  monkeypatch, nvidia_smi
):
  def default_backend():
    raise RuntimeError("no backend")

  monkeypatch.setattr(jax, "default_backend", default_backend)
  nvidia_smi("535.104.05\n")
  first, second = machine.check_devices()
  assert first.level == PROBLEM
  assert first.text == "JAX cannot start on cpu: no backend"
  assert "a GPU is present" in second.text


def test_a_tpu_that_jax_does_not_see_is_a_problem(monkeypatch, tmp_path):
  monkeypatch.setattr(machine, "TPU_CHIPS", (tmp_path,))
  monkeypatch.setattr(machine.os, "environ", {})
  assert not list(machine.find_tpu(""))
  monkeypatch.setenv("TPU_WORKER_ID", "0")
  finding = only(machine.find_tpu(""))
  assert (finding.level, finding.advice) == (PROBLEM, 'pip install "jax[tpu]"')
  assert only(machine.find_tpu("cpu")).level == WARNING
  monkeypatch.setattr(machine, "TPU_CHIPS", (tmp_path / "none",))
  assert not list(machine.find_tpu(""))


def test_little_memory_of_the_host_is_a_warning(monkeypatch, tmp_path):
  path = tmp_path / "meminfo"
  monkeypatch.setattr(machine, "MEMINFO", path)
  assert not list(machine.check_memory())
  for gib, level in ((3, OK), (1, WARNING)):
    path.write_text(
      f"MemTotal:       {16 * 2**20} kB\nMemAvailable:   {gib * 2**20} kB\n"
    )
    finding = only(machine.check_memory())
    assert (finding.level, finding.text) == (
      level,
      f"host: {gib}.0 GiB of 16.0 GiB available",
    )


def test_devices_that_tell_their_memory_are_listed(monkeypatch):
  class Device:
    def memory_stats(self):
      return {"bytes_limit": 8 * 2**30, "bytes_in_use": 2**30}

    def __str__(self):
      return "cuda:0"

  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  *_, device = machine.check_memory()
  assert device.text == "cuda:0: 7.0 GiB of 8.0 GiB available"


@pytest.mark.parametrize(
  ("library", "switch", "value", "hinted"),
  [
    ("glibc 2.35", "always [madvise] never", None, True),
    ("glibc 2.34", "always [madvise] never", None, False),
    ("glibc 2.35", "[always] madvise never", None, False),
    ("glibc 2.35", "always [madvise] never", "glibc.malloc.hugetlb=1", False),
  ],
)
def test_huge_pages_are_hinted_at_where_asking_would_help(
  monkeypatch, tmp_path, library, switch, value, hinted
):
  path = tmp_path / "enabled"
  path.write_text(switch)
  monkeypatch.setattr(machine, "HUGE_PAGE_SWITCH", path)
  monkeypatch.setattr(machine.os, "confstr", lambda name: library)
  environment = {"GLIBC_TUNABLES": value} if value else {}
  monkeypatch.setattr(machine.os, "environ", environment)
  advice = [x.advice for x in machine.check_huge_pages()]
  assert ["GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in x for x in advice] == (
    [True] if hinted else []
  )


def test_little_disk_space_is_a_warning_and_no_folder_is_made(
  monkeypatch, tmp_path
):
  for gib, level in ((9, OK), (1, WARNING)):
    usage = types.SimpleNamespace(free=gib * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
    finding = only(machine.check_workdir(tmp_path / "runs" / "new"))
    assert (finding.level, finding.text) == (
      level,
      f"{tmp_path} can be written, {gib}.0 GiB free",
    )
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
  path = tmp_path / "file"
  path.touch()
  finding = only(machine.check_workdir(path / "run"))
  assert finding.level == PROBLEM
  assert f"{path} cannot be written" in finding.text


@pytest.mark.parametrize(
  ("place", "on", "level"),
  [
    ("{}/cache", True, OK),
    ("gs://bucket/cache", True, OK),
    (None, True, WARNING),
    ("{}/cache", False, WARNING),
    ("{}/file/cache", True, WARNING),
  ],
)
def test_a_compile_cache_that_does_not_work_is_a_warning(
  tmp_path, place, on, level
):
  pathlib.Path(tmp_path / "file").touch()
  names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
  before = [getattr(jax.config, name) for name in names]
  try:
    jax.config.update(names[0], place and place.format(tmp_path))
    jax.config.update(names[1], on)
    assert only(machine.check_compile_cache()).level == level
  finally:
    for name, value in zip(names, before):
      jax.config.update(name, value)


# ---------------------------------------------------------------- the self-test


@pytest.mark.parametrize(
  ("change", "backend", "levels"),
  [
    ({}, "cpu", [OK, OK, OK]),
    ({"loss": math.nan}, "cpu", [PROBLEM, OK, OK]),
    ({"same": False}, "cpu", [OK, PROBLEM, OK]),
    ({"same": False}, "gpu", [OK, WARNING, OK]),
  ],
)
def test_a_step_has_to_be_finite_and_to_repeat_its_bits(
  monkeypatch, change, backend, levels
):
  good = trial.Trial(1.0, True, compile_seconds=2.0, step_seconds=0.005)
  monkeypatch.setattr(trial, "try_step", lambda size: good._replace(**change))
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  found = list(trial.check_training())
  assert [x.level for x in found] == levels
  assert found[2].text == "compiled in 2.0 s, a step takes 5.0 ms"


def test_a_real_step_is_finite_and_repeats_its_bits(monkeypatch):
  monkeypatch.setattr(
    networks, "make_network", lambda name, **options: tiny.Network(**options)
  )
  result = trial.try_step(32)
  assert math.isfinite(result.loss)
  assert result.same
  assert result.compile_seconds > result.step_seconds > 0
