#!/usr/bin/env bash
# What launch/tpu_pod.sh does on a worker, in the copy of the checkout that lies there:
#   worker.sh install [gs://DATA]     worker.sh start WORDS OF PYTHON...     worker.sh stop SECONDS     worker.sh status
#   worker.sh python WORDS OF PYTHON...
# Files: run.log, run.pid of the newest training, run.exit with its exit code once it has ended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

installed() { [[ -e .venv/.installed ]]; }

alive() { [[ -s run.pid && ! -e run.exit ]] && kill -0 "$(<run.pid)" 2>/dev/null; }

install() {
  rm -f .venv/.installed
  # uv brings a Python that is new enough; that of the TPU images is not.
  local uv=$HOME/.local/bin/uv
  [[ -x $uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -x .venv/bin/python ]] || "$uv" venv --python 3.12 .venv
  "$uv" pip install --python .venv/bin/python --editable '.[tpu,gcs]'
  if (($#)); then
    mkdir -p data
    gcloud storage rsync --recursive "$1" data
  fi
  touch .venv/.installed
}

ready() {
  if ! installed; then
    echo "error: the installation here is not complete; use launch/tpu_pod.sh install" >&2
    exit 1
  fi
  if alive; then
    echo "error: training runs here already; use launch/tpu_pod.sh stop" >&2
    exit 1
  fi
}

python() {
  ready
  exec .venv/bin/python "$@"
}

start() {
  ready
  rm -f run.exit run.pid
  # A session of its own outlives the connection and can be signalled as a whole.
  nohup setsid launch/worker.sh supervise "$@" >>run.log 2>&1 </dev/null &
  # From then on a stop is heard, and noted.
  for ((i = 0; i < 300; i++)); do
    [[ -e run.pid ]] && return
    sleep 0.1
  done
  echo "error: training did not start within 30 seconds; see run.log" >&2
  exit 1
}

supervise() {
  local status=0
  trap : TERM # is for Python; this shell stays to note how it ended
  echo $$ >run.pid.new
  mv run.pid.new run.pid
  .venv/bin/python "$@" || status=$?
  echo "$status" >run.exit
}

stop() {
  alive || return 0
  local pid
  pid=$(<run.pid)
  kill -TERM -- "-$pid"
  for ((i = 0; i < $1; i++)); do
    alive || return 0
    sleep 1
  done
  kill -KILL -- "-$pid"
  for ((i = 0; i < 100; i++)); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
}

status() {
  local told
  if ! installed; then
    told="not installed"
  elif alive; then
    told="running"
  elif [[ -e run.exit ]]; then
    told="ended with exit code $(<run.exit)"
  elif [[ -e run.pid ]]; then
    told="ended without a word"
  else
    told="not started"
  fi
  echo "$(uname -n): $told"
}

"$@"
