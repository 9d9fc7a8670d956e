"""A finished run's encoder, taken from its workdir by the tasks that use it and train it no further.

Flow: evaluate, export and embed call `run_config`, open what data they need, then `open_run`.
Holds: model and normalisation are the pre-training's, as they were up to the checkpoint that is opened; data may be
  another (None: the same), and then nothing that described the pre-training's own data set is applied to it.
Not here: sources and loaders (each task opens what it needs), scores.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.data.sources.kinds import read_as
from adco_jax.errors import require
from adco_jax.runtime import remote, rng, sharding
from adco_jax.runtime.files import read_json
from adco_jax.workdir.checkpoint import restore_parts, saved_steps
from adco_jax.workdir.files import read_config, undone

# What describes one data set and says nothing about another.
NOT_SAID = {
  "dir": "", "name": "", "split": "train", "test_split": "val", "image_key": "", "label_key": "",
  "labels": True, "num_classes": 0, "resident_size": 0,
}  # fmt: skip


class Opened(NamedTuple):
  """One player's encoder at one checkpoint, replicated over the devices."""

  config: ConfigDict  # of the pre-training
  encoder: Any
  variables: dict  # {'params', 'batch_stats'}
  create_untrained: Any  # () -> the same before the first step
  step: int
  mesh: Any


def run_config(workdir, data=None, step=0):
  """The config of a pre-training; `data`: values for config.data that replace its own where not None;
  `step`: of the checkpoint that is meant, 0 for the newest: what --extend changed later is not in force then.

  Another kind of source than the pre-training's keeps nothing of `NOT_SAID`; another dir or name of the same
  kind keeps all but the number of classes. Raises ConfigError.
  """
  config = ConfigDict(read_config(workdir))
  config.update_from_flattened_dict(_undone(workdir, step))
  given = {name: value for name, value in (data or {}).items() if value is not None}
  stored = config.data
  if _is_of_another_kind(stored, given):
    stored.update(NOT_SAID)
  elif any(given.get(name, stored[name]) != stored[name] for name in ("dir", "name")):
    stored.num_classes = 0
  stored.update(given)
  return config


def _undone(workdir, step):
  """What `undone` says of a checkpoint, 0 for the newest."""
  return undone(workdir, step or max(saved_steps(workdir), default=0))


def _is_of_another_kind(stored, given):
  """Whether values given for config.data name another kind of source than the pre-training read."""
  own = read_as(stored.source, stored.dir, stored.split)
  source = given.get("source", stored.source)
  if "dir" not in given and source not in (own, stored.source):
    return True  # the pre-training's folder is not meant, though it could be read
  place, split = (given.get(name, stored[name]) for name in ("dir", "split"))
  return read_as(source, place, split) != own


def open_run(workdir, config, player="query", step=0):
  """The `Opened` encoder of `player` ('query' or 'key') with its `run_config`.

  `step`: of the checkpoint, 0 for the newest intact one. Raises ConfigError.
  """
  facts = read_json(os.path.join(remote.local(workdir), "plan.json"))
  encoder = build.create_encoder(config, facts["compute_dtype"])
  mesh = sharding.create_mesh()
  size = config.views.crops[0][0]

  def create():
    start = rng.rng_for(config.seed, rng.ENCODER)
    return encoder.init(start, jnp.zeros((1, size, size, 3)), train=False)

  whole = sharding.replicated(mesh)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(create)
  )
  fields = {"params": f"{player}_params", "batch_stats": f"{player}_stats"}
  wanted = {field: abstract[name] for name, field in fields.items()}
  parts, found = restore_parts(workdir, wanted, step=step)
  same = _undone(workdir, found) == _undone(workdir, step)
  remedy = f"the newest intact checkpoint, {found}, is of before the config changed; use --config.step={found}"
  require(same, "step", step, remedy)
  variables = {name: parts[field] for name, field in fields.items()}
  return Opened(config, encoder, variables, jax.jit(create, out_shardings=whole), found, mesh)
