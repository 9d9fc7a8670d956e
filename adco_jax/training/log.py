"""Lines of a run while it trains: what is going on, what was measured, how fast it goes, when it will be done.

Flow: pretrain tells it of every step and evaluation; lines go to metrics.jsonl, TensorBoard and the console.
Holds: metrics of a step are fetched after the next one is dispatched, and always before a save; the host
  stays one step ahead of the device, no more: batches do not pile up there. No time is told before it is
  known: an interval with a compilation in it counts for nothing.
Not here: files (metrics), what is evaluated (online), what is alarming (alarms).
"""

import time
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from adco_jax.config.plan import Plan
from adco_jax.runtime import host, processes, sharding
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json
from adco_jax.runtime.processes import say
from adco_jax.runtime.progress import Clock, duration, rate
from adco_jax.training.alarms import Alarms
from adco_jax.training.programs import Program
from adco_jax.training.state import TrainState
from adco_jax.training.train_step import Metrics, StepSpec
from adco_jax.workdir.metrics import MetricsWriter


class Evaluation(Protocol):
  """What scores a state while it trains (evaluation.online): `size` images; `pictures`: paths of those that it may leave."""

  size: int
  pictures: tuple[str, ...]

  def __call__(self, state: TrainState) -> dict[str, float]:
    """{'group/name': number} of a state."""


class Log:
  """Lines of training: taken at logged steps, written one step late so that the device never waits."""

  def __init__(self, config: ConfigDict, plan: Plan, writer: MetricsWriter, spec: StepSpec) -> None:
    self.clock = Clock()
    self._plan, self._writer = plan, writer
    self._pending: tuple[int, Metrics] | None = None
    self._running: Metrics | None = None
    self._clipped: list[jax.Array | float] = []  # of every step since the last line, whether it was
    self._replaced = 0  # slots of this process since the last line
    self.bad_steps = 0  # in a row, the running one not counted
    self._every, self._batch = config.log.every_steps, config.data.batch_size
    objective, sizes = spec.objective, spec.sizes
    self._chance = lambda step: objective.chance(sizes, plan.phase(step - 1))
    whole = sharding.replicated(spec.mesh)
    self._summary = jax.jit(objective.summary, out_shardings=whole)
    self._alarms = Alarms(plan.filled_at, writer.lines)
    self._begun: set[Program] = set()  # those that have run
    self._waited_for = False  # the running step
    self._told: set[str] = set()  # things that were told once

  def once(self, text: str) -> None:
    """Says what begins, the first time that it does."""
    if text not in self._told:
      self._told.add(text)
      say(text)

  def update(self, program: Program, *args: Tree) -> tuple[TrainState, Metrics]:
    """program(*args); the first call of each of the two programs is told, waited for and left out of all speeds."""
    if program in self._begun:
      self.clock.dispatches()
      return program(*args)
    self.flush()
    start = time.monotonic()
    program.wait()
    host.give_back()
    began = time.monotonic()
    say(
      f"the first step of {program.name} begins; {duration(began - start)} waited for its program"
    )
    outputs = jax.block_until_ready(program(*args))
    say(f"its first step is done after {duration(time.monotonic() - began)}")
    self._begun.add(program)
    self._waited_for = True
    return outputs

  def busy(self) -> bool:
    """Whether the device still computes the newest step that was dispatched."""
    if self._running is None:
      return False
    newest: Any = self._running["train/finite"]  # jax.Array's type lacks is_ready
    return not newest.is_ready()

  def step(self, step: int, state: TrainState, metrics: Metrics, replaced: int) -> None:
    """Called after update `step` was dispatched; `replaced`: slots of this process, see batch.LoadedBatch."""
    if self._running is not None:
      self._count(step - 1, bool(self._running["train/finite"]))
    self._running = metrics
    self.flush()
    if self._waited_for:
      self.clock.begin(step)
      self._waited_for = False
    self._clipped += [metrics["optim/clipped"]] if "optim/clipped" in metrics else []
    self._replaced += replaced
    if step % self._every == 0:
      counts = {"data/replaced": processes.gather(np.array(self._replaced, np.float32)).sum()}
      shares = {"optim/clipped": self._clipped} if self._clipped else {}
      self._pending = step, metrics | self._summary(state.objective) | counts | shares
      self._clipped, self._replaced = [], 0

  def _count(self, step, finite):
    """Waits for the step before this one and counts those that changed nothing."""
    self.bad_steps = 0 if finite else self.bad_steps + 1
    if not finite:
      say(f"step {step}: loss or gradients are not finite; only the counter moved")

  def has_evaluation(self, step: int) -> bool:
    """Whether the numbers of an evaluation of `step` are on file."""
    names = ("knn/top1", "signal/rank_features", "classifier/top1")
    return processes.first_says(any(self._writer.has(step, name) for name in names))

  def evaluation(self, step: int, evaluate: Evaluation, state: TrainState) -> None:
    """Runs it, writes and prints its numbers; the time that it took is no training time."""
    self.flush()
    self.once(f"evaluating the frozen encoder on {evaluate.size} images, here and from now on")
    start, epoch = time.monotonic(), self._plan.epoch(step)
    host.give_back()
    values = evaluate(state)
    host.give_back()
    self._write(step, values)
    for path in evaluate.pictures:
      self._writer.picture(step, path)
    say(f"step {step} epoch {epoch:.1f}  evaluated in {duration(time.monotonic() - start)}")
    for group in dict.fromkeys(name.partition("/")[0] for name in values):
      told = (
        f"{k.partition('/')[2]} {x:.4g}" for k, x in values.items() if k.startswith(group + "/")
      )
      say(f"  {group}: {'  '.join(told)}")
    self._warn(step, values)
    self.clock.begin(step)

  def sync(self) -> dict[str, Json]:
    """Returns when every line is where the workdir lasts, with what the next line counts of earlier steps. Raises OSError."""
    self.flush()
    self._writer.sync()
    clipped = [float(x) for x in jax.device_get(self._clipped)]
    notes = {
      "clipped": clipped,
      "replaced": self._replaced,
    }  # the first process's, where there are several
    return {name: value for name, value in notes.items() if value}

  def recall(self, notes: dict[str, Json]) -> None:
    """What `sync` gave before the state was saved that this process goes on from."""
    self._clipped, self._replaced = [*notes.get("clipped", [])], notes.get("replaced", 0)
    self._replaced *= jax.process_index() == 0  # whose count it is

  def flush(self) -> None:
    """Fetches and writes what is pending."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {
      name: float(np.mean(value, dtype=float))
      for name, value in sorted(jax.device_get(metrics).items())
    }
    chance = self._chance(step)
    if chance is not None:
      values["train/chance"] = chance
    speed = self.clock.read(step, self._batch)
    self._write(step, values | speed)
    loss = values.get("train/loss", values.get("train/query_loss", float("nan")))
    pace, beside = "", "" if chance is None else f" (chance {chance:.3f})"
    if speed:
      left = (self._plan.total_steps - step) * speed["time/seconds_per_step"]
      known = step > self._plan.fill_steps  # steps of a short initialisation are others
      pace = (
        f"  {rate(speed['time/images_per_second'])} images/s  "
        f"waiting {speed['time/waiting_for_data']:.0%}"
        + (f"  left {duration(left)}" if known else "")
      )
    say(
      f"step {step}/{self._plan.total_steps} epoch {self._plan.epoch(step):.1f}  "
      f"loss {loss:.3f}{beside}{pace}"
    )
    self._warn(step, values)

  def _write(self, step, values):
    self._writer.write(step, self._plan.epoch(step), values)

  def _warn(self, step, values):
    for text in self._alarms.look({"step": step, "epoch": self._plan.epoch(step), **values}):
      say(f"step {step}: {text}")
