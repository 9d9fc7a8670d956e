"""The only constructor: config, plan and mesh -> encoder, steps, state, loader.

Flow: every task calls `build` (and `create_loader`), then uses what it returns; nobody else assembles.
Holds: choices are literal dictionaries; ranges holds their names against a config.
Not here: loops (tasks), the arithmetic of sizes (plan).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adco_jax.config import advice, method
from adco_jax.config import plan as planning
from adco_jax.config.plan import Plan
from adco_jax.data.images import Reader
from adco_jax.data.labelled import Parts, part
from adco_jax.data.loaders import Loader
from adco_jax.data.pipeline import PipelineLoader
from adco_jax.data.resident import ResidentLoader, kept_bytes
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.loading import load_source
from adco_jax.data.sources.subset import restrict
from adco_jax.errors import ConfigError, require
from adco_jax.models import vit
from adco_jax.models.heads import Encoder, Head, embed, layers_of
from adco_jax.models.resnet import ARCHITECTURES
from adco_jax.objectives.base import Objective, holds
from adco_jax.runtime import remote, rng, sharding
from adco_jax.runtime.console import tell
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.processes import say
from adco_jax.training import optimizers
from adco_jax.training.flat import FlatEncoder
from adco_jax.training.prepare import ViewSettings, make_prepare
from adco_jax.training.state import TrainState, create_state, state_specs, stored_specs
from adco_jax.training.train_step import StepSpec, Update, make_update
from adco_jax.training.trainer import Trainer
from adco_jax.views.augment import policies_for

NOTHING = "{} has no such part; leave it empty"  # that could be frozen


def build(config: ConfigDict, plan: Plan, mesh: Mesh) -> Trainer:
  """The `Trainer` of a checked config."""
  platform = mesh.devices.flat[0].platform
  encoder, spec, create = create_setup(config, plan, mesh, platform)
  shapes = jax.eval_shape(create)
  check_collections(config, plan, shapes.query_stats)
  freeze, parts = config.optim.freeze, shapes.query_params.get("backbone", {})
  require(not freeze or freeze in parts, "optim.freeze", freeze, NOTHING.format(config.model.arch))
  objective = spec.objective
  specs = state_specs(shapes, objective)
  if config.optim.shard:
    specs = stored_specs(shapes, objective, mesh.size)
  shardings = sharding.from_specs(mesh, specs)
  abstract = sharding.abstract(shapes, shardings)
  pack = unpack = lambda state: state
  packed, packed_shardings = abstract, shardings
  # A vector of all parameters moves as they do only where no array is treated apart from the others.
  alike = config.optim.name == "sgd" and not config.optim.no_decay and not config.optim.shard
  alike = alike and config.optim.layer_decay == 1 and not config.optim.freeze
  alike = alike and config.model.arch not in vit.ARCHITECTURES
  if encoder.platform == "gpu" and alike and shapes.query_stats:
    flat = FlatEncoder.of(encoder, shapes, objective.sees == "projections", not config.bn.frozen)
    spec = spec._replace(embed=flat.embed)
    shapes = jax.eval_shape(flat.pack, shapes)
    packed_shardings = sharding.from_specs(mesh, state_specs(shapes, objective))
    packed = sharding.abstract(shapes, packed_shardings)
    pack, unpack = flat.packing(abstract, shardings, packed_shardings)
  out = (packed_shardings, sharding.replicated(mesh))
  options = sharding.compiler_options(platform)
  jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=out, compiler_options=options)
  updates = tuple(map(jit, make_updates(config, plan, spec)))
  create = jax.jit(create, out_shardings=shardings)
  return Trainer(encoder, spec, mesh, shardings, abstract, create, pack, unpack, packed, updates)


def check_collections(config: ConfigDict, plan: Plan, stats: dict[str, Tree]) -> None:
  """Refuses what an encoder keeps beside parameters and BatchNorm's statistics where several would have to agree on it."""
  others = sorted({*stats} - {"batch_stats"})
  alone = plan.num_devices == 1 and config.accumulate == 1
  remedy = f"keeps the collections {', '.join(others)}, which nothing reduces over devices or parts; use one of each"
  require(not others or alone, "model.arch", config.model.arch, remedy)


def make_updates(config: ConfigDict, plan: Plan, spec: StepSpec) -> list[Update]:
  """The update of each phase, to be jitted."""
  views = view_settings(config)
  prepare = lambda phase: make_prepare(phase.pairing, plan, **views)
  return [make_update(spec, phase, prepare(phase)) for phase in plan.phases]


def view_settings(config: ConfigDict) -> ViewSettings:
  """What augmentation and normalisation of the views need."""
  count, kernel = len(config.views.crops), config.augment.blur_kernel
  policies = policies_for(config.augment.policy, count, kernel)
  return {"policies": policies, "mean": config.data.mean, "std": config.data.std}


def create_encoder(config: ConfigDict, compute_dtype: str, platform: str = "") -> Encoder:
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
    projection=Head(**config.model.head),
    vit=vit.form_of(config.model.vit, config.views.crops),
  )


def create_objective(config: ConfigDict) -> Objective:
  """The objective that `config.objective` names, with its settings. Raises ConfigError."""
  return method.create(method.find(config.objective), config.method.to_dict())


class Setup(NamedTuple):
  """What a config asks to train, before anything is compiled."""

  encoder: Encoder
  spec: StepSpec
  create_state: Callable[[], TrainState]  # before the first update, a function of config.seed


def create_setup(config: ConfigDict, plan: Plan, mesh: Mesh, platform: str = "") -> Setup:
  """The `Setup` of a checked config; `platform`: see `create_encoder`."""
  encoder = create_encoder(config, plan.compute_dtype, platform)
  spec = _create_spec(config, plan, encoder, mesh)
  size = plan.view_sizes[0]

  def create():
    rngs = rng.rng_for(config.seed, rng.ENCODER), rng.rng_for(config.seed, rng.BANK)
    shape = 1, size, size, 3
    return create_state(rngs, encoder, spec.objective, spec.descender, shape, spec.sizes)

  return Setup(encoder, spec, create)


def _create_spec(config, plan, encoder, mesh):
  optim, objective = config.optim, create_objective(config)
  frozen, trained_steps = optimizers.frozen_by(optim.freeze), plan.total_steps - plan.fill_steps
  rate = optimizers.make_rate(
    optim.schedule,
    base=plan.learning_rate,
    final=plan.lr_final,
    steps_per_epoch=plan.steps_per_epoch,
    epochs=config.epochs,
    warmup_epochs=optim.warmup_epochs,
    step_epochs=optim.step_epochs,
  )
  return StepSpec(
    embed=functools.partial(
      embed, encoder, head=objective.sees == "projections", train=not config.bn.frozen
    ),
    objective=objective,
    sizes=planning.sizes_of(config, plan.num_examples, plan.num_classes, plan.num_devices),
    descender=optimizers.make_optimizer(
      optim.name,
      optim.momentum,
      optim.weight_decay,
      no_decay=optim.no_decay,
      beta2=optim.beta2,
      trust=optim.trust,
      multiplier=optimizers.make_multiplier(
        optim.head_rate, optim.layer_decay, *(layers_of(encoder) or ())
      ),
      frozen=frozen,
      apart=holds(objective),
    ),
    rate=rate,
    decay=optimizers.make_decay(optim.weight_decay, optim.weight_decay_final, trained_steps),
    clip=optimizers.make_clip(optim.clip_norm, frozen),
    ema_rate=optimizers.make_ema_rate(config.ema.decay, config.ema.schedule, trained_steps),
    fill_steps=plan.fill_steps,
    running_from="first" if config.bn.frozen else config.bn.running_from,  # a mean would round them
    mesh=mesh,
    num_microbatches=config.accumulate,
    drops=config.model.arch in vit.ARCHITECTURES and config.model.vit.drop_path > 0,
  )


def open_training(config: ConfigDict) -> Parts:
  """The images of a run: those that it trains on, and those that it holds out. Raises ConfigError."""
  objective = create_objective(config)
  asked = {"labels_per_class": 0, "label_share": 1.0, "hold_out": 0.0}
  given = {name: config[name] for name in asked}
  for name, usual in asked.items():
    remedy = f"{config.objective} trains without labels, so none are left out; use {usual:g}"
    require(objective.needs_labels or given[name] == usual, name, given[name], remedy)
  remedy = f"config.labels_per_class={given['labels_per_class']} says as well how many labels; give one of the two"
  one = not given["labels_per_class"] or given["label_share"] == 1
  require(one, "label_share", given["label_share"], remedy)
  source = open_source(config.data)
  if not objective.needs_labels:
    return Parts(source, source)
  labelled = source.labels is not None and not source.has_several
  require(labelled, "objective", config.objective, planning.NO_LABELS)
  present = np.unique(source.targets)
  remedy = f"all {source.num_examples} images of split {source.split} are of one class, {source.classes[present[0]]}; a classifier needs two or more"
  require(len(present) > 1, "data.dir", config.data.dir, remedy)
  return part(source, config.seed, **given)


def open_source(data: ConfigDict, split: str = "") -> Source:
  """The `Source` of config.data, of its split (and then of its subset alone) or another one; says what was taken for
  what, and what is not read. Raises ConfigError."""
  remote.refuse(data.dir or "", "data.dir")
  source = load_source(
    data.source, data.dir, split or data.split, data.num_classes, name=data.name,
    image_key=data.image_key, label_key=data.label_key, labels=data.labels,
  )  # fmt: skip
  for line in filter(None, (*source.notes, source.left_out())):
    say(line)
  learnt = data.subset and (split or data.split) == data.split
  return restrict(source, data.subset) if learnt else source


def plan_for(
  config: ConfigDict, num_examples: int, num_classes: int, machine: planning.Machine
) -> Plan:
  """The `Plan` of a config and its objective; see config.plan.make_plan. Raises ConfigError."""
  arch, decay, freeze = config.model.arch, config.optim.layer_decay, config.optim.freeze
  require(not freeze or arch not in ARCHITECTURES, "optim.freeze", freeze, NOTHING.format(arch))
  if arch in vit.ARCHITECTURES:
    sides = [("views.crops", side) for side, *_ in config.views.crops]
    sides.append(("eval.size", config.eval.size))
    vit.check(arch, config.model.vit, sides)
  remedy = f"{arch} does not say which layer an array is of (docs/extending.md); use 1"
  known = decay == 1 or layers_of(create_encoder(config, "float32"))
  require(known, "optim.layer_decay", decay, remedy)
  counts = num_examples, num_classes, machine, normalises(config)
  return planning.make_plan(config, create_objective(config), *counts)


def normalises(config: ConfigDict) -> bool:
  """Whether there is a BatchNorm anywhere: a ViT has none, its head or the objective may."""
  own = getattr(create_objective(config), "normalises", True) or config.model.head.norm != "none"
  return own or config.model.arch not in vit.ARCHITECTURES


def warnings(config: ConfigDict, plan: Plan, short_side: float = 0) -> list[str]:
  """Lines a careful colleague would say; see config.advice."""
  sizes = planning.sizes_of(config, plan.num_examples, plan.num_classes, plan.num_devices)
  objective = create_objective(config)
  own = [f"warning: {text}" for text in objective.warnings(sizes)]
  if objective.needs_labels and config.eval.every_epochs and not config.hold_out:
    own.append(
      "warning: evaluations score train images, whose labels are learnt; --config.hold_out=.1 leaves some out"
    )
  return own + advice.warnings(config, plan, short_side)


def make_plan(config: ConfigDict, source: Source) -> Plan:
  """The `Plan` of this machine's devices and processes for the images of a source. Raises ConfigError."""
  machine = planning.Machine(
    jax.default_backend(), jax.device_count(), jax.process_count(), jax.process_index()
  )
  classes = 0 if source.has_several else len(source.classes)
  return plan_for(config, source.num_examples, classes, machine)


def create_loader(
  config: ConfigDict, source: Source, mesh: Mesh, reader: Reader | None = None
) -> Loader:
  """The loader that data.loader names; 'auto' keeps on the device what takes a small share of its memory.

  `reader`: of the source, where there is one that knows already what is broken.
  """
  data = config.data
  reader = reader or Reader(source, data.max_bad_fraction, data.max_megapixels)
  kind, device = data.loader, jax.local_devices()[0]
  how = kind, data.resident_size, data.resident_share
  if kind == "resident" or kept_bytes(reader, *how, device.platform, sharding.memory_bytes(device)):
    try:
      return ResidentLoader(reader, mesh, data.resident_size, data.threads)
    except ConfigError as error:
      if kind == "resident":
        raise
      tell(f"not kept on the device ({error})")
  if data.resident_size and source.images is None:
    say(
      f"data.resident_size={data.resident_size} is not used: images are read from disk as they are"
    )
  return PipelineLoader(reader, mesh, data.threads, data.cut)
