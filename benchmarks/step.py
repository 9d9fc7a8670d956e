"""How fast one whole training step is here: pairs/s, milliseconds, memory, compile time.

  python -m benchmarks.step --config=configs/adco_r50.py --config.data.batch_size=8 --config.bn.group_size=8
  python -m benchmarks.step --config=configs/adco_r50.py --steps=50 --warmup=10      # on a GPU

Takes any pre-training config with any override. Views are random uint8 images made on the device, so
neither TensorFlow nor a data set is needed; augmentation, both encoders, both losses and both optimisers
run as in training. A JSON file with all numbers goes to benchmarks/results/ (--out=DIR for another place).
A pair is one query view and one key view of an image.
"""

import argparse
import itertools
import os
import statistics
import sys
import time

import jax
import numpy as np

from adco_jax import build, main
from adco_jax.config.plan import Machine
from adco_jax.data import order
from adco_jax.data.batch import Batch, Constants
from adco_jax.data.pipeline import Pixels
from adco_jax.errors import ConfigError
from adco_jax.runtime import host, sharding
from benchmarks import record


def prepare(config):
  """(train step, state, batch, constants, plan) with synthetic views on the devices."""
  host.keep_memory()  # as main does, before there is any device
  plan = build.plan_for(
    config,
    config.data.num_examples,
    config.data.num_classes or 10,
    Machine(backend=jax.default_backend(), devices=jax.device_count()),
  )
  mesh = sharding.create_mesh()
  run = build.build(config, plan, mesh)
  numbers = itertools.count()

  def image(like):
    key = jax.random.fold_in(jax.random.key(0), next(numbers))
    draw = lambda: jax.random.bits(key, like.shape, "uint8")
    return jax.jit(draw, out_shardings=like.sharding)()

  shapes = Batch.shapes(plan, plan.train_pairing, mesh, Pixels)
  queries, keys = jax.tree.map(image, (shapes.queries, shapes.keys))
  batch = Batch.of(queries, keys, order.key_orders(0, 0, plan, plan.train_pairing))
  if plan.has_labels:
    batch = batch._replace(labels=np.arange(plan.batch_size, dtype=np.int32) % plan.num_classes)
  batch = batch.put(mesh)
  constants = Constants.put(mesh, seed=0)
  return run.updates[-1], run.pack(run.create_state()), batch, constants, plan


def measure(config, steps, warmup):
  """Every number as a dictionary."""
  step, state, batch, constants, plan = prepare(config)
  start = time.perf_counter()
  lowered = step.lower(state, batch, constants)
  traced = time.perf_counter()
  compiled = lowered.compile()
  done = time.perf_counter()
  memory = compiled.memory_analysis()
  times = []
  for number in range(warmup + steps):
    before = time.perf_counter()
    state, metrics = compiled(state, batch, constants)
    jax.block_until_ready(metrics)
    if number >= warmup:
      times.append(time.perf_counter() - before)
  median = statistics.median(times)
  stats = jax.local_devices()[0].memory_stats() or {}
  return {
    "pairs_per_second": plan.batch_size * len(plan.train_pairing.pairs) / median,
    "images_per_second": plan.batch_size / median,
    "step_milliseconds": {"median": 1e3 * median, "min": 1e3 * min(times), "max": 1e3 * max(times)},
    "steps": steps,
    "trace_seconds": traced - start,
    "compile_seconds": done - traced,
    "compiled_bytes": {
      "arguments": memory.argument_size_in_bytes,
      "outputs_not_aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
    },
    "peak_bytes_in_use": stats.get("peak_bytes_in_use"),  # None on CPU
    "loss": float(metrics["train/query_loss"]),
    "compute_dtype": plan.compute_dtype,
    "batch_size": plan.batch_size,
  }


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=10, help="measured steps")
  parser.add_argument("--warmup", type=int, default=2, help="steps before them")
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options, rest = parser.parse_known_args(argv)
  try:
    config, workdir = main.parse(rest)
    result = measure(config, options.steps, options.warmup)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  stem = record.stem("step", workdir, result)
  path = record.write(options.out, stem, "python -m benchmarks.step " + " ".join(argv), result)
  speed, times = result["pairs_per_second"], result["step_milliseconds"]
  print(f"{speed:.2f} pairs/s, {times['median']:.1f} ms per step of {result['batch_size']}")
  held = result["peak_bytes_in_use"] or sum(result["compiled_bytes"].values())
  print(f"{held / 2**30:.2f} GiB, compiled in {result['compile_seconds']:.0f} s ({path})")
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
