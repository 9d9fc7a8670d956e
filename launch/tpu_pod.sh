#!/usr/bin/env bash
# The same command on all workers of a Cloud TPU, whose checkout lies in ~/adco_jax and has its .venv:
#   TPU=my-tpu ZONE=us-east5-b bash launch/tpu_pod.sh --config=configs/adco_r50.py --workdir=/mnt/shared/r50 --config.data.dir=/mnt/data
# The workdir must lie where all workers see it. First: gcloud compute tpus tpu-vm scp, then on all workers
#   python3.12 -m venv .venv && .venv/bin/pip install -r requirements.txt "jax[tpu]"
set -euo pipefail
: "${TPU:?name the TPU with TPU=...}" "${ZONE:?name its zone with ZONE=...}"
printf -v arguments ' %q' "$@"
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd ~/adco_jax && KIND=tpu && . launch/flags.sh &&
  ADCO_JAX_CLUSTER=tpu .venv/bin/python -m adco_jax.main$arguments"
