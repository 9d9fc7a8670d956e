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

from adco_jax import losses


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
    meeting = losses.meet(queries_QxbxD, keys_VxBxD, pairs)

    def bank_loss(ascend):
      sim = losses.bank_similarity(meeting, losses.normalize(ascend["bank"]))
      loss, mass = losses.bank_loss(meeting, sim, self.bank_temperature, self.in_batch)
      return loss, (mass, sim)

    ascent_loss, (bank_mass, sim) = bank_loss(ascend)
    if respond is not None:
      ascend = respond(ascend, jax.grad(bank_loss, has_aux=True)(ascend)[0])
    bank = losses.normalize(ascend["bank"])
    if respond is not None:
      sim = losses.bank_similarity(meeting, bank)
    query_loss, query_mass = losses.query_loss(meeting, bank, sim, self.temperature, self.in_batch)
    aux = {
      "train/query_loss": query_loss,
      "train/accuracy": losses.accuracy(meeting, sim, self.in_batch),
      "train/alignment": losses.alignment(meeting),
      "train/in_batch_mass": query_mass,
      "bank/loss": ascent_loss,
      "bank/in_batch_mass": bank_mass,
    }
    return query_loss + ascent_loss, aux

  def write(self, slots, keys_VxBxD, step):
    """Nothing is written without a gradient."""
    del keys_VxBxD, step
    return slots
