"""A finished run's encoder, taken from its workdir by the tasks that use it and train it no further.

Flow: evaluate, export and embed call `run_config`, open what data they need, then `open_run`.
Holds: model and normalisation are the pre-training's; data may be another (an empty value: the same).
Not here: sources and loaders (each task opens what it needs), scores.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adco_jax import build, remote, rng, sharding
from adco_jax.checkpoint import restore_parts
from adco_jax.workdir import read_config, read_json


class Opened(NamedTuple):
  """One player's encoder at the newest checkpoint, replicated over the devices."""

  config: ConfigDict  # of the pre-training
  encoder: Any
  variables: dict  # {'params', 'batch_stats'}
  create_untrained: Any  # () -> the same before the first step
  step: int
  mesh: Any


def run_config(workdir, data=None):
  """The config of a pre-training; `data`: values for config.data that replace its own where not empty.

  Raises ConfigError.
  """
  config = ConfigDict(read_config(workdir))
  for name, value in (data or {}).items():
    config.data[name] = value or config.data[name]
  return config


def open_run(workdir, config, player="query"):
  """The `Opened` encoder of `player` ('query' or 'key') with its `run_config`. Raises ConfigError."""
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
  parts, step = restore_parts(workdir, {field: abstract[name] for name, field in fields.items()})
  variables = {name: parts[field] for name, field in fields.items()}
  return Opened(config, encoder, variables, jax.jit(create, out_shardings=whole), step, mesh)
