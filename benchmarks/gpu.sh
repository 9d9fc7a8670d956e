#!/usr/bin/env bash
# All that the owner of a GPU wants to know, in one call of at most nine minutes:
#
#   bash benchmarks/gpu.sh [DIR]        writes DIR/table.txt, table.json (every number) and log.txt; default runs/gpu
#
# r50_256, cifar_256, vits16_256, r50_1024, cifar_1024: our step against PyTorch's best (benchmarks/against_torch.py; a ViT
# is timm's); kernels: the twenty most expensive ones; resume: is a killed run the straight one, with deterministic=True;
# start: from nothing to the first step, with an empty and with a filled cache of compiled programs. torch.compile alone
# takes 90 seconds for ResNet-50, so that batch 1024 comes last and mostly in a second call. In the order of their worth:
# a part begins only if enough of BUDGET (seconds, default 540) is left, and a part that fails is a line of the table.
# PARTS="r50_1024 cifar_1024" runs these alone: what a first call left out, say, into another DIR. SIZES=tiny: minutes on
# a CPU. PYTHON: default python3. Neither TensorFlow nor data is needed.
set -uo pipefail

out=$(realpath -m "${1:-$(dirname "$0")/../runs/gpu}")
cd "$(dirname "$0")/.." || exit 2
if [ -e "$out/table.txt" ]; then
  echo "error: $out: holds a table already; name another folder" >&2
  exit 2
fi
mkdir -p "$out" || exit 2
python=${PYTHON:-python3} budget=${BUDGET:-540} sizes=${SIZES:-full}
parts=${PARTS:-r50_256 cifar_256 kernels resume start vits16_256 r50_1024 cifar_1024}
work=$(mktemp -d)
# Programs of one part are found again by the next; nothing of the user's cache is read or written.
export JAX_COMPILATION_CACHE_DIR="$work/compiled" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

finish() {
  $python -m benchmarks.gpu_table "$work" "$out"
  rm -rf "$work"
}
trap finish EXIT

# part NAME LEAST MOST WORDS...: runs `python -m WORDS` for at most MOST seconds if LEAST are left; LIMIT in a word is what it may take.
part() {
  local name=$1 least=$2 left=$((budget - SECONDS - 12)) status=- start=$SECONDS
  local limit=$((left < $3 ? left : $3))
  [[ " $parts " == *" $name "* ]] || return 0
  if ((left >= least)); then
    mkdir "$work/$name"
    shift 3
    echo "=== $name: $*" >>"$out/log.txt"
    timeout --kill-after=5 "$limit" "$python" -m "${@//LIMIT/$((limit - 8))}" >"$work/$name/log" 2>&1
    status=$?
    cat "$work/$name/log" >>"$out/log.txt"
  fi
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) | tee -a "$work/parts.tsv"
}

torch() { # NAME LEAST MOST CONFIG BATCH VARIANTS STEPS
  part "$1" "$2" "$3" benchmarks.against_torch --out="$work/$1" --seconds=LIMIT --config="$4" --ours="$ours" \
    --config.data.batch_size="$5" --torch="$6" --steps="$7" --rounds="$rounds" "${@:8}"
}

if [ "$sizes" = tiny ]; then
  rounds=2 ours=plain least=(1 1 1 1 1 1 1 1) small=(--config.model.arch=resnet8 --config.model.width=.25 --config.bn.group_size=8 --config.method.bank.size=64
    "--config.views.crops=((16,.5,1.),(16,.5,1.))")
  small_vit=(--config.model.width=.25 --config.model.vit.patch=8 "${small[@]:3}")
  batches=(8 16) variants=(eager eager eager eager) steps=(2 2 2 2) job=(--config.steps=6 --config.kills=1)
else
  rounds=5 ours=plain,augmented least=(60 60 30 150 95 50 35 90) small=() small_vit=() batches=(256 1024) steps=(10 50 5 20) job=(--config.steps=30 --config.kills=2)
  variants=("eager,compile" "eager,graph" compile graph)
fi
torch r50_256 "${least[0]}" 270 adco_r50 "${batches[0]}" "${variants[0]}" "${steps[0]}" "${small[@]}"
torch cifar_256 "${least[1]}" 180 adco_cifar10_r18 "${batches[0]}" "${variants[1]}" "${steps[1]}" "${small[@]}"
part kernels "${least[2]}" 120 benchmarks.kernels --out="$work/kernels" --config=adco_r50 --config.data.batch_size="${batches[0]}" "${small[@]}"
part resume "${least[5]}" 300 adco_jax.main --config=verify_resume --config.of=adco_digits --workdir="$work/resume/runs" "${job[@]}" \
  "--config.flags=--config.deterministic=True --config.eval.every_epochs=0"
part start "${least[6]}" 200 benchmarks.start --out="$work/start" --starts=2 --config=adco_digits --config.eval.every_epochs=0
torch vits16_256 "${least[7]}" 200 adco_vits16 "${batches[0]}" "${variants[0]}" "${steps[0]}" "${small_vit[@]}"
torch r50_1024 "${least[3]}" 200 adco_r50 "${batches[1]}" "${variants[2]}" "${steps[2]}" "${small[@]}"
torch cifar_1024 "${least[4]}" 150 adco_cifar10_r18 "${batches[1]}" "${variants[3]}" "${steps[3]}" "${small[@]}"
