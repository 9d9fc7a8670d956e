"""The task `import`: a checkpoint of another program becomes a workdir of this one.

Flow: main -> `run`: file -> what it holds -> held against the config -> a new state -> workdir with one
  checkpoint, from which evaluation, training and export go on as from our own.
Holds: nothing is guessed: a file of another network or bank size, or with several networks, is refused, what
  it lacks or what is not used is printed; training there begins its own epochs; an existing run is never touched.
Not here: names and layouts (interop).
"""

import dataclasses
import importlib
import os
import shlex
from collections.abc import Iterable

import jax
import numpy as np
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config import keys
from adco_jax.config import plan as planning
from adco_jax.config.plan import Machine, Plan
from adco_jax.errors import ConfigError, require
from adco_jax.interop import authors, files
from adco_jax.models import vit
from adco_jax.runtime import sharding
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json
from adco_jax.training.state import TrainState
from adco_jax.workdir.checkpoint import Checkpoints
from adco_jax.workdir.files import canonical, check_writable, differences
from adco_jax.workdir.opening import open_workdir

# By objective: the key of its number of rows, and what of a file goes into them.
ROWS = {"adco": ("method.bank.size", "bank"), "moco": ("method.queue_size", "queue")}


def run(config: ConfigDict, workdir: str) -> None:
  """Fills `workdir` from config.file. Raises ConfigError."""
  check_writable(workdir)
  if os.path.exists(os.path.join(workdir, "config.json")):
    raise ConfigError(f"--workdir={workdir}: holds a run already; name a new one")
  flags = overrides(config)
  loaded = open_file(config)
  state, plan, report = make_state(config, loaded)
  facts = dataclasses.asdict(plan) | {
    "imported": origin(config, loaded) | {"head": not report["missing"]}
  }
  open_workdir(workdir, pretraining(config), facts, planning.MAY_CHANGE)
  step = int(state.step)
  checkpoints = Checkpoints(workdir)
  checkpoints.save(step, state)
  checkpoints.finish()
  checkpoints.close()
  describe(config, loaded, report)
  advise(config, workdir, flags, step)


def open_file(config: ConfigDict) -> authors.Checkpoint:
  """The `authors.Checkpoint` of config.file, fitting the config. Raises ConfigError."""
  content = files.read(config.file)
  try:
    loaded = authors.parse_checkpoint(content, config.prefix)
    facts = loaded.facts
  except ValueError as error:
    raise ConfigError(f"config.file={config.file!r}: {error}") from error
  for part in (loaded.query, loaded.key, {"the bank": loaded.bank, "the queue": loaded.queue}):
    files.check_finite({n: v for n, v in part.items() if v is not None}, "file", config.file)
  wanted = {"model.arch": "arch", "model.width": "width", "model.stem": "stem"}
  wanted |= {"model.dim": "dim"} if facts["dim"] else {}
  rows_key, _ = ROWS.get(config.objective, ("", ""))
  wanted |= {rows_key: "bank_size"} if rows_key and facts["bank_size"] else {}
  rows = [
    (name, planning.get(config, name), facts[fact])
    for name, fact in wanted.items()
    if fact in facts
  ]
  rows += [(f"model.vit.{name}", *pair) for name, *pair in forms(config, facts.get("vit", {}))]
  rows = [row for row in rows if row[1] != row[2]]
  if rows:
    name, value, there = rows[0]
    use = " ".join(f"--config.{name}={there}" for name, _, there in rows)
    require(False, name, value, f"{config.file} holds {there}; use {use}")
  return loaded


def forms(config: ConfigDict, found: dict[str, Json]) -> list[tuple[str, Json, Json]]:
  """[(key of model.vit, the config's value, what a file with `found` has)]; of LayerScale only whether it is there."""
  here = config.model.vit.to_dict() | {"grid": vit.grid_of(config.model.vit, config.views.crops)}
  if here["layer_scale"] and found.get("layer_scale"):
    found = found | {"layer_scale": here["layer_scale"]}
  return [(name, here[name], value) for name, value in found.items()]


def make_state(
  config: ConfigDict, loaded: authors.Checkpoint
) -> tuple[TrainState, Plan, dict[str, list[str]]]:
  """(state on the host, plan, report of names). Raises ConfigError.

  With a bank the state stands behind the bank's initialisation, else at the start: the epochs of the file
  were of another plan, with another number of images, and are not counted.
  """
  plan = build.plan_for(config, config.data.num_examples, config.data.num_classes, Machine(backend=jax.default_backend(), devices=jax.device_count()))  # fmt: skip
  setup = build.create_setup(config, plan, sharding.create_mesh())
  state = jax.device_get(jax.jit(setup.create_state)())
  _, rows_name = ROWS.get(config.objective, ("", ""))
  whole = bool(rows_name) and getattr(loaded, rows_name) is not None
  try:
    state, report = authors.put_into(state, loaded)
  except ValueError as error:
    raise ConfigError(f"config.file={config.file!r}: {error}") from error
  return state.replace(step=np.int32(plan.filled_at if whole else 0)), plan, report


def origin(config: ConfigDict, loaded: authors.Checkpoint) -> dict[str, Json]:
  """Where the weights came from, for the workdir."""
  query, key = loaded.taken_from
  return {"file": os.path.basename(config.file), "query": query, "key": key, "epoch": loaded.epoch}


def pretraining(config: ConfigDict) -> dict[str, Json]:
  """The config under which the workdir goes on: this one without what the import alone needs."""
  stored = config.to_dict() | {"task": "pretrain"}
  return {name: value for name, value in stored.items() if name not in ("file", "prefix", "base")}


def describe(config: ConfigDict, loaded: authors.Checkpoint, report: dict[str, list[str]]) -> None:
  """Prints what was taken from where, what was matched and what was not."""
  query, key = loaded.taken_from
  said = f", {loaded.epoch} epochs" if loaded.epoch else ""
  tell(f"{config.file}: {loaded.facts['arch']}{said}")
  beside = f", key encoder from {key!r}" if key else ""
  tell(
    f"  query encoder taken from {query!r}{beside}"
    if query
    else "  names stand alone, without a prefix"
  )
  for what, names in report.items():
    some = f": {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
    tell(f"  {what} {len(names)} names{some if names and what != 'matched' else ''}")
  parts = {
    "key encoder": loaded.key, "bank": loaded.bank is not None, "queue": loaded.queue is not None,
    "encoder momentum": loaded.momentum, "bank momentum": loaded.bank_momentum is not None,
  }  # fmt: skip
  there = ", ".join(name for name, value in parts.items() if value)
  tell(f"  besides the query encoder: {there or 'nothing'}")


def advise(config: ConfigDict, workdir: str, flags: Iterable[str], step: int) -> None:
  """Prints commands that work from here."""
  begun = "behind the bank's initialisation" if step else "before its first step"
  tell(f"imported into {workdir}, at step {step}, {begun}; what can be done now:")
  program = "python -m adco_jax.main"
  pretrain = " ".join([f"{program} --config=configs/{config.base}.py", *flags])
  data = "" if config.data.dir or config.data.source == "digits" else " --config.data.dir=DIR"
  place = shlex.quote(workdir)
  tell(f"  score it: {program} --config=configs/knn.py --config.pretrained={place}{data}")
  tell(f"  train on, {config.epochs:g} epochs from here: {pretrain} --workdir={place}{data}")
  tell(f"  or with other keys: the same with --config.init_from={place} and a new --workdir")


def overrides(config: ConfigDict) -> list[str]:
  """Flags that make this config of its base. Raises ConfigError if there is no such base."""
  try:
    base = importlib.import_module(f"configs.{config.base}").get_config()
  except ImportError as error:
    raise ConfigError(
      f"config.base={config.base!r}: no such config; say it as --config=configs/import.py:NAME"
    ) from error
  rows = differences(canonical(base.to_dict()), canonical(pretraining(config)), ("task",))
  own = {*keys.walk(config)}  # without what another objective of the base had
  changed = [key for key, *_ in rows if key in own]
  return [shlex.quote(f"--config.{key}={_flag(planning.get(config, key))}") for key in changed]


def _flag(value):
  return str(tuple(value)) if isinstance(value, list) else str(value)
