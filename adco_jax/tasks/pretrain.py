"""The task `pretrain`: from a config to a trained encoder in a workdir.

Flow: main -> `run`: source -> plan -> workdir -> loader -> build -> restore or create -> loop.
Holds: at step n the loop first evaluates and saves, then draws batch n, then updates, so a restart at
  step n repeats nothing and leaves nothing out.
Not here: every part (see build); lines (log); scoring, while it trains (online) or later (evaluate).
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import NoReturn

import jax
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config import plan as planning
from adco_jax.config.plan import Plan
from adco_jax.data.ahead import Ahead
from adco_jax.data.batch import Constants, LoadedBatch
from adco_jax.data.glance import glance
from adco_jax.data.loaders import Loader
from adco_jax.data.sources.base import Source
from adco_jax.errors import ConfigError, RunError
from adco_jax.evaluation.classifier import Best
from adco_jax.evaluation.online import OnlineEvaluation
from adco_jax.models import positions, vit
from adco_jax.objectives.base import Classifying
from adco_jax.runtime import processes, sharding
from adco_jax.runtime.guard import Guard, Leaving
from adco_jax.runtime.processes import say
from adco_jax.tasks import beginning
from adco_jax.tasks.classified import Classified, Prepared, open_test
from adco_jax.tasks.hooks import Hook, WithHooks, check_hooks
from adco_jax.tasks.view_sheet import save_view_sheet
from adco_jax.training import capsule
from adco_jax.training.log import Evaluation, Log
from adco_jax.training.programs import Programs
from adco_jax.training.restore import (
  check_extends,
  check_not_past,
  check_same,
  restore_or_create_state,
)
from adco_jax.training.saver import Saver
from adco_jax.training.state import TrainState
from adco_jax.training.train_step import Metrics
from adco_jax.training.trainer import Trainer
from adco_jax.workdir.checkpoint import Checkpoints, saved_steps
from adco_jax.workdir.files import Change, check_writable, describe_changes, flatten, read_opened
from adco_jax.workdir.fingerprints import fingerprint
from adco_jax.workdir.metrics import MetricsWriter, as_markdown
from adco_jax.workdir.opening import has_begun


def run(config: ConfigDict, workdir: str, extend: bool = False, hooks: Sequence[Hook] = ()) -> None:
  """Trains until the plan's last step (or stop_at_step), resuming what `workdir` holds.

  `extend`: a run of another config there goes on with this one. `hooks`: see main.train. Raises ConfigError, before anything compiles,
  for what cannot be run.
  """
  check_hooks(config, hooks)
  prepared = processes.on_all(lambda: prepare(config, workdir, extend))
  plan = prepared.plan
  identity = prepared.parts.whole.identity(labels=plan.has_labels)
  shared = dataclasses.asdict(plan) | {"slots": ()}
  check_same({"config": config.to_dict(), "data": identity, "plan": shared, "--extend": extend})
  with Guard(workdir, config.watchdog_minutes) as guard:
    facts = config.to_dict(), dataclasses.asdict(plan), planning.MAY_CHANGE, identity, extend
    changes = processes.first_gives(lambda: beginning.begin(workdir, facts))
    stored_plan, number = processes.on_all(lambda: read_opened(workdir))
    if len(set(processes.gather_texts(str(number)))) > 1:
      raise ConfigError(
        f"--workdir={workdir}: processes see different runs there; name a folder that all of them share"
      )
    processes.on_all(lambda: check_not_past(workdir, plan))
    if has_begun(stored_plan) and "compute_dtype" not in [key for key, *_ in changes]:
      plan = dataclasses.replace(plan, compute_dtype=stored_plan["compute_dtype"])
    say(describe(config, plan, prepared.source))
    state = run_alone(config, workdir, prepared._replace(plan=plan), changes, guard, hooks)
  step = int(state.step)
  what = "done" if step == plan.total_steps else "stopped"
  say(
    f"{what} at step {step} of {plan.total_steps}; state {fingerprint(state)}; everything is in {workdir}"
  )


def prepare(config: ConfigDict, workdir: str, extend: bool = False) -> Prepared:
  """Sources and plan of a config that can be run in this workdir. Raises ConfigError."""
  check_writable(workdir)
  beginning.check(config, workdir)
  if extend:
    check_extends(workdir)
  parts = build.open_training(config)
  plan = build.make_plan(config, parts.trained)
  beginning.check_head(config, plan, workdir)
  return Prepared(parts.trained, plan, parts, open_test(config, parts.whole))


def run_alone(
  config: ConfigDict,
  workdir: str,
  prepared: Prepared,
  changes: list[Change],
  guard: Guard,
  hooks: Sequence[Hook] = (),
) -> TrainState:
  """Builds, restores or creates, trains; returns the last state. Nobody else writes to the workdir."""
  mesh, best, (source, plan, parts, _) = sharding.create_mesh(), Best(), prepared
  loader = processes.on_all(lambda: build.create_loader(config, source, mesh))
  trainer = build.build(config, plan, mesh)
  keeps = lambda step: plan.keeps(step) or step == best.step
  checkpoints = Checkpoints(workdir, config.save.keep, keeps)
  # Where the run will most likely begin; `Programs` compiles later what that leaves out.
  newest = max(saved_steps(workdir), default=plan.filled_at if config.init_from else 0)
  constants = Constants.put(mesh, config.seed, loader.images)
  programs = Programs(trainer, plan, loader.item, constants, newest, last_step(config, plan))
  with contextlib.closing(programs), contextlib.closing(checkpoints):
    state, step, kept = restore_or_create_state(config, plan, trainer, checkpoints, beginning.start)
    if changes:
      say(f"extended from step {step}: {describe_changes(changes)}")
    processes.on_first(lambda: beginning.record(workdir, changes, config, plan, step, parts.whole))
    count = sum(x.size for x in jax.tree.leaves(state.query_params))
    say(f"parameters: {count:,} per encoder")
    objective, evaluate, classified = trainer.spec.objective, None, None
    if isinstance(objective, Classifying):
      classified = Classified(config, prepared, trainer, objective, guard, best)
    if config.eval.every_epochs:
      given = config, plan, source, loader, trainer.encoder, objective, mesh, guard, workdir
      if classified and parts.held_out:
        own: Evaluation = classified.online(parts.held_out)
      else:
        own = OnlineEvaluation(*given)
      evaluate = WithHooks(own, hooks, config, trainer) if hooks else own
    writer = processes.on_all(lambda: MetricsWriter(workdir, step))
    best.recall(processes.first_gives(lambda: Best.lines_of(writer.lines)))
    programs.traced()
    if step == 0 or not kept:
      views = f"{workdir}/views.png"
      processes.on_first(lambda: save_view_sheet(views, config, plan, loader))
      writer.picture(step, views)
    if step == 0 or not kept or changes:
      writer.text(step, "config", as_markdown(flatten(config.to_dict())))
    saver = Saver(config.save, config.log.every_steps, checkpoints, step, keeps)
    with contextlib.closing(writer):
      log = Log(config, plan, writer, trainer.spec)
      if not kept:
        saver.save(step, state, log.sync)
      elif step:
        log.recall(processes.on_all(lambda: checkpoints.notes(step)))
      state = Training(
        config, workdir, plan, loader, constants, trainer, programs, saver, log, evaluate, guard
      ).run(state, step)
    if classified and int(state.step) == plan.total_steps:
      with contextlib.suppress(Leaving):  # the same command scores it
        classified.score_test(workdir, state)
    return state


def last_step(config: ConfigDict, plan: Plan) -> int:
  """Where this process leaves."""
  return min(plan.total_steps, config.stop_at_step or plan.total_steps)


@dataclasses.dataclass
class Training:
  """The loop. Its order is the contract of resuming: evaluate, save, draw, update."""

  config: ConfigDict
  workdir: str
  plan: Plan
  loader: Loader
  constants: Constants
  trainer: Trainer
  programs: Programs
  saver: Saver
  log: Log
  evaluate: Evaluation | None  # None: never
  guard: Guard
  first: int = 0  # step, of this process

  def run(self, state: TrainState, step: int) -> TrainState:
    """Trains from `state` of `step` and returns the last one."""
    self.first = step
    config, plan, last = self.config, self.plan, last_step(self.config, self.plan)
    batches = self.loader.train(step, last, seed=config.seed, plan=plan, ratio=config.views.ratio)
    with contextlib.closing(Ahead(batches, self.loader.ahead)) as ready:
      self.programs.begin_later()
      packed = self.trainer.pack(state)
      return self.trainer.unpack(self.loop(packed, step, last, ready))

  def loop(
    self, state: TrainState, step: int, last: int, batches: Ahead[LoadedBatch]
  ) -> TrainState:
    """Evaluate, save, draw, update, until step `last`; returns its state. States are packed here and below."""
    while True:
      with self.guard.errors(functools.partial(self.rescue, state, step)):
        self.look(state, step)
        if self.settle(state, step, last):
          return state
        state, metrics, replaced = self.update(state, step, batches)
      step += 1
      self.guard.nothing_unsaved = False
      with self.guard.errors(functools.partial(self.rescue, state, step)):
        self.note(state, step, metrics, replaced)

  def look(self, state: TrainState, step: int) -> None:
    """Evaluates where the plan says so or another run's bank lets this one begin, unless that was done before a restart."""
    begins = self.config.init_from and step == self.first == self.plan.filled_at
    due = self.plan.evaluates(step) or (begins and self.plan.eval_every_steps)
    if self.evaluate and due and not self.log.has_evaluation(step):
      with contextlib.suppress(Leaving):
        self.log.evaluation(step, self.evaluate, self.trainer.unpack(state))

  def settle(self, state: TrainState, step: int, last: int) -> bool:
    """Saves where that is due; whether the run is over. Raises Preempted where a signal asked to leave."""
    self.guard.alive()
    leaving = self.guard.leaves_at(step)
    ending = step >= last or leaving
    if self.saver.due(step, ending):
      processes.on_all(self.loader.reader.check)
      self.log.once(f"saving checkpoints in {self.workdir}/checkpoints, here and from now on")
      self.saver.save(step, self.trainer.unpack(state), self.log.sync)
    if ending:
      self.saver.finish(step)
    if leaving:
      self.guard.leave(step)
    return step >= last

  def update(
    self, state: TrainState, step: int, batches: Ahead[LoadedBatch]
  ) -> tuple[TrainState, Metrics, int]:
    """(state, metrics, replaced images) of update `step`."""
    loaded = self.log.clock.wait_for(step, batches, self.log.busy)
    batch, program = loaded.batch.put(self.trainer.mesh), self.programs.of(step)
    state, metrics = self.log.update(program, state, batch, self.constants)
    return state, metrics, loaded.replaced

  def note(self, state: TrainState, step: int, metrics: Metrics, replaced: int) -> None:
    """Logs what the update before `step` gave. Raises RunError where the run cannot go on."""
    self.log.step(step, state, metrics, replaced)
    if step % self.config.log.every_steps == 0:
      processes.on_all(self.loader.reader.check)
    if self.log.bad_steps >= self.config.max_bad_steps - 1 and not metrics["train/finite"]:
      self.stop(state, step - 1)

  def rescue(self, state: TrainState, step: int) -> bool:
    """Whether `state`, which an error has met, is on disk now; one whose arrays were given away is lost."""
    if any(x.is_deleted() for x in jax.tree.leaves(state)):
      return False
    if self.saver.due(step, ending=True):
      self.saver.save(step, self.trainer.unpack(state), self.log.sync)
    self.saver.finish(step)
    return True

  def stop(self, state: TrainState, step: int) -> NoReturn:
    """Raises RunError about update `step`, the last of too many that were not finite."""
    self.log.flush()
    folder = capsule.write(self.workdir, self.config, self.plan, self.trainer.unpack(state), step)
    raise RunError(
      f"config.max_bad_steps={self.config.max_bad_steps}: so many steps in a row were not finite, the last was "
      f"{step}; look at it with --config=configs/replay_step.py --config.capsule={folder}"
    )


def describe(config: ConfigDict, plan: Plan, source: Source) -> str:
  """What is about to run, with the resolved numbers that a user may not expect."""
  lines = [f"{source.name}: {plan.num_examples} images, {plan.num_classes or 'no'} classes"]
  rate, batch = config.optim.learning_rate, plan.batch_size
  scaled = config.optim.scale_from_batch
  group = config.bn.group_size or f"all {plan.batch_size}"
  normal = f", BatchNorm over {group} images" if build.normalises(config) else ""
  how = f"{rate:g} x {batch} / {scaled}" if scaled else "as given, not scaled with the batch"
  lines.append(f"learning rate {plan.learning_rate:g} ({how}), batch {batch}, {plan.compute_dtype}")
  lines.append(
    f"{plan.total_steps:,} steps = {beginning.length(config, plan)}; {plan.num_devices} x {jax.devices()[0].device_kind}{normal}"
  )
  if config.model.arch in vit.ARCHITECTURES:
    grid, patch = vit.grid_of(config.model.vit, config.views.crops), config.model.vit.patch
    lines.extend(positions.describe(grid, patch, plan.view_sizes))
  if plan.shuffles_over_processes and plan.train_pairing.key_views:
    lines.append(
      "keys are shuffled over all processes: each reads the images of its keys as well (bn.shuffle_block)"
    )
  short_side, seen = glance(source, config.data.max_megapixels)
  return "\n".join((*lines, *seen, *build.warnings(config, plan, short_side)))
