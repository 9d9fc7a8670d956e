"""A control: AdCo whose bank ascends the alternative adversary of the paper's section 4, normalised over queries.

Flow: as objectives/adco.py; the encoder's loss is AdCo's.
Paper: section 4 holds AdCo's rows, drawn to queries of low density, against rows that every query of the batch competes
  for. Its formula is not given in what could be read; this is the reading of it that Bayes' rule leads to: the bank ascends
  (1/K) sum_j log sum_i exp(q_i.n_j / t), so that row j moves towards sum_i p(q_i | n_j) q_i.
Holds: the weights of all rows and queries sum to 1, as those of AdCo's ascent do (in-batch mass aside), so that the same
  rate asks for the same length of steps.
"""

import dataclasses

import jax
import jax.numpy as jnp

from adco_jax.config.plan import Phase, Sizes
from adco_jax.errors import require
from adco_jax.objectives import infonce, rows
from adco_jax.objectives.adco import AdCo
from adco_jax.objectives.base import Context, Embeddings, Rows, Variables, Written


@dataclasses.dataclass(frozen=True)
class QuerySoftmax(AdCo):
  """Settings; as AdCo's."""

  def check(self, sizes: Sizes) -> None:
    """As AdCo's; both move at once."""
    super().check(sizes)
    order = self.bank.order
    require(
      order == "simultaneous", "method.bank.order", order, "query_softmax has simultaneous alone"
    )

  def loss(
    self, v: Variables, e: Embeddings, c: Context, phase: Phase
  ) -> tuple[jax.Array, Written]:
    """L_temperature(queries, stop(bank)) and what the bank ascends; while filling AdCo's."""
    if phase.name == rows.FILLING:
      return super().loss(v, e, c, phase)
    assert e.keys is not None  # keys_from
    queries, keys, bank = *map(infonce.l2_normalize, (e.queries, e.keys)), v.adversary["bank"]
    stopped = jax.lax.stop_gradient(bank)
    loss, metrics = rows.queue_loss(
      stopped, queries, keys, c.pairs, self.temperature, self.in_batch
    )
    gathered_QxBxD = infonce.gather(jax.lax.stop_gradient(queries))
    ascent, bank_kxD = jnp.zeros(()), infonce.l2_normalize(bank)
    for query, _, weight in c.pairs:
      sim_kxB = jnp.matmul(bank_kxD, gathered_QxBxD[query].T, precision=infonce.HIGHEST)
      each = jax.nn.logsumexp(sim_kxB / self.bank.temperature, 1)
      ascent += weight * jnp.sum(each) / self.bank.size
    return loss + ascent, Written(metrics | {"bank/loss": ascent})

  def rows(self, v: Variables) -> Rows:
    """The bank; p(q_i | n_j) is what row j moves towards query i with."""
    return super().rows(v).replace(over="queries")
