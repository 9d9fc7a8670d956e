"""When a run saves, and what happens when saving fails: said at once, tried again, given up after a few.

Flow: pretrain asks `due` before every step, then `save`; `finish` before it ends.
Holds: a run that ends says so if its last state is not on disk.
Not here: files (checkpoint).
"""

import time
from collections.abc import Callable

from ml_collections import ConfigDict

from adco_jax.errors import RunError
from adco_jax.runtime import processes
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json
from adco_jax.runtime.processes import say
from adco_jax.workdir.checkpoint import Checkpoints, SaveError


class Saver:
  """Saves of one run from `step` on. `setting`: config.save; clocks are looked at every `look_steps`.

  `keeps(step)`: whether the checkpoint of a step stays for good, so that there has to be one.
  """

  def __init__(
    self,
    setting: ConfigDict,
    look_steps: int,
    checkpoints: Checkpoints,
    step: int,
    keeps: Callable[[int], bool] = lambda step: False,
  ) -> None:
    self._setting, self._look_steps, self._checkpoints = setting, look_steps, checkpoints
    self._keeps = keeps
    self._step: int | None = step  # of the last save, None where it failed
    self._time, self._failures = time.monotonic(), 0

  def due(self, step: int, ending: bool) -> bool:
    """Whether the state of `step` is to be saved. Raises RunError after too many failures."""
    look = ending or step % self._look_steps == 0
    if look or not processes.several():
      self._attempt(self._checkpoints.check)
    if look and self._failures and self._step is not None:
      self._failures *= processes.anyone(
        self._checkpoints.saving()
      )  # a completed save resets the failure count
    every = step % self._setting.every_steps == 0 or self._keeps(step) or self._minutes_passed(step)
    again = self._step is None and step % self._look_steps == 0
    return (ending or every or again) and step != self._step

  def save(self, step: int, state: Tree, sync: Callable[[], dict[str, Json] | None]) -> None:
    """Starts a save; raises RunError after too many failures, or if one of several processes cannot begin.

    `sync()` brings the lines up to this step to disk first, or there would be a gap after a restart; it gives notes to save.
    """
    self._step, self._time = step, time.monotonic()
    notes: dict[str, Json] = {}
    self._attempt(lambda: notes.update(sync() or {}))
    if processes.several():  # else a failure of the save before looks like one to begin
      self._attempt(self._checkpoints.finish)
    if self._step is not None:
      self._attempt(lambda: self._start(step, state, notes))

  def finish(self, step: int) -> None:
    """Returns when the state of `step` is on disk. Raises RunError if it cannot be."""
    error = _failure(self._checkpoints.finish)
    if error or self._step != step:
      raise RunError(f"{error or 'a save failed'}, so the last state is lost; {self._remedy()}")

  def _start(self, step, state, notes):
    try:
      self._checkpoints.save(step, state, notes)
    except SaveError as error:
      if processes.several():  # the others wait inside Orbax, and would for ever
        raise RunError(f"{error}; {self._remedy()}") from error
      raise

  def _attempt(self, work):
    """Does `work`; a failed save is told, counted and due again."""
    if error := _failure(work):
      self._step, self._failures = None, self._failures + 1
      most = self._setting.max_failures
      say(f"{error}; training goes on ({self._failures} of {most} failures)")
      if self._failures >= most:
        raise RunError(f"config.save.max_failures={most}: {error}; {self._remedy()}")

  def _remedy(self):
    try:
      newest = self._checkpoints.latest_step()
      kept = "no checkpoint is left" if newest is None else f"checkpoint {newest} is the newest"
    except Exception:  # of the client of gs://
      kept = "which checkpoint is the newest cannot be seen"
    return f"{kept}; make room or repair the storage, then start the same command again"

  def _minutes_passed(self, step):
    """Whether it is time to save; all processes follow the first one's clock."""
    minutes = self._setting.every_minutes
    if step % self._look_steps or not minutes:
      return False
    return processes.first_says(time.monotonic() - self._time > 60 * minutes)


def _failure(work):
  """The SaveError of work(), None if it succeeds; what fails on one process has failed for all."""
  error = None
  try:
    work()
  except SaveError as problem:
    error = problem
  except OSError as problem:
    error = SaveError(f"a save failed (metrics.jsonl: {problem.strerror})")
  failed = processes.anyone(error is not None)
  return error or (SaveError("a save failed (on another process)") if failed else None)
