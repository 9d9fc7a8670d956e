"""What a compiled program sends between devices: kinds and bytes, read out of its text.

Flow: estimate and benchmarks/collectives hand over `compiled.as_text()`.
Shapes: ring bytes per device: an all-gather or reduce-scatter of n bytes over d devices sends n (d - 1) / d, an
  all-reduce twice that.
Holds: one that the TPU compiler spreads over the fusions it runs beside counts once, where it starts.
Not here: compiling.
"""

import re
from typing import NamedTuple

import numpy as np

ITEM = {
  "f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
STARTED = re.compile(r"%async-collective-start\S* = .*?calls=(%[\w.-]+)")
SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


Result = list[tuple[str, tuple[int, ...]]]  # dtype and shape of every array


class Row(NamedTuple):
  """All collectives of one kind."""

  kind: str
  number: int
  bytes: float


def collectives(hlo: str) -> list[tuple[str, Result]]:
  """[(kind, [(dtype, shape), ...] of the result)] of every collective in an HLO text."""
  sent, started, computation = [], set(STARTED.findall(hlo)), ""
  for line in hlo.splitlines():
    if line.startswith("%"):
      computation = line.split(" ")[0]
    if "async_collective_fusion_config" in line and computation not in started:
      continue
    match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if match:
      result = [(t, tuple(int(n) for n in s.split(",") if n)) for t, s in SHAPE.findall(match[1])]
      sent.append((match[2], result))
  return sent


def ring_bytes(kind: str, result: Result, devices: int) -> float:
  """Bytes that each device sends for one collective."""
  size = sum(ITEM[dtype] * int(np.prod(shape)) for dtype, shape in result if dtype in ITEM)
  share = (devices - 1) / devices
  return {
    "all-gather": size * share,
    "all-reduce": 2 * size * share,
    "reduce-scatter": size * devices * share,
    "all-to-all": size * share,
    "collective-permute": size,
  }[kind]


def table(hlo: str, devices: int) -> list[Row]:
  """A `Row` per kind, largest first."""
  sent = [(kind, ring_bytes(kind, result, devices)) for kind, result in collectives(hlo)]
  rows = [Row(k, sum(x == k for x, _ in sent), sum(b for x, b in sent if x == k)) for k in KINDS]
  return sorted((row for row in rows if row.number), key=lambda row: -row.bytes)
