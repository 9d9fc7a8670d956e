"""CaCo: one bank holds positives and negatives; a query's positive row descends with it, all other rows ascend.

Flow: as objectives/adco.py; the bank is filled before training, at a temperature of its own.
Shapes: bank [K, D], not normalised, rows split over devices (here k of them).
Paper: Wang et al. 2023 (AdCo-v2); training/train_caco.py: the positive of a query is the row nearest to the other view's
  key; cross-entropy over the K rows, no keys of the batch; the bank moves along the mean over queries of s_ij q_i / t,
  s_ij = p_ij, but 1 - p_ij for the positive; both directions summed (views.reduction=sum).
Holds: every row moves towards queries; both players see the old state. Of rows equally near the lower one is the positive.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.plan import Phase, Sizes
from adco_jax.objectives import infonce, rows
from adco_jax.objectives.base import Base, Context, Embeddings, Rows, Variables, Written
from adco_jax.runtime.sharding import AXIS

FILL_TEMPERATURE = 0.2  # train_caco.py's init_memory


@dataclasses.dataclass(frozen=True)
class Bank:
  """Settings of the bank, the authors'."""

  size: int = setting(65536, ranges.COUNT, "K rows", fixed=True)
  temperature: float = setting(0.08, ranges.temperature, "of what moves the bank")
  learning_rate: float = setting(3.0, ranges.AMOUNT, "of the bank")
  warmup_epochs: float = setting(10.0, ranges.AMOUNT, "in which its rate grows from 0")
  momentum: float = setting(0.9, ranges.SHARE, "of its steps")
  init_epochs: float = setting(
    0.0, ranges.AMOUNT, "first epochs in which it is a queue", fixed=True
  )


@dataclasses.dataclass(frozen=True)
class CaCo(Base):
  """Settings, the authors'."""

  temperature: float = setting(0.08, ranges.temperature, "of the encoder's loss")
  bank: Bank = Bank()

  modes = ("symmetric",)

  def check(self, sizes: Sizes) -> None:
    """The bank's rows are split over the devices."""
    rows.check_rows("method.bank.size", self.bank.size, sizes.devices)

  def phases(self, sizes: Sizes) -> tuple[Phase, ...]:
    """Filling, then training."""
    bank = self.bank
    filling = rows.filling(bank.size, sizes, "trained", init_epochs=bank.init_epochs)
    return *filling, *super().phases(sizes)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """Gaussian rows."""
    return Variables(adversary={"bank": jax.random.normal(rng, (self.bank.size, sizes.dim), dtype)})

  def specs(self) -> Variables:
    """Rows are split."""
    return Variables(P(), P(AXIS), P())

  def ascent(self, sizes: Sizes) -> optax.GradientTransformation:
    """SGD with momentum up the gradient, its rate warmed up; no decay."""
    bank = self.bank
    steps = round(bank.warmup_epochs * sizes.steps_per_epoch)
    rate = lambda count: bank.learning_rate * jnp.minimum(1.0, (count + 1) / max(1, steps))
    return optax.chain(optax.scale(-1.0), optax.sgd(rate, bank.momentum))

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """What has the gradients of both players; its value means nothing, train/loss is the encoder's."""
    assert e.keys is not None  # keys_from
    bank, keys = v.adversary["bank"], infonce.l2_normalize(e.keys)
    queries = infonce.l2_normalize(e.queries)
    if phase.name == rows.FILLING:
      of = c, phase, self.bank.size, FILL_TEMPERATURE
      loss, metrics, bank = rows.fill(bank, queries, keys, *of)
      return loss, Written(metrics, adversary={"bank": bank})
    gathered_QxBxD, rows_kxD = infonce.gather_with_gradient(queries), infonce.l2_normalize(bank)
    played, told, right = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    for query, key, weight in c.pairs:
      play, loss, correct = self._pair(gathered_QxBxD[query], keys[key], rows_kxD)
      played, told, right = played + weight * play, told + weight * loss, right + correct
    return played, Written({"train/loss": told, "train/accuracy": right / len(c.pairs)})

  def _pair(self, queries_BxD, keys_BxD, rows_kxD):
    """Of one direction: what both gradients come from, this device's parts of the loss and of the accuracy."""
    product = lambda x, y: jnp.matmul(x, y.T, precision=infonce.HIGHEST)
    stop = jax.lax.stop_gradient
    sim_Bxk = stop(product(queries_BxD, rows_kxD))
    positive_Bxk = _nearest(product(keys_BxD, stop(rows_kxD)))
    p, log_sum = _softmax(sim_Bxk, self.temperature)
    descent = (
      product(queries_BxD, stop(rows_kxD)) * (p - positive_Bxk.astype(p.dtype)) / self.temperature
    )
    p_bank, _ = _softmax(sim_Bxk, self.bank.temperature)
    towards = jnp.where(positive_Bxk, 1 - p_bank, p_bank)
    ascent = product(stop(queries_BxD), rows_kxD) * towards / self.bank.temperature
    chosen = jnp.sum(jnp.where(positive_Bxk, sim_Bxk, 0)) / self.temperature
    batch, devices = len(queries_BxD), jax.lax.axis_size(AXIS)
    loss = jnp.sum(log_sum) / (batch * devices) - chosen / batch
    right = jnp.sum((_nearest(sim_Bxk) & positive_Bxk).astype(p.dtype)) / batch
    return jnp.sum(descent + ascent) / batch, loss, right

  def rows(self, v: Variables) -> Rows:
    """The bank; the positive of a query is one of its rows."""
    return Rows(v.adversary["bank"], self.bank.temperature, "none")

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """Log of the number of rows, times the weights of the pairs."""
    more = 1 if phase.name == rows.FILLING else 0
    return sum(weight for *_, weight in phase.pairing.pairs) * math.log(self.bank.size + more)

  def warnings(self, sizes: Sizes) -> tuple[str, ...]:
    """What is known to go badly."""
    return rows.warn_rows("method.bank.size", self.bank.size, sizes.num_examples)


def _softmax(sim_Bxk, temperature):
  """(this device's part of each query's softmax over all rows, log of the sum [B])."""
  x = sim_Bxk / temperature
  most = jax.lax.pmax(jnp.max(x, 1), AXIS)
  log_sum = most + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(x - most[:, None]), 1), AXIS))
  return jnp.exp(x - log_sum[:, None]), log_sum


def _nearest(sim_Bxk):
  """Which row of all devices' is the nearest, bool [B, k]: found by its number, no value is compared twice."""
  here = jnp.argmax(sim_Bxk, 1)
  value = jnp.take_along_axis(sim_Bxk, here[:, None], 1)[:, 0]
  device = jnp.argmax(jax.lax.all_gather(value, AXIS), 0)
  mine = device == jax.lax.axis_index(AXIS)
  return mine[:, None] & (jnp.arange(sim_Bxk.shape[1])[None] == here[:, None])
