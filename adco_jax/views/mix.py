"""Mixup of neighbouring slots: each of two images becomes a mixture of both, and so do their labels.

Flow: prepare mixes the views with `shares` of the step's rng, the supervised loss its labels with the same.
Shapes: of a batch's B slots, 2i and 2i + 1 are a pair; arrays [b, ...] of a device or a part of one begin with a pair's first.
Paper: Zhang et al. 2018; a share is drawn per pair, not per batch. The order of a batch is random, so neighbours are any two.
Holds: what a slot is mixed with does not depend on the number of devices or parts.
"""

import jax
import jax.numpy as jnp


def shares(rng: jax.Array, batch_size: int, alpha: float) -> jax.Array:
  """What each slot keeps of its own, float32 [B] in 0..1: Beta(alpha, alpha), alike in a pair."""
  return jnp.repeat(jax.random.beta(rng, alpha, alpha, (batch_size // 2,), jnp.float32), 2)


def mix(x: jax.Array, share: jax.Array) -> jax.Array:
  """share * x + (1 - share) * its neighbour; x [b, ...] of whole pairs, share [b]."""
  pairs = x.reshape(len(x) // 2, 2, *x.shape[1:])
  share = share.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
  return share * x + (1 - share) * pairs[:, ::-1].reshape(x.shape)
