"""Batches made ahead of the step in a thread, so that the step's own thread only takes them.

Flow: pretrain wraps what a loader yields before it compiles or evaluates anything; progress.Clock takes from it.
Holds: the same batches in the same order; what the loader raises is raised where its batch would have come.
Not here: which batches (order), how far ahead (each loader's own `ahead`).
"""

import queue
import threading
from collections.abc import Generator
from typing import Any, Generic, Self, TypeVar

PATIENCE_SECONDS = 20  # for a batch that is being read when the run ends


T = TypeVar("T")


class Ahead(Generic[T]):
  """An iterator over what the generator `batches` yields, `depth` of them ready and one more under way."""

  def __init__(self, batches: Generator[T, None, None], depth: int) -> None:
    self._batches, self._over = batches, threading.Event()
    self._ready: queue.Queue[Any] = queue.Queue(depth)  # (batch, error)
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> T:
    return self.take(None)

  def take(self, seconds: float | None) -> T:
    """The next batch; raises TimeoutError if it is not there within `seconds` (None: waits), StopIteration at the end."""
    try:
      batch, error = self._ready.get(timeout=seconds)
    except queue.Empty:
      raise TimeoutError from None
    if error is not None:
      self._ready.put((None, error))  # for whoever asks again
      raise error
    return batch

  def close(self) -> None:
    """Ends thread and generator; batches that were made are lost."""
    self._over.set()
    while not self._ready.empty():
      self._ready.get_nowait()
    self._thread.join(PATIENCE_SECONDS)
    if not self._thread.is_alive():
      self._batches.close()

  def _work(self):
    error: Exception = StopIteration()
    try:
      for batch in self._batches:
        self._put(batch, None)
        if self._over.is_set():
          return
    except Exception as problem:
      error = problem
    self._put(None, error)

  def _put(self, batch, error):
    while not self._over.is_set():
      try:
        self._ready.put((batch, error), timeout=0.1)
      except queue.Full:
        continue
      return
