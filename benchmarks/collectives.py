"""What the compiled step sends between devices: kind, count and bytes, without running it.

  python -m benchmarks.collectives [--config configs/adco_r50.py] [--devices 8] [--set KEY=VALUE ...]

Compiles the whole training step for that many CPU devices (images arrive as uint8 views) and reads the
collectives out of the optimised program. Ring bytes per device and step: an all-gather or
reduce-scatter of n bytes over d devices sends n (d - 1) / d, an all-reduce twice that.
"""

import re

ITEM = {
  "f64": 8,
  "s64": 8,
  "u64": 8,
  "f32": 4,
  "s32": 4,
  "u32": 4,
  "bf16": 2,
  "f16": 2,
  "s8": 1,
  "u8": 1,
  "pred": 1,
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


def collectives(hlo):
  """[(kind, [(dtype, shape), ...] of the result)] of every collective in an HLO text."""
  found = []
  for line in hlo.splitlines():
    match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if match:
      result = [(t, tuple(int(n) for n in s.split(",") if n)) for t, s in SHAPE.findall(match[1])]
      found.append((match[2], result))
  return found


def ring_bytes(kind, result, devices):
  """Bytes that each device sends for one collective."""
  size = sum(ITEM[dtype] * _product(shape) for dtype, shape in result)
  share = (devices - 1) / devices
  return {
    "all-gather": size * share,
    "all-reduce": 2 * size * share,
    "reduce-scatter": size * devices * share,
    "all-to-all": size * share,
    "collective-permute": size,
  }[kind]


def purpose(result, parameters, statistics, bank_size):
  """What travels, told by size: gradient, statistics, the objective's small arrays, or the bank."""
  shapes = [shape for _, shape in result]
  if any(bank_size in shape for shape in shapes):
    return "bank"
  large = sum(_product(s) for s in shapes)
  return "gradient and statistics" if large > 0.5 * min(parameters, statistics) else "objective"


def _product(shape):
  total = 1
  for n in shape:
    total *= n
  return total
