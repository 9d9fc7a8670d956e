#!/usr/bin/env bash
# All GPUs of this machine in one process, started again after preemption and hangs:
#   bash launch/gpu_node.sh --config=configs/adco_r50.py --config.data.dir=/datasets/imagenet
# PYTHON names the interpreter (default: the checkout's .venv, else python).
set -euo pipefail
cd "$(dirname "$0")/.."
export KIND=gpu
. launch/flags.sh
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python

status=0 id='' stopped=''
trap 'stopped=1; kill -TERM "$id" 2>/dev/null || true' TERM INT  # a container's stop reaches the script alone
for ((start = 0; start < 200; start++)); do
  if [ -n "$stopped" ]; then exit "$status"; fi
  "$python" -m adco_jax.main "$@" &
  id=$!
  while kill -0 "$id" 2>/dev/null; do wait "$id" || true; done  # a trap interrupts wait
  wait "$id" && exit 0 || status=$?
  # 42: a signal, all is saved and whoever sent it wants the machine; 43: hung; above 128: killed by the system.
  if [ "$status" -ne 43 ] && [ "$status" -le 128 ]; then exit "$status"; fi
  echo "ended with $status, starting again" >&2
  sleep 10
done
exit "$status"
