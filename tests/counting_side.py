"""A side of benchmarks/turns that counts, in a module whose import costs its processes nothing."""

import os
import pathlib


class Counting:
  """A side that counts its steps and fails in `fault`'s way, `wide` ones as long as another is there."""

  warm_up = 3

  def __init__(self, fault, folder):
    self.count, self.own = 0, pathlib.Path(folder, str(os.getpid()))
    if fault == "aborts":
      os.abort()
    if fault == "raises":
      raise ValueError("two\nlines")
    if fault == "wide" and list(pathlib.Path(folder).iterdir()):
      raise MemoryError("out of memory")
    self.own.touch()

  def play(self, steps):
    self.count += steps
    return self.count

  def rest(self):
    self.own.unlink(missing_ok=True)

  def facts(self):
    return {"fact": 1}
