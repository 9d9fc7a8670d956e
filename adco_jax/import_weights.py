"""The task `import`: a checkpoint of another program becomes a workdir of this one.

Flow: main -> `run`: file -> what it holds -> held against the config -> a new state -> workdir with one
  checkpoint, from which evaluation, resuming and fine-tuning go on as from our own.
Holds: nothing is guessed: a file of another network or bank size is refused, what it lacks or what is
  not used is printed; an existing run is never touched.
Not here: names and layouts (interop).
"""

import dataclasses
import os

import jax
import numpy as np

from adco_jax import build, console, sharding
from adco_jax import plan as planning
from adco_jax.checkpoint import Checkpoints
from adco_jax.interop import authors, files
from adco_jax.plan import ConfigError, require
from adco_jax.workdir import check_writable, open_workdir


def run(config, workdir):
  """Fills `workdir` from config.file. Raises ConfigError."""
  check_writable(workdir)
  if os.path.exists(os.path.join(workdir, "config.json")):
    raise ConfigError(f"--workdir={workdir}: holds a run already; name a new one")
  held = open_file(config)
  state, plan, report = make_state(config, held)
  open_workdir(workdir, pretraining(config), dataclasses.asdict(plan), planning.MAY_CHANGE)
  step = int(state.step)
  checkpoints = Checkpoints(workdir)
  checkpoints.save(step, state)
  checkpoints.finish()
  checkpoints.close()
  tell(config, workdir, held, report, step)


def open_file(config):
  """The `authors.Checkpoint` of config.file, fitting the config. Raises ConfigError."""
  content = files.read(config.file)
  try:
    held = authors.split(content)
    facts = held.facts
  except ValueError as error:
    raise ConfigError(f"config.file={config.file!r}: {error}") from error
  for part in (held.query, held.key, {"the bank": held.bank, "the queue": held.queue}):
    files.check_finite({n: v for n, v in part.items() if v is not None}, "file", config.file)
  wanted = {"model.arch": "arch", "model.width": "width", "model.stem": "stem"}
  wanted |= {"model.dim": "dim"} if facts["dim"] else {}
  wanted |= {"bank.size": "bank_size"} if facts["bank_size"] else {}
  for name, fact in wanted.items():
    value, found = planning.get(config, name), facts[fact]
    require(
      value == found, name, value, f"{config.file} holds {found}; use --config.{name}={found}"
    )
  return held


def make_state(config, held):
  """(state on the host, plan, report of names). Raises ConfigError.

  With a bank (or queue) the state stands behind the bank's initialisation, after the file's epochs;
  with encoders alone it stands at the start.
  """
  plan = planning.make_plan(
    config, config.data.num_examples, config.data.num_classes,
    backend=jax.default_backend(), devices=jax.device_count(),
  )  # fmt: skip
  encoder = build.create_encoder(config, plan.compute_dtype)
  players = build.create_players(config, plan, encoder, sharding.create_mesh())
  state = jax.device_get(jax.jit(build.make_create_state(config, plan, players))())
  whole = {"adco": held.bank, "moco": held.queue}[config.objective] is not None
  step = plan.fill_steps + held.epoch * plan.steps_per_epoch if whole else 0
  require(
    step <= plan.total_steps,
    "epochs",
    config.epochs,
    f"the file has {held.epoch} already; use more",
  )
  try:
    first_row = step * plan.batch_size % config.bank.size
    state, report = authors.put_into(state, held, first_row)
  except ValueError as error:
    raise ConfigError(f"config.file={config.file!r}: {error}") from error
  return state.replace(step=np.int32(step)), plan, report


def pretraining(config):
  """The config under which the workdir goes on: this one without the file."""
  stored = config.to_dict() | {"task": "pretrain"}
  del stored["file"]
  return stored


def tell(config, workdir, held, report, step):
  """What was matched, what was not, and what can be done now."""
  print(f"{config.file}: {held.facts['arch']}, epoch {held.epoch}", flush=True)
  for what, names in report.items():
    some = (
      f": {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if what != "matched" else ""
    )
    print(f"  {what} {len(names)} names{some if names else ''}")
  parts = {
    "key encoder": held.key, "bank": held.bank is not None, "queue": held.queue is not None,
    "encoder momentum": held.momentum, "bank momentum": held.bank_momentum is not None,
  }  # fmt: skip
  there = ", ".join(name for name, value in parts.items() if value)
  print(f"  besides the query encoder: {there or 'nothing'}")
  console.tell(f"imported at step {step}: {workdir}")
  console.tell(
    f"  score it:  python -m adco_jax.main --config=configs/knn.py --config.pretrained={workdir}"
  )
  console.tell(
    f"  fine-tune: --config.init_from={workdir}; go on: the same config with --workdir={workdir}"
  )
