"""The task `pretrain`: from a config to a trained encoder in a workdir.

Flow: main -> `run`: source -> plan -> workdir -> loader -> build -> restore or create -> loop.
Holds: at step n the loop first evaluates and saves, then draws batch n, then updates, so a restart at
  step n repeats nothing and leaves nothing out.
Not here: every part (see build); lines (log); scoring, while it trains (online) or later (evaluate).
"""

import contextlib
import dataclasses

import jax
import numpy as np
from clu import parameter_overview

from adco_jax import build, capsule, processes, remote, sharding
from adco_jax import plan as planning
from adco_jax.checkpoint import Checkpoints
from adco_jax.fingerprints import fingerprint
from adco_jax.guard import Guard, Leaving
from adco_jax.log import Log
from adco_jax.metrics import MetricsWriter, say
from adco_jax.online import make_online_evaluation
from adco_jax.plan import ConfigError, RunError
from adco_jax.saver import Saver
from adco_jax.start import check_init_from, check_not_past, check_same, restore_or_create_state
from adco_jax.view_sheet import save_view_sheet
from adco_jax.workdir import check_writable, open_workdir, read_opened


def run(config, workdir):
  """Trains until the plan's last step (or stop_at_step), resuming what `workdir` holds.

  Raises ConfigError, before anything compiles, for what cannot be run.
  """
  source, plan = processes.on_all(lambda: prepare(config, workdir))
  identity = source.identity()
  shared = dataclasses.asdict(dataclasses.replace(plan, slots=()))
  check_same({"config": config.to_dict(), "data": identity, "plan": shared})
  with Guard(workdir, config.watchdog_minutes) as guard:
    facts = config.to_dict(), dataclasses.asdict(plan), planning.MAY_CHANGE, identity
    processes.on_first(lambda: begin(workdir, facts))
    began, number = processes.on_all(lambda: read_opened(workdir))
    if len(set(processes.gather_texts(str(number)))) > 1:
      raise ConfigError(
        f"--workdir={workdir}: processes see different runs there; name a folder that all of them share"
      )
    processes.on_all(lambda: check_not_past(workdir, plan))
    plan = dataclasses.replace(plan, compute_dtype=began["compute_dtype"])
    say(describe(config, plan, source))
    state = run_alone(config, workdir, source, plan, guard)
  step = int(state.step)
  what = "done" if step == plan.total_steps else "stopped"
  say(
    f"{what} at step {step} of {plan.total_steps}; state {fingerprint(state)}; everything is in {workdir}"
  )


def begin(workdir, facts):
  """Opens the workdir, and where it lasts. Raises ConfigError."""
  open_workdir(workdir, *facts)
  try:
    remote.push(workdir)
  except OSError as error:
    raise ConfigError(f"--workdir={workdir}: {error.strerror}") from error


def prepare(config, workdir):
  """(source, plan) of a config that can be run in this workdir. Raises ConfigError."""
  check_writable(workdir)
  if config.init_from:
    check_init_from(config, workdir)
  source = build.open_source(config.data)
  return source, build.make_plan(config, source)


def run_alone(config, workdir, source, plan, guard):
  """Builds, restores or creates, trains; returns the last state. Nobody else writes to the workdir."""
  mesh = sharding.create_mesh()
  loader = processes.on_all(lambda: build.create_loader(config, source, mesh))
  parts = build.build(config, plan, mesh, loader.cut)
  checkpoints = Checkpoints(workdir, config.save.keep, plan.keeps)
  with contextlib.closing(checkpoints):
    state, step, kept = restore_or_create_state(config, plan, parts, checkpoints)
    say(f"parameters: {parameter_overview.count_parameters(state.query_params):,} per encoder")
    evaluate = make_online_evaluation(config, plan, source, loader, parts.encoder, mesh, guard)
    if step == 0:
      views = f"{workdir}/views.png"
      processes.on_first(lambda: save_view_sheet(views, config, plan, loader))
    saver = Saver(config.save, config.log.every_steps, checkpoints, step, plan.keeps)
    writer = processes.on_all(lambda: MetricsWriter(workdir, step))
    with contextlib.closing(writer):
      log = Log(config, plan, writer, mesh)
      if not kept:
        saver.save(step, state, log.sync)
      return train(config, workdir, plan, loader, parts, state, step, saver, log, evaluate, guard)


def train(config, workdir, plan, loader, parts, state, step, saver, log, evaluate, guard):
  """The loop. Its order is the contract of resuming: evaluate, save, draw, update."""
  last = min(plan.total_steps, config.stop_at_step or plan.total_steps)
  batches = loader.train(step, last, seed=config.seed, plan=plan, ratio=config.views.ratio)
  shared = loader.shared | sharding.put_replicated(
    parts.players.mesh, {"seed": np.uint32(config.seed)}
  )
  while True:
    if evaluate and plan.evaluates(step) and not log.has_evaluation(step):
      with contextlib.suppress(Leaving):
        log.evaluation(step, lambda s=state: evaluate(s))
    guard.alive()
    leaving = guard.leaves_at(step)
    ending = step >= last or leaving
    if saver.due(step, ending):
      processes.on_all(loader.reader.check)
      saver.save(step, state, log.sync)
    if ending:
      saver.finish(step)
    if leaving:
      guard.leave(step)
    if step >= last:
      return state
    batch = log.clock.wait_for(batches)
    split = sharding.put_split(parts.players.mesh, batch.split)
    orders = sharding.put_replicated(parts.players.mesh, batch.orders)
    update = parts.fill_step if step < plan.fill_steps else parts.train_step
    state, metrics = update(state, split, shared | {"key_orders": orders})
    guard.nothing_unsaved = False
    step += 1
    log.step(step, state, metrics, batch.replaced)
    if step % config.log.every_steps == 0:
      processes.on_all(loader.reader.check)
    if log.bad_steps >= config.max_bad_steps - 1 and not metrics["train/finite"]:
      log.flush()
      folder = capsule.write(workdir, config, plan, state, step - 1)
      raise RunError(
        f"config.max_bad_steps={config.max_bad_steps}: so many steps in a row were not finite, the last was "
        f"{step - 1}; look at it with --config=configs/replay_step.py --config.capsule={folder}"
      )


def describe(config, plan, source):
  """What is about to run, with the resolved numbers that a user may not expect."""
  lines = [f"{source.name}: {plan.num_examples} images, {plan.num_classes or 'no'} classes"]
  expected = config.data.num_examples
  if config.data.source == "folder" and expected and expected != plan.num_examples:
    lines.append(
      f"data.num_examples={expected} serves plans only; this run counts {plan.num_examples}"
    )
  rate, batch = config.optim.learning_rate, plan.batch_size
  scaled = config.optim.scale_from_batch
  how = f"{rate:g} x {batch} / {scaled}" if scaled else "as given, not scaled with the batch"
  lines.append(f"learning rate {plan.learning_rate:g} ({how}), batch {batch}, {plan.compute_dtype}")
  lines.append(
    f"{plan.total_steps} steps = {plan.fill_steps} of bank initialisation + {config.epochs:g} epochs "
    f"of {plan.steps_per_epoch}; {plan.num_devices} x {jax.devices()[0].device_kind}, BatchNorm over {config.bn.group_size} images"
  )
  if plan.shuffles_over_processes:
    lines.append(
      "keys are shuffled over all processes: each reads the images of its keys as well (bn.shuffle_block)"
    )
  return "\n".join((*lines, *planning.warnings(config, plan)))
