#!/usr/bin/env bash
# Trains on a TPU slice, of one host or many, that is asked for as a queued resource. See --help.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
Trains on a Cloud TPU slice.

  launch/tpu_pod.sh COMMAND [--flag=value ...] [-- arguments of srpo_jax.main]

Commands
  create    ask for the slice (a queued resource)
  wait      until the slice is there
  install   copy this checkout to all workers and install it there; copy --data
  run       start training on all workers, in the background
  python    run Python on all workers and wait for its end: encode, generate, ... as "-- -m srpo_jax.encode ..."
  logs      follow the log of a worker
  status    state of the slice, and of the training on each worker
  stop      stop training; the update in progress is finished and saved
  resume    make it train, whatever happened: a slice that was preempted is deleted, asked for again and installed;
            with --watch, stay and go on doing so until the run is complete
  delete    delete the slice and all that is on it

Flags, each also read from the environment: --name from SRPO_NAME, --create-flags from SRPO_CREATE_FLAGS
  --name           of the queued resource                               all commands
  --zone           as us-east5-a                                        all commands
  --project        default: gcloud's own setting                        all commands
  --type           accelerator type, as v4-64, v5litepod-64, v5p-64, v6e-64        create, resume
  --runtime        TPU software version; default: by type                          create, resume
  --slices         slices that train together, default 1                           create, resume
  --spot           cheaper, can be preempted                                       create, resume
  --create-flags   more flags of gcloud, as "--reserved --internal-ips"            create, resume
  --data           gs:// folder that is copied to data/ on each worker             install, resume
  --config         recipe of this checkout, as configs/flux_dev_hps.py             run, resume
  --workdir        gs:// folder of the run; the same one again goes on from there  run, resume
  --worker         whose log, default 0: the one that reports; or all              logs
  --grace          seconds that a stop waits before it kills, default 600          stop, resume
  --poll           seconds between two looks, default 30                           wait, resume
  --watch          see resume                                                      resume
  --ssh-flags      more flags of gcloud's ssh and scp, as "--tunnel-through-iap"   all that reach workers
  --dry-run        print the commands, run nothing                                 all commands

Models and prompts are local files of each worker. With --data=gs://BUCKET/srpo the keys of the config name them as
data/models/flux-dev, data/prompts.txt.

Examples
  export SRPO_NAME=srpo SRPO_ZONE=us-east5-a SRPO_TYPE=v5p-64 SRPO_DATA=gs://BUCKET/srpo
  launch/tpu_pod.sh create --spot && launch/tpu_pod.sh wait && launch/tpu_pod.sh install
  launch/tpu_pod.sh run --config=configs/flux_dev_hps.py --workdir=gs://BUCKET/runs/hps -- \
      --config.model.path=data/models/flux-dev --config.reward.models.hps.path=data/models/hps \
      --config.data.prompts=data/prompts.txt --config.sample.prompts=data/held_out.txt
  launch/tpu_pod.sh logs
  launch/tpu_pod.sh python -- -m srpo_jax.generate --model=data/models/flux-dev --prompt="a fox" \
      --checkpoint=gs://BUCKET/runs/hps --out=gs://BUCKET/images
  launch/tpu_pod.sh resume --spot --watch --config=... --workdir=... -- ...     # flags of create, install and run
  launch/tpu_pod.sh delete
HELP
}

# --- gcloud -----------------------------------------------------------------------------------------------------------

queued_resources() {
  run gcloud compute tpus queued-resources "$@"
}

# Prints the slice's state.
describe() {
  queued_resources describe "${FLAG[name]}" "${PLACE[@]}" '--format=value(state.state)'
}

# Runs a line of shell on workers: remote NODES WORKERS LINE
remote() {
  queued_resources ssh "${FLAG[name]}" "${PLACE[@]}" --quiet "--node=$1" "--worker=$2" "${SSH_FLAGS[@]}" "--command=$3"
}

# Runs worker.sh on all workers.
workers() {
  local missing="{ echo error: nothing is installed here, use install >&2; exit 1; }"
  remote all all "cd ~/srpo_jax 2>/dev/null || $missing; launch/worker.sh $(quote "$@")"
}

# Prints a line "HOST: running" or the like for each worker.
progress() {
  # shellcheck disable=SC2016 # expanded on the worker
  remote all all 'cd ~/srpo_jax 2>/dev/null && launch/worker.sh status || echo "$(uname -n): not installed"'
}

# Prints the slice's state as one word, ABSENT if there is no such queued resource.
state() {
  local answer
  if answer=$(describe 2>&1); then
    # What gcloud has to say besides stands on lines of its own.
    grep -xE '[A-Z_]+' <<<"$answer" || fail "gcloud names no state of ${FLAG[name]}: ${answer//$'\n'/ }"
  elif [[ $answer == *NOT_FOUND* || $answer == *"was not found"* ]]; then
    echo ABSENT
  else
    fail "the state of ${FLAG[name]} is unknown: ${answer//$'\n'/ }"
  fi
}

# --- commands ---------------------------------------------------------------------------------------------------------

create() {
  local nodes tier=()
  local runtime=${FLAG[runtime]:-}
  case $runtime:${FLAG[type]} in
    :v4-*) runtime=tpu-ubuntu2204-base ;;
    :v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    :v5p-*) runtime=v2-alpha-tpuv5 ;;
    :v6e-*) runtime=v2-alpha-tpuv6e ;;
    :*) fail "--type=${FLAG[type]} has no default software version; give --runtime=VERSION" ;;
  esac
  if ((FLAG[slices] > 1)); then
    nodes=("--node-count=${FLAG[slices]}" "--node-prefix=${FLAG[name]}")
  else
    nodes=("--node-id=${FLAG[name]}")
  fi
  if [[ -n ${FLAG[spot]:-} ]]; then tier=(--spot); fi
  queued_resources create "${FLAG[name]}" "${PLACE[@]}" "--accelerator-type=${FLAG[type]}" \
    "--runtime-version=$runtime" "${nodes[@]}" "${tier[@]}" "${CREATE_FLAGS[@]}"
}

wait_until_active() {
  local state
  if dry; then
    comment "every ${FLAG[poll]} s until it prints ACTIVE:"
    describe
    return
  fi
  while true; do
    state=$(state)
    case $state in
      ACTIVE) return ;;
      ABSENT) fail "there is no queued resource ${FLAG[name]} in ${FLAG[zone]}; use create" ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) fail "${FLAG[name]} is $state; use resume, or delete" ;;
    esac
    say "${FLAG[name]} is $state"
    sleep "${FLAG[poll]}"
  done
}

install() {
  pack &&
    queued_resources scp "$ARCHIVE" "${FLAG[name]}:srpo_jax.tar.gz" "${PLACE[@]}" --quiet --node=all --worker=all \
      "${SSH_FLAGS[@]}" &&
    remote all all "mkdir -p ~/srpo_jax && cd ~/srpo_jax && rm -rf configs srpo_jax && tar -xzf ~/srpo_jax.tar.gz" &&
    workers install ${FLAG[data]:+"${FLAG[data]}"}
}

start() {
  training_command
  workers start "${TRAIN[@]}"
}

stop() {
  workers stop "${FLAG[grace]}"
}

delete() {
  queued_resources delete "${FLAG[name]}" "${PLACE[@]}" --force --quiet
}

# One look at the slice and one step towards training. Sets PROGRESS to running, complete or "" (look again).
look() {
  local state told
  PROGRESS=""
  state=$(state)
  if [[ $state != ACTIVE ]]; then
    say "${FLAG[name]} is $state"
    case $state in
      FAILED | SUSPENDED) delete && create ;;
      ABSENT) create ;;
    esac
    return
  fi
  # What all workers say, each thing once.
  if ! told=$(progress | sed 's/.*: //' | sort -u); then
    # A slice that has just been preempted is still called ACTIVE.
    say "a worker does not answer"
    return
  fi
  say "${told//$'\n'/, }"
  case $told in
    running) PROGRESS=running ;;
    "ended with exit code 0") PROGRESS=complete ;;
    *"not installed"*) install || say "the installation failed; trying it again" ;;
    *running*) ;; # When one process ends, jax.distributed ends the others.
    *)
      # 1: a mistake, or a crash that would come again. 74: storage took no checkpoint. Other codes are of signals and
      # lost workers.
      [[ -z $STARTED || ! $'\n'$told$'\n' =~ $'\n'"ended with exit code "(1|74)$'\n' ]] ||
        fail "training failed; see logs"
      STARTED=yes
      if ! { stop && start; }; then say "training did not start; trying it again"; fi
      ;;
  esac
}

resume() {
  STARTED=""
  if dry; then
    describe
    comment "FAILED or SUSPENDED:"
    delete
    comment "the same, and if there is none:"
    create
    wait_until_active
    comment "ACTIVE:"
    progress
    comment "not installed:"
    install
    comment "not running:"
    stop
    start
    return
  fi
  while true; do
    look
    if [[ $PROGRESS == complete || ($PROGRESS == running && -z ${FLAG[watch]:-}) ]]; then return; fi
    sleep "${FLAG[poll]}"
  done
}

# --- command line -----------------------------------------------------------------------------------------------------

parse "create wait install run python logs status stop resume delete" \
  "name zone project type runtime slices create-flags data config workdir worker grace poll ssh-flags" "spot watch" "$@"
require name zone
require_tool gcloud "see https://cloud.google.com/sdk/docs/install"
FLAG[slices]=${FLAG[slices]:-1} FLAG[grace]=${FLAG[grace]:-600} FLAG[poll]=${FLAG[poll]:-30}
require_number slices 1
require_number grace 1
require_number poll 1
PLACE=("--zone=${FLAG[zone]}" ${FLAG[project]:+"--project=${FLAG[project]}"})
read -ra CREATE_FLAGS <<<"${FLAG[create-flags]:-}"
read -ra SSH_FLAGS <<<"${FLAG[ssh-flags]:-}"

case $COMMAND in create | resume) require type ;; esac
case $COMMAND in
  install | resume) [[ ${FLAG[data]:-gs://} == gs://* ]] || fail "--data=${FLAG[data]} is not a gs:// folder" ;;
esac
case $COMMAND in
  run | resume)
    require workdir
    require_recipe "$ROOT"
    [[ ${FLAG[workdir]} == gs://* ]] || fail "--workdir=${FLAG[workdir]} is no gs:// folder; the workers share no disk"
    ;;
esac

case $COMMAND in
  create) create ;;
  wait) wait_until_active ;;
  install) install ;;
  run) start ;;
  python)
    ((${#TRAINING[@]})) || fail "nothing to run; give words of Python, as -- -m srpo_jax.encode --model=..."
    workers python "${TRAINING[@]}"
    ;;
  logs) remote 0 "${FLAG[worker]:-0}" 'tail -n 100 -F ~/srpo_jax/run.log' ;;
  status)
    describe
    progress
    ;;
  stop) stop ;;
  resume) resume ;;
  delete) delete ;;
esac
