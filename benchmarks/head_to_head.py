"""Methods against each other in one trainer: the same data, network, views, seeds and scores, under one recipe and under their own.

  python -m benchmarks.head_to_head --smoke                      every kind of method on digits, ten minutes on two cores
  python -m benchmarks.head_to_head --data=/datasets/cifar10.npz --configs=supervised_cifar10,moco_cifar10_demo \
    --epochs=200 --parallel=3 --minutes=9                        at full width; again and again until it says that it is done

Runs are processes of their own (benchmarks/one_run.py) in --runs; the numbers of each are a file in benchmarks/results/NAME/ as
soon as it is over. What is there is not done again and what was killed goes on, so the same command, over and over with
--minutes, or by several machines one after the other, does it all in pieces; what is there with other flags or of other
images ends it. Temperatures of the equal recipe are chosen by kNN of the first seed's train images, each among the others;
all scores are of the last epoch on test images, and nothing is chosen on those.
At the end writes benchmarks/results/NAME.json and, beside it, tables (.md) and two plots (.png).
"""

import argparse
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
import zlib

import numpy as np

from adco_jax.errors import ConfigError
from adco_jax.runtime.files import read_json
from benchmarks import head_to_head_report, one_run, recipes, record

AGAIN = 75  # exit status of a comparison that is not over
SMOKE = ("adco", "moco", "simclr", "byol", "swav", "supervised")


class Runner:
  """Starts runs, so many side by side, until the time is over."""

  def __init__(self, folder, results, parallel, minutes, more):
    self.folder, self.results, self.parallel, self.more = folder, results, parallel, more
    self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    self._slots, self._running, self._lock = list(range(parallel)), {}, threading.Lock()
    self._images = None  # of all results, as a checksum
    self.failed = []  # names of runs that left with an error

  def all(self, runs):
    """{name: result} of {name: flags}; None for a run that is not over or failed."""
    with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
      threading.Thread(target=self._watch, daemon=True).start()
      return dict(zip(runs, pool.map(self._one, runs.items()), strict=True))

  def _one(self, item):
    name, flags = item
    place = os.path.join(self.folder, name)
    result = os.path.join(self.results, f"{name}.json")
    flags = [*flags, *self.more]
    over = os.path.exists(result) or name in self.failed
    if not over and time.monotonic() < self.deadline:
      for folder in (place, os.path.dirname(result)):
        os.makedirs(folder, exist_ok=True)
      self._start(name, [result, *flags, f"--workdir={place}"], f"{place}.log")
    return self._read(result, flags) if os.path.exists(result) else None

  def _read(self, path, flags):
    """A result that was made with these flags, which mean what they mean today, and of the images of all others. Raises ConfigError."""
    found, remedy = read_json(path), "remove it, or use another --name"
    if "settings" not in found:
      raise ConfigError(f"{path}: was made by an older version; {remedy}")
    if odd := sorted({*found["flags"]} ^ {*one_run.told(flags)}):
      raise ConfigError(f"{path}: was made with other flags ({', '.join(odd)}); {remedy}")
    today = one_run.settings(flags)
    odd = [
      k for k, v in found["settings"].items() if today.get(k, v) != v
    ]  # what is new is its default
    if odd:
      raise ConfigError(f"{path}: its flags meant other settings then ({', '.join(odd)}); {remedy}")
    with self._lock:
      self._images = self._images or found["images"]
    if found["images"] != self._images:
      raise ConfigError(f"{path}: is of other images than the rest; {remedy}")
    return found

  def _start(self, name, arguments, log):
    with self._lock:
      slot = self._slots.pop()
    cores = sorted(os.sched_getaffinity(0))
    own = set(cores[slot :: self.parallel] or cores)
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / self.parallel:.2f}"}
    command = [sys.executable, "-m", "benchmarks.one_run", *arguments]
    start = time.monotonic()
    with open(log, "ab") as file:
      process = subprocess.Popen(
        command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | share,
        preexec_fn=lambda: os.sched_setaffinity(0, own),
      )  # fmt: skip
      self._running[name] = process
      status = process.wait()
    with self._lock:
      self._slots.append(slot)
      del self._running[name]
    what = {0: "done"}.get(status, f"left with {status}, see {log}")
    if status and time.monotonic() < self.deadline:
      self.failed.append(name)
    print(f"{name}: {what} after {time.monotonic() - start:.0f}s", flush=True)

  def _watch(self):
    """Asks every run to save and leave when the time is over."""
    while time.monotonic() < self.deadline:
      time.sleep(1)
    for process in list(self._running.values()):
      process.send_signal(signal.SIGTERM)


def subset(path, images, folder):
  """An .npz of the first `images` train images and all test images; its name has a checksum of the whole."""
  with open(path, "rb") as file:
    out = os.path.join(folder, f"first_{images}-{zlib.crc32(file.read()):08x}.npz")
  if not os.path.exists(out):
    os.makedirs(folder, exist_ok=True)
    with np.load(path) as there:
      cut = {k: v[:images] if k.startswith("train") else v for k, v in there.items()}
    np.savez(out, **cut)
  return out


def grid_runs(options, sizes):
  """{("grid", method, temperature): (name, flags)} of the first seed; none where temperatures are given."""
  runs = {}
  for method in options.methods if "equal" in options.kinds and not options.like else ():
    for t in [None] if method in recipes.NO_TEMPERATURE else options.grid:
      flags = [*recipes.equal(method, sizes, t), "--config.seed=0"]
      runs["grid", method, t] = f"equal/{named(method, t)}-seed0", flags
  return runs


def choose_temperatures(runner, options, grid):
  """{method: temperature} with the best kNN of train images among the others, first seed, none where one is missing; and all seen."""
  if options.like:
    seen = [of for of in read_json(options.like)["temperatures"] if of[0] in options.methods]
    best = head_to_head_report.best_of(options.methods, seen)
    if lacks := sorted({*options.methods} - {*best}):
      raise ConfigError(f"--like={options.like}: has no temperature for {', '.join(lacks)}")
    return best, seen
  found = runner.all(dict(grid.values()))
  seen = [
    [method, t, found[name]["scores"]["knn_left_out"]["k20"] if found[name] else None]
    for (_, method, t), (name, _) in grid.items()
  ]
  return head_to_head_report.best_of(options.methods, seen), seen


def named(method, temperature):
  """Of a run's folder."""
  return method if temperature is None else f"{method}-t{temperature:g}"


def compare(runner, options, sizes):
  """({kind: {method: results of its seeds}}, what the temperatures were chosen from, all results, whether all runs are there)."""
  as_they_are = {
    ("configs", name, seed): (f"configs/{name}-seed{seed}", [f"--config={name}", f"--config.seed={seed}"])
    for seed in range(options.seeds) for name in options.configs
  }  # fmt: skip
  runner.all(dict(as_they_are.values()))  # before all others
  best, seen, grid = {}, [], grid_runs(options, sizes)
  if "equal" in options.kinds:
    best, seen = choose_temperatures(runner, options, grid)
  runs = once(as_they_are | grid | wanted(best, options, sizes))
  found = runner.all(dict(runs.values()))
  table = {kind: {} for kind in ("configs", *options.kinds)}
  for (kind, method, _), (name, _) in runs.items():
    if kind in table and found[name]:
      table[kind].setdefault(method, []).append(found[name])
  whole = all(found.values()) and len(best) == len(options.methods) * ("equal" in options.kinds)
  return table, seen, [result for result in found.values() if result], whole


def once(runs):
  """The same with one name for runs that have equal flags: a method's own recipe may be the equal one."""
  first = {}
  return {key: first.setdefault(tuple(flags), (name, flags)) for key, (name, flags) in runs.items()}


def wanted(best, options, sizes):
  """{(kind, method, seed): (name, flags)} of both recipes; `best`: temperatures of the equal one."""
  runs = {}
  for seed in range(options.seeds):
    for method, t in best.items():
      flags = [*recipes.equal(method, sizes, t), f"--config.seed={seed}"]
      runs["equal", method, seed] = f"equal/{named(method, t)}-seed{seed}", flags
    if best:
      name, flags = recipes.untrained(sizes)
      runs["equal", name, seed] = f"equal/{name}-seed{seed}", [*flags, f"--config.seed={seed}"]
    for method in options.methods if "own" in options.kinds else ():
      flags = [*recipes.own(method, sizes), f"--config.seed={seed}"]
      runs["own", method, seed] = f"own/{method}-seed{seed}", flags
  return runs


def parse(argv):
  """The options."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--methods", default=",".join(recipes.methods()), help="a list with commas")
  parser.add_argument("--kinds", default="equal,own", help="equal, own or both")
  parser.add_argument(
    "--configs",
    default="",
    help="configs that are run as they are, before all others; a list with commas",
  )
  parser.add_argument(
    "--base",
    default="adco_cifar10_r18",
    help="config that the equal recipe is made of; own ones are for CIFAR-10",
  )
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--epochs", type=int, default=200)
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--rows", type=int, default=4096, help="of a bank or queue")
  parser.add_argument("--width", type=float, default=1.0, help="of the network")
  parser.add_argument("--grid", default="0.05,0.1,0.2,0.5", help="temperatures of the equal recipe")
  parser.add_argument("--like", default="", help="a result file; temperatures as chosen there")
  parser.add_argument(
    "--images", type=int, default=0, help="train on the first so many of an .npz; 0: all"
  )
  parser.add_argument("--data", default="", help="an .npz file, for --images")
  parser.add_argument("--set", action="append", default=[], help="a flag for all runs")
  parser.add_argument("--runs", default="", help="folder of the workdirs; runs/NAME if not said")
  parser.add_argument("--parallel", type=int, default=1, help="runs side by side on this device")
  parser.add_argument(
    "--minutes", type=float, default=0, help="leave after so long, to be called again; 0: never"
  )
  parser.add_argument("--name", default="head_to_head", help="of the result files")
  parser.add_argument("--smoke", action="store_true")
  options = parser.parse_args(argv)
  if options.smoke:
    options.methods, options.grid, options.kinds = ",".join(SMOKE), "0.2", "equal"
    options.base = "adco_digits"
    options.seeds, options.epochs, options.batch, options.rows, options.width = 1, 3, 64, 256, 0.25
    options.set.append("--config.eval.every_epochs=1")
  options.runs = options.runs or os.path.join("runs", options.name)
  options.configs = [name for name in options.configs.split(",") if name]
  options.methods, options.kinds = options.methods.split(","), options.kinds.split(",")
  options.grid = [float(t) for t in options.grid.split(",")]
  return options


def main(argv):
  """Runs, prints, writes; returns the exit status."""
  options = parse(argv)
  more = list(options.set)
  if options.data:
    path = subset(options.data, options.images, options.runs) if options.images else options.data
    more += [f"--config.data.dir={path}", "--config.data.source=npz"]
  images = options.images or recipes.base_config(options.base).data.num_examples
  sizes = recipes.Sizes(
    options.epochs, options.batch, options.rows, images, options.width, options.base
  )
  results = os.path.join(record.RESULTS, options.name)
  runner = Runner(options.runs, results, options.parallel, options.minutes, more)
  try:
    table, seen, every, whole = compare(runner, options, sizes)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  summary = head_to_head_report.summarise(table)
  print(head_to_head_report.as_markdown(summary, seen, like=options.like))
  if runner.failed:
    print(f"error: {', '.join(runner.failed)}: failed", file=sys.stderr)
    return 1
  if not whole:
    print("not all runs are done: the same command goes on")
    return AGAIN
  told = [
    word for word in argv if not word.startswith(("--data=", "--runs="))
  ]  # places of one machine
  command = " ".join(["python -m benchmarks.head_to_head", *told])
  facts = {"further_differences": recipes.FURTHER, "temperatures": seen}
  made = head_to_head_report.origins(every) | {"data": os.path.basename(options.data)}
  path = record.write(
    record.RESULTS, options.name, command, facts | {"runs": made, "table": summary}
  )
  head_to_head_report.write_beside(
    path, head_to_head_report.as_markdown(summary, seen, made, options.like), table
  )
  print(path)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
