"""What XLA makes of one training step for an NVIDIA GPU that need not be there: launches, bytes, the largest kernels.

  python -m benchmarks.gpu_program --target=benchmarks/targets/h200.txtpb --config=configs/adco_r50.py
  python -m benchmarks.gpu_program --target=benchmarks/targets/h200.txtpb --config=adco_cifar10_r18 --launches=1500

Compiles the real step; nothing runs and nothing is timed. With limits (--launches, --gigabytes, --large_...) it ends with
status 1 where the program has more than that: launch/nightly.sh holds a budget so. Large: of an activation's size.
Needs an environment of its own, which launch/nightly.sh makes: Python 3.12 or newer, the same versions of jax, jaxlib,
jax-cuda13-plugin and jax-cuda13-pjrt (the last two with pip install --no-deps), and ptxas of CUDA 13 on the PATH (package
nvidia-cuda-nvcc). The target describes the GPU as XLA's own specifications do (target_config/specs/*.txtpb of its repository);
a machine that has the GPU writes it with --write_target=FILE. No algorithm is chosen by timing without one.
Bytes: see benchmarks/hlo.
"""

import argparse
import collections
import pathlib
import sys

import jax

from adco_jax import main
from adco_jax.errors import ConfigError
from benchmarks import hlo, record

LARGE = 2**22  # elements from which an array counts as an activation
LIMITS = ("launches", "gigabytes", "large_float32_results", "large_masks", "large_transposes")


def summary(compiled):
  """Everything that is counted, as a dictionary."""
  found = hlo.kernels(compiled.as_text())
  own = [k for k in found if "$" not in k.kind]  # a library's functions have one in their names
  large = lambda types: sum(t in types and n >= LARGE for k in own for t, n in k.results)
  kinds = collections.Counter()
  for kernel in found:
    kinds[kernel.kind] += kernel.moved
  count = collections.Counter(k.kind for k in found)
  return {
    "launches": len(found),
    "gigabytes": sum(k.moved for k in found) / 1e9,
    "gigabytes_of_xla_kernels": sum(k.moved for k in own) / 1e9,
    "stages": [[k, n, moved] for k, (n, moved) in hlo.by_stage(found).items()],
    "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    "large_float32_results": large({"f32"}),
    "large_masks": large({"pred"}),
    "large_transposes": sum("transpose" in k.kind and max((n for _, n in k.results), default=0) >= LARGE for k in own),
    "kinds": [[kind, count[kind], moved / 1e9] for kind, moved in kinds.most_common(12)],
    "largest": [[k.name, k.moved / 1e9] for k in sorted(found, key=lambda k: -k.moved)[:20]],
  }  # fmt: skip


def parse():
  """(arguments, words that the config is made of)."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--target", help="file that describes the GPU")
  parser.add_argument(
    "--write_target", help="file to write the description of this machine's GPU to"
  )
  for name in LIMITS:
    parser.add_argument(f"--{name}", type=float, help="most of them per step; left out: any number")
  parser.add_argument("--out", default=record.RESULTS)
  arguments, rest = parser.parse_known_args()
  if not (arguments.target or arguments.write_target):
    parser.error("give --target=FILE, or --write_target=FILE on a machine with the GPU")
  return arguments, rest


def run():
  """Prints and writes the summary; returns the exit status."""
  arguments, rest = parse()
  if arguments.write_target:
    found = jax._src.lib.xla_client.get_topology_for_devices(jax.devices()).target_config
    pathlib.Path(arguments.write_target).write_text(str(found))
    return 0
  try:
    config, _ = main.parse(rest)
    compiled, _, seconds = hlo.compile_for(f"gpu:{arguments.target}", config)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  result = summary(compiled) | {"compile_seconds": seconds}
  show(result)
  target = pathlib.Path(arguments.target)
  words = sys.argv[1:]
  command = " ".join(["python -m benchmarks.gpu_program", *words]).replace(str(target), target.name)
  print(record.write(arguments.out, f"gpu_program-{target.stem}", command, result))
  broken = broken_limits(vars(arguments), result)
  print(*broken, sep="\n", file=sys.stderr)
  return 1 if broken else 0


def show(result):
  """Prints every number, tables a row a line."""
  say = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)
  for name, value in result.items():
    if isinstance(value, list):
      print(f"{name}:", *(" ".join(map(say, row)) for row in value), sep="\n  ")
    else:
      print(f"{name:26} {say(value)}")


def broken_limits(limits, result):
  """A line for each of LIMITS that the program breaks."""
  named = [(name, limits[name]) for name in LIMITS if limits[name] is not None]
  return [f"{name} {result[name]:.4g} > {most:g}" for name, most in named if result[name] > most]


if __name__ == "__main__":
  sys.exit(run())
