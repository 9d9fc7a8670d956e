"""Programs that are compared play in turns: each is a process of its own that builds once and waits for its turn.

Flow: a benchmark makes a `Side` per program and calls `play`; a side's process runs `serve`.
Holds: a side that fails, aborts or does not fit is one line in its `facts`; the others go on.
Not here: what a side does (the benchmark), what is made of the times.
"""

import contextlib
import importlib
import multiprocessing
import os
import time

GRACE = 60  # seconds in which a turn that began in time may end


class Side:
  """A process that plays, seen from the one that measures.

  `make()` -> an object with play(steps), which returns a number after so many steps are done; rest(), which gives back
  between turns what it can; facts(), a dictionary; and warm_up, steps between the first one and the first turn.
  `module` is imported before, and not timed. `turns`: [wall milliseconds per step, CPU milliseconds per step (user + system,
  all threads), what play returned].
  """

  def __init__(self, name, make, module, environment):
    self.name, self._make, self._module, self._environment = name, make, module, environment
    self.facts, self.turns = {}, []

  @property
  def well(self):
    """Whether it can play."""
    return "error" not in self.facts

  def start(self):
    """Begins its imports."""
    self.facts, self.turns = {}, []
    context = multiprocessing.get_context("spawn")
    self._connection, other = context.Pipe()
    self._process = context.Process(target=serve, args=(other, self._make, self._module))
    with changed(self._environment):
      self._process.start()
    other.close()

  def hear(self, seconds):
    """Its next message; None where it failed, which its facts then tell."""
    try:
      heard = self._connection.poll(max(0, seconds))
      found = self._connection.recv() if heard else {"error": "not ready when the time was over"}
    except (EOFError, OSError):
      self._process.join(10)
      found = {"error": f"its process ended with status {self._process.exitcode}"}
    if isinstance(found, dict) and "error" in found:
      self.facts = {**self.facts, **found}
      self.stop()
      return None
    return found

  def tell(self, message):
    """Asks for something that `hear` then answers."""
    with contextlib.suppress(OSError):  # `hear` finds out why
      self._connection.send(message)

  def stop(self):
    """Ends the process."""
    self.tell(0)
    self._process.join(1 if self.well else 0)  # what a compiler left behind could take ten
    if self._process.is_alive():
      self._process.kill()
      self._process.join()


def play(sides, rounds, steps, seconds):
  """Builds one side after the other, since they may time what they choose from, then lets all play in turns.

  Every round begins with another side. After so many `seconds` nothing is built and no further round begins. Sides that
  found too little memory beside the others play alone in the end; their facts say so.
  """
  limit = time.monotonic() + seconds
  build(sides, limit)
  take_turns(sides, rounds, steps, limit)
  for side in [side for side in sides if "memory" in side.facts.get("error", "")]:
    build([side], limit)
    take_turns([side], rounds, steps, limit)
    side.facts["alone"] = True


def build(sides, limit):
  """Starts all sides; each has its facts afterwards."""
  left = lambda: limit - time.monotonic()
  for side in sides:
    side.start()
  for side in sides:
    if side.hear(left()):
      side.tell("build")
      side.facts = side.hear(left()) or side.facts


def take_turns(sides, rounds, steps, limit):
  """Lets the sides play, and ends their processes."""
  sides = [side for side in sides if side.well]
  for number in range(rounds):
    if number and time.monotonic() > limit:
      break
    playing = [side for side in sides if side.well]
    first = number % max(1, len(playing))
    for side in playing[first:] + playing[:first]:
      side.tell(steps)
      if turn := side.hear(max(GRACE, limit - time.monotonic())):
        side.turns.append(turn)
  for side in sides:
    side.stop()


def serve(connection, make, module):
  """What a side's process does: imports, builds when asked, plays as many steps as it is told, until that is none."""
  try:
    importlib.import_module(module)
    connection.send("ready")
    connection.recv()
    start = time.perf_counter()
    side = make()
    side.play(1)
    first = time.perf_counter() - start
    side.play(side.warm_up)
    connection.send({"seconds_to_first_step": first, **side.facts()})
    while steps := connection.recv():
      wall, cpu = time.perf_counter(), time.process_time()
      value = side.play(steps)
      times = time.perf_counter() - wall, time.process_time() - cpu
      connection.send([1e3 * x / steps for x in times] + [value])
      side.rest()
  except EOFError:  # who measured is gone
    pass
  except Exception as error:
    text = " ".join(str(error).split())[:300]
    connection.send({"error": f"{type(error).__name__}: {text}"})


@contextlib.contextmanager
def changed(environment):
  """os.environ with these in it."""
  before = dict(os.environ)
  os.environ.update(environment)
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)
