#!/usr/bin/env bash
# Trains on this machine, with all of its accelerators. See --help.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
Trains on one machine, with all of its accelerators.

  launch/local.sh COMMAND [--flag=value ...] [-- arguments of srpo_jax.main]

Commands
  install   make .venv in this checkout, if there is none, and install the package there
  run       train; after an interruption the same command goes on from the newest checkpoint

Flags, each also read from the environment: --workdir from SRPO_WORKDIR
  --device     install: cpu, cuda or tpu; default cpu
  --python     install: the Python of .venv, 3.11 or newer; default python3
  --config     run: recipe, as configs/flux_dev_hps.py
  --workdir    run: folder of the run
  --restarts   run: how often to start again after a failure; default 0
  --dry-run    print the commands, run nothing

Examples
  launch/local.sh install --device=cuda
  launch/local.sh run --config=configs/flux_dev_hps.py --workdir=runs/hps -- \
      --config.model.path=models/flux-dev --config.reward.models.hps.path=models/hps \
      --config.data.prompts=prompts.txt --config.sample.prompts=held_out.txt
HELP
}

install() {
  local extra=""
  case ${FLAG[device]:-cpu} in
    cpu) ;;
    cuda | tpu) extra="[${FLAG[device]}]" ;;
    *) fail "--device=${FLAG[device]} is not known; give cpu, cuda or tpu" ;;
  esac
  local python=${FLAG[python]:-python3}
  require_tool "$python" "install Python 3.11 or newer, or give --python=PATH"
  if dry || [[ ! -x $PYTHON ]]; then
    run "$python" -m venv "$ROOT/.venv"
  fi
  run "$PYTHON" -m pip install --editable "$ROOT$extra"
}

# Runs the training once, passing signals on, and sets STATUS to its exit code and STOPPED if a signal came.
train_once() {
  local child
  "$PYTHON" "${TRAIN[@]}" &
  child=$!
  # A background process of a script does not get Ctrl-C. Training saves on SIGTERM as on Ctrl-C.
  trap 'STOPPED=yes; kill -TERM "$child" 2>/dev/null || true' INT TERM
  while true; do
    STATUS=0
    wait "$child" || STATUS=$?
    # A signal ends "wait", not the training.
    kill -0 "$child" 2>/dev/null || break
  done
  trap - INT TERM
}

train() {
  local restarts=${FLAG[restarts]:-0} failures=0
  training_command
  dry || [[ -x $PYTHON ]] || fail "there is no $PYTHON; use launch/local.sh install"
  if dry; then
    run "$PYTHON" "${TRAIN[@]}"
    comment "again after a failure, at most $restarts times"
    return
  fi
  STOPPED=""
  while true; do
    train_once
    if ((STATUS == 0)) || [[ -n $STOPPED ]] || ((failures == restarts)); then exit "$STATUS"; fi
    failures=$((failures + 1))
    say "training ended with exit code $STATUS; starting it again ($failures of $restarts)"
  done
}

parse "install run" "device python config workdir restarts" "" "$@"
require_number restarts 0
PYTHON=$ROOT/.venv/bin/python
case $COMMAND in
  install) install ;;
  run)
    require workdir
    require_recipe "$PWD"
    train
    ;;
esac
