#!/usr/bin/env bash
# What is too slow for every commit, on a machine without a GPU, one group after the other: those of the slow tests (the markers
# in pyproject.toml) and `budget`, the steps' programs for every GPU described in benchmarks/targets, held to the budgets below.
# `bash launch/nightly.sh kills budget` runs these two. A group that fails stops no other; a table of all ends the night, with
# status 1 if any failed. About two hours on two cores.
# The compiler for GPUs wants an environment of its own, .venv-gpu (Python 3.12 or newer; PYTHON312 names one).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh requirements.txt tests/requirements.txt

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

budget() {
  local targets=(benchmarks/targets/*.txtpb) target status=0 out
  if [ ! -e "${targets[0]}" ]; then
    echo "error: no GPU is described in benchmarks/targets; write one on a machine that has it: python -m benchmarks.gpu_program --write_target=benchmarks/targets/NAME.txtpb" >&2
    return 2
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
  return $status
}

run() {
  if [ "$1" = budget ]; then budget; else python -m pytest -n 0 -m "slow and $1"; fi
}

groups=("$@")
if [ $# = 0 ]; then
  mapfile -t groups < <(python -m pytest --markers | sed -n 's/^@pytest.mark.\([a-z]*\): group: .*/\1/p')
  groups+=(budget)
fi
table="group        result      seconds"
failed=0
for group in "${groups[@]}"; do
  echo "== $group"
  start=$SECONDS result=passed
  set +e # and no `||`, behind which a command that fails would not end the group
  (set -e && run "$group")
  status=$?
  set -e
  if [ $status != 0 ]; then result=FAILED failed=1; fi
  table+=$(printf '\n%-12s %-8s %10d' "$group" "$result" $((SECONDS - start)))
done
echo "$table"
exit $failed
