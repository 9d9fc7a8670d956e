"""How a run begins: its workdir, and what starts it besides its own checkpoints: another run's encoders, or a file's.

Flow: pretrain and inspect_data ask `check` and `check_head` before anything compiles; pretrain then calls `begin`, hands `start` to
  restore, and calls `record` when it knows where it goes on.
Holds: whichever it was is printed; what cannot start the run is refused before its workdir is there.
Not here: workdirs (training.restore), names in a file (interop).
"""

import dataclasses
import os

import jax
import numpy as np
from ml_collections import ConfigDict

from adco_jax.config.plan import Plan, get
from adco_jax.data.sources.base import Source
from adco_jax.errors import ConfigError, require
from adco_jax.interop import exported, torch_weights
from adco_jax.models import vit
from adco_jax.runtime import remote
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json, read_json, write_json
from adco_jax.runtime.processes import say
from adco_jax.training import restore
from adco_jax.training.state import TrainState
from adco_jax.workdir.checkpoint import saved_steps
from adco_jax.workdir.files import Change, read_config, with_later_keys
from adco_jax.workdir.opening import open_workdir, record_extension, record_return

BACKBONE = ("model.arch", "model.width", "model.stem")  # decide what a file must hold
# ... of a ViT: heads and pool change no array's shape
TRANSFORMER = tuple(
  f"model.vit.{key}" for key in ("patch", "pool", "positions", "registers", "depth", "heads")
)


def check(config: ConfigDict, workdir: str) -> None:
  """Refuses what cannot start this run; nothing was written yet. Raises ConfigError."""
  name = config.init_from
  if not name or not os.path.isfile(name):
    if name:
      restore.check_init_from(config, workdir)
    return
  if saved_steps(workdir):
    return  # it resumes from its own checkpoints
  facts, _ = exported.read(name)
  stored = with_later_keys(facts["config"])
  keys = (*BACKBONE, *TRANSFORMER) if config.model.arch in vit.ARCHITECTURES else BACKBONE
  there, here = ([get(c, key) for key in keys] for c in (stored, config))
  if config.model.arch in vit.ARCHITECTURES:
    keys = (*keys, "model.vit.grid")
    for values, c in ((there, stored), (here, config)):
      values.append(vit.grid_of(c["model"]["vit"], c["views"]["crops"]))
  use = " ".join(f"--config.{k}={x}" for k, x in zip(keys, there, strict=True))
  require(there == here, "init_from", name, f"holds another encoder; use {use}")
  remedy = (
    "an exported file starts encoders alone; use auto or new, or name the workdir that it came from"
  )
  require(config.init_head != "kept", "init_head", config.init_head, remedy)


def check_head(config: ConfigDict, plan: Plan, workdir: str) -> None:
  """Refuses to keep the head of a run that has none like this one's. Raises ConfigError."""
  if config.init_head != "kept" or saved_steps(workdir):
    return
  name = config.init_from
  require(name, "init_head", "kept", "there is nothing to keep it of; name config.init_from")
  other = read_config(name, "init_from")
  remedy = f"{name} is a run of {other['objective']}, this one of {config.objective}; use new"
  require(other["objective"] == config.objective, "init_head", "kept", remedy)
  classes = read_json(f"{remote.local(name)}/plan.json")["num_classes"]
  remedy = f"the head of {name} is of {classes} classes, the data has {plan.num_classes}; use new"
  require(classes == plan.num_classes, "init_head", "kept", remedy)


def start(
  name: str, config: ConfigDict, state: TrainState, abstract: TrainState, plan: Plan
) -> TrainState:
  """A new state with the encoders of `name`, see `restore.start_from`; of a file both are its own, a head that it
  lacks is new. Raises ConfigError."""
  if not os.path.isfile(name):
    return restore.start_from(name, config, state, abstract, plan)
  facts, weights = exported.read(name)
  shapes = {"params": abstract.query_params, **abstract.query_stats}
  fresh = {"params": state.query_params, **state.query_stats}
  try:
    variables, report = torch_weights.import_encoder(weights, jax.device_get(fresh))
  except ValueError as error:
    require(False, "init_from", name, str(error))
  put = lambda x, like: jax.device_put(np.asarray(x), like.sharding)
  taken = {"query": jax.tree.map(put, variables, shapes)}
  if state.key_params:
    likes = {"params": abstract.key_params, **abstract.key_stats}
    taken["key"] = jax.tree.map(put, variables, likes)
  fields: dict[str, Tree] = {}
  for player, tree in taken.items():
    stats = {key: value for key, value in tree.items() if key != "params"}
    fields |= {f"{player}_params": tree["params"], f"{player}_stats": stats}
  new = f", its projection is new ({len(report['missing'])} arrays)" if report["missing"] else ""
  say(f"starting from {name}, step {facts['step']}: encoders{new}")
  return state.replace(**fields)


def begin(workdir: str, facts: tuple) -> list[Change]:
  """Opens the workdir, and where it lasts; returns what an extended run changes. Raises ConfigError."""
  changes = open_workdir(workdir, *facts)
  if changes:
    check_grid(workdir, facts[0])
  try:
    remote.push(workdir)
  except OSError as error:
    raise ConfigError(f"--workdir={workdir}: {error.strerror}") from error
  return changes


def check_grid(workdir: str, config: dict[str, Json]) -> None:
  """Refuses to extend a ViT with views of which the first would move its positions. Raises ConfigError."""
  if config["model"]["arch"] not in vit.ARCHITECTURES:
    return
  crops, grid = (
    config["views"]["crops"],
    lambda x: vit.grid_of(x["model"]["vit"], x["views"]["crops"]),
  )
  there = grid(read_config(workdir))
  remedy = (
    f"the positions of the run are of {there} x {there} patches, those of its first view; begin another one with "
    f"--config.init_from={workdir} --config.model.vit.grid={there}"
  )
  require(there == grid(config), "views.crops", crops, remedy)


def record(
  workdir: str, changes: list[Change], config: ConfigDict, plan: Plan, step: int, source: Source
) -> None:
  """Records where the run goes on, and with which `changes`, also where the workdir lasts. Raises ConfigError."""
  try:
    if changes:
      facts = config.to_dict(), dataclasses.asdict(plan), step, source.identity(plan.has_labels)
      record_extension(workdir, changes, *facts)
    else:
      record_return(workdir, step)
    if plan.has_labels:
      write_json(f"{workdir}/classes.json", [*source.classes])
    remote.push(workdir)
  except OSError as error:
    what = f"{error.strerror}, so where it goes on is not recorded; start the same command again"
    raise ConfigError(f"--workdir={workdir}: {what}") from error


def length(config: ConfigDict, plan: Plan) -> str:
  """Of what a run's steps are, as a user reads it."""
  first = [(phase.counted, f"{phase.steps:,} of {phase.name}") for phase in plan.phases[:-1]]
  before = "".join(f"{text} + " for counted, text in first if not counted)
  among = "".join(f" ({text} among them)" for counted, text in first if counted)
  return f"{before}{config.epochs:g} epochs of {plan.steps_per_epoch:,}{among}"
