"""MoCo v3: a predictor, and the batch's other keys as negatives; no queue.

Flow: as objectives/adco.py.
Paper: Chen, Xie, He 2021; moco-v3 moco/builder.py: cross-entropy of predictions with the keys of the whole batch, times 2T,
  both directions summed (views.reduction=sum), cosine average of the key encoder (ema.schedule=cosine).
Not here: the predictor (predictor); ViT's frozen patch embedding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.objectives import in_batch, infonce, predictor
from adco_jax.objectives.base import Base, Context, Embeddings, Variables, Written


@dataclasses.dataclass(frozen=True)
class MoCoV3(Base):
  """Settings; the authors' temperature is 1 with ResNet-50, .2 with ViTs."""

  temperature: float = setting(0.2, ranges.temperature, "of the loss, which is scaled by twice it")
  predictor_width: int = setting(4096, ranges.COUNT, "of the predictor's hidden layer", fixed=True)
  predictor_norm: str = setting(
    "hidden", ranges.choice("hidden", "all_plain"), "BatchNorm: of the hidden layer (ResNet), or of the last too, without scale and bias (ViT)",
    fixed=True,
  )  # fmt: skip

  normalises = True
  modes = ("symmetric",)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """The predictor."""
    return predictor.init(rng, sizes, self.predictor_width, dtype, self.predictor_norm)

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """2T times the cross-entropy over the batch's keys."""
    assert e.keys is not None  # keys_from
    predictions, memory = predictor.predict(
      v, e.queries, c.sizes, self.predictor_width, self.predictor_norm
    )
    keys, batch = infonce.l2_normalize(e.keys), c.sizes.batch_size
    own = in_batch.own_slots(e.queries.shape[1])
    loss, right, count = jnp.zeros(()), jnp.zeros(()), batch * len(c.pairs)
    for query, key, weight in c.pairs:
      sim = jnp.matmul(
        infonce.l2_normalize(predictions[query]), keys[key].T, precision=infonce.HIGHEST
      )
      total, correct = in_batch.cross_entropy(sim / self.temperature, own)
      loss += weight * 2 * self.temperature * total / batch
      right += correct / count
    return loss, Written({"train/loss": loss, "train/accuracy": right}, memory)

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """2T times the log of the batch, times the weights of the pairs."""
    weights = sum(weight for *_, weight in phase.pairing.pairs)
    return weights * 2 * self.temperature * math.log(sizes.batch_size)
