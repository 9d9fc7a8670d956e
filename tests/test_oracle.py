"""The step against itself by hand: linear encoder, gradients written out in NumPy, float64, eight steps."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from adco_jax.config.pairing import make_pairing
from adco_jax.config.plan import Sizes
from adco_jax.data.batch import Batch
from adco_jax.models.heads import embed
from adco_jax.objectives.adco import AdCo, Bank
from adco_jax.runtime import sharding
from adco_jax.training import optimizers
from adco_jax.training.state import create_state
from adco_jax.training.train_step import StepSpec, make_update

B, SIDE, D, K, STEPS = 8, 3, 6, 24, 8
TAU, BANK_TAU, RATE, BANK_RATE, DECAY, BANK_DECAY, EMA = 0.2, 0.1, 0.05, 1.0, 1e-3, 1e-2, 0.9
MODES = {"single": 2, "symmetric": 2, "multicrop": 4, "symmetric_multicrop": 4}


class Linear(nn.Module):
  """z = x W; no statistics."""

  @nn.compact
  def __call__(self, images, train, head=True):
    del train, head
    x = images.reshape(len(images), -1)
    kernel = self.param("kernel", nn.initializers.normal(0.3), (x.shape[1], D), images.dtype)
    return x @ kernel

  dtype = np.dtype(np.float64)


def spec(order, in_batch, devices, mode):
  """(encoder, what the step is made of)."""
  encoder = Linear()
  objective = AdCo(
    TAU, in_batch, Bank(K, BANK_TAU, BANK_RATE, BANK_DECAY, 0.9, "random", order=order)
  )
  return encoder, StepSpec(
    embed=functools.partial(embed, encoder),
    objective=objective,
    sizes=Sizes(B, D, B, 0, devices, mode, MODES[mode]),
    descender=optimizers.make_optimizer("sgd", 0.9, DECAY),
    rate=lambda step: jax.numpy.full((), RATE),
    ema_rate=lambda step: jax.numpy.full((), 1 - EMA),
    fill_steps=0,
    running_from="mean",
    mesh=sharding.create_mesh(jax.devices()[:devices]),
  )


def played(mode, order, in_batch, views, devices):
  """[(loss, kernel, key kernel, bank)] and the state before, as the system plays."""
  (encoder, game), pairing = spec(order, in_batch, devices, mode), make_pairing(mode, MODES[mode])
  rngs = jax.random.key(0), jax.random.key(1)
  make = lambda: create_state(
    rngs, encoder, game.objective, game.descender, (1, SIDE, SIDE, 3), game.sizes
  )
  state = start = jax.device_get(jax.jit(make)())
  (training,) = game.objective.phases(game.sizes)
  update = jax.jit(make_update(game, training))
  found = []
  for step in range(STEPS):
    x = views[step].reshape(-1, B, SIDE, SIDE, 3)
    batch = Batch.of([x[v] for v in pairing.query_views], [x[v] for v in pairing.key_views])
    state, metrics = jax.device_get(update(state, batch))
    kernels = state.query_params["kernel"], state.key_params["kernel"]
    found.append((metrics["train/query_loss"], *kernels, state.objective.adversary["bank"]))
  return found, (start.query_params["kernel"], start.objective.adversary["bank"])


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmaxes(q, k, bank, tau, in_batch):
  """(losses [B], weights of keys [B, B], weights of rows [B, K]) of one pair of views."""
  keys = np.exp(q @ k.T / tau) * (1 if in_batch else np.eye(B))
  rows = np.exp(q @ unit(bank).T / tau)
  total = keys.sum(1) + rows.sum(1)
  loss = np.log(total) - (q * k).sum(1) / tau
  return loss, keys / total[:, None], rows / total[:, None]


def bank_ascent(pairs, bank, in_batch):
  """dL/dw of the weighted mean loss at the bank's temperature: tangent part over the length."""
  gradient = np.zeros_like(bank)
  n = unit(bank)
  for q, k, weight in pairs:
    *_, p = softmaxes(q, k, bank, BANK_TAU, in_batch)
    pull = p.T @ q / (B * BANK_TAU)
    pull -= (pull * n).sum(1, keepdims=True) * n
    gradient += weight * pull / np.linalg.norm(bank, axis=1, keepdims=True)
  return gradient


def by_hand(mode, order, in_batch, views, kernel, bank):
  """The same from the equations."""
  pairing = make_pairing(mode, MODES[mode])
  key_kernel, velocity, bank_velocity = kernel.copy(), 0 * kernel, 0 * bank
  found = []
  for x in views:
    z = {v: x[v] @ kernel for v in pairing.query_views}
    key_kernel = EMA * key_kernel + (1 - EMA) * kernel
    k = {v: unit(x[v] @ key_kernel) for v in pairing.key_views}
    named = [(pairing.query_views[i], pairing.key_views[j], w) for i, j, w in pairing.pairs]
    ascent = bank_ascent([(unit(z[i]), k[j], w) for i, j, w in named], bank, in_batch)
    bank_velocity = 0.9 * bank_velocity - ascent + BANK_DECAY * bank
    new_bank = bank - BANK_RATE * bank_velocity
    seen = new_bank if order == "alternating" else bank
    loss, gradient = 0.0, np.zeros_like(kernel)
    for i, j, weight in named:
      q = unit(z[i])
      losses, keys, rows = softmaxes(q, k[j], seen, TAU, in_batch)
      dq = (keys @ k[j] + rows @ unit(seen) - k[j]) / (B * TAU)
      dz = (dq - (dq * q).sum(1, keepdims=True) * q) / np.linalg.norm(z[i], axis=1, keepdims=True)
      loss, gradient = loss + weight * losses.mean(), gradient + weight * x[i].T @ dz
    velocity = 0.9 * velocity + gradient + DECAY * kernel
    kernel, bank = kernel - RATE * velocity, new_bank
    found.append((loss, kernel, key_kernel, bank))
  return found


def largest_difference(one, other):
  """Over all steps and arrays, relative to the array's largest value."""
  return max(
    np.abs(np.asarray(a) - b).max() / np.abs(b).max()
    for left, right in zip(one, other, strict=True)
    for a, b in zip(left, right, strict=True)
  )


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("mode", MODES)
def test_eight_steps_by_hand(float64, mode, order, in_batch):
  views = np.random.RandomState(0).standard_normal((STEPS, MODES[mode], B, SIDE * SIDE * 3))
  ours, (kernel, bank) = played(mode, order, in_batch, views, devices=4)
  hand = by_hand(mode, order, in_batch, views, kernel, bank)
  other = {"simultaneous": "alternating", "alternating": "simultaneous"}[order]
  assert largest_difference(by_hand(mode, other, in_batch, views, kernel, bank), hand) > 1e-3
  difference = largest_difference(ours, hand)
  print(f"{mode} {order} in_batch={in_batch}: {difference:.1e}")
  assert difference < 1e-10
