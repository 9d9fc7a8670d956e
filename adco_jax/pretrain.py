"""The task `pretrain`: from a config to a trained encoder in a workdir.

Flow: main -> `run`: source -> plan -> workdir -> loader -> build -> restore or create -> loop.
Holds: at step n the loop first evaluates and saves, then draws batch n, then updates, so a restart at
  step n repeats nothing and leaves nothing out. Metrics of a step are fetched after the next one is
  dispatched, and always before a save.
Not here: every part (see build); scoring a finished encoder (evaluate).
"""

import contextlib
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from adco_jax import build, capsule, losses, processes, remote, sharding
from adco_jax import plan as planning
from adco_jax.checkpoint import Checkpoints, fingerprint
from adco_jax.data import order
from adco_jax.evaluation import features, knn, linear
from adco_jax.guard import Guard, Leaving
from adco_jax.metrics import Clock, MetricsWriter, duration, say
from adco_jax.plan import ConfigError, RunError
from adco_jax.saver import Saver
from adco_jax.start import check_same, restore_or_create_state
from adco_jax.view_sheet import save_view_sheet
from adco_jax.workdir import check_writable, holds_run, open_workdir, read_config, read_opened


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
  if config.init_from and not holds_run(workdir):
    read_config(config.init_from, "init_from")
  source = build.open_source(config.data)
  plan = planning.make_plan(
    config, source.num_examples, len(source.classes), backend=jax.default_backend(),
    devices=jax.device_count(), processes=jax.process_count(), process=jax.process_index(),
  )  # fmt: skip
  return source, plan


def run_alone(config, workdir, source, plan, guard):
  """Builds, restores or creates, trains; returns the last state. Nobody else writes to the workdir."""
  mesh = sharding.create_mesh()
  loader = processes.on_all(lambda: build.create_loader(config, source, mesh))
  parts = build.build(config, plan, mesh, loader.cut)
  checkpoints = Checkpoints(workdir, config.save.keep)
  with contextlib.closing(checkpoints):
    state, step, kept = restore_or_create_state(config, plan, parts, checkpoints)
    say(f"parameters: {parameter_overview.count_parameters(state.query_params):,} per encoder")
    evaluate = make_online_evaluation(config, plan, source, loader, parts.encoder, mesh, guard)
    if step == 0:
      views = f"{workdir}/views.png"
      processes.on_first(lambda: save_view_sheet(views, config, plan, loader))
    saver = Saver(config.save, config.log.every_steps, checkpoints, step)
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


class Log:
  """Lines of training: taken at logged steps, written one step late so that the device never waits.

  The host stays one step ahead of the device, no more: batches do not pile up there.
  """

  def __init__(self, config, plan, writer, mesh):
    self.clock = Clock()
    self._plan, self._writer, self._pending, self._running = plan, writer, None, None
    self.bad_steps = 0  # in a row, the running one not counted
    self._every, self._batch = config.log.every_steps, config.data.batch_size
    weight = sum(w for *_, w in plan.train_pairing.pairs)
    level = losses.chance_level(config.bank.size, self._batch, config.in_batch)
    fill_level = losses.chance_level(config.bank.size, self._batch, False)
    self._chance = lambda step: fill_level if step <= plan.fill_steps else weight * level
    self._summary = jax.jit(bank_summary, out_shardings=sharding.replicated(mesh))

  def step(self, step, state, metrics, replaced):
    """Called after update `step` was dispatched; `replaced`: slots of this process, see order.Batch."""
    if self._running is not None:
      self._count(step - 1, bool(self._running["train/finite"]))
    self._running = metrics
    self.flush()
    if step % self._every == 0:
      found = {"data/replaced": processes.gather(np.float32(replaced)).sum()}
      self._pending = step, metrics | self._summary(state.ascend) | found

  def _count(self, step, finite):
    """Waits for the step before this one and counts those that changed nothing."""
    self.bad_steps = 0 if finite else self.bad_steps + 1
    if not finite:
      say(f"step {step}: loss or gradients are not finite; only the counter moved")

  def has_evaluation(self, step):
    """Whether the scores of `step` are on file."""
    return processes.first_says(self._writer.has(step, "knn/top1"))

  def evaluation(self, step, evaluate):
    """Runs it, writes and prints its scores; the time that it took is no training time."""
    self.flush()
    start, epoch = time.monotonic(), self._plan.epoch(step)
    values = evaluate()
    self._writer.write(step, epoch, values)
    named = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    say(f"step {step} epoch {epoch:.1f}  {named}  ({time.monotonic() - start:.0f}s)")
    self.clock.pause()

  def sync(self):
    """Returns when every line is where the workdir lasts. Raises OSError."""
    self.flush()
    self._writer.sync()

  def flush(self):
    """Fetches and writes what is pending."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {name: float(value) for name, value in sorted(jax.device_get(metrics).items())}
    values["train/chance"] = self._chance(step)
    speed = self.clock.read(self._batch)
    self._writer.write(step, self._plan.epoch(step), values | speed)
    left = (self._plan.total_steps - step) * speed["time/seconds_per_step"]
    say(
      f"step {step}/{self._plan.total_steps} epoch {self._plan.epoch(step):.1f}  "
      f"loss {values['train/query_loss']:.3f} (chance {values['train/chance']:.3f})  "
      f"{speed['time/images_per_second']:.0f} images/s  "
      f"waiting {speed['time/waiting_for_data']:.0%}  left {duration(left)}"
    )


def bank_summary(ascend):
  """Norms of the bank's rows: they set how fast the bank can turn (the step's angle is ~ 1 / norm^2)."""
  if "bank" not in ascend:
    return {}
  norms = jnp.linalg.norm(ascend["bank"], axis=-1)
  names = ("bank/min_norm", "bank/median_norm", "bank/max_norm")
  return dict(zip(names, jnp.quantile(norms, jnp.array([0.0, 0.5, 1.0], norms.dtype)), strict=True))


def make_online_evaluation(config, plan, source, loader, encoder, mesh, guard):
  """state -> {'knn/top1', 'probe/top1'} on train images left out of the search; None without labels."""
  if not config.eval.every_epochs:
    return None
  if source.labels is None:
    say("no labels: kNN and probe are off; the loss against chance and the bank's norms remain")
    return None
  setting, num_classes = config.eval, plan.num_classes
  searched, scored = order.hold_out(
    config.seed, source.num_examples, setting.hold_out, setting.max_images
  )
  labels = source.labels[searched], source.labels[scored]
  forward = features.make_features(encoder, config.data.mean, config.data.std, mesh)
  view = dict(
    size=setting.size,
    fraction=setting.crop_fraction,
    batch_size=sharding.round_up(setting.batch_size),
  )

  def evaluate(state):
    variables = {"params": state.query_params, "batch_stats": state.query_stats}
    embed = lambda images: forward(variables, images)
    index, queries = (
      features.extract(embed, guard.over(loader.evaluation(i, **view))) for i in (searched, scored)
    )
    near = knn.predict(
      index, labels[0], queries,
      k=setting.knn_k, temperature=setting.knn_temperature, num_classes=num_classes,
    )  # fmt: skip
    index, queries = linear.scale(index, queries)
    probe = linear.predict(linear.fit(index, labels[0], num_classes), queries)
    return {"knn/top1": knn.accuracy(near, labels[1]), "probe/top1": knn.accuracy(probe, labels[1])}

  return evaluate


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
  return "\n".join(lines)
