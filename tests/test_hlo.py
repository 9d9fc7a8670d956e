"""How a compiled program is read: ones that XLA might write, counted by hand; and the step's own on CPU."""

import pytest

from benchmarks import bytes as step_bytes
from benchmarks import gpu_program, hlo
from benchmarks.hlo import Kernel, kernels, shapes, size, stage_of
from tests import settings

PROGRAM = """HloModule step
%fused_computation (p: f32[4]) -> f32[4] {
  %inside = f32[4]{0} exponential(%p)
}

ENTRY %main (x: bf16[8,4], w: bf16[4,2]) -> (f32[2], bf16[8,2]) {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4,2]{1,0} parameter(1)
  %both.3 = (f32[2]{0}, pred[8,4]{1,0}) fusion(%x, %x), kind=kInput, calls=%fused_computation, metadata={op_name="jit(update)/shard_map/transpose(jvp(Encoder))/backbone/layer2_0/bn1/mul"}
  %sum = f32[2]{0} get-tuple-element(%both.3), index=0
  %cublas-gemm.1 = (bf16[8,2]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={}
  %y = bf16[8,2]{1,0} get-tuple-element(%cublas-gemm.1), index=0
  ROOT %out = (f32[2]{0}, bf16[8,2]{1,0}) tuple(%sum, %y)
}
"""

TPU = """HloModule step

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  ROOT %add.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%copy-done, %x), kind=kLoop, calls=%f, metadata={op_name="jit(update)/add"}
}
"""


def test_kernels_are_what_runs_and_bytes_are_counted_once():
  both, product = kernels(PROGRAM)
  assert both == Kernel("both.3", "both", 64 + 8 + 32, [("f32", 2), ("pred", 32)], "layer2")
  assert product.kind == "__cublas$gemm" and product.moved == 64 + 16 + 32 + 64
  assert product.stage == "rest"


def test_a_copy_to_fast_memory_is_read_once_and_what_lies_there_is_free():
  copy, add = kernels(TPU)
  assert copy.moved == 2048 and add.moved == 2 * 2048 and add.stage == "optimiser"


def test_types():
  assert shapes("(f32[], f8e4m3fn[2,3]{1,0}, u8[7])") == [("f32", 1), ("f8e4m3fn", 6), ("u8", 7)]
  assert size([("bf16", 3), ("s32", 1), ("pred", 5), ("f8e4m3fn", 4)]) == 6 + 4 + 5 + 4


@pytest.mark.parametrize("path, stage", [
  ("jit(update)/shard_map/jvp(Encoder)/backbone/layer1_2/conv3/cond/branch_1_fun/dot_general", "layer1"),
  ("jit(update)/shard_map/transpose(jvp(Encoder))/backbone/bn1/mul", "stem"),
  ("jit(update)/shard_map/Encoder/head/fc0/dot_general", "head"),
  ("jit(update)/shard_map/transpose(jvp(objective))/kqb,qbd->kd/dot_general", "objective"),
  ("jit(update)/shard_map/augmentation/jit(clip)/min", "augmentation"),
  ("jit(update)/shard_map/psum", "rest"),
  ("jit(update)/shard_map/jvp(Encoder)/backbone/blocks_10/attn/qkv/dot_general", "attn"),
  ("jit(update)/shard_map/transpose(jvp(Encoder))/backbone/blocks_1/norm2/mul", "norm"),
  ("jit(update)/shard_map/Encoder/backbone/patch_embed/dot_general", "stem"),
  ("old.query_params['backbone']['blocks_0']['mlp']['fc1']['kernel']", "mlp"),
  ("old.query_params['backbone']['blocks_0']['norm1']['scale']", "norm"),
  ("old.key_params['backbone']['layer3_0']['conv1']['kernel']", "layer3"),
  ("jit(update)/jit(_where)/select_n", "optimiser"),
])  # fmt: skip
def test_stages_are_read_from_names(path, stage):
  assert stage_of(path) == stage


def test_a_budget_names_what_breaks_it():
  result = dict(launches=10, gigabytes=2.0, large_float32_results=1, large_masks=0, large_transposes=0)  # fmt: skip
  limits = dict.fromkeys(gpu_program.LIMITS) | {"launches": 9, "gigabytes": 2, "large_float32_results": 0}  # fmt: skip
  assert gpu_program.broken_limits(limits, result) == ["launches 10 > 9", "large_float32_results 1 > 0"]  # fmt: skip


def test_the_step_is_split_and_nothing_is_lost(monkeypatch):
  """A step small enough to compile: every part is there, the parts' FLOPs are the whole's."""
  config = settings.tiny_config()
  config.data.num_examples = 64
  monkeypatch.setattr(hlo.estimate, "prepare", lambda _: (hlo.estimate.jax.devices()[:2], "cpu"))  # fmt: skip
  found = step_bytes.measure("cpu:2", config)
  rows = {row[0]: row for row in found["stages"]}
  assert {"stem", "layer1", "head", "objective", "augmentation", "optimiser"} <= set(rows)
  assert found["pairs_per_device"] == 8 and found["temporaries_megabytes_per_pair"] > 0
  assert found["megabytes_moved_per_pair"] == pytest.approx(sum(row[3] for row in rows.values()))
  flops = sum(row[1] for row in rows.values())
  assert (
    0.5 < flops / found["gigaflops_per_pair"] < 1.1
  )  # the compiler counts colour and blur as well
