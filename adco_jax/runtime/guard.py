"""What may end a run from outside: signals, a step that never ends, a second run in the same workdir.

Flow: pretrain enters one `Guard` before its loop, tells it of every step and asks whether to leave.
Holds: a signal is heard at once, also while XLA compiles; what is unsaved is saved first; a lock is the
  kernel's (flock), so a killed run leaves none behind. With several processes a signal to any of them
  makes all leave at one step, which JAX's preemption service finds; there SIGTERM is that service's.
Not here: numbers that are not finite (capsule), what is saved (checkpoint).
"""

import contextlib
import faulthandler
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, Self, TypeVar

from jax.experimental import multihost_utils

from adco_jax.errors import ConfigError, Preempted, RunError
from adco_jax.runtime import processes
from adco_jax.runtime.console import tell

ABANDONED = 130  # exit status beside those of plan's exceptions
PATIENCE_SECONDS = 0.5  # between an error and the signal that caused it
SIGNALS = (signal.SIGTERM, signal.SIGINT)


T = TypeVar("T")


class Leaving(Exception):
  """A signal came while an evaluation ran; it is left undone, and is done after the restart."""


class Guard:
  """Context of a run: holds the workdir's lock, listens to signals, watches the clock.

  `minutes`: without `alive()` for so long all stacks are printed and the process ends with 43; 0: never.
  Raises ConfigError if another run holds the workdir.
  """

  def __init__(self, workdir: str, minutes: float) -> None:
    self._workdir, self._limit = workdir, 60 * minutes
    self._heard: signal.Signals | None = None
    self._alive, self._over = time.monotonic(), threading.Event()
    self.nothing_unsaved = True  # then a signal ends the run at once, whatever it is doing

  def __enter__(self) -> Self:
    self._lock = processes.on_first(lambda: lock(self._workdir))
    self._several = processes.several()
    self._heard_from, self._told = socket.socketpair()
    self._told.setblocking(False)
    ours = (signal.SIGINT,) if self._several else SIGNALS
    self._before = {s: signal.signal(s, lambda *_: None) for s in ours}
    self._fd = signal.set_wakeup_fd(self._told.fileno())
    for work in (self._listen, self._watch):
      threading.Thread(target=work, daemon=True).start()
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind and self.nothing_unsaved and not issubclass(kind, Preempted | ConfigError | RunError):
      self._hears()  # a signal that is behind this error ends the process meanwhile
    self._over.set()
    signal.set_wakeup_fd(self._fd)
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._told.close()  # ends the listener
    if self._lock is not None:
      os.close(self._lock)

  def alive(self) -> None:
    """Called after every step, evaluation and save."""
    self._alive = time.monotonic()

  def over(self, batches: Iterable[T]) -> Iterator[T]:
    """The batches of an evaluation, each a sign of life. Raises Leaving between two of them."""
    for batch in batches:
      self.alive()
      if self._heard is not None and not self._several:
        raise Leaving
      yield batch

  def leaves_at(self, step: int) -> bool:
    """Whether a signal asked to leave, and this is the step to do so; asked once at every step."""
    if self._several:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._heard is not None

  @contextlib.contextmanager
  def errors(self, rescue: Callable[[], bool]) -> Iterator[None]:
    """Within, an error after a signal to leave ends as the signal does, if `rescue()` could save the state.

    Whoever ends a run signals all its processes, those that compile for it among them, which then fails.
    """
    try:
      yield
    except (Preempted, ConfigError, RunError):
      raise
    except Exception as error:
      if self._several or not (heard := self._hears()) or not rescue():
        raise
      what = " ".join(f"{type(error).__name__}: {error}".split())[:120]
      raise Preempted(
        f"{heard.name}: saved, then met an error ({what}); the same command goes on from there"
      ) from error

  def _hears(self) -> signal.Signals | None:
    """The signal that asked to leave, or does so within a moment: an error may come first."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while self._heard is None and time.monotonic() < patience:
      time.sleep(0.01)
    return self._heard

  def leave(self, step: int) -> NoReturn:
    """Raises Preempted; everything is saved by now."""
    name = (self._heard or signal.SIGTERM).name
    raise Preempted(f"{name}: saved at step {step}; the same command goes on from there")

  def _listen(self):
    interrupted = False
    while data := self._heard_from.recv(1):
      number = signal.Signals(data[0])
      if number not in SIGNALS:
        continue
      if self.nothing_unsaved and not self._several:
        self._exit(Preempted.status, f"{number.name}: nothing is unsaved, leaving")
      if interrupted and number == signal.SIGINT:
        self._exit(ABANDONED, "SIGINT again: leaving at once")
      interrupted |= number == signal.SIGINT
      first, self._heard = self._heard is None, self._heard or number
      if first:
        tell(f"{number.name}: will save after this step, then leave")
      if self._several and number == signal.SIGINT:
        os.kill(os.getpid(), signal.SIGTERM)  # which the preemption service tells the others
    self._heard_from.close()

  def _watch(self):
    while self._limit and not self._over.wait(min(self._limit / 4, 10)):
      if time.monotonic() - self._alive > self._limit:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        minutes = self._limit / 60
        self._exit(
          processes.STUCK,
          f"no step ended within {minutes:g} minutes (watchdog_minutes); stacks above",
        )

  def _exit(self, status, text):
    tell(text, sys.__stderr__)
    os._exit(status)


def lock(workdir: str) -> int:
  """An open file that no other process can open so. Raises ConfigError with who holds it."""
  try:
    os.makedirs(workdir, exist_ok=True)
    file = os.open(os.path.join(workdir, ".lock"), os.O_RDWR | os.O_CREAT)
  except OSError as error:
    raise ConfigError(
      f"--workdir={workdir}: not writable ({error.strerror}); name another"
    ) from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    holder = os.read(file, 200).decode(errors="replace") or "another process"
    os.close(file)
    raise ConfigError(f"--workdir={workdir}: in use by {holder}; wait, or name another") from error
  except OSError as error:  # some network file systems
    tell(f"--workdir={workdir} cannot be locked ({error.strerror}): start no second run in it")
  os.ftruncate(file, 0)
  os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
  return file
