"""How a GPU's program is read: one that XLA might write, counted by hand."""

from benchmarks.gpu_program import Kernel, kernels, shapes, size

PROGRAM = """HloModule step
%fused_computation (p: f32[4]) -> f32[4] {
  %inside = f32[4]{0} exponential(%p)
}

ENTRY %main (x: bf16[8,4], w: bf16[4,2]) -> (f32[2], bf16[8,2]) {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4,2]{1,0} parameter(1)
  %both.3 = (f32[2]{0}, pred[8,4]{1,0}) fusion(%x, %x), kind=kInput, calls=%fused_computation
  %sum = f32[2]{0} get-tuple-element(%both.3), index=0
  %cublas-gemm.1 = (bf16[8,2]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={}
  %y = bf16[8,2]{1,0} get-tuple-element(%cublas-gemm.1), index=0
  ROOT %out = (f32[2]{0}, bf16[8,2]{1,0}) tuple(%sum, %y)
}
"""


def test_kernels_are_what_runs_and_bytes_are_counted_once():
  both, product = kernels(PROGRAM)
  assert both == Kernel("both.3", "both", 64 + 8 + 32, [("f32", 2), ("pred", 32)])
  assert product.kind == "__cublas$gemm" and product.moved == 64 + 16 + 32 + 64


def test_types():
  assert shapes("(f32[], f8e4m3fn[2,3]{1,0}, u8[7])") == [("f32", 1), ("f8e4m3fn", 6), ("u8", 7)]
  assert size([("bf16", 3), ("s32", 1), ("pred", 5), ("f8e4m3fn", 4)]) == 6 + 4 + 5 + 4
