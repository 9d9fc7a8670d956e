"""The loss against float64 NumPy and a case worked by hand; the bank's gradient and its laws."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adco_jax.objectives import infonce, rows
from adco_jax.objectives.adco import AdCo, Bank
from adco_jax.runtime import sharding
from adco_jax.runtime.runs import run_length
from adco_jax.runtime.sharding import AXIS
from benchmarks.collectives import replicated_loss
from tests import settings

PAIRS = ((0, 0, 1.0),)


def unit(rng, *shape):
  x = rng.standard_normal(shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def reference(q, k, bank, temperature, in_batch):
  """Mean InfoNCE by the book: one matrix of logits, log-softmax, in NumPy."""
  rows = bank / np.linalg.norm(bank, axis=-1, keepdims=True)
  keys = q @ k.T / temperature
  positive = np.diag(keys)
  negatives = q @ rows.T / temperature
  everything = np.concatenate([keys if in_batch else positive[:, None], negatives], 1)
  top = everything.max(1)
  return np.mean(np.log(np.exp(everything - top[:, None]).sum(1)) + top - positive)


def on_devices(devices, function, specs, out):
  mesh = sharding.create_mesh(jax.devices()[:devices])
  return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out))


def objective_value(devices, objective, which):
  """(queries [1,B,D], keys [1,B,D], bank [K,D]) -> (summed aux, gradients of queries and bank)."""

  def play(queries, keys, bank):
    def loss(queries, bank):
      return objective.contrast({"bank": bank}, queries, infonce.gather(keys), PAIRS)

    (_, aux), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(queries, bank)
    return jax.lax.psum(aux[which], AXIS), gradients

  specs = (P(None, AXIS), P(None, AXIS), P(AXIS))
  return on_devices(devices, play, specs, (P(), (P(None, AXIS), P(AXIS))))


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("temperature", [0.12, 0.02])
@pytest.mark.parametrize("devices", [1, 4])
def test_loss_equals_numpy(float64, strict, devices, temperature, in_batch):
  rng = np.random.RandomState(0)
  q, k, bank = unit(rng, 8, 5), unit(rng, 8, 5), rng.standard_normal((12, 5))
  objective = AdCo(temperature, in_batch, Bank(temperature=0.1))
  value, _ = objective_value(devices, objective, "train/query_loss")(q[None], k[None], bank)
  assert abs(value - reference(q, k, bank, temperature, in_batch)) < 1e-12


def test_loss_worked_by_hand(float64):
  # q1 = k1 = (1, 0), q2 = k2 = (0, 1), one bank row (3, 0), temperature 1, in-batch negatives:
  # row 1: -log e / (e + 1 + e), row 2: -log e / (1 + e + 1).
  q = np.eye(2)
  value, _ = objective_value(1, AdCo(1.0, True, Bank(temperature=1.0)), "train/query_loss")(
    q[None], q[None], np.array([[3.0, 0.0]])
  )
  e = math.e
  assert abs(value - (math.log((2 * e + 1) / e) + math.log((e + 2) / e)) / 2) < 1e-14


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("in_batch", [True, False])
def test_bank_gradient_is_the_closed_form(float64, devices, in_batch):
  """The authors' update (train.py:60-67), g = -A / (|w| t), is minus our gradient, per row."""
  rng = np.random.RandomState(1)
  q, k, bank, t = unit(rng, 8, 5), unit(rng, 8, 5), 2 * rng.standard_normal((12, 5)), 0.3
  norm = np.linalg.norm(bank, axis=-1, keepdims=True)
  rows = bank / norm
  s, keys = np.exp(q @ rows.T / t), np.exp(q @ k.T / t)
  p = s / (s.sum(1) + (keys.sum(1) if in_batch else np.diag(keys)))[:, None]
  ascent = (p.T @ q - (p * (q @ rows.T)).sum(0)[:, None] * rows) / (8 * t * norm)
  _, (_, gradient) = objective_value(
    devices, AdCo(0.12, in_batch, Bank(temperature=t)), "bank/loss"
  )(q[None], k[None], bank)
  assert np.abs(gradient - ascent).max() < 1e-14
  # ... and it is tangential: a step turns a row, it does not stretch it.
  assert np.abs((np.asarray(gradient) * bank).sum(1)).max() < 1e-14


def test_bank_gradient_equals_finite_differences(float64):
  rng = np.random.RandomState(2)
  q, k, bank, t = unit(rng, 4, 3), unit(rng, 4, 3), rng.standard_normal((6, 3)), 0.2
  _, (_, gradient) = objective_value(1, AdCo(0.12, True, Bank(temperature=t)), "bank/loss")(
    q[None], k[None], bank
  )
  for i in range(6):
    for j in range(3):
      step = np.zeros_like(bank)
      step[i, j] = 1e-6
      slope = reference(q, k, bank + step, t, True) - reference(q, k, bank - step, t, True)
      assert abs(gradient[i, j] - slope / 2e-6) < 1e-8


def test_players_have_separate_temperatures(float64):
  """The query's gradient must not see the bank's temperature, nor the bank's the query's."""
  rng = np.random.RandomState(3)
  args = unit(rng, 1, 4, 3), unit(rng, 1, 4, 3), rng.standard_normal((6, 3))
  run = lambda t, tm: objective_value(1, AdCo(t, True, Bank(temperature=tm)), "bank/loss")(*args)[1]
  base, other_bank, other_query = run(0.1, 0.3), run(0.1, 0.5), run(0.2, 0.3)
  assert np.array_equal(base[0], other_bank[0]) and not np.allclose(base[1], other_bank[1])
  assert np.array_equal(base[1], other_query[1]) and not np.allclose(base[0], other_query[0])


def test_a_hard_temperature_moves_few_rows_and_a_far_bank_none(float64):
  """Share of all rows' pull that the nearest 5% get, at .02 and at .2; and the pull of rows opposite all."""
  rng = np.random.RandomState(4)
  q, bank = unit(rng, 1, 8, 16), unit(rng, 200, 16)
  pull = lambda t, bank: np.linalg.norm(
    objective_value(1, AdCo(0.12, True, Bank(temperature=t)), "bank/loss")(q, q, bank)[1][1], axis=1
  )
  share = lambda x: np.sort(x)[-10:].sum() / x.sum()
  assert share(pull(0.02, bank)) > 0.9 and share(pull(0.2, bank)) < 0.5
  away = -q[0, 0] + 0.3 * bank
  q = unit(rng, 1, 8, 16) * 0.05 + q[:, :1]
  q /= np.linalg.norm(q, axis=-1, keepdims=True)
  assert pull(0.02, away).max() < 1e-15


@pytest.mark.parametrize("temperature", [0.0134, 0.0133])
def test_both_shifts_equal_numpy(float64, temperature):
  """Either side of 2 / temperature = 150 another shift is taken; the loss must not notice."""
  assert (2 / temperature > infonce.SAFE_RANGE) == (temperature == 0.0133)
  rng = np.random.RandomState(4)
  q, k, bank = unit(rng, 8, 5), unit(rng, 8, 5), rng.standard_normal((12, 5))
  for which, objective in (("train/query_loss", AdCo(temperature, True, Bank(temperature=0.1))),
                           ("bank/loss", AdCo(0.1, True, Bank(temperature=temperature)))):  # fmt: skip
    value, _ = objective_value(4, objective, which)(q[None], k[None], bank)
    assert abs(value - reference(q, k, bank, temperature, True)) < 1e-11


def reference_gradients(q, k, bank, temperature, in_batch):
  """Of `reference`, by the book: (to the queries, to the bank), from softmax probabilities."""
  norm = np.linalg.norm(bank, axis=-1, keepdims=True)
  rows = bank / norm
  logits = np.concatenate([q @ k.T, q @ rows.T], 1) / temperature
  if not in_batch:
    logits[:, : len(k)][~np.eye(len(k), dtype=bool)] = -np.inf
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  pull = (p @ np.concatenate([k, rows]) - k) / (len(q) * temperature)
  negative = p[:, len(k) :]
  push = (negative.T @ q - (negative * (q @ rows.T)).sum(0)[:, None] * rows) / norm
  return pull, push / (len(q) * temperature)


@pytest.mark.parametrize("temperature", [0.12, 0.005])
@pytest.mark.parametrize("rows", [1, 12])
def test_low_temperatures_and_one_row_are_exact(float64, temperature, rows):
  """Values and gradients of both players to 1e-12 of the largest (1 / temperature, which a loss may be)."""
  rng = np.random.RandomState(7)
  q, k, bank = unit(rng, 8, 5), unit(rng, 8, 5), rng.standard_normal((rows, 5))
  for in_batch in (True, False):
    player = AdCo(temperature, in_batch, Bank(temperature=temperature))
    exact = reference(q, k, bank, temperature, in_batch)
    pull, push = reference_gradients(q, k, bank, temperature, in_batch)
    for which in ("train/query_loss", "bank/loss"):
      value, gradients = objective_value(1, player, which)(q[None], k[None], bank)
      assert abs(value - exact) < 1e-12
      assert settings.difference(gradients[0][0], pull) < 1e-12
      assert settings.difference(gradients[1], push) < 1e-12


@pytest.mark.parametrize("temperature", [0.12, 0.005])
def test_runs_of_rows_are_the_whole_bank(float64, monkeypatch, temperature):
  """What a CPU sees in runs of two rows of the six that each device has: loss, accuracy, both gradients."""
  rng = np.random.RandomState(8)
  arguments = unit(rng, 1, 8, 5), unit(rng, 1, 8, 5), rng.standard_normal((12, 5))
  found, programs = [], []
  for run in (infonce.RUN, 2 * 8):
    monkeypatch.setattr(infonce, "RUN", run)
    for which in ("bank/loss", "train/accuracy"):
      play = objective_value(2, AdCo(temperature, False, Bank(temperature=0.1)), which)
      found.append(play(*arguments))
    programs.append("while" in play.lower(*arguments).compile().as_text())
  assert programs == [False, True]
  for one, other in zip(found[:2], found[2:], strict=True):
    assert settings.difference(one, other) < 1e-14


def test_run_length():
  """A divisor, at most as asked; all rows where none comes near."""
  asked = [(64, 10), (6, 4), (61, 3), (61, 60), (61, 64), (1, 1), (12, 1000)]
  assert [run_length(*x) for x in asked] == [8, 3, 1, 61, 61, 1, 12]


def test_a_bank_that_has_no_even_runs_is_seen_at_once(monkeypatch):
  """Seven rows on each device, runs of up to six: not seven runs of one row."""
  monkeypatch.setattr(infonce, "RUN", 6 * 8)
  rng = np.random.RandomState(8)
  play = objective_value(2, AdCo(0.1, False, Bank(temperature=0.1)), "bank/loss")
  program = play.lower(unit(rng, 1, 8, 5), unit(rng, 1, 8, 5), rng.standard_normal((14, 5)))
  assert "while" not in program.compile().as_text()


@pytest.mark.parametrize("temperature", [0.12, 0.02, 0.0134, 0.005])
def test_extreme_cosines_stay_finite(temperature):
  """float32, every combination of own key and bank at, across and opposite the query."""
  at = np.array([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
  q = np.tile(at[2], (1, 4, 1))
  for which, in_batch in (("train/query_loss", True), ("bank/loss", False)):
    objective = AdCo(temperature, in_batch, Bank(temperature=temperature))
    play = objective_value(2, objective, which)
    for own, other in itertools.product(at, at):
      k, bank = np.tile(own, (1, 4, 1)), np.tile(other, (8, 1))
      value, gradients = play(q, k, bank)
      wide = (x.astype(np.float64) for x in (q[0], k[0], bank))
      exact = reference(*wide, temperature, in_batch)
      assert abs(value - exact) <= 1e-5 * max(1, exact), (own, other)
      assert all(np.isfinite(g).all() for g in gradients), (own, other)


@pytest.mark.parametrize("temperature", [0.12, 0.0134, 0.0133, 0.005])
@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_not_summed_does_not_shift(temperature, devices):
  """float32, without the batch's keys: that another image's key equals the query takes nothing from the own one's term."""
  rng = np.random.RandomState(9)
  q = unit(rng, 1, 4, 5).astype(np.float32)
  k, bank = np.roll(q, 1, 1), rng.standard_normal((8, 5)).astype(np.float32)
  exact = reference(q[0].astype(float), k[0].astype(float), bank.astype(float), temperature, False)
  objective = AdCo(temperature, False, Bank(temperature=temperature))
  for which in ("train/query_loss", "bank/loss"):
    value, gradients = objective_value(devices, objective, which)(q, k, bank)
    assert abs(value - exact) < 1e-5 * exact
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("in_batch", [True, False])
def test_query_gradient_equals_finite_differences(float64, in_batch):
  """The hand-written backward pass, on four devices."""
  rng = np.random.RandomState(6)
  q, k, bank, t = unit(rng, 4, 3), unit(rng, 4, 3), rng.standard_normal((8, 3)), 0.2
  _, (gradient, _) = objective_value(4, AdCo(t, in_batch, Bank(temperature=0.1)), "bank/loss")(
    q[None], k[None], bank
  )
  for i in range(4):
    for j in range(3):
      step = np.zeros_like(q)
      step[i, j] = 1e-6
      slope = reference(q + step, k, bank, t, in_batch) - reference(q - step, k, bank, t, in_batch)
      assert abs(gradient[0, i, j] - slope / 2e-6) < 1e-8


def test_zero_row_stays_finite():
  """The authors divide by |w| without an epsilon; a row of zeros must not poison the bank."""
  q = np.eye(3, dtype=np.float32)[None]
  _, gradients = objective_value(1, AdCo(0.1, True, Bank(temperature=0.1)), "bank/loss")(
    q, q, np.zeros((4, 3), np.float32)
  )
  assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("devices", [1, 4])
def test_alignment_is_the_mean_squared_distance_to_the_own_key(float64, devices):
  rng = np.random.RandomState(6)
  q, k, bank = unit(rng, 8, 5), unit(rng, 8, 5), rng.standard_normal((12, 5))
  value = lambda k: objective_value(
    devices, AdCo(0.1, True, Bank(temperature=0.1)), "train/alignment"
  )(q[None], k[None], bank)[0]
  assert value(k) == pytest.approx(np.square(q - k).sum(-1).mean())
  assert value(q) == pytest.approx(0, abs=1e-12) and value(-q) == pytest.approx(4)


def test_accuracy_counts_what_is_nearer():
  """Three queries: one beaten by a bank row, one by another key, one by nobody."""
  q = np.eye(3)[None].astype(np.float32)
  k = np.array([[[1, 0, 0], [0, 0.6, 0.8], [0, 0.8, 0.6]]], np.float32)
  bank = np.array([[0.1, 0.0, 9.0], [0.0, 0.0, 1.0]], np.float32)
  for in_batch, right in ((True, 1 / 3), (False, 2 / 3)):
    value, _ = objective_value(1, AdCo(0.1, in_batch, Bank(temperature=0.1)), "train/accuracy")(
      q, k, bank
    )
    assert abs(value - right) < 1e-6


def test_accuracy_of_a_collapsed_encoder_is_zero():
  """All embeddings alike: candidates as near as the key count against it, however products are rounded."""
  direction = np.random.RandomState(0).standard_normal(128)
  alike = lambda n, scale: np.tile(direction, (n, 1)) * scale
  unit = (alike(16, 1) / np.linalg.norm(direction))[None].astype(np.float32)
  value, _ = objective_value(1, AdCo(0.1, True, Bank(temperature=0.1)), "train/accuracy")(
    unit, unit, alike(32, 0.3).astype(np.float32)
  )
  assert value == 0


def test_normalize_equals_torch_definition():
  x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
  assert np.array_equal(
    infonce.l2_normalize(jnp.asarray(x)), np.array([[0.6, 0.8], [0, 0]], np.float32)
  )
  assert infonce.l2_normalize(jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32


def test_chance_level():
  once, twice = settings.phase(PAIRS), settings.phase(((1, 0, 1.0), (2, 0, 1.0)))
  assert rows.chance(once, 65536, 256, True) == math.log(65792)
  assert rows.chance(once, 65536, 256, False) == math.log(65537)
  assert rows.chance(twice, 65536, 256, True) == 2 * math.log(65792)


def test_a_split_bank_plays_as_a_replicated_one(float64):
  """Losses and both gradients of the authors' design (every device holds the bank) on 8 devices."""
  rng, pairs = np.random.RandomState(0), ((0, 1, 0.5), (1, 0, 0.5))
  queries, keys, bank = unit(rng, 2, 16, 6), unit(rng, 2, 16, 6), unit(rng, 64, 6)
  mesh, split = sharding.create_mesh(jax.devices()[:8]), P(None, AXIS)
  player = AdCo(0.12, True, Bank(temperature=0.3))

  def ours(queries, keys, bank):
    every = infonce.gather(keys)
    play = lambda q, b: player.contrast({"bank": b}, q, every, pairs)[0]
    value, gradients = jax.value_and_grad(play, (0, 1))(queries, bank)
    return jax.lax.psum(value, AXIS), gradients

  def theirs(queries, keys, bank):
    play = lambda q, b: replicated_loss(q, keys, b, pairs, 0.12, 0.3)[0]
    value, (pull, push) = jax.value_and_grad(play, (0, 1))(queries, bank)
    return jax.lax.psum(value, AXIS), (pull, jax.lax.psum(push, AXIS))

  def play(game, where):
    specs = dict(in_specs=(split, split, where), out_specs=(P(), (split, where)), check_vma=game is ours)  # fmt: skip
    return jax.jit(jax.shard_map(game, mesh=mesh, **specs))(queries, keys, bank)

  one, other = play(ours, P(AXIS)), play(theirs, P())
  assert settings.difference(one[0], other[0]) < 1e-12
  assert settings.difference(one[1][0], other[1][0]) < 1e-12
  unnormalised = other[1][1] - jnp.sum(other[1][1] * bank, -1, keepdims=True) * bank
  assert settings.difference(one[1][1], unnormalised) < 1e-12


def test_sums_over_gloo_are_the_same(float64, monkeypatch):
  """Where reduce-scatter is not to be had, the whole sum is cut: the same loss and gradients."""
  rng = np.random.RandomState(0)
  arguments = unit(rng, 1, 16, 6), unit(rng, 1, 16, 6), unit(rng, 64, 6)
  mesh, split = sharding.create_mesh(jax.devices()[:8]), P(None, AXIS)
  player = AdCo(0.12, True, Bank(temperature=0.3))

  def play():
    def game(queries, keys, bank):
      every = infonce.gather(keys)
      loss = lambda q, b: player.contrast({"bank": b}, q, every, PAIRS)[0]
      value, gradients = jax.value_and_grad(loss, (0, 1))(queries, bank)
      return jax.lax.psum(value, AXIS), gradients

    where = dict(in_specs=(split, split, P(AXIS)), out_specs=(P(), (split, P(AXIS))))
    compiled = jax.jit(jax.shard_map(game, mesh=mesh, **where)).lower(*arguments).compile()
    return compiled(*arguments), "reduce-scatter" in compiled.as_text()

  scattered, has = play()
  monkeypatch.setattr(sharding, "over_gloo", lambda: True)
  summed, still_has = play()
  assert has and not still_has
  assert settings.difference(scattered, summed) < 1e-14
