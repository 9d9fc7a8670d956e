"""What XLA makes of one training step for an NVIDIA GPU that need not be there: launches, bytes, the largest kernels.

  python -m benchmarks.gpu_program --target=h200.txtpb --config=configs/adco_r50.py
  python -m benchmarks.gpu_program --target=h200.txtpb --config=adco_cifar10_r18 --launches=1500 --gigabytes=20

Compiles the real step; nothing runs and nothing is timed. With --launches or --gigabytes it ends with status 1 where
the program has more than that: a budget for every night.
Needs an environment of its own (Python 3.12 or newer): the same versions of jax, jaxlib, jax-cuda13-plugin and
jax-cuda13-pjrt (the last two with pip install --no-deps), and ptxas of CUDA 13 on the PATH (package nvidia-cuda-nvcc).
FILE describes the GPU as XLA's own specifications do (target_config/specs/*.txtpb of its repository); a machine that has
the GPU writes it with --write_target=FILE. No algorithm is chosen by timing without one.
Bytes: operands and results of every kernel, once each, as the compiler lays them out; what a cache saves is not known.
"""

import argparse
import collections
import math
import pathlib
import re
import sys
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies

from adco_jax import build, estimate, main, sharding
from adco_jax import plan as planning
from adco_jax.data.pipeline import PipelineLoader
from benchmarks import record

FREE = {
  "parameter",
  "get-tuple-element",
  "tuple",
  "bitcast",
  "constant",
  "after-all",
  "opt-barrier",
}
LARGE = 2**22  # elements from which an array counts as an activation


class Kernel(NamedTuple):
  """An instruction of the program that runs by itself."""

  name: str
  kind: str  # opcode, or a fusion's name without its number, or the library's function
  moved: int  # bytes of operands and results
  results: list  # (type, elements)


def shapes(text):
  """[(type, elements)] of all arrays in an HLO type."""
  found = re.findall(r"\b([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([\d,]*)\]", text)
  return [(kind, math.prod(map(int, filter(None, sides.split(","))))) for kind, sides in found]


def size(arrays):
  """Bytes of [(type, elements)]."""
  bits = lambda kind: 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
  return sum(bits(kind) * count for kind, count in arrays) // 8


def kernels(text):
  """Every `Kernel` of an optimised HLO module's entry, in order."""
  lines = text[text.index("\nENTRY") :].split("\n")
  arrays, found = {}, []
  for line in lines:
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
    if not match:
      continue
    name, kind, opcode, rest = match.groups()
    arrays[name] = shapes(kind)
    if opcode in FREE:
      continue
    operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
    read = sum(size(arrays.get(x, ())) for x in dict.fromkeys(operands))
    target = re.search(r'custom_call_target="([^"]+)"', rest)
    plain = re.sub(r"[._]?\d+$", "", name) if opcode == "fusion" else opcode
    found.append(
      Kernel(name, target[1] if target else plain, read + size(arrays[name]), arrays[name])
    )
  return found


def summary(compiled):
  """Everything that is counted, as a dictionary."""
  found = kernels(compiled.as_text())
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
    "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    "large_float32_results": large({"f32"}),
    "large_masks": large({"pred"}),
    "large_transposes": sum("transpose" in k.kind and max((n for _, n in k.results), default=0) >= LARGE for k in own),
    "kinds": [[kind, count[kind], moved / 1e9] for kind, moved in kinds.most_common(12)],
    "largest": [[k.name, k.moved / 1e9] for k in sorted(found, key=lambda k: -k.moved)[:20]],
  }  # fmt: skip


def compile_for(target, config):
  """The compiled step of a config on one GPU of this description, and the seconds it took."""
  topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
  images, classes = config.data.num_examples, config.data.num_classes
  plan = planning.make_plan(config, images, classes, backend="gpu", devices=1)
  mesh = sharding.create_mesh(list(topology.devices))
  built = build.build(config, plan, mesh, PipelineLoader.cut)
  start = time.monotonic()
  return estimate.compile_step(config, plan, built, mesh, ""), time.monotonic() - start


def parse():
  """(arguments, words that the config is made of)."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--target", help="file that describes the GPU")
  parser.add_argument(
    "--write_target", help="file to write the description of this machine's GPU to"
  )
  parser.add_argument("--launches", type=int, default=0, help="most of them; 0: any number")
  parser.add_argument("--gigabytes", type=float, default=0, help="most of them per step; 0: any")
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
  jax.config.update("jax_platforms", "cpu")
  config, _ = main.parse(rest)
  compiled, seconds = compile_for(pathlib.Path(arguments.target).read_text(), config)
  result = summary(compiled) | {"compile_seconds": seconds}
  for name, value in result.items():
    if isinstance(value, list):
      print(f"{name}:", *(" ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) for row in value), sep="\n  ")  # fmt: skip
    else:
      print(f"{name:26} {value:.3f}" if isinstance(value, float) else f"{name:26} {value}")
  target = pathlib.Path(arguments.target)
  command = " ".join([f"python -m benchmarks.gpu_program --target={target.name}", *rest])
  print(record.write(arguments.out, f"gpu_program-{target.stem}", command, result))
  limits = {"launches": arguments.launches, "gigabytes": arguments.gigabytes}
  broken = [
    f"{k} {result[k]:.4g} > {most:g}" for k, most in limits.items() if most and result[k] > most
  ]
  print(*broken, sep="\n", file=sys.stderr)
  return 1 if broken else 0


if __name__ == "__main__":
  sys.exit(run())
