"""MoCo: negatives are the last K keys, a queue that is written first in, first out.

Flow: as objectives/adco.py; nothing ascends, `loss` gives the queue back with this step's keys in it.
Shapes: queue [K, D] of unit rows, split over devices (here k of them).
Paper: He et al. 2020 (MoCo), Chen et al. 2020 (MoCo v2); `in_batch` off is theirs.
Holds: after n steps the queue is exactly the last K keys; where to write follows from the step, so no
  pointer is stored.
"""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.errors import require
from adco_jax.objectives import infonce, rows
from adco_jax.objectives.base import Base, Context, Embeddings, Rows, Variables, Written
from adco_jax.runtime.sharding import AXIS


@dataclasses.dataclass(frozen=True)
class MoCo(Base):
  """Settings, MoCo v2's."""

  temperature: float = setting(0.2, ranges.temperature, "of the loss")
  in_batch: bool = setting(
    False, words="all keys of the batch are further negatives; MoCo has none"
  )
  queue_size: int = setting(65536, ranges.COUNT, "K keys that wait in the queue", fixed=True)

  def check(self, sizes: Sizes) -> None:
    """Rows are split over the devices, and a batch fits into them."""
    rows.check_rows("method.queue_size", self.queue_size, sizes.devices)
    rows.check_temperature("method.temperature", self.temperature, sizes.mode)
    remedy = f"a queue must hold a batch; use {sizes.batch_size} or more"
    require(self.queue_size >= sizes.batch_size, "method.queue_size", self.queue_size, remedy)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """A queue of random unit vectors."""
    drawn = jax.random.normal(rng, (self.queue_size, sizes.dim), dtype)
    return Variables(memory={"queue": infonce.l2_normalize(drawn)})

  def specs(self) -> Variables:
    """Rows are split."""
    return Variables(P(), P(), P(AXIS))

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """InfoNCE against the queue, and the queue with this step's keys, all key views, in place of the oldest."""
    del phase
    assert e.keys is not None  # keys_from
    queries, keys, queue = (
      infonce.l2_normalize(e.queries),
      infonce.l2_normalize(e.keys),
      v.memory["queue"],
    )
    loss, metrics = rows.queue_loss(queue, queries, keys, c.pairs, self.temperature, self.in_batch)
    queue = rows.enqueue(queue, keys, c.step, self.queue_size)
    return loss, Written(metrics, memory={"queue": queue})

  def rows(self, v: Variables) -> Rows:
    """The queue."""
    return Rows(v.memory["queue"], self.temperature, "batch" if self.in_batch else "own")

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """Log of the number of candidates, times the weights of the pairs."""
    return rows.chance(phase, self.queue_size, sizes.batch_size, self.in_batch)

  def warnings(self, sizes: Sizes) -> tuple[str, ...]:
    """What is known to go badly."""
    own = "method.in_batch=True: the batch's keys are negatives beside the queue's, which MoCo's are not; False is its own"
    few = rows.warn_rows("method.queue_size", self.queue_size, sizes.num_examples)
    return (*few, own) if self.in_batch else few
