"""BYOL: a predictor of the query encoder's projections descends towards the key encoder's; there are no negatives.

Flow: as objectives/adco.py; the key encoder moves after the update, and starts from numbers of its own (theirs) or as
  a copy (as lightly's).
Paper: Grill et al. 2020; deepmind-research byol_experiment.py: loss = mean over the batch of 2 - 2 cos(prediction of one view,
  key of the other), both directions summed (views.reduction=sum), cosine average (ema.schedule=cosine).
Not here: the predictor (predictor). Theirs has a bias before BatchNorm, which takes it away again.
"""

import dataclasses

import jax
import jax.numpy as jnp

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.objectives import infonce, predictor
from adco_jax.objectives.base import Base, Context, Embeddings, MomentumInit, Variables, Written


@dataclasses.dataclass(frozen=True)
class BYOL(Base):
  """Settings."""

  predictor_width: int = setting(4096, ranges.COUNT, "of the predictor's hidden layer", fixed=True)
  momentum_init: MomentumInit = setting(
    "independent", ranges.choice("independent", "copy"), "of the key encoder: drawn on its own, or the query's", fixed=True
  )  # fmt: skip

  normalises = True
  momentum_update = "after_step"
  modes = ("symmetric",)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """The predictor."""
    return predictor.init(rng, sizes, self.predictor_width, dtype)

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """2 - 2 cos of predictions and keys."""
    assert e.keys is not None  # keys_from
    predictions, memory = predictor.predict(v, e.queries, c.sizes, self.predictor_width)
    keys = infonce.l2_normalize(infonce.own_rows(e.keys))
    loss, alignment, batch = jnp.zeros(()), jnp.zeros(()), c.sizes.batch_size
    queries = infonce.l2_normalize(e.queries)
    for query, key, weight in c.pairs:
      cosine = jnp.sum(infonce.l2_normalize(predictions[query]) * keys[key], -1)
      loss += weight * jnp.sum(2 - 2 * cosine) / batch
      apart = jnp.sum(jnp.square(queries[query] - keys[key]))
      alignment += apart / (batch * len(c.pairs))
    return loss, Written({"train/loss": loss, "train/alignment": alignment}, memory)

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """2 for each direction: what directions without relation give. (All alike give 0: watch the ranks.)"""
    return sum(2 * weight for *_, weight in phase.pairing.pairs)
