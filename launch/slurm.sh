#!/usr/bin/env bash
# Trains on the GPU nodes of a SLURM cluster. See --help.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
Trains on GPU nodes of a SLURM cluster: writes a batch script and submits it.

  launch/slurm.sh [--flag=value ...] [-- arguments of srpo_jax.main]

One process drives one GPU, as JAX expects under SLURM. Before the time limit the run is saved and the job put back into
the queue; after preemption or the loss of a node SLURM does that. All of it goes into one log. Checkout, models and
workdir have to lie on a file system that all nodes see; install once with launch/local.sh install --device=cuda.

Flags, each also read from the environment: --nodes from SRPO_NODES, --sbatch-flags from SRPO_SBATCH_FLAGS
  --nodes          number of nodes
  --gpus           GPUs of a node, as 8 or h100:8
  --time           time limit of one stay on the nodes, as 24:00:00
  --config         recipe, as configs/flux_dev_hps.py
  --workdir        folder of the run
  --name           of the job, default srpo
  --cpus           CPU cores for each GPU, default 8
  --grace          seconds before the time limit at which to save and stop, default 600
  --logs           existing folder of the logs, default: this one
  --python         default: .venv/bin/python of this checkout
  --sbatch-flags   more flags of sbatch, as "--partition=gpu --account=lab --mem=0"
  --dry-run        print the command with its batch script, run nothing

Examples
  launch/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 --config=configs/flux_dev_hps.py --workdir=runs/hps \
      --sbatch-flags="--partition=gpu" -- \
      --config.model.path=models/flux-dev --config.reward.models.hps.path=models/hps \
      --config.data.prompts=prompts.txt --config.sample.prompts=held_out.txt
  squeue --me                    # its state
  tail -F srpo-JOB.log           # its log
  scancel JOB                    # its end; the same command goes on from the newest checkpoint
HELP
}

# Prints the batch script.
batch_script() {
  training_command
  cat <<SCRIPT
#!/bin/bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=${FLAG[nodes]}
#SBATCH --gres=gpu:${FLAG[gpus]}
#SBATCH --ntasks-per-node=${FLAG[gpus]##*:}
#SBATCH --cpus-per-task=$CPUS
#SBATCH --time=${FLAG[time]}
#SBATCH --signal=TERM@$GRACE
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$LOGS/%x-%j.log

# The signal goes to the processes of srun, which save, and not to this script.
status=0
srun --kill-on-bad-exit=1 --cpus-per-task=$CPUS \\
  $(quote "$PYTHON" "${TRAIN[@]}") || status=\$?
# 143 = 128 + SIGTERM: saved before the end of its time.
if ((status == 143)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
SCRIPT
}

parse "" "nodes gpus time config workdir name cpus grace logs python sbatch-flags" "" "$@"
require nodes gpus time workdir
require_number nodes 1
require_number cpus 1
require_number grace 1
[[ ${FLAG[gpus]} =~ ^([A-Za-z0-9_.-]+:)?[1-9][0-9]*$ ]] || fail "--gpus=${FLAG[gpus]} is not like 8 or h100:8"
for flag in name time logs; do
  [[ ${FLAG[$flag]:-} != *[[:space:]]* ]] || fail "--$flag=${FLAG[$flag]} holds white space, which #SBATCH lines cannot"
done
require_recipe "$PWD"
require_tool sbatch "run this on a login node of the cluster"
NAME=${FLAG[name]:-srpo} CPUS=${FLAG[cpus]:-8} GRACE=${FLAG[grace]:-600} LOGS=${FLAG[logs]:-.}
PYTHON=${FLAG[python]:-$ROOT/.venv/bin/python}
dry || [[ -x $PYTHON ]] || fail "there is no $PYTHON; use launch/local.sh install --device=cuda, or give --python"
# SLURM makes no folders: a job whose log has no place fails without a word.
dry || [[ -d $LOGS ]] || fail "--logs=$LOGS is not a folder; make it"
read -ra SBATCH_FLAGS <<<"${FLAG[sbatch-flags]:-}"

if dry; then
  printf "%s <<'SCRIPT'\n%s\nSCRIPT\n" "$(quote sbatch "${SBATCH_FLAGS[@]}")" "$(batch_script)"
else
  batch_script | sbatch "${SBATCH_FLAGS[@]}"
fi
