"""Controls: AdCo with a bank that never moves, filled with keys (`still`) or random for ever (`random`).

Flow: as objectives/adco.py. What AdCo gains over `still` its adversary gained, what over `random` its bank did.
Shapes: bank [K, D], rows split over devices (here k of them), kept as memory.
Holds: `still` computes what adco does at method.bank.learning_rate=0.
"""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.objectives import infonce, rows
from adco_jax.objectives.base import Base, Context, Embeddings, Rows, Variables, Written
from adco_jax.runtime.sharding import AXIS


@dataclasses.dataclass(frozen=True)
class RandomBank:
  """Gaussian rows."""

  size: int = setting(65536, ranges.COUNT, "K rows", fixed=True)


@dataclasses.dataclass(frozen=True)
class StillBank(RandomBank):
  """Rows that are filled as AdCo's; configs/adco_r50.py says what each key means."""

  init: str = setting("trained", ranges.choice("trained", "keys"), fixed=True)
  init_views: str = setting("training", ranges.choice("training", "authors"), fixed=True)
  init_epochs: float = setting(0.0, ranges.AMOUNT, fixed=True)


@dataclasses.dataclass(frozen=True)
class Random(Base):
  """Settings; as AdCo's."""

  temperature: float = setting(0.12, ranges.temperature, "of the loss")
  in_batch: bool = setting(True, words="all keys of the batch are further negatives")
  bank: RandomBank = RandomBank()

  def check(self, sizes: Sizes) -> None:
    """The bank's rows are split over the devices."""
    rows.check_rows("method.bank.size", self.bank.size, sizes.devices)
    rows.check_temperature("method.temperature", self.temperature, sizes.mode)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """Gaussian rows, as AdCo's."""
    return Variables(memory={"bank": jax.random.normal(rng, (self.bank.size, sizes.dim), dtype)})

  def specs(self) -> Variables:
    """Rows are split."""
    return Variables(P(), P(), P(AXIS))

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """InfoNCE against the rows, which stay as they are once they are filled.

    Against random ones no loss is known for an encoder that tells nothing apart: it depends on where all its embeddings are.
    """
    assert e.keys is not None  # keys_from
    queries, keys, bank = *map(infonce.l2_normalize, (e.queries, e.keys)), v.memory["bank"]
    if phase.name == rows.FILLING:
      of = c, phase, self.bank.size, self.temperature
      loss, metrics, bank = rows.fill(bank, queries, keys, *of)
    else:
      pairs = c.pairs
      loss, metrics = rows.queue_loss(bank, queries, keys, pairs, self.temperature, self.in_batch)
    return loss, Written(metrics, memory={"bank": bank})

  def rows(self, v: Variables) -> Rows:
    """The bank, which nothing moves."""
    return Rows(v.memory["bank"], self.temperature, "batch" if self.in_batch else "own")

  def warnings(self, sizes: Sizes) -> tuple[str, ...]:
    """What is known to go badly."""
    return rows.warn_rows("method.bank.size", self.bank.size, sizes.num_examples)


@dataclasses.dataclass(frozen=True)
class Still(Random):
  """Settings; as AdCo's."""

  bank: StillBank = StillBank()

  def phases(self, sizes: Sizes) -> tuple[Phase, ...]:
    """Filling, then training."""
    bank = self.bank
    filling = rows.filling(bank.size, sizes, bank.init, bank.init_views, bank.init_epochs)
    return *filling, *super().phases(sizes)

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """Log of the number of candidates, times the weights of the pairs: while the rows are where the embeddings are."""
    others = self.in_batch and phase.name != rows.FILLING
    return rows.chance(phase, self.bank.size, sizes.batch_size, others)
