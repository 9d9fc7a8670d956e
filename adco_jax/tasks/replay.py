"""Another implementation's steps, taken again: its checkpoint and its views in, every bank and loss out.

Flow: files, authors -> the setup that training builds -> the `update` that training calls, once per
  recorded step.
Shapes: S steps, B images per step, K bank rows, D components, n probe images.
Paper: the authors' program, one process of B images or several of bn.group_size each.
Holds: nothing here computes: views come augmented and normalised, all arithmetic is train_step's. The
  rate is constant; running statistics are those of the first group, as their first process keeps them.
"""

import itertools
import os
from collections.abc import Iterable

import jax
import numpy as np
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config import ranges
from adco_jax.config.plan import Machine
from adco_jax.data.batch import Batch
from adco_jax.errors import ConfigError, require
from adco_jax.interop import authors, files
from adco_jax.runtime import sharding
from adco_jax.runtime.dtypes import Tree
from adco_jax.training.train_step import make_update


def replay(
  checkpoint: str | os.PathLike[str] | dict[str, Tree],
  steps: Iterable[dict[str, Tree]],
  *,
  config: ConfigDict,
  probe: np.ndarray | None = None,
  dtype: str = "float32",
) -> dict[str, np.ndarray]:
  """Plays `steps` from `checkpoint` and returns what every step left behind.

  checkpoint: path of an authors' .pth.tar, or a dictionary of that shape: `state_dict` with encoder_q.*
    and encoder_k.* (with or without `module.`), `Memory_Bank` with W and v [D, K], optionally `optimizer`.
  steps: iterable of dictionaries: `views`, float arrays [B, H, W, 3] in the authors' order (single: query,
    key; symmetric: both; multicrop: key, then queries); optionally `key_orders`, one permutation of the
    batch per key view: position p of the shuffled batch holds image key_orders[v][p].
  config: a pre-training config; architecture, K and D come from the checkpoint, of the rest counts what
    the step uses (views.mode, bn.group_size, method.*, ...); its objective is adco.
  probe: float array [n, H, W, 3], embedded after each step with running statistics.
  dtype: 'float32' or 'float64', of everything.
  Returns a dictionary of arrays: loss [S], in_batch_mass [S] (at the bank's temperature), bank [S, K, D]
  and, with a probe, query_embedding and key_embedding [S, n, D], not normalised. Raises ConfigError.
  """
  with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
    return _replay(checkpoint, iter(steps), config, probe, dtype)


def _replay(checkpoint, steps, config, probe, dtype):
  first = next(steps, None)
  if first is None:
    raise ConfigError("steps: there are none; give at least one")
  loaded = _read(checkpoint)
  config = _adapt(config, loaded.facts, first["views"], dtype)
  batch = config.data.batch_size
  ranges.check(config)
  plan = build.plan_for(config, batch, 0, Machine(backend=jax.default_backend(), devices=1))
  mesh = sharding.create_mesh(jax.devices()[:1])
  encoder, spec, create = build.create_setup(config, plan, mesh)
  state = jax.device_get(jax.jit(create)())
  state, _ = authors.put_into(state, loaded)
  update = jax.jit(make_update(spec, plan.phases[-1]), donate_argnums=0)
  embed = jax.jit(lambda p, s, x: encoder.apply({"params": p, **s}, x, train=False))
  state = jax.device_put(state, sharding.replicated(mesh))

  outputs = []
  for step in itertools.chain([first], steps):
    state, metrics = update(state, _batch(step, plan.train_pairing, dtype))
    left = {
      "loss": metrics["train/query_loss"],
      "in_batch_mass": metrics["bank/in_batch_mass"],
      "bank": state.objective.adversary["bank"],
    }
    if probe is not None:
      images = np.asarray(probe, dtype)
      left["query_embedding"] = embed(state.query_params, state.query_stats, images)
      left["key_embedding"] = embed(state.key_params, state.key_stats, images)
    outputs.append(jax.device_get(left))
  return {name: np.stack([left[name] for left in outputs]) for name in outputs[0]}


def _read(checkpoint):
  is_path = isinstance(checkpoint, (str, os.PathLike))
  content = files.read(os.fspath(checkpoint)) if is_path else files.to_numpy(checkpoint)
  try:
    loaded = authors.parse_checkpoint(content)
  except ValueError as error:
    name = checkpoint if is_path else "the checkpoint"
    raise ConfigError(f"{name}: {error}") from error
  if loaded.bank is None:
    raise ConfigError("the checkpoint has no Memory_Bank with W; replay needs the bank")
  return loaded


def _adapt(config, facts, views, dtype):
  """The config of a replay: sizes from the checkpoint and the first step's views."""
  ours = config.objective == "adco"
  require(ours, "objective", config.objective, "the steps are AdCo's; use a config of adco")
  config = config.copy_and_resolve_references()
  config.unlock()
  config.model.update({name: facts[name] for name in ("arch", "width", "stem", "dim")})
  config.method.bank.update(size=facts["bank_size"], init="random", init_epochs=0.0)
  config.optim.update(schedule="constant", warmup_epochs=0.0, scale_from_batch=0)
  config.bn.running_from = "first"
  config.compute_dtype, config.epochs = dtype, 1
  config.data.batch_size = len(views[0])
  config.views.crops = tuple((view.shape[1], 1.0, 1.0) for view in views)
  return config


def _batch(step, pairing, dtype):
  """The `Batch` of a recorded step, its keys shuffled as they were there."""
  arrays = [np.asarray(view, dtype) for view in step["views"]]
  queries, keys = [arrays[v] for v in pairing.query_views], [arrays[v] for v in pairing.key_views]
  if not step.get("key_orders"):
    return Batch.of(queries, keys)
  orders = np.asarray(step["key_orders"], np.int32)
  return Batch.of(queries, [x[order] for x, order in zip(keys, orders, strict=True)], orders)
