"""Where one whole training step spends its time: the most expensive kernels, by jax.profiler.

  python -m benchmarks.kernels --config=adco_r50                                       # on a GPU
  python -m benchmarks.kernels --config=adco_digits --config.data.batch_size=16 --config.bn.group_size=8

Takes any pre-training config with any override; views as in benchmarks/step, no data set needed. On a GPU the kernels as
they ran on its streams (XLA runs CUDA graphs kernel by kernel while it is profiled: times are right, gaps are not);
on a CPU XLA's operations, whose times add up over the threads. Kinds: names without their numbers.
A JSON file goes to benchmarks/results/ (--out=DIR for another place).
"""

import argparse
import collections
import os
import pathlib
import re
import sys
import tempfile

import jax

from adco_jax import main
from adco_jax.errors import ConfigError
from benchmarks import record, step


def events(path):
  """(name, milliseconds) of everything in a profile that ran on the device."""
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      if plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
        yield from ((event.name, event.duration_ns / 1e6) for event in line.events)
      elif plane.name == "/host:CPU" and jax.default_backend() == "cpu":
        for event in line.events:
          if any(name == "hlo_op" for name, _ in event.stats):
            yield event.name, event.duration_ns / 1e6


def kind(name):
  """A name without the numbers that tell its like apart: loop_fusion_12 is a loop_fusion."""
  return re.sub(r"([._]\d+)+$", "", name)


def table(found, steps, top):
  """[[name, launches per step, milliseconds per step]] of the `top` most expensive of (name, milliseconds)."""
  count, total = collections.Counter(), collections.Counter()
  for name, milliseconds in found:
    count[name] += 1
    total[name] += milliseconds
  return [[name, count[name] / steps, ms / steps] for name, ms in total.most_common(top)]


def measure(config, steps, top):
  """Everything as a dictionary."""
  train_step, state, batch, constants, plan = step.prepare(config)
  update = train_step.lower(state, batch, constants).compile()
  for _ in range(3):
    state, _ = update(state, batch, constants)
  jax.block_until_ready(state)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        state, _ = update(state, batch, constants)
      jax.block_until_ready(state)
    found = [x for path in pathlib.Path(folder).rglob("*.xplane.pb") for x in events(path)]
  return {
    "batch_size": plan.batch_size,
    "compute_dtype": plan.compute_dtype,
    "steps": steps,
    "milliseconds": sum(ms for _, ms in found) / steps,
    "launches": len(found) / steps,
    "kernels": table(found, steps, top),
    "kinds": table([(kind(name), ms) for name, ms in found], steps, top),
  }


def show(result):
  """Lines of both tables."""
  lines = [f"{result['launches']:.0f} launches, {result['milliseconds']:.2f} ms per step"]
  for title in ("kernels", "kinds"):
    lines.append(f"{title:>10} {'per step':>9} {'ms':>8} {'share':>6}")
    for name, count, ms in result[title]:
      share = ms / result["milliseconds"]
      lines.append(f"{'':10} {count:9.1f} {ms:8.3f} {share:6.1%}  {name[:90]}")
  return lines


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=3, help="that are profiled, after three others")
  parser.add_argument("--top", type=int, default=20, help="kernels, and kinds of them, that are listed")  # fmt: skip
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options, rest = parser.parse_known_args(argv)
  try:
    config, workdir = main.parse(rest)
    result = measure(config, options.steps, options.top)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  stem = record.stem("kernels", workdir, result)
  path = record.write(options.out, stem, "python -m benchmarks.kernels " + " ".join(argv), result)
  print(*show(result), path, sep="\n")
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
