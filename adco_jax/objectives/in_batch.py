"""Softmax over the batch itself, for objectives without rows of negatives.

Flow: simclr and mocov3 hand over logits of this device's queries with all candidates; nothing comes before.
Shapes: b slots of this device, B of all, C candidates.
Holds: every number is this device's part of a sum over devices.
"""

import jax
import jax.numpy as jnp

from adco_jax.objectives.infonce import TIE
from adco_jax.runtime.sharding import AXIS


def own_slots(slots: int) -> jax.Array:
  """Numbers in the global batch of this device's slots, int32 [slots]."""
  return jax.lax.axis_index(AXIS) * slots + jnp.arange(slots, dtype=jnp.int32)


def cross_entropy(logits_bxC: jax.Array, right_b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums over this device's queries of (loss, whether no other candidate is as near as the right one).

  Candidates as near up to rounding count as nearer: an encoder to which all is alike has 0.
  """
  chosen = jax.nn.one_hot(right_b, logits_bxC.shape[1], dtype=bool)
  positive = jnp.sum(jnp.where(chosen, logits_bxC, 0), 1)
  loss = jax.nn.logsumexp(logits_bxC, 1) - positive
  largest = jnp.max(jnp.where(chosen, -jnp.inf, logits_bxC), 1)
  slack = TIE * jnp.finfo(logits_bxC.dtype).eps * (1 + jnp.abs(positive))
  return jnp.sum(loss), jnp.sum((largest < positive - slack).astype(loss.dtype))
