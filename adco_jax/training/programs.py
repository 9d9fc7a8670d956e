"""The programs of a run's updates, compiled ahead and side by side while the run evaluates and reads.

Flow: pretrain makes `Programs` as soon as it has its constants, calls `begin_later` when it is ready itself, and takes
  the program of every update from it.
Holds: they are what the jitted updates would be; what the compiler refuses is raised at the first use. Python traces the
  one that comes first while the run gets ready, the other one then; XLA compiles both at once.
Not here: what an update does (train_step), where compiled programs are kept (compiled).
"""

import concurrent.futures
import gc
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from adco_jax.config.plan import Plan
from adco_jax.data.batch import Batch, Constants, Item
from adco_jax.runtime import processes
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.processes import say
from adco_jax.training.state import TrainState
from adco_jax.training.train_step import Metrics
from adco_jax.training.trainer import Trainer


class Program:
  """An update (state, batch, constants) -> (state, metrics), state donated; it may still be compiling."""

  def __init__(self, name: str, future: Future[jax.stages.Compiled]) -> None:
    self.name, self._future = name, future

  def wait(self) -> None:
    """Returns when it is compiled; raises what the compiler did."""
    self._future.result()

  def done(self) -> bool:
    """Whether `wait` would return at once."""
    return self._future.done()

  def __call__(self, *args: Tree) -> tuple[TrainState, Metrics]:
    return self._future.result()(*args)


class Programs:
  """Compiles in threads what the updates step..last-1 need: what comes first from now on, the rest from `begin_later` on."""

  def __init__(
    self, trainer: Trainer, plan: Plan, item: type[Item], constants: Constants, step: int, last: int
  ) -> None:
    self._trainer, self._plan, self._item, self._constants = trainer, plan, item, constants
    self._tracer, self._compiler = (
      ThreadPoolExecutor(threads, thread_name_prefix=processes.COMPILING) for threads in (1, 2)
    )
    self._programs: dict[str, Program] = {}
    self._lowered: list[Future[jax.stages.Lowered]] = []
    wanted = [phase for phase in plan.phases if max(step, phase.start) < min(phase.stop, last)]
    self._later = wanted[1:]
    for phase in wanted[:1]:
      self._begin(phase)
    if wanted:
      named = " and of ".join(phase.name for phase in wanted)
      say(f"compiling the step of {named}: usually 25 s, less from the second start on")

  def of(self, step: int) -> Program:
    """The `Program` of update `step`."""
    phase = self._plan.phase(step)
    return self._programs.get(phase.name) or self._begin(phase)

  def begin_later(self) -> None:
    """Begins what does not come first: from now on Python has time for it."""
    while self._later:
      self._begin(self._later.pop())

  def traced(self) -> None:
    """Returns when Python has nothing more to do for the program that comes first; other work then delays it no more."""
    concurrent.futures.wait(self._lowered[:1])

  def close(self) -> None:
    """Nobody waits for what is still compiling: see processes.leave."""
    over = all(program.done() for program in self._programs.values())
    for pool in (self._tracer, self._compiler):
      pool.shutdown(wait=over, cancel_futures=True)

  def _begin(self, phase):
    plan, trainer = self._plan, self._trainer
    update = trainer.updates[plan.phases.index(phase)]
    shapes = Batch.shapes(plan, phase.pairing, trainer.mesh, self._item)
    arguments = trainer.abstract_packed, shapes, self._constants
    traced = self._tracer.submit(_lower, update, arguments)
    self._lowered.append(traced)
    compiled = self._compiler.submit(lambda: traced.result().compile())
    self._programs[phase.name] = Program(phase.name, compiled)
    return self._programs[phase.name]


def _lower(update, arguments):
  """What XLA compiles. Nearly all that is made here stays: looking for what could go is a fifth of the time."""
  collects = gc.isenabled()
  gc.disable()
  try:
    return update.lower(*arguments)
  finally:
    if collects:
      gc.enable()
