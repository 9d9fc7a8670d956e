"""What the compiled step sends between devices: kind and bytes, without running it.

  python -m benchmarks.collectives --config=configs/adco_r50.py --config.model.arch=resnet18 [--devices=8]

Compiles the whole training step for that many CPU devices and reads the collectives out of the optimised
program, largest first. Ring bytes per device and step: an all-gather or reduce-scatter of n bytes over d
devices sends n (d - 1) / d, an all-reduce twice that. The all-reduce of the encoder's gradient is as large
as the encoder; everything else is what the objective costs.
"""

import argparse
import sys

import jax
import numpy as np

from adco_jax import main
from adco_jax import plan as planning
from adco_jax.collectives import collectives, ring_bytes
from benchmarks import step


def show(found, devices):
  """Prints a line per collective and the sums."""
  rows = [(ring_bytes(kind, result, devices), kind, result) for kind, result in found]
  for size, kind, result in sorted(rows, key=lambda row: -row[0]):
    dtype, shape = max(result, key=lambda r: np.prod(r[1]))
    of = f"{len(result)} arrays, largest " if len(result) > 1 else ""
    print(f"{size:14,.0f} bytes  {kind:15} {of}{dtype}{list(shape)}")
  total, largest = sum(row[0] for row in rows), max(row[0] for row in rows)
  print(f"{total:14,.0f} bytes  per device and step, {total - largest:,.0f} without the largest")


def run(argv):
  """Compiles and prints; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--devices", type=int, default=8)
  options, rest = parser.parse_known_args(argv)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  try:
    config, _ = main.parse(rest)
    train_step, state, split, shared, _ = step.prepare(config)
  except planning.ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  compiled = train_step.lower(state, split, shared).compile()
  show(collectives(compiled.as_text()), options.devices)
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
