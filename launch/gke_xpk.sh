#!/usr/bin/env bash
# Trains on TPU or GPU node pools of a GKE cluster that XPK made. See --help.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
Trains on a GKE cluster with TPU or GPU node pools, through XPK (https://github.com/AI-Hypercomputer/xpk).

  launch/gke_xpk.sh COMMAND [--flag=value ...] [-- arguments of srpo_jax.main]

Commands
  image     build the container image of this checkout and push it
  create    submit the workload; it starts again after preemption, and goes on from the newest checkpoint
  list      workloads of the cluster and their state
  logs      follow the log of process 0
  delete    delete the workload

Flags, each also read from the environment: --cluster from SRPO_CLUSTER, --xpk-flags from SRPO_XPK_FLAGS
  --image         name of the image with its registry and tag               image, create
  --device        image: tpu or cuda; default tpu                           image
  --cluster       of XPK                                                    create, list, delete
  --zone          default: gcloud's own setting                             create, list, delete
  --project       default: gcloud's own setting                             create, list, delete
  --name          of the workload                                           create, logs, delete
  --tpu-type      as v5p-64, v5litepod-64, v6e-64; or ...                   create
  --device-type   ... of GPU nodes, as h100-mega-80gb-8, h200-141gb-8       create
  --slices        TPU slices, default 1                                     create
  --nodes         GPU nodes, default 1                                      create
  --config        recipe of this checkout, as configs/flux_dev_hps.py       create
  --workdir       gs:// folder of the run, or a path of a mounted storage   create
  --restarts      how often it may start again, default 50                  create
  --grace         seconds for saving when it has to go, default 600         create
  --xpk-flags     more flags of xpk, as "--spot --storage=models"           create
  --dry-run       print the commands, run nothing                           all commands

Models and prompts are files of a storage that XPK mounts: attach a bucket once, name the paths below its mount point.
  xpk storage attach models --cluster=CLUSTER --zone=ZONE --type=gcsfuse --bucket=BUCKET --mount-point=/data \
      --size=200 --readonly=false --auto-mount=true

Examples
  export SRPO_CLUSTER=pods SRPO_ZONE=us-east5-a SRPO_IMAGE=REGISTRY/srpo_jax:1
  launch/gke_xpk.sh image
  launch/gke_xpk.sh create --name=hps --tpu-type=v5p-64 --config=configs/flux_dev_hps.py \
      --workdir=gs://BUCKET/runs/hps -- \
      --config.model.path=/data/models/flux-dev --config.reward.models.hps.path=/data/models/hps \
      --config.data.prompts=/data/prompts.txt --config.sample.prompts=/data/held_out.txt
  launch/gke_xpk.sh logs --name=hps
  launch/gke_xpk.sh delete --name=hps
HELP
}

image() {
  case ${FLAG[device]:-tpu} in
    tpu | cuda) ;;
    *) fail "--device=${FLAG[device]} is not known; give tpu or cuda" ;;
  esac
  require_tool docker "see https://docs.docker.com/engine/install"
  pack
  # The folder of the archive is the whole context: weights beside the code stay where they are.
  run docker build --file "$ROOT/launch/Dockerfile" --build-arg "DEVICE=${FLAG[device]:-tpu}" --tag "${FLAG[image]}" \
    "$(dirname "$ARCHIVE")"
  run docker push "${FLAG[image]}"
}

create() {
  local devices words
  training_command
  # XPK puts the command into YAML and through two shells.
  words=$(quote "${TRAIN[@]}")
  [[ $words != *[\"\\\$]* ]] || fail "XPK cannot pass on quotation marks, \\ and \$; leave them out of the arguments"
  # With exec the signal that asks to save reaches Python, not a shell.
  words="exec python $words"
  if [[ -n ${FLAG[tpu-type]:-} ]]; then
    devices=("--tpu-type=${FLAG[tpu-type]}" "--num-slices=${FLAG[slices]:-1}")
  else
    devices=("--device-type=${FLAG[device-type]}" "--num-nodes=${FLAG[nodes]:-1}")
    # What JAX finds by itself on TPUs, XPK tells GPU nodes by these variables.
    # shellcheck disable=SC2016 # expanded in the container
    words+=' --coordinator=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT'
    words+=" --process-id=\$NODE_RANK --process-count=\$NNODES"
  fi
  run xpk workload create "${CLUSTER[@]}" "--workload=${FLAG[name]}" "${devices[@]}" \
    "--docker-image=${FLAG[image]}" "--max-restarts=${FLAG[restarts]:-50}" \
    "--termination-grace-period-seconds=${FLAG[grace]:-600}" "${XPK_FLAGS[@]}" "--command=$words"
}

logs() {
  local first="jobset.sigs.k8s.io/jobset-name=${FLAG[name]},jobset.sigs.k8s.io/job-index=0"
  run kubectl logs --follow --tail=100 --all-containers "--selector=$first,batch.kubernetes.io/job-completion-index=0"
}

parse "image create list logs delete" \
  "image device cluster zone project name tpu-type device-type slices nodes config workdir restarts grace xpk-flags" \
  "" "$@"
case $COMMAND in image | create) require image ;; esac
case $COMMAND in create | logs | delete) require name ;; esac
case $COMMAND in
  create | list | delete)
    require cluster
    require_tool xpk "use pip install xpk"
    CLUSTER=("--cluster=${FLAG[cluster]}")
    if [[ -n ${FLAG[zone]:-} ]]; then CLUSTER+=("--zone=${FLAG[zone]}"); fi
    if [[ -n ${FLAG[project]:-} ]]; then CLUSTER+=("--project=${FLAG[project]}"); fi
    ;;
  logs) require_tool kubectl "use gcloud components install kubectl gke-gcloud-auth-plugin" ;;
esac
if [[ $COMMAND == create ]]; then
  require workdir
  require_recipe "$ROOT"
  [[ ${FLAG[workdir]} == gs://* || ${FLAG[workdir]} == /* ]] ||
    fail "--workdir=${FLAG[workdir]} is lost with its container; give gs://BUCKET/PATH or a path of a mounted storage"
  case ${FLAG[tpu-type]:+tpu}${FLAG[device-type]:+gpu} in
    "") fail "no device; give --tpu-type=v5p-64 or --device-type=h100-mega-80gb-8, or the like" ;;
    tpugpu) fail "two devices; give one of --tpu-type and --device-type" ;;
  esac
  for number in slices nodes grace; do require_number "$number" 1; done
  require_number restarts 0
fi
read -ra XPK_FLAGS <<<"${FLAG[xpk-flags]:-}"

case $COMMAND in
  image) image ;;
  create) create ;;
  list) run xpk workload list "${CLUSTER[@]}" ;;
  logs) logs ;;
  delete) run xpk workload delete "${CLUSTER[@]}" "--workload=${FLAG[name]}" ;;
esac
