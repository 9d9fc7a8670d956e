"""Frozen encoder -> one feature vector per image, each image exactly once.

Flow: a loader's `evaluation` batches -> `extract` -> knn, linear, pictures.
Shapes: features float32 [N, F] on the host, in the order of the indices asked for.
Holds: padding never reaches the result.
Not here: scores.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.runtime import sharding
from adco_jax.views.augment import normalise

PIXEL_SIDE = 32  # raw pixels are compared at up to this size


def make_features(encoder, mean, std, mesh):
  """(variables, uint8 [B, H, W, 3]) -> pooled features [B, F] with running statistics."""

  def features(variables, images):
    x = normalise(images.astype(jnp.float32) / 255, mean, std)
    return encoder.apply(variables, x, method="features").astype(jnp.float32)

  return jax.jit(features, out_shardings=sharding.replicated(mesh))


def make_pixels(mesh):
  """uint8 [B, H, W, 3] -> the pixels themselves in [0, 1], [B, side * side * 3]."""

  def pixels(images):
    side = min(PIXEL_SIDE, images.shape[1])
    x = jax.image.resize(images.astype(jnp.float32) / 255, (len(images), side, side, 3), "bilinear")
    return x.reshape(len(images), -1)

  return jax.jit(pixels, out_shardings=sharding.replicated(mesh))


def extract(features, batches):
  """Runs `features` over (images, how many count) batches -> float32 [N, F]."""
  return np.concatenate([np.asarray(features(images))[:count] for images, count in batches])
