"""AdCo: a bank of negatives that ascends the contrastive loss which the encoder descends.

Flow: build makes one `AdCo`; train_step calls `loss` on one device's part of the batch, differentiates
  it, and hands the bank's gradient to its own ascending optimiser.
Shapes: bank [K, D], not normalised, rows split over devices (here k of them).
Paper: min over the encoder, max over the bank (introduction); the bank's gradient of section 3.3 with
  the factor 1/|w| and the tangent projection that autodiff of the normalisation gives (the authors'
  closed form in training/train.py:60-67).
Holds: both gradients are those of the old state ('simultaneous'); each row's gradient is orthogonal to
  the row.
"""

import dataclasses

import jax

from adco_jax.objectives import infonce


@dataclasses.dataclass(frozen=True)
class AdCo:
  """The second player with its own temperature; `in_batch` adds the batch's keys as negatives."""

  temperature: float
  bank_temperature: float
  in_batch: bool

  def init(self, rng, size, dim, dtype):
    """(descend, ascend, slots): Gaussian rows, as the authors' before their initialisation."""
    return {}, {"bank": jax.random.normal(rng, (size, dim), dtype)}, {}

  def loss(self, descend, ascend, slots, queries_QxbxD, keys_VxBxD, pairs, respond=None):
    """L_temperature(queries, stop(bank)) + L_bank_temperature(stop(queries), bank), and aux.

    `respond`: (ascend, gradient) -> ascend. Given, the bank moves first and the encoder meets its
    answer (alternating order); without it each meets the other's old state (simultaneous).
    """
    del descend, slots
    meeting = infonce.meet(queries_QxbxD, keys_VxBxD, pairs)
    query, bank = infonce.Queries(self.temperature), infonce.Bank(self.bank_temperature)

    def play(ascend, *players):
      return infonce.play(meeting, infonce.normalize(ascend["bank"]), self.in_batch, *players)

    if respond is None:
      (query_loss, query_mass, accuracy), (ascent_loss, bank_mass) = play(ascend, query, bank)
    else:
      ((ascent_loss, bank_mass),) = play(ascend, bank)
      gradient = jax.grad(lambda ascend: play(ascend, bank)[0][0])(ascend)
      ((query_loss, query_mass, accuracy),) = play(respond(ascend, gradient), query)
    aux = {
      "train/query_loss": query_loss,
      "train/accuracy": accuracy,
      "train/alignment": infonce.alignment(meeting),
      "train/in_batch_mass": query_mass,
      "bank/loss": ascent_loss,
      "bank/in_batch_mass": bank_mass,
    }
    return query_loss + ascent_loss, aux

  def write(self, slots, keys_VxBxD, step):
    """Nothing is written without a gradient."""
    del keys_VxBxD, step
    return slots
