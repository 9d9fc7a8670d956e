"""What one training step computes and moves per pair, by part of the network, as a compiler writes it: no clock, no luck.

  python -m benchmarks.bytes --topology=cpu:1 --config=adco_r50 --config.data.batch_size=8 --config.bn.group_size=8
  python -m benchmarks.bytes --topology=v5e:2x4 --config=adco_r50 --config.data.batch_size=1024 --megabytes=465
  python -m benchmarks.bytes --topology=gpu:benchmarks/targets/h200.txtpb --config=adco_r50

Compiles the real step for devices that need not be there (names as --plan_topology's) and runs nothing. Prints, per pair and
device: FLOPs (of the parts: the encoder's products by arithmetic; in all: as the compiler counts), megabytes of operands and
results in the device's large memory, the compiler's own count of all bytes accessed (on a TPU those in its fast memory as
well), temporaries. What the compiler counts of a loop is one run of it: on a CPU that leaves out most of the kernels' gradients. With --megabytes it ends with status 1 where the compiler counts more per pair. A TPU needs
`pip install libtpu` in an environment of its own, on Python 3.12, and minutes; a GPU see benchmarks/gpu_program.
"""

import argparse
import os
import sys

from adco_jax import main
from adco_jax.errors import ConfigError
from benchmarks import hlo, record


def measure(topology, config):
  """Every number as a dictionary."""
  compiled, step, seconds = hlo.compile_for(topology, config)
  plan, cost = step.plan, compiled.cost_analysis() or {}
  pairs = plan.batch_size * len(plan.train_pairing.pairs) // step.mesh.size
  slots = plan.batch_size // step.mesh.size
  flops = hlo.flops_by_stage(step)
  moved = hlo.by_stage(hlo.kernels(compiled.as_text()))
  stages = [
    [stage, flops[stage] * slots / pairs / 1e9, *moved.get(stage, [0, 0.0])]
    for stage in hlo.STAGES
    if flops[stage] or stage in moved
  ]
  return {
    "devices": f"{step.mesh.size} x {step.mesh.devices.flat[0].device_kind}",
    "compute_dtype": str(plan.compute_dtype),
    "pairs_per_device": pairs,
    "compile_seconds": seconds,
    "megabytes_accessed_per_pair": cost.get("bytes accessed", 0) / pairs / 1e6,  # no count on GPU
    "gigaflops_per_pair": cost.get("flops", 0) / pairs / 1e9,
    "megabytes_moved_per_pair": sum(row[3] for row in stages) * 1e3 / pairs,
    "temporaries_megabytes_per_pair": compiled.memory_analysis().temp_size_in_bytes / pairs / 1e6,
    "stages": [[*row[:3], row[3] * 1e3 / pairs] for row in stages],
  }


def show(found):
  """The table."""
  print(f"{'':14} {'GFLOP':>9} {'kernels':>8} {'MB moved':>9}   per pair; kernels per step")
  for stage, flops, count, moved in found["stages"]:
    print(f"{stage:14} {flops:9.3f} {count:8} {moved:9.2f}")
  for name, value in found.items():
    if name != "stages":
      print(f"{name:32} {value:.2f}" if isinstance(value, float) else f"{name:32} {value}")


def run(argv):
  """Compiles, prints, writes; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--topology", default="cpu:1", help="as --plan_topology")
  parser.add_argument("--megabytes", type=float, help="most that may be accessed per pair")
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options, rest = parser.parse_known_args(argv)
  try:
    config, workdir = main.parse(rest)
    found = measure(options.topology, config)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  show(found)
  where = os.path.basename(options.topology).replace(":", "-").removesuffix(".txtpb")
  stem = f"bytes-{os.path.basename(workdir)}-{where}-b{found['pairs_per_device']}"
  print(record.write(options.out, stem, "python -m benchmarks.bytes " + " ".join(argv), found))
  accessed = found["megabytes_accessed_per_pair"]
  if options.megabytes is not None and accessed > options.megabytes:
    print(f"megabytes_accessed_per_pair {accessed:.4g} > {options.megabytes:g}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
