"""Where a run begins: at its newest intact checkpoint, at another run's encoders, or at nothing.

Flow: pretrain calls `check_init_from` and `check_extends` before it opens a workdir, `check_same` when it knows what to do,
  `check_not_past` and `restore_or_create_state` before its loop.
Holds: whichever it was is printed; an objective's arrays are taken over only from behind its first phases.
Not here: files of a checkpoint (checkpoint), first values (state).
"""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adco_jax.config import method
from adco_jax.config.plan import Plan, get
from adco_jax.config.ranges import resolve_dtype
from adco_jax.errors import ConfigError, require
from adco_jax.models import vit
from adco_jax.runtime import processes, remote
from adco_jax.runtime.dtypes import at_least_float32
from adco_jax.runtime.files import Json, read_json
from adco_jax.runtime.processes import say
from adco_jax.training.state import TrainState
from adco_jax.training.trainer import Trainer
from adco_jax.workdir.checkpoint import (
  Checkpoints,
  holds,
  restore_parts,
  saved_steps,
  stored_fields,
)
from adco_jax.workdir.files import canonical, differences, filled_at, holds_run, read_config

# (name, config, new state, its shapes, plan) -> the state that init_from starts, see `start_from`
Start = Callable[[str, ConfigDict, TrainState, TrainState, Plan], TrainState]
ENCODERS = ("query_params", "query_stats", "key_params", "key_stats")  # fields of a state
# They decide its shapes.
ENCODER = (
  "model.arch", "model.width", "model.stem", "model.dim", "model.head.layers", "model.head.width", "model.head.norm",
  "model.vit.patch", "model.vit.pool", "model.vit.positions", "model.vit.registers", "model.vit.depth", "model.vit.heads",
)  # fmt: skip


def check_init_from(config: ConfigDict, workdir: str) -> None:
  """Refuses another run that cannot start this one; nothing was written yet. Raises ConfigError."""
  name = config.init_from
  folder = remote.local(name)
  itself = os.path.realpath(folder) == os.path.realpath(workdir)
  require(not itself, "init_from", name, "is this run's own workdir; leave it out to resume")
  if saved_steps(workdir):
    return  # it resumes from its own checkpoints
  other = read_config(name, "init_from")
  require(saved_steps(name), "init_from", name, "no checkpoint there yet; let that run save one")
  rows = [(key, get(other, key), get(config, key)) for key in ENCODER]
  if config.model.arch in vit.ARCHITECTURES:
    grid, own = (vit.grid_of(x["model"]["vit"], x["views"]["crops"]) for x in (other, config))
    rows.append(("model.vit.grid", grid, own))
    scales = [x["model"]["vit"]["layer_scale"] for x in (other, config)]
    if not all(scales):
      rows.append(("model.vit.layer_scale", *scales))
  here = resolve_dtype(config.compute_dtype, jax.default_backend())
  stored = read_json(f"{folder}/plan.json")["compute_dtype"]
  if at_least_float32(stored) != at_least_float32(here):
    rows.append(("compute_dtype", stored, here))
  rows = [row for row in rows if row[1] != row[2]]
  there = ", ".join(f"{key}={there!r} (here {here!r})" for key, there, here in rows)
  use = " ".join(f"--config.{key}={there}" for key, there, _ in rows)
  require(not rows, "init_from", name, f"holds another encoder, {there}; use {use}")


def check_extends(workdir: str) -> None:
  """Refuses to extend where no run is; nothing was written yet. Raises ConfigError."""
  if not holds_run(workdir):
    raise ConfigError(
      f"--extend: no run in {workdir}; name its --workdir, or leave it out to begin one"
    )


def check_not_past(workdir: str, plan: Plan) -> None:
  """Refuses to resume behind the plan's end: nothing would be trained. Raises ConfigError."""
  newest = max(saved_steps(workdir), default=0)
  if newest > plan.total_steps:
    raise ConfigError(
      f"--workdir={workdir}: its newest checkpoint is of step {newest}, this run would end at step {plan.total_steps} "
      f"({plan.num_examples} images, batch {plan.batch_size}), so nothing would be trained; begin anew in a new "
      f"--workdir with --config.init_from={workdir}"
    )


def check_same(facts: dict[str, Json]) -> None:
  """Raises ConfigError on all processes, with a key that differs, unless all hold the same nested dictionary."""
  first, *others = map(json.loads, processes.gather_texts(json.dumps(canonical(facts))))
  for number, other in enumerate(others, 1):
    if rows := differences(first, other, ()):
      key, there, here = rows[0]
      more = f", and {len(rows) - 1} more differ" if len(rows) > 1 else ""
      raise ConfigError(
        f"{key}: {there!r} in process 0, {here!r} in process {number}{more}; start all with the same options and data"
      )


def restore_or_create_state(
  config: ConfigDict,
  plan: Plan,
  trainer: Trainer,
  checkpoints: Checkpoints,
  start: Start | None = None,
) -> tuple[TrainState, int, bool]:
  """(state, step, kept): the newest intact checkpoint, else a new state (by `start` of init_from where given).

  kept: whether a restart would find the same state again; the newest of another run it may not.
  """
  restored = checkpoints.restore(trainer.abstract_state)
  if restored:
    say(f"resuming at step {restored[1]} of {plan.total_steps}")
    return *restored, True
  state = trainer.create_state()
  if config.init_from:
    state = (start or start_from)(config.init_from, config, state, trainer.abstract_state, plan)
  return state, int(state.step), not config.init_from


def start_from(
  workdir: str, config: ConfigDict, state: TrainState, abstract: TrainState, plan: Plan
) -> TrainState:
  """A new state with the encoders of another run, and with its objective's arrays if they are alike and past their first phases.

  Then what comes before training is over: the run starts behind it. A key encoder that the other run has not is a copy of
  its query encoder. Raises ConfigError.
  """
  other, facts = read_config(workdir, "init_from"), read_json(f"{remote.local(workdir)}/plan.json")
  there = stored_fields(workdir)

  def take(names):
    return restore_parts(workdir, {name: getattr(abstract, name) for name in names}, "init_from")

  cls: Any = method.find(config.objective)
  embeds = (
    cls.keys_from == "momentum"
  )  # else key fields are an average, which begins where the encoder does
  own = lambda name: embeds or not name.startswith("key_")
  names = [name for name in ENCODERS if own(name) and name in there and getattr(abstract, name)]
  taken, step = take(names)
  copy = lambda x, like: jax.device_put(jnp.copy(x), like.sharding)
  for name in ("params", "stats"):
    like = getattr(abstract, f"key_{name}")
    if like and f"key_{name}" not in taken:
      taken[f"key_{name}"] = jax.tree.map(copy, taken[f"query_{name}"], like)
  alike = other["objective"] == config.objective and step >= filled_at(facts)
  alike = alike and config.init_head != "new" and holds(workdir, {"objective": abstract.objective})
  remedy = (
    f"the arrays of {config.objective} in {workdir} have other shapes, or are not filled; use new"
  )
  require(alike or config.init_head != "kept", "init_head", "kept", remedy)
  if alike:
    taken |= take(["objective"])[0]
  behind = ""
  if alike and plan.filled_at:
    behind = f"; the {plan.filled_at} steps that fill a bank are over"
    if over := plan.epoch(plan.filled_at):
      behind += f", so that {config.epochs - over:g} of {config.epochs:g} epochs are left"
  say(f"starting from {workdir}, step {step}: encoders{', objective' if alike else ''}{behind}")
  return state.replace(**taken, step=state.step + (plan.filled_at if alike else 0))
