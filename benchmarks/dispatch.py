"""What the host does per step of a resident set, and whether several steps in one dispatch would be faster than one.

Command: python -m benchmarks.dispatch --config=configs/adco_digits.py --config.method.bank.init=random
For resident sets, whose batches are a few kilobytes. Paired rounds in one process. Drawing is what a thread does ahead of the
step; shipping is what the step's own thread does besides the dispatch. The same steps are then taken one by one and unrolled in
one program; --together=0 leaves that out.
"""

import argparse
import os
import statistics
import sys
import time

import jax

from adco_jax import build, main
from adco_jax.config.plan import Machine
from adco_jax.data.batch import Constants
from adco_jax.errors import ConfigError
from adco_jax.runtime import sharding
from benchmarks import record


def measure(config, many, steps, rounds):
  """Milliseconds per step of drawing, of shipping and, where `many` are to be taken together, of both ways of taking them;
  seconds to compile the unrolled program."""
  source, mesh = build.open_source(config.data), sharding.create_mesh()
  loader = build.create_loader(config, source, mesh)
  plan = build.plan_for(config, source.num_examples, len(source.classes), Machine(backend=jax.default_backend(), devices=jax.device_count()))  # fmt: skip
  step = build.build(config, plan, mesh)
  constants = Constants.put(mesh, config.seed, loader.images)
  batches = loader.train(
    plan.fill_steps, 10**9, seed=config.seed, plan=plan, ratio=config.views.ratio
  )

  put = lambda: next(batches).batch.put(mesh)

  def all_of(state, several):
    for batch in several:
      state, metrics = step.updates[-1](state, batch, constants)
    return state, metrics

  def seconds_of(work, n):
    start, used = time.perf_counter(), time.process_time()
    for _ in range(n):
      work()
    return [1e3 * (now - then) / n for now, then in ((time.perf_counter(), start), (time.process_time(), used))]  # fmt: skip

  batch = next(batches).batch
  host = {"drawing": lambda: next(batches), "shipping": lambda: batch.put(mesh)}
  taken = {name: [seconds_of(work, steps) for _ in range(rounds)] for name, work in host.items()}
  medians = {name: list(map(statistics.median, zip(*x, strict=True))) for name, x in taken.items()}
  hosts = {"host_milliseconds": medians, "rounds": rounds, "load": os.getloadavg()[0]}
  if not many:
    return hosts
  together = jax.jit(all_of, donate_argnums=0)
  state = step.pack(step.create_state())
  state = all_of(state, [put()])[0]
  start = time.perf_counter()
  compiled = together.lower(state, [put() for _ in range(many)]).compile()
  seconds = time.perf_counter() - start
  ways = {"one by one": all_of, "together": compiled}
  found = {name: [] for name in ways}
  for _ in range(rounds):
    for name, way in ways.items():
      start = time.perf_counter()
      for _ in range(steps // many):
        items = [put() for _ in range(many)]
        state, metrics = way(state, items)
      jax.block_until_ready(state)
      found[name].append(1e3 * (time.perf_counter() - start) / (steps // many * many))
  table = {name: statistics.median(times) for name, times in found.items()}
  gain = statistics.median(
    1 - b / a for a, b in zip(found["one by one"], found["together"], strict=True)
  )
  return {
    "milliseconds_per_step": table,
    "gain": gain,
    "compile_seconds": seconds,
    "together": many,
    **hosts,
  }


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--together", type=int, default=8)
  parser.add_argument("--steps", type=int, default=80)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options, rest = parser.parse_known_args(argv)
  try:
    config, workdir = main.parse(rest)
    found = measure(config, options.together, options.steps, options.rounds)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for name, (wall, used) in found["host_milliseconds"].items():
    print(f"{name:12} {wall:7.2f} ms per step, {used:.2f} of processors")
  if options.together:
    for name, value in found["milliseconds_per_step"].items():
      print(f"{name:12} {value:7.2f} ms per step")
    print(
      f"{options.together} steps together save {found['gain']:.1%} and take {found['compile_seconds']:.0f} s to compile"
    )
  stem = f"dispatch-{os.path.basename(workdir)}-{jax.default_backend()}"
  print(record.write(options.out, stem, "python -m benchmarks.dispatch " + " ".join(argv), found))
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
