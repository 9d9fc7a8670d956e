"""MoCHi: MoCo with further negatives, mixed for each query of the hardest ones in its queue and of the query itself.

Flow: as objectives/moco.py.
Shapes: queue [K, D] of unit rows, whole on every device, so that it is ranked where the query is; mixed rows [b, s, D].
Paper: Kalantidis et al. 2020. Of the N rows nearest to a query: s times a n_i + (1 - a) n_j with a from [0, 1], s' times
  b q + (1 - b) n_i with b from [0, .5], pairs drawn with replacement, brought to length 1, without gradient, never queued.
Holds: what is mixed is drawn for the whole batch and does not depend on the devices; of equal rows the lower one counts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.errors import require
from adco_jax.objectives import in_batch, infonce
from adco_jax.objectives.base import Base, Context, Embeddings, Rows, Variables, Written
from adco_jax.runtime.sharding import AXIS


@dataclasses.dataclass(frozen=True)
class MoCHi(Base):
  """Settings: MoCo v2's, and one of the paper's (N, s, s') as it is remembered: its tables could not be read."""

  temperature: float = setting(0.2, ranges.temperature, "of the loss")
  queue_size: int = setting(65536, ranges.COUNT, "K keys that wait in the queue", fixed=True)
  hardest: int = setting(1024, ranges.COUNT, "N nearest rows that are mixed")
  mixed: int = setting(512, ranges.AMOUNT, "s rows of two of them")
  mixed_with_query: int = setting(256, ranges.AMOUNT, "s' rows of one of them and the query")
  start_epochs: float = setting(15.0, ranges.AMOUNT, "epochs of MoCo before anything is mixed")

  def check(self, sizes: Sizes) -> None:
    """A batch, and the hardest rows, fit into the queue."""
    size = self.queue_size
    remedy = f"a queue must hold a batch; use {sizes.batch_size} or more"
    require(size >= sizes.batch_size, "method.queue_size", size, remedy)
    remedy = f"the queue has {size} rows; use {size} or less"
    require(self.hardest <= size, "method.hardest", self.hardest, remedy)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """A queue of random unit vectors."""
    drawn = jax.random.normal(rng, (self.queue_size, sizes.dim), dtype)
    return Variables(memory={"queue": infonce.l2_normalize(drawn)})

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """InfoNCE against queue and mixed rows; the queue with this step's keys in place of the oldest."""
    assert e.keys is not None  # keys_from
    queries, keys, queue = *map(infonce.l2_normalize, (e.queries, e.keys)), v.memory["queue"]
    own_keys, batch = infonce.own_rows(keys), c.sizes.batch_size
    loss, right, count = jnp.zeros(()), jnp.zeros(()), batch * len(c.pairs)
    for number, (query, key, weight) in enumerate(c.pairs):
      q_bxD = queries[query]
      positive = jnp.sum(q_bxD * own_keys[key], 1, keepdims=True)
      sim_bxK = jnp.matmul(q_bxD, queue.T, precision=infonce.HIGHEST)
      mixed_bxS = self._mixed(jax.random.fold_in(c.rng, number), q_bxD, sim_bxK, queue, c)
      logits = jnp.concatenate([positive, sim_bxK, mixed_bxS], 1) / self.temperature
      total, correct = in_batch.cross_entropy(logits, jnp.zeros(len(logits), jnp.int32))
      loss, right = loss + weight * total / batch, right + correct / count
    return loss, Written(
      {"train/loss": loss, "train/accuracy": right}, {"queue": self._queued(queue, own_keys, c)}
    )

  def _mixed(self, rng, q_bxD, sim_bxK, queue, c):
    """Cosines with the mixed rows, -inf before `start_epochs`."""
    _, hardest_bxN = jax.lax.top_k(jax.lax.stop_gradient(sim_bxK), self.hardest)
    first, second, member, a, b = jax.random.split(rng, 5)
    first, second = (self._drawn(r, hardest_bxN, self.mixed, queue, c) for r in (first, second))
    member = self._drawn(member, hardest_bxN, self.mixed_with_query, queue, c)
    a = self._shares(a, self.mixed, 1.0, q_bxD, c)
    b = self._shares(b, self.mixed_with_query, 0.5, q_bxD, c)
    still = jax.lax.stop_gradient(q_bxD)[:, None]
    rows_bxSxD = jnp.concatenate([a * first + (1 - a) * second, b * still + (1 - b) * member], 1)
    cosines = jnp.einsum(
      "bd,bsd->bs", q_bxD, infonce.l2_normalize(rows_bxSxD), precision=infonce.HIGHEST
    )
    return jnp.where(c.epoch >= self.start_epochs, cosines, -jnp.inf)

  def _drawn(self, rng, hardest_bxN, count, queue, c):
    """[b, count, D]: rows of the queue, drawn of each query's hardest ones."""
    places_Bxs = jax.random.randint(rng, (c.sizes.batch_size, count), 0, self.hardest)
    places_bxs = places_Bxs[in_batch.own_slots(len(hardest_bxN))]
    return queue[jnp.take_along_axis(hardest_bxN, places_bxs, 1)]

  def _shares(self, rng, count, most, q_bxD, c):
    """[b, count, 1] from 0 to `most`."""
    drawn = jax.random.uniform(rng, (c.sizes.batch_size, count), q_bxD.dtype, 0, most)
    return drawn[in_batch.own_slots(len(q_bxD))][..., None]

  def _queued(self, queue, own_keys_VxbxD, c):
    """The queue with all devices' keys, all key views, in place of the oldest; the same on every device."""
    keys = jax.lax.all_gather(own_keys_VxbxD, AXIS, axis=1, tiled=True, to="invarying")
    keys = keys.reshape(-1, keys.shape[-1])
    places = (c.step * len(keys) + jnp.arange(len(keys))) % self.queue_size
    size = self.queue_size
    return queue.at[places[-size:]].set(keys[-size:].astype(queue.dtype))

  def rows(self, v: Variables) -> Rows:
    """The queue; what is mixed of it is another for every query."""
    return Rows(v.memory["queue"], self.temperature, "own")

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """Log of the number of candidates, mixed ones among them (also before there are any), times the weights of the pairs."""
    candidates = 1 + self.queue_size + self.mixed + self.mixed_with_query
    return sum(weight for *_, weight in phase.pairing.pairs) * math.log(candidates)
