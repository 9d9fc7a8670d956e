"""The only constructor: config, plan and mesh -> encoder, players, steps, state, loader.

Flow: every task calls `build` (and `create_loader`), then uses what it returns; nobody else assembles.
Holds: choices are literal dictionaries; ranges holds their names against a config.
Not here: loops (tasks), the arithmetic of sizes (plan).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adco_jax.config import plan as planning
from adco_jax.data.images import Reader
from adco_jax.data.pipeline import PipelineLoader
from adco_jax.data.resident import ResidentLoader, expected_bytes
from adco_jax.data.sources.loading import load_source
from adco_jax.errors import ConfigError
from adco_jax.models.heads import Encoder
from adco_jax.objectives.adco import AdCo
from adco_jax.objectives.fill import Fill
from adco_jax.objectives.moco import MoCo
from adco_jax.runtime import remote, rng, sharding
from adco_jax.runtime.console import tell
from adco_jax.runtime.processes import say
from adco_jax.training import optimizers, train_step
from adco_jax.training.flat import FlatEncoder
from adco_jax.training.state import create_state, state_specs, stored_specs
from adco_jax.views.augment import policies_for


class Run(NamedTuple):
  """What a task needs to train: pure functions, compiled at first use."""

  encoder: Any
  players: Any
  mesh: Any
  shardings: Any  # of the state
  abstract_state: Any  # shapes, dtypes and shardings of the state, for restoring
  create_state: Any  # () -> state
  pack: Any  # state (given away) -> state in the form that the updates take
  unpack: Any  # that form -> state
  abstract_packed: Any  # as abstract_state, of that form
  fill_step: Any  # (packed state, split, shared) -> (packed state, metrics), state donated
  train_step: Any


def build(config, plan, mesh, cut):
  """The `Run` of a checked config; `cut` is the loader's."""
  platform = mesh.devices.flat[0].platform
  encoder = create_encoder(config, plan.compute_dtype, platform)
  players = create_players(config, plan, encoder, mesh)
  create = make_create_state(config, plan, players)
  shapes = jax.eval_shape(create)
  specs = stored_specs(shapes, mesh.size) if config.optim.shard else state_specs(shapes)
  shardings = sharding.from_specs(mesh, specs)
  abstract = _abstract(shapes, shardings)
  pack = unpack = lambda state: state
  packed, packed_shardings = abstract, shardings
  if encoder.platform == "gpu" and not config.optim.shard:
    flat = FlatEncoder.of(encoder, shapes)
    players = players._replace(encoder=flat)
    shapes = jax.eval_shape(flat.pack, shapes)
    packed_shardings = sharding.from_specs(mesh, state_specs(shapes))
    packed = _abstract(shapes, packed_shardings)
    pack, unpack = flat.packing(abstract, shardings, packed_shardings)
  fill, train = make_updates(config, plan, players, cut)
  out = (packed_shardings, sharding.replicated(mesh))
  options = sharding.compiler_options(platform)
  jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=out, compiler_options=options)
  create = jax.jit(create, out_shardings=shardings)
  return Run(
    encoder, players, mesh, shardings, abstract, create, pack, unpack, packed, jit(fill), jit(train)
  )


def _abstract(shapes, shardings):
  put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(put, shapes, shardings)


def make_updates(config, plan, players, cut):
  """(update of the bank's initialisation, update of training), to be jitted."""
  views = view_settings(config) | {"cut": cut}
  ((_, key, _),) = plan.fill_pairing.pairs
  filling = players._replace(objective=Fill(config.temperature, key), alternating=False)
  fill = train_step.make_train_step(filling, plan.fill_pairing, plan, **views)
  fill = train_step.make_fill_update(fill, plan.fill_steps, config.bank.init == "trained")
  return fill, train_step.make_train_step(players, plan.train_pairing, plan, **views)


def view_settings(config):
  """What augmentation and normalisation of the views need."""
  policies = policies_for(
    config.augment.policy, len(config.views.crops), config.augment.blur_kernel
  )
  return {"policies": policies, "mean": config.data.mean, "std": config.data.std}


def create_encoder(config, compute_dtype, platform=""):
  """The Linen module; parameters come from its init or from a checkpoint. `platform`: of the devices it is for."""
  return Encoder(
    arch=config.model.arch,
    width=config.model.width,
    stem=config.model.stem,
    dim=config.model.dim,
    group_size=config.bn.group_size,
    running_from=config.bn.running_from,
    dtype=jnp.dtype(compute_dtype),
    platform={"cuda": "gpu"}.get(platform, platform),
  )


def create_objective(config):
  """The second player that `config.objective` names."""
  objectives = {
    "adco": lambda: AdCo(config.temperature, config.bank.temperature, config.in_batch),
    "moco": lambda: MoCo(config.temperature, config.in_batch),
  }
  return objectives[config.objective]()


def create_players(config, plan, encoder, mesh):
  """Encoder, second player, both optimisers and their curves."""
  optim, bank = config.optim, config.bank
  rate = optimizers.make_rate(
    optim.schedule,
    base=plan.learning_rate,
    final=plan.lr_final,
    steps_per_epoch=plan.steps_per_epoch,
    epochs=config.epochs,
    warmup_epochs=optim.warmup_epochs,
    step_epochs=optim.step_epochs,
  )
  return train_step.Players(
    encoder=encoder,
    objective=create_objective(config),
    descender=optimizers.descend_transform(optim.name, optim.momentum, optim.weight_decay),
    ascender=optimizers.ascend_transform(bank.learning_rate, bank.momentum, bank.weight_decay),
    rate=rate,
    ema_rate=optimizers.make_ema_rate(
      config.ema.decay, config.ema.schedule, plan.total_steps - plan.fill_steps
    ),
    fill_steps=plan.fill_steps,
    alternating=bank.order == "alternating",
    running_from=config.bn.running_from,
    mesh=mesh,
    parts=config.accumulate,
  )


def make_create_state(config, plan, players):
  """() -> the state before the first update, a function of config.seed."""

  def create():
    rngs = rng.rng_for(config.seed, rng.ENCODER), rng.rng_for(config.seed, rng.BANK)
    size = plan.view_sizes[0]
    return create_state(
      rngs, players.encoder, players.objective, players.descender, players.ascender,
      (1, size, size, 3), (config.bank.size, config.model.dim),
    )  # fmt: skip

  return create


def open_source(data, split=""):
  """The `Source` of config.data, of its split or another one; says what was taken for what, and what is
  not read. Raises ConfigError."""
  remote.refuse(data.dir or "", "data.dir")
  source = load_source(
    data.source, data.dir, split or data.split, data.num_classes, name=data.name,
    image_key=data.image_key, label_key=data.label_key, labels=data.labels,
  )  # fmt: skip
  for line in filter(None, (*source.notes, source.left_out())):
    say(line)
  return source


def make_plan(config, source):
  """The `Plan` of this machine's devices and processes for the images of a source. Raises ConfigError."""
  return planning.make_plan(
    config, source.num_examples, len(source.classes), backend=jax.default_backend(),
    devices=jax.device_count(), processes=jax.process_count(), process=jax.process_index(),
  )  # fmt: skip


def create_loader(config, source, mesh, reader=None):
  """The loader that data.loader names; 'auto' keeps on the device what takes a small share of its memory.

  `reader`: of the source, where there is one that knows already what is broken.
  """
  data = config.data
  reader = reader or Reader(source, data.max_bad_fraction, data.max_megapixels)
  kind = data.loader
  if kind == "resident" or (
    kind == "auto" and fits(reader, data.resident_size, data.resident_share)
  ):
    try:
      return ResidentLoader(reader, mesh, data.resident_size, data.threads)
    except ConfigError as error:
      if kind == "resident":
        raise
      tell(f"not kept on the device ({error})")
  return PipelineLoader(reader, mesh, data.threads, data.cut)


def fits(reader, size, share):
  """Whether a set may stay on the device; on a CPU only what is in memory anyway (files gain nothing there)."""
  device = jax.local_devices()[0]
  if device.platform == "cpu" and reader.source.images is None:
    return False
  needed = expected_bytes(reader, size)
  return needed is not None and needed <= share * sharding.memory_bytes(device)
