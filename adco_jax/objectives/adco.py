"""AdCo: a bank of negatives that ascends the contrastive loss which the encoder descends.

Flow: build makes one `AdCo`; train_step calls `loss` on one device's part of the batch, differentiates it, and hands the
  bank's gradient to `ascent`. Before training the bank is filled with keys, row after row (`phases`).
Shapes: bank [K, D], not normalised, rows split over devices (here k of them).
Paper: min over the encoder, max over the bank (introduction); the bank's gradient of section 3.3 with the factor 1/|w| and
  the tangent projection that autodiff of the normalisation gives (the authors' closed form in training/train.py:60-67).
Holds: both gradients are those of the old state ('simultaneous'); each row's gradient is orthogonal to the row.
Not here: how the bank is filled (rows).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from adco_jax.config import ranges
from adco_jax.config.method import setting
from adco_jax.config.pairing import Pair
from adco_jax.config.plan import Phase, Sizes
from adco_jax.objectives import infonce, rows
from adco_jax.objectives.base import Base, Context, Embeddings, Rows, Variables, Written
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.sharding import AXIS


@dataclasses.dataclass(frozen=True)
class Bank:
  """Settings of the bank; configs/adco_r50.py says what each means."""

  size: int = setting(65536, ranges.COUNT, fixed=True)
  temperature: float = setting(0.02, ranges.temperature)
  learning_rate: float = setting(3.0, ranges.AMOUNT)
  weight_decay: float = setting(1e-4, ranges.AMOUNT)
  momentum: float = setting(0.9, ranges.SHARE)
  init: str = setting("trained", ranges.choice("trained", "keys", "random"), fixed=True)
  init_views: str = setting("training", ranges.choice("training", "authors"), fixed=True)
  init_epochs: float = setting(0.0, ranges.AMOUNT, fixed=True)
  order: str = setting("simultaneous", ranges.choice("simultaneous", "alternating"))


@dataclasses.dataclass(frozen=True)
class AdCo(Base):
  """Settings of both players; configs/adco_r50.py says what each means."""

  temperature: float = setting(0.12, ranges.temperature)
  in_batch: bool = setting(True)
  bank: Bank = Bank()

  def check(self, sizes: Sizes) -> None:
    """The bank's rows are split over the devices."""
    rows.check_rows("method.bank.size", self.bank.size, sizes.devices)
    rows.check_temperature("method.temperature", self.temperature, sizes.mode)
    rows.check_temperature("method.bank.temperature", self.bank.temperature, sizes.mode)

  def phases(self, sizes: Sizes) -> tuple[Phase, ...]:
    """Filling the bank, unless it stays random, then training."""
    bank = self.bank
    filling = rows.filling(bank.size, sizes, bank.init, bank.init_views, bank.init_epochs)
    return *filling, *super().phases(sizes)

  def init(self, rng: jax.Array, sizes: Sizes, dtype: jax.typing.DTypeLike) -> Variables:
    """Gaussian rows, as the authors' before their initialisation."""
    return Variables(adversary={"bank": jax.random.normal(rng, (self.bank.size, sizes.dim), dtype)})

  def specs(self) -> Variables:
    """Rows are split."""
    return Variables(P(), P(AXIS), P())

  def ascent(self, sizes: Sizes) -> optax.GradientTransformation:
    """torch's SGD(maximize=True), see `ascend_transform`."""
    bank = self.bank
    return ascend_transform(bank.learning_rate, bank.momentum, bank.weight_decay)

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """L_temperature(queries, stop(bank)) + L_bank_temperature(stop(queries), bank); while filling the queue's loss."""
    assert e.keys is not None  # keys_from
    queries, keys = infonce.l2_normalize(e.queries), infonce.l2_normalize(e.keys)
    if phase.name == rows.FILLING:
      of = c, phase, self.bank.size, self.temperature
      loss, metrics, bank = rows.fill(v.adversary["bank"], queries, keys, *of)
      return loss, Written(metrics, adversary={"bank": bank})
    ascend = c.ascend if self.bank.order == "alternating" else None
    loss, metrics = self.contrast(v.adversary, queries, keys, c.pairs, ascend)
    return loss, Written(metrics)

  def contrast(
    self,
    adversary: Tree,
    queries_QxbxD: jax.Array,
    keys_VxBxD: jax.Array,
    pairs: Sequence[Pair],
    ascend: Callable[[Tree, Tree], Tree] | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of unit vectors.

    `ascend`: (adversary, gradient) -> adversary. Given, the bank moves first and the encoder meets its answer
    (alternating order); without it each meets the other's old state (simultaneous).
    """
    similarities = infonce.pair_similarities(queries_QxbxD, keys_VxBxD, pairs)
    query, bank = infonce.QueryLoss(self.temperature), infonce.BankLoss(self.bank.temperature)

    def losses(adversary, *wanted):
      rows_kxD = infonce.l2_normalize(adversary["bank"])
      return infonce.losses(similarities, rows_kxD, self.in_batch, *wanted)

    if ascend is None:
      (query_loss, query_mass, accuracy), (ascent_loss, bank_mass) = losses(adversary, query, bank)
    else:
      ((ascent_loss, bank_mass),) = losses(adversary, bank)
      gradient = jax.grad(lambda adversary: losses(adversary, bank)[0][0])(adversary)
      ((query_loss, query_mass, accuracy),) = losses(ascend(adversary, gradient), query)
    metrics = infonce.metrics(similarities, query_loss, query_mass, accuracy)
    return query_loss + ascent_loss, metrics | {
      "bank/loss": ascent_loss,
      "bank/in_batch_mass": bank_mass,
    }

  def summary(self, v: Variables) -> dict[str, jax.Array]:
    """Norms of the bank's rows: they set how fast the bank can turn (the step's angle is ~ 1 / norm^2)."""
    norms = jnp.linalg.norm(v.adversary["bank"], axis=-1)
    quantiles = jnp.quantile(norms, jnp.array([0.0, 0.5, 1.0], norms.dtype))
    return dict(zip(("bank/min_norm", "bank/median_norm", "bank/max_norm"), quantiles, strict=True))

  def rows(self, v: Variables) -> Rows:
    """The bank; p(n_j | q_i) is what row j moves towards query i with."""
    bank, temperature = v.adversary["bank"], self.bank.temperature
    return Rows(bank, temperature, "batch" if self.in_batch else "own")

  def chance(self, sizes: Sizes, phase: Phase) -> float:
    """Log of the number of candidates, times the weights of the pairs."""
    return rows.chance(
      phase, self.bank.size, sizes.batch_size, self.in_batch and phase.name != rows.FILLING
    )

  def warnings(self, sizes: Sizes) -> tuple[str, ...]:
    """What is known to go badly."""
    batch, bank = sizes.batch_size, self.bank
    told = rows.warn_rows("method.bank.size", bank.size, sizes.num_examples)
    if bank.learning_rate and batch > 1024:
      told += (
        f"method.bank.learning_rate={bank.learning_rate:g} is known at batch 256 only; at {batch} the bank takes fewer steps per epoch",
      )
    return told


def ascend_transform(
  learning_rate: float, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
  """The bank's ascent: torch's SGD(maximize=True), so that weight decay still shrinks the rows.

  The sign is turned first; turned last, decay would become growth. The authors' lines:
  v = momentum v + g + weight_decay w; w -= learning_rate v with g = -dL/dw (training/train.py:65-67).
  """
  return optax.chain(
    optax.scale(-1.0),
    optax.add_decayed_weights(weight_decay),
    optax.sgd(learning_rate, momentum),
  )
