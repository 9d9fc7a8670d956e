"""MoCo: the second player is a queue of the last K keys, written first in, first out.

Flow: as objectives/adco.py, behind the same functions; nothing is trained, `write` moves the queue on.
Shapes: queue [K, D] of unit rows, split over devices (here k of them).
Paper: He et al. 2020 (MoCo), Chen et al. 2020 (MoCo v2); `in_batch` off is theirs.
Holds: after n steps the queue is exactly the last K keys; where to write follows from the step, so no
  pointer is stored.
"""

import dataclasses

import jax
import jax.numpy as jnp

from adco_jax.objectives import infonce
from adco_jax.runtime.sharding import AXIS


@dataclasses.dataclass(frozen=True)
class MoCo:
  """Negatives are past keys."""

  temperature: float
  in_batch: bool

  def init(self, rng, size, dim, dtype):
    """(descend, ascend, slots): a queue of random unit vectors."""
    return {}, {}, {"queue": infonce.normalize(jax.random.normal(rng, (size, dim), dtype))}

  def loss(self, descend, ascend, slots, queries_QxbxD, keys_VxBxD, pairs, respond=None):
    """InfoNCE against the queue, and aux; `respond` has nobody to move."""
    del descend, ascend, respond
    return queue_loss(
      slots["queue"], queries_QxbxD, keys_VxBxD, pairs, self.temperature, self.in_batch
    )

  def write(self, slots, keys_VxBxD, step):
    """The queue with this step's keys, all key views, in place of the oldest."""
    keys = keys_VxBxD.reshape(-1, keys_VxBxD.shape[-1])
    size = slots["queue"].shape[0] * jax.lax.axis_size(AXIS)
    rows = (step * len(keys) + jnp.arange(len(keys))) % size
    return {"queue": write_rows(slots["queue"], keys[-size:], rows[-size:])}


def queue_loss(queue_kxD, queries_QxbxD, keys_VxBxD, pairs, temperature, in_batch):
  """This device's part of the loss against constant rows, and aux."""
  meeting = infonce.meet(queries_QxbxD, keys_VxBxD, pairs)
  bank = infonce.normalize(queue_kxD)
  ((loss, mass, accuracy),) = infonce.play(meeting, bank, in_batch, infonce.Queries(temperature))
  aux = {
    "train/query_loss": loss,
    "train/accuracy": accuracy,
    "train/alignment": infonce.alignment(meeting),
    "train/in_batch_mass": mass,
  }
  return loss, aux


def write_rows(queue_kxD, keys_nxD, rows_n):
  """Puts key i into row rows[i] of the whole queue; rows of other devices or past its end are left."""
  size = queue_kxD.shape[0]
  local = rows_n - jax.lax.axis_index(AXIS) * size
  local = jnp.where((local >= 0) & (local < size), local, size)
  return queue_kxD.at[local].set(keys_nxD.astype(queue_kxD.dtype), mode="drop")
