"""Frozen encoder -> one feature vector per image, each image exactly once.

Flow: a loader's `evaluation` batches -> `extract` -> knn, linear, pictures.
Shapes: features float32 [N, F] on the host, in the order of the indices asked for.
Holds: padding never reaches the result.
Not here: scores.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from adco_jax.models.heads import Encoder
from adco_jax.models.tokens import POOLED
from adco_jax.runtime import sharding
from adco_jax.runtime.dtypes import Tree
from adco_jax.views.augment import standardize

PIXEL_SIDE = 32  # raw pixels are compared at up to this size


def make_features(
  encoder: nn.Module,
  mean: Sequence[float],
  std: Sequence[float],
  mesh: Mesh,
  projected: bool = False,
  tokens: str = POOLED,
) -> Callable[[Tree, jax.Array], jax.Array]:
  """(variables, uint8 [B, H, W, 3]) -> pooled features [B, F] with running statistics, or what the head makes of them [B, D].

  tokens: of a ViT, which are the features, see models.tokens.
  """
  how: dict[str, Any] = {"train": False} if projected else {"method": "features"}
  if tokens != POOLED:
    how["form"] = tokens

  def features(variables, images):
    x = standardize(images.astype(jnp.float32) / 255, mean, std)
    outputs: Any = encoder.apply(variables, x, **how)
    return outputs.astype(jnp.float32)

  return jax.jit(features, out_shardings=sharding.replicated(mesh))


def make_attention(
  encoder: Encoder, mean: Sequence[float], std: Sequence[float], mesh: Mesh
) -> Callable[[Tree, jax.Array], jax.Array]:
  """(variables, uint8 [B, H, W, 3]) -> shares [B, heads, h, w] of what a ViT's class token takes from each patch in the last block;
  what it takes from itself and from registers is left out, so that they sum to less than 1."""

  def attention(variables, images):
    x = standardize(images.astype(jnp.float32) / 255, mean, std)
    sown: Any = encoder.apply(variables, x, method="features", mutable=["intermediates"])[1]
    blocks = sown["intermediates"]["backbone"]
    shares = blocks[f"blocks_{len(blocks) - 1}"]["attn"]["class_attention"][0]
    rows, columns = (side // encoder.vit.patch for side in images.shape[1:3])
    patches = shares[:, :, 1 + encoder.vit.registers :]
    return patches.reshape(*patches.shape[:2], rows, columns).astype(jnp.float32)

  return jax.jit(attention, out_shardings=sharding.replicated(mesh))


def make_pixels(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """uint8 [B, H, W, 3] -> the pixels themselves in [0, 1], [B, side * side * 3]."""

  def pixels(images):
    side = min(PIXEL_SIDE, images.shape[1])
    x = jax.image.resize(images.astype(jnp.float32) / 255, (len(images), side, side, 3), "bilinear")
    return x.reshape(len(images), -1)

  return jax.jit(pixels, out_shardings=sharding.replicated(mesh))


def extract(
  features: Callable[[jax.Array], jax.Array],
  batches: Iterable[tuple[jax.Array, int]],
  into: np.ndarray | None = None,
) -> np.ndarray:
  """Runs `features` over (images, how many count) batches -> float32 [N, F], or `into` [N, F] of any float type, which is filled."""
  found = (np.asarray(features(images))[:count] for images, count in batches)
  if into is None:
    return np.concatenate(list(found))
  start = 0
  for part in found:
    into[start : start + len(part)] = part
    start += len(part)
  return into
