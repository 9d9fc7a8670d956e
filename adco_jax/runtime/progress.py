"""How fast work goes, how long it still takes, and how a person says such numbers.

Flow: the loop asks a `Clock` at every logged step; whatever goes through many images says so through `Progress`.
Not here: where the numbers are kept (workdir.metrics).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from adco_jax.runtime.processes import say

TELL_SECONDS = 5.0  # between lines of progress
LOOK_SECONDS = 0.0005  # between looks at the device while a batch is waited for


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Waiting(Protocol[T_co]):
  """Batches that one can wait for (data.ahead)."""

  def take(self, seconds: float | None) -> T_co:
    """The next; raises TimeoutError if it is not there within `seconds`."""


class Clock:
  """Speed since the last look: images/s and the share of time in which the device waited for data.

  An interval goes from the end of one step to the end of another, which is often looked for when the next one is dispatched.
  """

  def __init__(self) -> None:
    self._idle: float | None = None  # since when the device has had nothing to do
    self._over, self._behind = -1, 0.0  # the step behind which that was, and how long it was
    self.begin(0)

  def wait_for(self, step: int, batches: Waiting[T], busy: Callable[[], bool]) -> T:
    """The next of the batches (data.ahead), that behind `step`. From the moment that it is waited for and the device, as
    `busy()` says, is done with `step`, the device waits until `dispatches`."""
    self._idle, self._behind = None, 0.0
    while True:
      if self._idle is None and not busy():
        self._idle, self._over = time.perf_counter(), step
      try:
        return batches.take(None if self._idle else LOOK_SECONDS)
      except TimeoutError:
        continue

  def dispatches(self) -> None:
    """The device gets its next step now."""
    if self._idle is not None:
      self._behind = time.perf_counter() - self._idle
      self._waited += self._behind

  def begin(self, step: int) -> None:
    """An interval begins now, where the device is done with `step`; what was before does not count."""
    self._step, self._start, self._waited = step, time.perf_counter(), 0.0

  def read(self, step: int, batch_size: int) -> dict[str, float]:
    """{'time/...'} of the interval that ends with `step`, which is over, and begins the next; nothing if no step was in it."""
    steps = step - self._step
    if not steps:
      return {}
    end, behind = time.perf_counter(), 0.0
    if self._over == step and self._idle is not None:  # else it was waited for until now
      end, behind = self._idle, self._behind
    seconds = max(end - self._start, 1e-9)
    values = {
      "time/images_per_second": batch_size * steps / seconds,
      "time/waiting_for_data": (self._waited - behind) / seconds,
      "time/seconds_per_step": seconds / steps,
    }
    self._step, self._start, self._waited = step, end, behind
    return values


class Rhythm:
  """When work that takes long says how far it has come: every TELL_SECONDS."""

  def __init__(self) -> None:
    self._last = time.monotonic()

  def is_due(self) -> bool:
    """Whether it is time for a line, which is then said."""
    now = time.monotonic()
    due = now - self._last > TELL_SECONDS
    if due:
      self._last = now
    return due


class Progress:
  """A line every few seconds of work that goes through many images, or other things: how many, how fast, how long still."""

  def __init__(self, what: str, total: int, unit: str = "images") -> None:
    self._what, self._total, self._done, self._unit = what, total, 0, unit
    self._start, self._rhythm = time.monotonic(), Rhythm()

  def over(self, items: Iterable[T], images: int = 1) -> Iterator[T]:
    """The same items, counted; each is so many `images`."""
    for item in items:
      yield item
      self._done = min(self._total, self._done + images)  # a batch may be padded
      if self._rhythm.is_due():
        speed = self._done / (time.monotonic() - self._start)
        left = duration((self._total - self._done) / speed)
        done = f"{self._done}/{self._total} {self._unit}  {rate(speed)} {self._unit}/s"
        say(f"{self._what}: {done}  left {left}")


def rate(number: float) -> str:
  """A number as a person says it: 1234, 315, 12.4, 0.83, 0.0042."""
  if number >= 100 or number <= 0:
    return f"{number:.0f}"
  digits = 1 - math.floor(math.log10(number))
  return f"{number:.{max(digits, 1)}f}"


def duration(seconds: float) -> str:
  """Seconds as a person says them: 45s, 12m05s, 3h20m, 2d04h."""
  seconds = round(seconds)
  minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
  if days:
    return f"{days}d{hours % 24:02d}h"
  if hours:
    return f"{hours}h{minutes % 60:02d}m"
  return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"
