"""What a step of every method costs beside AdCo's, everything equal but the negatives.

  python -m benchmarks.methods [--batch=128 --rows=2048 --width=0.25] [--steps=5]

The equal recipe of benchmarks/recipes.py, symmetric views (supervised: one), random images. CPU time of the process, in turns: a step of
each method, then again, so that what else the machine does falls on all alike; the median of a method over AdCo's. FLOPs: as
XLA counts them in the compiled step. Writes benchmarks/results/methods-<device>-b<batch>.json.
"""

import argparse
import statistics
import sys
import time

import jax

from adco_jax import main
from benchmarks import recipes, record, step


def prepare(method, sizes):
  """A function that does one step, and {'flops', 'bytes'} of the compiled one."""
  config, *_ = main.parse(recipes.equal(method, sizes, 0.2))
  update, state, batch, constants, _ = step.prepare(config)
  compiled = update.lower(state, batch, constants).compile()
  kept = [state]

  def once():
    kept[0], metrics = compiled(kept[0], batch, constants)
    jax.block_until_ready((kept[0], metrics))

  once()  # the first touches all memory
  facts = {
    "flops": compiled.cost_analysis()["flops"],
    "bytes": compiled.memory_analysis().temp_size_in_bytes,
  }
  return once, facts


def measure(methods, sizes, steps):
  """{method: {'cpu_seconds', 'seconds', 'flops', 'bytes'}}."""
  ready, facts = {}, {}
  for method in methods:
    ready[method], facts[method] = prepare(method, sizes)
    print(f"{method}: compiled", flush=True)
  times = {method: [] for method in methods}
  for _ in range(steps):
    for method, once in ready.items():
      start = time.process_time(), time.perf_counter()
      once()
      times[method].append((time.process_time() - start[0], time.perf_counter() - start[1]))
  for method, seen in times.items():
    cpu, wall = (statistics.median(column) for column in zip(*seen, strict=True))
    facts[method] |= {"cpu_seconds": cpu, "seconds": wall, "all_cpu_seconds": [t for t, _ in seen]}
  return facts


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--rows", type=int, default=2048)
  parser.add_argument("--width", type=float, default=0.25)
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--methods", default=",".join(recipes.methods()))
  options = parser.parse_args(argv)
  sizes = recipes.Sizes(10, options.batch, options.rows, 50_000, options.width)
  facts = measure(options.methods.split(","), sizes, options.steps)
  own = "cpu_seconds" if jax.default_backend() == "cpu" else "seconds"
  for method, values in facts.items():
    for key in (own, "flops"):
      values[f"{key} over AdCo's"] = values[key] / facts["adco"][key]
    ratio = values[f"{own} over AdCo's"]
    print(f"{method:14} {values[own]:.3f} s  {ratio:.2f} x  {values['flops'] / 1e9:.0f} GFLOP")
  device = jax.devices()[0].device_kind.replace(" ", "_").lower()
  command = " ".join(["python -m benchmarks.methods", *argv])
  print(
    record.write(record.RESULTS, f"methods-{device}-b{options.batch}", command, {"methods": facts})
  )


if __name__ == "__main__":
  run(sys.argv[1:])
