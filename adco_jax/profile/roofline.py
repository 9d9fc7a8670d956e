"""How fast an update could be at most, by arithmetic: products of the encoder, bytes they move, what chips can do.

Flow: estimate traces an encoder with `count` and prints what `work` and `step_seconds` make of it.
Shapes: of one image: FLOPs (two per multiply-add) and elements that products read and write.
Holds: ResNet-50 at 224 pixels: 8.18 GFLOP forward, 32.5 per pair of AdCo; 321 MB per pair where everything
  between products is fused into them, 465 where nothing is.
Not here: what a compiler makes of it (estimate), measurements (benchmarks).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

GIB = 2**30


class Passes(NamedTuple):
  """Passes over the inputs and outputs of all products, each (forward, backward), fused and unfused."""

  fused: tuple[float, float]
  unfused: tuple[float, float]


# Enumerated for ResNet-50 with BatchNorm's statistics, its application with ReLU, and block ends as passes of their own, or fused.
RESNET = Passes((1.898, 3.953), (2.791, 5.632))
# Of n = T F numbers in a ViT's tokens and m = heads T^2 in its logits a block's products read and write 20 n + 2 m, those of both
# gradients twice that. Between them, fused: two passes of residual with LayerNorm (8 n) and the softmax (2 m); backward 8 n,
# GELU's input (4 n), 3 m. Unfused: 4 n LayerNorm, 6 n residuals, 8 n GELU, 2 m; backward 6 n, 6 n, 12 n, biases 9 n, 3 m. The
# ratios below are those of 65 to 197 tokens, heads of 64 (within 4 %). Attention that keeps no logits moves less.
VIT = Passes((1.5, 2.75), (1.92, 3.63))
ITEM_BYTES = 2  # bfloat16 activations
# Per parameter and step: copies in bfloat16; SGD (20) and the average of the key encoder (12).
CAST_BYTES, UPDATE_BYTES = 12, 32


class Chip(NamedTuple):
  """Data-sheet figures: bfloat16 FLOP/s (dense), bytes/s of memory, bytes of memory."""

  flops: float
  bandwidth: float
  memory: float


CHIPS = {
  "v4": Chip(275e12, 1.2e12, 32 * GIB), "v5e": Chip(197e12, 0.81e12, 16 * GIB), "v5p": Chip(459e12, 2.77e12, 95 * GIB),
  "v6e": Chip(918e12, 1.64e12, 32 * GIB), "A100": Chip(312e12, 2.0e12, 80 * GIB), "H100": Chip(989e12, 3.35e12, 80 * GIB),
  "H200": Chip(989e12, 4.8e12, 141e9),
}  # fmt: skip


class Products(NamedTuple):
  """All convolutions and matrix products of one image's forward pass; `first`: FLOPs of the first alone."""

  flops: float
  elements: float
  first: float

  def backward(self) -> float:
    """FLOPs of both gradients of every product; images have none."""
    return 2 * self.flops - self.first


class Work(NamedTuple):
  """Of one slot of the batch: FLOPs, bytes fused, bytes unfused."""

  flops: float
  fused: float
  unfused: float


def products(encoder: nn.Module, size: int) -> list[tuple[str, int, int]]:
  """[(path of the module, FLOPs, elements)] of one image of `size` pixels per side, in order."""
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, train=False), image)
  traced = jax.make_jaxpr(lambda v, x: encoder.apply(v, x, train=False))(variables, image)
  return list(_products(traced.jaxpr))


def count(encoder: nn.Module, size: int) -> Products:
  """`Products` of one image of `size` pixels per side, in the plain form of every layer."""
  encoder = encoder.clone(platform="tpu")
  layers = products(encoder, size)
  return Products(sum(f for _, f, _ in layers), sum(n for _, _, n in layers), layers[0][1])


def work(
  queries: Sequence[Products], keys: Sequence[Products], parts: int, passes: Passes = RESNET
) -> Work:
  """`Work` of one slot: `queries` and `keys` are lists of `Products`, one per view; see accumulate for `parts`."""
  forwards = [*keys, *queries, *(queries if parts > 1 else ())]
  flops = sum(v.flops for v in forwards) + sum(v.backward() for v in queries)
  moved = (
    ITEM_BYTES
    * (forward * sum(v.elements for v in forwards) + backward * sum(v.elements for v in queries))
    for forward, backward in passes
  )
  return Work(flops, *moved)


def step_seconds(chip: Chip, flops: float, moved: float) -> tuple[float, float, float]:
  """(least seconds of a step, those of computing alone, those of moving bytes alone) on one chip."""
  compute, memory = flops / chip.flops, moved / chip.bandwidth
  return max(compute, memory), compute, memory


def _products(jaxpr, inside=""):
  """(path, FLOPs, elements read and written) of every convolution and matrix product, in order."""
  for step in jaxpr.eqns:
    path = f"{inside}/{step.source_info.name_stack}"
    inner = jax.tree.leaves(list(step.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    inner = [x for x in inner if hasattr(x, "eqns")]
    for program in inner:
      yield from _products(program, path)
    if step.primitive.name not in ("conv_general_dilated", "dot_general"):
      continue
    left, right, out = (v.aval.shape for v in (*step.invars, *step.outvars))
    if step.primitive.name == "dot_general":
      ((contracted, _), (batch, _)) = step.params["dimension_numbers"]
      # With a batch of its own the right one is no kernel but another of the image's arrays.
      terms, read = math.prod(left[i] for i in contracted), math.prod(left)
      read += math.prod(right) if batch else 0
    else:
      spec = step.params["dimension_numbers"].rhs_spec  # out, in, height, width
      terms = math.prod(right[i] for i in spec[1:])
      # A 1 x 1 kernel that strides leaves out three pixels of four.
      read = min(math.prod(left), math.prod(out) // right[spec[0]] * terms)
    yield path, 2 * math.prod(out) * terms, read + math.prod(out)
