#!/usr/bin/env bash
# Fresh machine -> an encoder pre-trained on handwritten digits, probed and reported. No GPU needed.
# A second call resumes, or says that all is done; nothing is overwritten. Arguments go to the training.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh requirements.txt

workdir=runs/adco_digits
for word in "$@"; do
  case $word in --workdir=*) workdir=${word#--workdir=} ;; esac
done
run="python -m adco_jax.main"
$run --config=configs/adco_digits.py --workdir="$workdir" "$@"
$run --config=configs/knn.py --config.pretrained="$workdir"
$run --config=configs/linear.py:small --config.pretrained="$workdir"
