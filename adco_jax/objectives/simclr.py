"""SimCLR: both views of every other image of the batch are negatives; no key encoder, nothing kept, nothing ascends.

Flow: as objectives/adco.py.
Paper: Chen et al. 2020, NT-Xent with 2B - 2 negatives. google-research/simclr objective.py sums the two directions
  (views.reduction=sum), the paper takes the mean over 2B rows ('directions').
Holds: the gradient reaches queries and candidates, those of other devices through the gather.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.objectives import in_batch, infonce
from adco_jax.objectives.base import Base, Context, Embeddings, Variables, Written


@dataclasses.dataclass(frozen=True)
class SimCLR(Base):
  """Settings."""

  temperature: float = setting(0.5, ranges.temperature, "of the loss (lightly's for CIFAR-10)")

  keys_from = "online"
  modes = ("symmetric",)

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """Cross-entropy over the other view's B embeddings and the own view's B - 1 others."""
    z_QxbxD = infonce.l2_normalize(e.queries)
    every_QxBxD = infonce.gather_with_gradient(z_QxbxD)
    own, batch = in_batch.own_slots(z_QxbxD.shape[1]), c.sizes.batch_size
    loss, right = jnp.zeros(()), jnp.zeros(())
    for query, key, weight in c.pairs:
      product = lambda other, q=query: jnp.matmul(
        z_QxbxD[q], every_QxBxD[other].T, precision=infonce.HIGHEST
      )
      itself = jax.nn.one_hot(own, batch, dtype=bool)
      candidates = product(key), jnp.where(itself, -jnp.inf, product(query))
      total, correct = in_batch.cross_entropy(
        jnp.concatenate(candidates, 1) / self.temperature, own
      )
      loss, right = loss + weight * total / batch, right + correct / (batch * len(c.pairs))
    return loss, Written({"train/loss": loss, "train/accuracy": right})

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """Log of the number of candidates, times the weights of the pairs."""
    weights = sum(weight for *_, weight in phase.pairing.pairs)
    return weights * math.log(2 * sizes.batch_size - 1)
