"""Which of a ViT's tokens are its features: the class token, the mean of the patches, both, or the class tokens of the last four blocks.

Flow: heads.Encoder makes `every` one in one forward pass; scores are of the `columns` of one form, or of the form that is best on
  held-out train images (tasks.chosen_tokens).
Shapes: tokens [B, T, F] after each of the last P = min(4, blocks) blocks -> [B, (P + 1) F]: their class tokens, first block first,
  then the mean of the last one's patches.
Paper: `class_4` Caron et al. 2021 (DINO's eval_linear.py, ViT-S), `class_mean` Oquab et al. 2023 (DINOv2).
Holds: a form is a slice of `every`.
Not here: the tokens (vit).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adco_jax.errors import require
from adco_jax.models import vit
from adco_jax.runtime.dtypes import at_least_float32

BLOCKS = 4
POOLED, EVERY, CHOSEN = "pooled", "every", "chosen"
FORMS = ("class", "mean", "class_mean", "class_4")
NAMES = (POOLED, *FORMS)
OR_CHOSEN = (*NAMES, CHOSEN)


def columns(dim: int, depth: int) -> dict[str, slice]:
  """{form: its columns of `every`} of a ViT of `depth` blocks; of fewer than four without class_4."""
  parts = min(BLOCKS, depth) + 1
  ends = dict(zip(FORMS, ((-2, -1), (-1, 0), (-2, 0), (-5, -1)), strict=True))
  return {
    form: slice((parts + first) * dim, (parts + last) * dim)
    for form, (first, last) in ends.items()
    if parts + first >= 0
  }


def every(after: Sequence[jax.Array], registers: int) -> jax.Array:
  """[B, (P + 1) F] of the normalised tokens after each of the last P blocks."""
  kept = at_least_float32(after[-1].dtype)
  mean = jnp.mean(after[-1][:, 1 + registers :], 1, dtype=kept)
  return jnp.concatenate([*(tokens[:, 0].astype(kept) for tokens in after), mean], 1)


def check(key: str, wanted: str, arch: str, depth: int, allowed: Sequence[str] = NAMES) -> None:
  """Refuses a form that an encoder does not have; depth: `model.vit.depth`, 0 as named. Raises ConfigError."""
  require(wanted in allowed, key, wanted, f"use one of {', '.join(allowed)}")
  if wanted == POOLED:
    return
  require(arch in vit.ARCHITECTURES, key, wanted, f"{arch} has no tokens; use {POOLED}")
  blocks = depth or vit.ARCHITECTURES[arch][1]
  few = wanted == "class_4" and blocks < BLOCKS
  require(not few, key, wanted, f"this {arch} has {blocks} blocks; use class")
