# shellcheck shell=bash disable=SC1091
# Sourced by the other scripts: environment of JAX and XLA for real hardware, each with its reason.
# What is set already is kept. KIND=gpu or tpu; on a CPU nothing is needed.

case "${KIND:-}" in
gpu)
  # The step's buffers are known: take nearly all memory at once instead of growing into fragments.
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"
  ;;
tpu)
  # Warnings only: libtpu otherwise writes a page per process.
  export TPU_MIN_LOG_LEVEL="${TPU_MIN_LOG_LEVEL:-2}"
  ;;
esac
