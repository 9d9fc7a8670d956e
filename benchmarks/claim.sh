#!/usr/bin/env bash
# AdCo against every method that its paper names: all tables of docs/methods.md that are measured on photographs.
#
#   bash benchmarks/claim.sh PART DATA.npz [MINUTES]     DATA: as configs/adco_cifar10_r18.py wants it
#
# small: ResNet-18 of a quarter of the width, 10,000 images, 5 epochs, 13 methods and controls, 3 seeds, one recipe and own ones
# all:   the same network, all images, 20 epochs, one seed, five methods at the temperatures that `small` chose
# full:  the whole network, 200 epochs, one seed: supervised, the authors' MoCo demo, AdCo with one view as query, then with
#        both, MoCo, SimCLR, BYOL, SwAV
#
# MINUTES: leaves with status 75 after so long, and the same command goes on; what is over is in benchmarks/results/ and is
# never done again. Of an H200 with 16 cores, PARALLEL=11 for `small` and 2 for `full` at the same time fill it.
set -euo pipefail
if [ $# -lt 2 ] || [ ! -f "$2" ]; then
  echo "error: bash benchmarks/claim.sh small|all|full DATA.npz [MINUTES]: DATA is no file" >&2
  exit 2
fi
part=$1 data=$(realpath "$2") minutes=${3:-0}
cd "$(dirname "$0")/.."
export TF_CPP_MIN_LOG_LEVEL=3 XLA_PYTHON_CLIENT_PREALLOCATE=false
if [ -z "${PYTHONPATH:-}" ]; then export PYTHONPATH=$PWD; fi
compare() {
  "${PYTHON:-python}" -m benchmarks.head_to_head --data="$data" --minutes="$minutes" --runs="runs/$1" --name="head_to_head-$1" "${@:2}"
}
quarter=(--batch=128 --width=0.25 --parallel="${PARALLEL:-2}" --set=--config.eval.max_images=6000)
case $part in
small)
  compare cifar10k "${quarter[@]}" --images=10000 --epochs=5 --rows=2048 --set=--config.eval.every_epochs=1 \
    --methods=adco,still,moco,simclr,byol,random,mochi,swav,mocov3,caco,query_softmax,moco_in_batch,supervised
  ;;
all)
  compare cifar10 "${quarter[@]}" --epochs=20 --rows=4096 --seeds=1 --kinds=equal --set=--config.eval.every_epochs=2 \
    --like=benchmarks/results/head_to_head-cifar10k.json --methods=adco,still,moco,simclr,byol
  ;;
full)
  compare cifar10_full --epochs=200 --seeds=1 --kinds=own --parallel="${PARALLEL:-2}" --set=--config.eval.every_epochs=20 \
    --configs=supervised_cifar10,moco_cifar10_demo,adco_cifar10_r18 --methods=adco,moco,simclr,byol,swav
  ;;
*)
  echo "error: $part: use small, all or full" >&2
  exit 2
  ;;
esac
