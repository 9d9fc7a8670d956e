"""The task `replay_step`: takes the step of a capsule again and names the first tensor that is not finite.

Flow: main -> `run`: capsule -> the same batch, state and trainer -> every tensor in the order in which
  the step makes it: parameters, views, query layers, keys' layers, losses, gradients.
Not here: why; the indices of the images and the norms of the layers are in the capsule.
"""

from collections.abc import Iterator

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config.plan import Plan
from adco_jax.data.batch import Batch, Constants
from adco_jax.errors import ConfigError
from adco_jax.runtime import sharding
from adco_jax.runtime.console import tell
from adco_jax.runtime.dtypes import Tree
from adco_jax.training import capsule
from adco_jax.training.prepare import make_prepare
from adco_jax.training.state import TrainState
from adco_jax.training.trainer import Trainer
from adco_jax.workdir.checkpoint import Checkpoints
from adco_jax.workdir.files import with_later_keys


def run(config: ConfigDict) -> None:
  """Prints what was found. Raises ConfigError."""
  facts = capsule.read(config.capsule)
  stored = ConfigDict(with_later_keys(facts["config"]))
  stored.compute_dtype = facts.get("compute_dtype", stored.compute_dtype)
  step = facts["step"]
  source = build.open_training(stored).trained
  plan = build.make_plan(stored, source)
  mesh = sharding.create_mesh()
  loader = build.create_loader(stored, source, mesh)
  trainer = build.build(stored, plan, mesh)
  checkpoints = Checkpoints(config.capsule)
  restored = checkpoints.restore(trainer.abstract_state)
  checkpoints.close()
  if restored is None:
    raise ConfigError(
      f"config.capsule={config.capsule!r}: its checkpoint is not there; copy the whole folder"
    )
  state = restored[0].replace(step=np.int32(step))
  setting = dict(seed=stored.seed, plan=plan, ratio=stored.views.ratio)
  batch = next(loader.train(step, step + 1, **setting)).batch.put(mesh)
  constants = Constants.put(mesh, stored.seed, loader.images)
  tell(
    f"step {step} in {plan.compute_dtype}, batch {facts['batch']}, images {facts['indices'][:8]} ..."
  )
  looked = 0
  for name, value in tensors(stored, plan, trainer, state, batch, constants):
    looked += 1
    value = np.asarray(value)
    bad = ~np.isfinite(value)
    if bad.any():
      first = [int(i) for i in np.argwhere(bad)[0]]
      tell(f"first tensor that is not finite: {name}, shape {list(value.shape)}, {bad.sum()} of "
            f"{bad.size} values, the first at {first}; {looked - 1} tensors before it are finite")  # fmt: skip
      return
  tell(f"all {looked} tensors are finite: this step does not fail here")


def tensors(
  config: ConfigDict,
  plan: Plan,
  trainer: Trainer,
  state: TrainState,
  batch: Batch,
  constants: Constants,
) -> Iterator[tuple[str, ArrayLike]]:
  """(name, array) of everything that the step computes, in its order."""
  pairing = plan.pairing(int(state.step))
  yield from _named("parameters", {"query": state.query_params, "key": state.key_params})
  yield from _named("objective", state.objective._asdict())
  prepare = make_prepare(pairing, plan, **build.view_settings(config))
  specs = Batch.specs()
  on_devices = jax.shard_map(
    prepare, mesh=trainer.mesh, in_specs=(P(), specs, P()), out_specs=specs
  )
  views = jax.device_get(jax.jit(on_devices)(state.step, batch, constants))
  names = ("queries", pairing.query_views, views.queries), ("keys", pairing.key_views, views.keys)
  for what, numbers, images in names:
    yield from ((f"view {v} of {what}", x) for v, x in zip(numbers, images, strict=True))
  for what, numbers, images in names:
    player = "query" if what == "queries" else "key"
    variables = {
      "params": getattr(state, f"{player}_params"),
      **getattr(state, f"{player}_stats"),
    }
    for v, x in zip(numbers, images, strict=True):
      yield from layers(trainer.encoder, variables, x, f"{player} encoder, view {v}")
  update = trainer.updates[plan.phases.index(plan.phase(int(state.step)))]
  packed = trainer.pack(jax.device_put(state, trainer.shardings))
  _, metrics = update(packed, batch, constants)
  yield from sorted(jax.device_get(metrics).items())
  yield "gradients (the step is finite if this is 0)", 0.0 if metrics["train/finite"] else np.nan


def layers(
  encoder: nn.Module, variables: dict[str, Tree], images: jax.Array, what: str
) -> Iterator[tuple[str, ArrayLike]]:
  """(name, output) of every layer in the order of the forward pass."""
  _, kept = encoder.apply(
    variables, images, train=True, capture_intermediates=True, mutable=[*variables, "intermediates"]
  )  # fmt: skip
  yield from _named(what, kept["intermediates"], ordered=True)


def _named(what, tree, ordered=False):
  """(path, array); `ordered`: in the order of the dictionaries, which is that of the calls."""
  if not ordered:
    for path, value in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
      yield f"{what}: {jax.tree_util.keystr(path, simple=True, separator='/')}", value
    return
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _named(f"{what}/{name}", value, ordered)
    else:
      yield f"{what}", value[0]
