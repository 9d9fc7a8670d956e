"""A state whose parameters are one vector is the same state, and its steps are the same steps."""

import functools

import jax
import numpy as np
import pytest

from adco_jax import build
from adco_jax.models.heads import embed
from adco_jax.runtime import sharding
from adco_jax.training import flat, train_step
from adco_jax.training.state import state_specs
from tests import settings

pytestmark = pytest.mark.steps  # the slow ones' group


def flattened(devices, **overrides):
  """(players on vectors in a GPU's form, plan, state as trees, FlatEncoder)."""
  config = settings.tiny_config(**overrides)
  players, plan, state = settings.create_players(config, devices)
  encoder = build.create_encoder(config, plan.compute_dtype, "gpu")
  encoder = flat.FlatEncoder.of(encoder, state, players.objective.sees == "projections")
  return players._replace(embed=encoder.embed), plan, state, encoder


def test_packed_and_unpacked_is_the_same():
  """Parameters, their momentum and statistics become vectors; all numbers come back at their places."""
  _, _, state, encoder = flattened(1)
  draw = np.random.RandomState(0).standard_normal
  state = jax.tree.map(lambda x: np.asarray(draw(x.shape), x.dtype), jax.device_get(state))
  packed = encoder.pack(state)
  assert (
    len(jax.tree.leaves(packed)) == 8
  )  # step, 2 x (parameters, statistics), momentum, bank and its momentum
  again = encoder.unpack(packed, jax.eval_shape(lambda: state))
  assert jax.tree.structure(again) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
    assert np.array_equal(a, b)


def test_packing_leaves_no_second_copy():
  """The state that a run begins with is gone once it is packed, and comes back with its numbers and places."""
  players, _, state, encoder = flattened(8)
  shapes, before = jax.eval_shape(lambda: state), jax.device_get(state)
  whole, parts = (
    sharding.from_specs(players.mesh, state_specs(x, players.objective))
    for x in (shapes, jax.eval_shape(encoder.pack, shapes))
  )
  pack, unpack = encoder.packing(shapes, whole, parts)
  again = unpack(pack(state))
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert settings.difference(again, before) == 0
  assert again.objective.adversary["bank"].sharding == whole.objective.adversary["bank"]


ADCO, SWAV = (
  {"method__bank__init": "random"},
  {"method__prototypes": 8, "method__frozen_epochs": 0.2},
)
CASES = [
  (8, "single", "adco", ADCO),
  *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
      (1, "symmetric", "adco", ADCO),
      (2, "one", "supervised", {}),
      (
        2,
        "symmetric",
        "swav",
        SWAV | {"model__head__norm": "hidden"},
      ),  # held in the first of the two steps
      (2, "symmetric", "byol", {"method__predictor_width": 8, "model__head__norm": "all_plain"}),
    )
  ),
]


@pytest.mark.parametrize("devices, mode, objective, own", CASES)
def test_a_gpu_s_steps_on_vectors_are_plain_steps_on_trees(float64, devices, mode, objective, own):
  setting = dict(mode=mode, objective=objective, compute_dtype="float64", **own)
  on_vectors, plan, state, encoder = flattened(devices, **setting)
  plain = functools.partial(embed, encoder.encoder.clone(platform="cpu"), head=encoder.head)
  on_trees = on_vectors._replace(embed=plain)
  found = []
  for players, start in ((on_trees, state), (on_vectors, encoder.pack(state))):
    update = jax.jit(train_step.make_update(players, plan.phases[-1]))
    for step in range(2):
      batch = settings.random_batch(plan, plan.train_pairing, step, np.float64)
      labels = np.arange(plan.batch_size, dtype=np.int32) % 10 if plan.has_labels else None
      batch = batch._replace(labels=labels)
      start, metrics = update(start, batch.put(players.mesh))
    found.append((start, metrics))
  (trees, metrics), (vectors, others) = found
  assert settings.difference(trees, encoder.unpack(vectors, state)) < 1e-12
  assert settings.difference(metrics, others) < 1e-12
