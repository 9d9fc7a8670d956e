"""The bank's initialisation: a queue that is written once, row after row, while the encoder trains.

Flow: for the first ceil(K / B) steps train_step plays this instead of AdCo; the slots that it writes are
  the bank.
Paper: the authors' `init_memory` (training/train.py): temperature of the encoder, positives are own
  keys, negatives the rows as they stand (Gaussian at first), no in-batch negatives.
Holds: step i writes rows [i B, (i + 1) B), the last write is cut at K.
Not here: the reset of the key encoder and what a passive fill leaves alone (train_step).
"""

import dataclasses

import jax.numpy as jnp

from adco_jax.objectives.moco import queue_loss, write_rows


@dataclasses.dataclass(frozen=True)
class Fill:
  """Plays with slots {'bank': [K, D]}; only `loss` and `write` are ever asked of it."""

  temperature: float
  key_view: int  # position of the view whose keys are written

  def loss(self, descend, ascend, slots, queries_QxbxD, keys_VxBxD, pairs, respond=None):
    """InfoNCE of the one pair against the rows filled so far, and aux; other views play no part."""
    del descend, ascend, respond
    ((query, key, weight),) = pairs
    alone = queries_QxbxD[query][None], keys_VxBxD[key][None], ((0, 0, weight),)
    return queue_loss(slots["bank"], *alone, self.temperature, False)

  def write(self, slots, keys_VxBxD, step):
    """The bank with this step's keys in the next B rows."""
    keys = keys_VxBxD[self.key_view]
    return {"bank": write_rows(slots["bank"], keys, step * len(keys) + jnp.arange(len(keys)))}
