#!/usr/bin/env bash
# Several processes on this machine, as a cluster would start them: bash launch/local.sh 2 --config=configs/adco_digits.py ...
# Every process gets the same arguments. Ctrl-C reaches all; the exit status is the first that is not 0.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: usage: bash launch/local.sh PROCESSES --config=FILE ..." >&2
  exit 2
fi
export JAX_NUM_PROCESSES=$1
shift
python=.venv/bin/python
[ -x "$python" ] || python=python
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-localhost:$port}

ids=()
for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
  JAX_PROCESS_ID=$i "$python" -m adco_jax.main "$@" &
  ids+=($!)
done
trap 'kill -TERM "${ids[@]}" 2>/dev/null || true' TERM INT
status=0
for id in "${ids[@]}"; do
  while kill -0 "$id" 2>/dev/null; do wait "$id" || true; done  # a trap interrupts wait
  wait "$id" && one=0 || one=$?
  if [ "$status" = 0 ]; then status=$one; fi
done
exit "$status"
