"""Tiny configs, plans and batches that the tests share."""

import dataclasses
import importlib

import jax
import numpy as np

from adco_jax import build
from adco_jax.config import command_line, keys
from adco_jax.config import plan as planning
from adco_jax.config.pairing import Pairing
from adco_jax.config.plan import Machine, Phase
from adco_jax.data import order
from adco_jax.data.batch import Batch
from adco_jax.models import resnet
from adco_jax.runtime import sharding
from adco_jax.training.state import state_specs
from adco_jax.workdir.checkpoint import Checkpoints
from adco_jax.workdir.opening import open_workdir

# What a test compiles as training does, in spite of conftest's flags: jax.jit(..., compiler_options=OPTIMISED).
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
TINY = "tiny"
resnet.ARCHITECTURES[TINY] = ("basic", (1,))  # one block: compiles in a second

CROPS = {
  "one": ((8, 0.4, 1.0),),
  "single": ((8, 0.4, 1.0), (8, 0.4, 1.0)),
  "symmetric": ((8, 0.4, 1.0), (8, 0.4, 1.0)),
  "multicrop": ((8, 0.4, 1.0), (8, 0.4, 1.0), (8, 0.2, 0.5)),
  "symmetric_multicrop": ((8, 0.4, 1.0), (8, 0.4, 1.0), (8, 0.2, 0.5)),
}


def tiny_config(mode="single", name="adco_r50", **overrides):
  """A config in which everything is small but the method is the published one."""
  config = importlib.import_module(f"configs.{name}").get_config()
  config = command_line.complete(config, name, overrides.get("objective", config.objective))
  small = {
    "epochs": 1.0, "model.arch": "tiny", "model.width": 0.125, "model.stem": "small", "model.dim": 16,
    "views.mode": mode, "views.crops": CROPS[mode], "bn.group_size": 2, 
    "data.source": "digits", "data.batch_size": 16, "eval.size": 8, "eval.every_epochs": 1.0,
    "data.test_split": "test",
  }  # fmt: skip
  small |= {
    key: 32 for key in ("method.bank.size", "method.queue_size") if key in [*keys.walk(config)]
  }
  for key, value in (small | {k.replace("__", "."): v for k, v in overrides.items()}).items():
    branch = config
    for part in key.split(".")[:-1]:
      branch = branch[part]
    with branch.ignore_type():
      branch[key.split(".")[-1]] = value
  return config


def tiny_plan(config, devices=1, num_examples=64, **kwargs):
  return build.plan_for(config, num_examples, 10, Machine(backend="cpu", devices=devices, **kwargs))


def create_players(config, devices=1, num_examples=64, platform=""):
  """(players, plan, state) on the first `devices` devices; made once, the state is each caller's own.

  AdCo's bank starts at embeddings of noise images with norms from .5 to 2: Gaussian rows are so far from
  an untrained encoder's queries, which all look alike, that the bank would take no part in the game.
  """
  key = config.to_json(), devices, num_examples, platform, jax.config.jax_enable_x64
  if key not in _MADE:
    _MADE[key] = _create_players(config, devices, num_examples, platform)
  players, plan, state, shardings = _MADE[key]
  return players, plan, jax.device_put(jax.tree.map(np.array, state), shardings)


_MADE = {}  # by everything that they depend on


def _create_players(config, devices, num_examples, platform):
  players, plan, encoder, create, shardings = _parts(config, devices, num_examples, platform)
  state = jax.device_get(jax.jit(create)())
  if "bank" in state.objective.adversary:
    rows = embeddings(encoder, state, config.method.bank.size)
    bank = rows.astype(state.objective.adversary["bank"].dtype)
    state = state.replace(objective=state.objective._replace(adversary={"bank": bank}))
  return players, plan, state, shardings


def describe_players(config, devices=1, num_examples=64):
  """(players, plan, shapes of the state where they would lie): enough to compile a step."""
  players, plan, _, create, shardings = _parts(config, devices, num_examples, "")
  place = lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)
  return players, plan, jax.tree.map(place, jax.eval_shape(create), shardings)


def _parts(config, devices, num_examples, platform):
  plan = tiny_plan(config, devices, num_examples)
  mesh = sharding.create_mesh(jax.devices()[:devices])
  encoder, players, create = build.create_setup(config, plan, mesh, platform)
  shardings = sharding.from_specs(mesh, state_specs(jax.eval_shape(create), players.objective))
  return players, plan, encoder, create, shardings


def save_run(workdir, config, step=0, wide=False):
  """Makes the workdir that a run of `config` would have left at `step`; its weights are drawn, nothing compiles.

  wide: as far apart as a ViT wants them, whose LayerNorm makes large of what differs little.
  """
  plan = tiny_plan(config, num_examples=config.data.num_examples)
  mesh = sharding.create_mesh(jax.devices()[:1])
  shapes = jax.eval_shape(build.create_setup(config, plan, mesh).create_state)
  rng = np.random.RandomState(0)
  draw = lambda x: np.asarray(0.5 + rng.uniform(-0.5, 0.5, x.shape) / np.sqrt(x.size), x.dtype)
  far = lambda x: np.asarray(rng.normal(0, 0.2, x.shape), x.dtype)
  state = jax.tree.map(far if wide else draw, shapes).replace(step=np.int32(step))
  open_workdir(workdir, config.to_dict(), dataclasses.asdict(plan), planning.MAY_CHANGE)
  checkpoints = Checkpoints(workdir)
  checkpoints.save(step, state)
  checkpoints.finish()
  checkpoints.close()


def phase(pairs):
  """A phase of training in which these pairs meet."""
  return Phase("training", Pairing((), (), tuple(pairs)))


def embeddings(encoder, state, count):
  """Rows near what the encoder makes of noise images, float64 [count, D]."""
  rng = np.random.RandomState(99)
  images = rng.standard_normal((64, 8, 8, 3))
  variables = {"params": state.query_params, **state.query_stats}
  encoder = encoder.clone(group_size=encoder.group_size or 16)  # no other device is here
  found = jax.jit(lambda v, x: encoder.apply(v, x, True, mutable=["batch_stats"])[0])(
    variables, images
  )
  found = np.asarray(found, np.float64)[np.arange(count) % 64]
  rows = found / np.linalg.norm(found, axis=-1, keepdims=True) + 0.02 * rng.standard_normal(
    found.shape
  )
  return rows * rng.uniform(0.5, 2, (count, 1))


def random_batch(plan, pairing, step, dtype=np.float32):
  """A `Batch` of normalised noise images, keys not shuffled."""
  rng = np.random.RandomState(step)
  shape = lambda v: (plan.batch_size, plan.view_sizes[v], plan.view_sizes[v], 3)
  images = {v: rng.standard_normal(shape(v)).astype(dtype) for v in pairing.views}
  return Batch.of(
    *([images[v] for v in views] for views in (pairing.query_views, pairing.key_views))
  )


def shuffled(batch, pairing, step):
  """The same batch with every key view shuffled as a whole."""
  size = len(batch.queries[0])
  orders = [order.key_order(0, step, v, size, size) for v in pairing.key_views]
  keys = [x[places] for x, places in zip(batch.keys, orders, strict=True)]
  return Batch.of(batch.queries, keys, np.stack(orders))


def is_joined(whole, parts):
  """Whether a `LoadedBatch` holds the slots of those of several processes one after the other, and the same order of keys."""
  rows = lambda x: (x.batch.queries, x.batch.keys, x.indices)
  joined = jax.tree.map(lambda *x: np.concatenate(x), *map(rows, parts))
  pairs = [(rows(whole), joined), *((whole.batch[2:], part.batch[2:]) for part in parts)]
  return jax.tree.all([jax.tree.map(np.array_equal, a, b) for a, b in pairs])


def difference(a, b):
  """Largest absolute difference of two trees."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(
    float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs
  )
