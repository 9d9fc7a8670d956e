"""SwAV: prototypes; a view predicts to which of them another view of its image is assigned, equally over the batch.

Flow: as objectives/adco.py. A pair's key is the view that is assigned: with small crops (symmetric_multicrop) they only predict.
Shapes: prototypes [P, D] of unit rows, which descend; scores [b, P]; queue [2, N / B, B, D], of each assigning view the
  embeddings of the newest batch first, slots split over devices.
Paper: Caron et al. 2020; swav main_swav.py. Every assigning view and every other view count alike (views.reduction=mean).
  Their rows are brought to length 1 before each forward pass, ours after each update, which is the same from the first one on.
Holds: no gradient through assignments or the rows' normalisation; of a batch and its queue on several devices the
  assignment is that on one.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.errors import require
from adco_jax.objectives import infonce
from adco_jax.objectives.base import Base, Context, Embeddings, Variables, Written
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.sharding import AXIS

ASSIGNED = 2  # views that are assigned: the large ones


@dataclasses.dataclass(frozen=True)
class SwAV(Base):
  """Settings, the authors' for ImageNet."""

  temperature: float = setting(0.1, ranges.temperature, "of what a view predicts")
  prototypes: int = setting(3000, ranges.COUNT, "P of them", fixed=True)
  epsilon: float = setting(0.05, ranges.temperature, "of the assignment: lower is sharper")
  iterations: int = setting(3, ranges.COUNT, "of Sinkhorn and Knopp")
  frozen_epochs: float = setting(1.0, ranges.AMOUNT, "epochs before the prototypes move")
  queue_size: int = setting(
    0, ranges.AMOUNT, "N embeddings of earlier batches, 0: none", fixed=True
  )
  queue_epochs: float = setting(15.0, ranges.AMOUNT, "epochs before the queue fills")

  keys_from = "online"
  modes = ("symmetric", "symmetric_multicrop")

  def check(self, sizes: Sizes) -> None:
    """There are images for all prototypes; the queue holds whole batches."""
    count, images = self.prototypes, sizes.num_examples
    remedy = f"the data has {images} images, fewer; use {images} or less"
    require(count <= images, "method.prototypes", count, remedy)
    size, batch = self.queue_size, sizes.batch_size
    near = max(1, round(size / batch)) * batch
    remedy = f"does not hold whole batches of {batch}; use {near}"
    require(size % batch == 0, "method.queue_size", size, remedy)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """torch's Linear without bias, brought to length 1; a queue of zeros."""
    drawn = jax.random.uniform(rng, (self.prototypes, sizes.dim), dtype, -1, 1)
    batches, batch = self.queue_size // sizes.batch_size, sizes.batch_size
    queue = jnp.zeros((ASSIGNED, batches, batch, sizes.dim), dtype)
    memory = {"queue": queue} if batches else {}
    return Variables(params={"prototypes": infonce.l2_normalize(drawn)}, memory=memory)

  def specs(self) -> Variables:
    """Every device has a queue of its own slots."""
    return Variables(P(), P(), P(None, None, AXIS))

  def trains(self, c: Context) -> jax.Array:
    """Not in the first epochs."""
    return c.epoch >= self.frozen_epochs

  def project(self, params: Tree) -> Tree:
    """Rows of length 1."""
    return {"prototypes": infonce.l2_normalize(params["prototypes"])}

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """Cross-entropy of each view's prediction with the other view's assignment."""
    z_QxbxD, prototypes = infonce.l2_normalize(e.queries), v.params["prototypes"]
    scores_QxbxP = jnp.matmul(z_QxbxD, prototypes.T, precision=infonce.HIGHEST)
    log_p = jax.nn.log_softmax(scores_QxbxP / self.temperature)
    still = jax.lax.stop_gradient((z_QxbxD, scores_QxbxP, prototypes))
    assignments = {key: self._assign(v, key, *still) for key in sorted({k for _, k, _ in c.pairs})}
    loss, batch = jnp.zeros(()), c.sizes.batch_size
    for query, key, weight in c.pairs:
      loss -= weight * jnp.sum(assignments[key] * log_p[query]) / batch
    told = {"train/loss": loss, "prototypes/used": _used(still[1]) / jax.lax.axis_size(AXIS)}
    return loss, Written(told, self._queued(v, still[0], c))

  def _assign(self, v, key, z_QxbxD, scores_QxbxP, prototypes):
    """[b, P]: of a view's scores, those of a full queue beside them."""
    scores = scores_QxbxP[key]
    if not self.queue_size:
      return sinkhorn(scores, self.epsilon, self.iterations)
    queue = v.memory["queue"][key]
    earlier = jnp.matmul(
      queue.reshape(-1, queue.shape[-1]), prototypes.T, precision=infonce.HIGHEST
    )
    full = jnp.any(queue[-1] != 0)  # the oldest place is taken
    every = jnp.concatenate([jnp.where(full, earlier, -jnp.inf), scores])
    return sinkhorn(every, self.epsilon, self.iterations)[-len(scores) :]

  def _queued(self, v, z_QxbxD, c):
    """The memory with this step's embeddings first, once `queue_epochs` are over."""
    if not self.queue_size:
      return {}
    queue = v.memory["queue"]
    new = z_QxbxD[:ASSIGNED, None].astype(queue.dtype)
    moved = jnp.concatenate([new, queue[:, :-1]], 1)
    return {"queue": jnp.where(c.epoch >= self.queue_epochs, moved, queue)}

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """Log of the number of prototypes, times the weights of the pairs."""
    return sum(weight for *_, weight in phase.pairing.pairs) * math.log(self.prototypes)


def _used(scores_QxbxP):
  """exp of the entropy of how often each prototype is the nearest to an embedding of a batch, over all devices.

  Not of what is assigned: Sinkhorn's assignments share the prototypes alike whatever the scores are.
  """
  nearest = jax.nn.one_hot(jnp.argmax(scores_QxbxP, -1), scores_QxbxP.shape[-1])
  share = jax.lax.pmean(nearest.mean((0, 1)), AXIS)
  return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def sinkhorn(scores_nxP: jax.Array, epsilon: float, iterations: int) -> jax.Array:
  """exp(scores / epsilon) of all devices' rows, scaled until prototypes share the mass alike and each row has 1.

  In logarithms, so that no epsilon is too small. A row of -inf takes no part (and stays 0). swav's distributed_sinkhorn, whose
  constants cancel.
  """
  x = scores_nxP / epsilon
  there = jnp.isfinite(x)
  for _ in range(iterations):
    most = jax.lax.pmax(jnp.max(x, 0), AXIS)
    sums = jax.lax.psum(jnp.sum(jnp.exp(x - most[None]), 0), AXIS)
    x = x - (most + jnp.log(sums))[None]
    x = jnp.where(there, x - jax.nn.logsumexp(jnp.where(there, x, 0), 1, keepdims=True), -jnp.inf)
  return jnp.exp(x)
