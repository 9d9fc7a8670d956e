#!/usr/bin/env bash
# What is too slow for every commit, on a machine without a GPU: the slow tests, then the steps' programs for every GPU described in
# benchmarks/targets, held to the budgets below. `bash launch/nightly.sh budget` leaves the tests out. About two hours on two cores.
# The compiler for GPUs wants an environment of its own, .venv-gpu (Python 3.12 or newer; PYTHON312 names one).
set -euo pipefail
cd "$(dirname "$0")/.."

# config, batch, then the most of: launches, gigabytes, float32 results, masks, transposes of an activation's size.
# Measured with jax 0.12.0.1 for an H200 and rounded up; to be lowered with every change that needs less.
budgets() {
  cat <<'END'
adco_r50          256  1540 133 25 5 0
adco_cifar10_r18  256   485 9.5  3 0 0
END
}

gpu_environment() {
  local python="${PYTHON312:-python3.12}" version nvidia
  [ -x .venv-gpu/bin/python ] || "$python" -m venv .venv-gpu
  version=$(sed -n 's/^jax==\([0-9.]*\); python_version >= "3.12".*/\1/p' requirements.txt)
  if [ ! -e ".venv-gpu/installed-$version" ]; then
    .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt nvidia-cuda-nvcc
    .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
      "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version"
    touch ".venv-gpu/installed-$version"
  fi
  nvidia=$(.venv-gpu/bin/python -c 'import pathlib, nvidia; print(next(pathlib.Path(nvidia.__path__[0]).rglob("ptxas")).parent)')
  export PATH="$nvidia:$PATH"
}

shopt -s nullglob
targets=(benchmarks/targets/*.txtpb)
if [ ${#targets[@]} = 0 ]; then
  echo "error: no GPU is described in benchmarks/targets; write one on a machine that has it: python -m benchmarks.gpu_program --write_target=benchmarks/targets/NAME.txtpb" >&2
  exit 2
fi
status=0
if [ "${1:-}" != budget ]; then
  bash launch/test.sh -m slow -n 0 || status=1
fi
gpu_environment
out=$(mktemp -d)
for target in "${targets[@]}"; do
  while read -r config batch launches gigabytes floats masks transposes; do
    echo "$config, batch $batch, ${target##*/}"
    .venv-gpu/bin/python -m benchmarks.gpu_program "--target=$target" "--config=$config" "--config.data.batch_size=$batch" \
      "--launches=$launches" "--gigabytes=$gigabytes" "--large_float32_results=$floats" "--large_masks=$masks" \
      "--large_transposes=$transposes" "--out=$out" || status=1
  done < <(budgets)
done
exit $status
