"""The queue and the bank's initialisation, through the real step on one and four devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adco_jax.errors import ConfigError
from adco_jax.objectives import infonce, swav
from adco_jax.objectives.rows import write_rows
from adco_jax.runtime import sharding
from adco_jax.training import train_step
from tests import settings

pytestmark = pytest.mark.steps  # the slow ones' group


def keys_of(players, state, views):
  """The step's keys, recomputed outside it: EMA first, then the key forward, [V, B, D]."""
  key_params = jax.tree.map(
    lambda k, q: 0.999 * k + 0.001 * q, state.key_params, state.query_params
  )
  stats, keys = state.key_stats, []
  for images in views.keys:
    z, stats = players.embed(key_params, stats, images)
    keys.append(infonce.l2_normalize(z))
  return np.stack(keys)


def play(config, devices, steps):
  """(plan, [state before, ..., state after], [keys]) of the first phase."""
  players, plan, state = settings.create_players(config, devices)
  phase = plan.phases[0]
  update = jax.jit(train_step.make_update(players, phase))
  states, keys = [jax.device_get(state)], []
  for step in range(steps):
    batch = settings.random_batch(plan, phase.pairing, step)
    keys.append(keys_of(players, states[-1], batch))
    state, _ = update(state, batch.put(players.mesh))
    states.append(jax.device_get(state))
  return plan, states, keys


ONE_OR_FOUR = [pytest.param(1, marks=pytest.mark.slow), 4]


@pytest.mark.parametrize("mode", [pytest.param("single", marks=pytest.mark.slow), "symmetric"])
@pytest.mark.parametrize("devices", ONE_OR_FOUR)
def test_queue_holds_exactly_the_last_keys(mode, devices):
  """Five steps into 40 rows: the oldest are overwritten in order, wrapping around."""
  config = settings.tiny_config(
    mode, objective="moco", method__in_batch=False, method__queue_size=40
  )
  _, states, keys = play(config, devices, 5)
  written = np.concatenate([k.reshape(-1, 16) for k in keys])
  expected = np.empty((40, 16), np.float32)
  for i, row in enumerate(written):
    expected[i % 40] = row
  assert len(written) > 40
  assert np.abs(states[-1].objective.memory["queue"] - expected).max() < 1e-5
  assert states[-1].objective.adversary == {}


def test_a_step_larger_than_the_queue_keeps_its_last_keys():
  def write(queue, keys):
    return write_rows(queue, keys, jnp.arange(4, 8) % 6)

  mesh = sharding.create_mesh(jax.devices()[:2])
  split = jax.shard_map(write, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
  found = jax.jit(split)(np.zeros((6, 1), np.float32), np.arange(1, 5, dtype=np.float32)[:, None])
  assert found[:, 0].tolist() == [3, 4, 0, 0, 1, 2]


@pytest.mark.parametrize("devices", ONE_OR_FOUR)
def test_trained_initialisation(devices):
  """40 rows in 3 steps of 16: rows in order, the last write cut, phi := theta, bank at rest."""
  config = settings.tiny_config("symmetric", method__bank__size=40)
  plan, states, keys = play(config, devices, 3)
  assert plan.fill_steps == 3 and plan.total_steps == 3 + 4
  end = states[-1]
  assert (
    np.abs(end.objective.adversary["bank"] - np.concatenate([k[0] for k in keys])[:40]).max() < 1e-5
  )
  assert settings.difference(end.key_params, end.query_params) == 0
  assert settings.difference(states[-2].key_params, states[-2].query_params) > 1e-4
  assert settings.difference(end.key_stats, end.query_stats) > 1e-4
  assert all((x == 0).all() for x in jax.tree.leaves(end.adversary_optimizer))
  assert max(np.abs(x).max() for x in jax.tree.leaves(end.optimizer)) > 0
  assert end.step == 3 and end.objective.memory == {}


def test_passive_initialisation_moves_the_bank_only():
  config = settings.tiny_config(method__bank__size=32, method__bank__init="keys")
  _, (start, *_, end), keys = play(config, 1, 2)
  for name in ("query_params", "query_stats", "key_params", "key_stats", "optimizer"):
    assert settings.difference(getattr(start, name), getattr(end, name)) == 0
  # Without training every key comes from the start: keys_of's EMA of equal parameters changes nothing.
  assert np.abs(end.objective.adversary["bank"] - np.concatenate([k[0] for k in keys])).max() < 1e-4
  assert end.step == 2


def test_positives_are_global_on_every_device():
  """Identical views: each query's nearest candidate is its own key wherever it lives. With the authors'
  local label every device but the first would be wrong."""
  config = settings.tiny_config(method__bank__init="random", model__dim=16)
  players, plan, state = settings.create_players(config, 4)
  far = -10 * np.sign(np.asarray(state.objective.adversary["bank"]))
  state = state.replace(
    objective=state.objective._replace(
      adversary={"bank": jax.device_put(far, state.objective.adversary["bank"].sharding)}
    )
  )
  batch = settings.random_batch(plan, plan.train_pairing, 0)
  batch = batch._replace(keys=batch.queries)
  update = jax.jit(train_step.make_update(players, plan.phases[-1]))
  _, metrics = update(state, batch.put(players.mesh))
  assert metrics["train/accuracy"] > 0.9


LONG = [pytest.param(40, 4, 1), pytest.param(8, 2, 4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("rows, steps, devices", LONG)
def test_long_filling_goes_around(rows, steps, devices):
  """Key n of update i, both views', is written to row (2 i B + n) mod K; the key encoder stays an average. 8 rows: fewer than keys."""
  config = settings.tiny_config("symmetric", epochs=2, method__bank__size=rows, method__bank__init_epochs=steps / 4)  # fmt: skip
  plan, states, keys = play(config, devices, steps)
  expected = np.empty((rows, 16), np.float32)
  for i, row in enumerate(np.concatenate([k.reshape(-1, 16) for k in keys])):
    expected[i % rows] = row
  assert (plan.filled_at, plan.fill_steps, plan.total_steps) == (steps, 0, 8)
  end, before = states[-1], states[-2]
  assert np.abs(end.objective.adversary["bank"] - expected).max() < 1e-5
  average = jax.tree.map(lambda k, q: 0.999 * k + 0.001 * q, before.key_params, before.query_params)
  assert settings.difference(end.key_params, average) < 1e-6
  assert settings.difference(end.key_params, end.query_params) > 1e-4


def test_a_filling_is_before_the_epochs_or_among_them():
  plan_of = lambda **keys: settings.tiny_plan(settings.tiny_config("symmetric", **keys))
  once = plan_of(epochs=2, method__bank__size=40)
  assert (once.filled_at, once.fill_steps, once.total_steps) == (3, 3, 11)
  assert [once.epoch(3), once.epoch(7), once.batch(3), once.batch(2)] == [0, 1, 0, 2]
  first, second = once.phases
  assert first.copies_query_to_key and first.pairing.pairs == ((0, 0, 1.0),)
  long = plan_of(epochs=2, method__bank__size=40, method__bank__init_epochs=1)
  assert (long.filled_at, long.fill_steps, long.total_steps) == (4, 0, 8)
  assert [long.epoch(3), long.epoch(8), long.batch(5)] == [0.75, 2, 5]
  assert long.evaluates(4) == once.evaluates(7)
  first, second = long.phases
  assert not first.copies_query_to_key and first.pairing == second.pairing == long.train_pairing


@pytest.mark.parametrize("keys, said", [
  (dict(epochs=2, method__bank__init_epochs=0.5), "config.method.bank.init_epochs=0.5: 40 rows take 3 steps; use 0.75 or more, or 0"),
  (dict(epochs=1, method__bank__init_epochs=1.0), "config.epochs=1: method.bank.init_epochs leaves none for training; use more, or fewer of those"),
  (dict(method__bank__init="random", method__bank__init_epochs=1.0), "here random and training; use 0"),
  (dict(method__bank__init_views="authors", method__bank__init_epochs=1.0), "here trained and authors; use 0"),
])  # fmt: skip
def test_a_filling_that_cannot_be(keys, said):
  with pytest.raises(ConfigError) as error:
    settings.tiny_plan(settings.tiny_config("symmetric", method__bank__size=40, **keys))
  assert said in str(error.value)


@pytest.mark.parametrize("devices", [1, 4])
def test_prototypes_in_play_are_those_that_are_nearest(devices):
  """Of 6 prototypes: one, where all embeddings are alike; else by counts, whatever Sinkhorn's assignments are."""
  scores = np.random.RandomState(0).standard_normal((2, 16, 6)).astype(np.float32)
  scores[..., 3] += 0.8
  mesh = sharding.create_mesh(jax.devices()[:devices])
  used = jax.jit(jax.shard_map(swav._used, mesh=mesh, in_specs=P(None, "data"), out_specs=P()))
  share = np.bincount(scores.argmax(-1).ravel(), minlength=6) / 32
  share = share[share > 0]
  assert used(scores) == pytest.approx(np.prod(share**-share), rel=1e-5)
  assert used(np.tile(scores[:, :1], (1, 16, 1))[[0, 0]]) == pytest.approx(1)
