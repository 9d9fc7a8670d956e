"""What a CPU gains by the forms of layers.Conv and sums.means: each against XLA's own operation, in turns.

  python -m benchmarks.forms [--rounds=9]

The 3 x 3 and 7 x 7 convolutions of a ResNet-18 at 32 pixels (64 images) and of a ResNet-50 at 224 pixels (8 images): GFLOP/s of
forward pass, input's gradient and kernel's gradient, alone in a program, float32. Sums: milliseconds for the mean of a map
and of another's product with it, as a BatchNorm's gradient takes them. Medians of processor time (user and system, all
threads) of rounds in turns: on a machine that others use as well the wall clock tells less.
A JSON file goes to benchmarks/results/ (--out=DIR for another place).
"""

import argparse
import functools
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.models import layers, norm, sums
from benchmarks import record

# images, side, channels in, channels out, kernel, stride
CONVOLUTIONS = [
  (64, 32, 3, 64, 3, 1), (64, 32, 64, 64, 3, 1), (64, 32, 64, 128, 3, 2), (64, 16, 128, 128, 3, 1),
  (64, 8, 256, 256, 3, 1), (64, 8, 256, 512, 3, 2), (64, 4, 512, 512, 3, 1),
  (8, 224, 3, 64, 7, 2), (8, 56, 64, 64, 3, 1), (8, 56, 128, 128, 3, 2), (8, 28, 128, 128, 3, 1),
  (8, 14, 256, 256, 3, 1), (8, 14, 512, 512, 3, 2), (8, 7, 512, 512, 3, 1), (8, 28, 512, 128, 1, 1),
]  # fmt: skip
DIRECTIONS = {
  "forward": lambda f: lambda x, k, dy: f(x, k),
  "input's gradient": lambda f: lambda x, k, dy: jax.vjp(lambda x: f(x, k), x)[1](dy),
  "kernel's gradient": lambda f: lambda x, k, dy: jax.vjp(lambda k: f(x, k), k)[1](dy),
}
MAPS = [(64, 32, 32, 64), (64, 8, 8, 256), (8, 112, 112, 64), (8, 28, 28, 512), (8, 7, 7, 2048)]


def in_turns(functions, args, rounds):
  """Median processor milliseconds of each function, compiled."""
  compiled = [jax.jit(f).lower(*args).compile() for f in functions]
  taken = [[] for _ in compiled]
  for number in range(rounds + 1):  # the first round warms up
    for run, times in zip(compiled, taken, strict=True):
      start = time.process_time()
      jax.block_until_ready(run(*args))
      times += [1e3 * (time.process_time() - start)] * (number > 0)
  return [statistics.median(times) for times in taken]


def convolutions(draw, rounds):
  """[[name, XLA's GFLOP/s, ours]] of every convolution and direction."""
  rows = []
  for count, side, channels, features, size, stride in CONVOLUTIONS:
    conv = layers.Conv(features, size, stride)
    x, kernel = draw(count, side, side, channels), draw(size, size, channels, features)
    ours = lambda x, k, conv=conv: conv.apply({"params": {"kernel": k}}, x)
    plain = functools.partial(layers._convolve, stride=stride)
    dy = draw(*jax.eval_shape(ours, x, kernel).shape)
    work = 2 * dy.size * size**2 * channels / 1e6
    for name, make in DIRECTIONS.items():
      taken = in_turns([make(plain), make(ours)], (x, kernel, dy), rounds)
      what = f"{count} x {side} x {side} x {channels} -> {features}, {size} x {size} / {stride}"
      rows.append([f"{what}: {name}", *(work / ms for ms in taken)])
  return rows


def means(draw, rounds):
  """[[name, milliseconds of XLA's reduction, ours]]"""
  rows = []
  for shape in MAPS:
    form = norm.Form(1, False, "cpu")
    run = lambda form: lambda x, dy: sums.means(form, dy, dy * x)
    functions = [run(form._replace(platform="tpu")), run(form)]
    rows.append([" x ".join(map(str, shape)), *in_turns(functions, (draw(*shape), draw(*shape)), rounds)])  # fmt: skip
  return rows


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options = parser.parse_args(argv)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  found = {"GFLOP/s": convolutions(draw, options.rounds), "ms": means(draw, options.rounds)}
  for unit, rows in found.items():
    print(f"{'XLA':>8} {'here':>8}  {unit} of one core")
    print(*(f"{plain:8.1f} {ours:8.1f}  {name}" for name, plain, ours in rows), sep="\n")
  command = "python -m benchmarks.forms " + " ".join(argv)
  print(record.write(options.out, "forms-cpu", command, found))
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
