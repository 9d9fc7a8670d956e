"""What is written in a compiled step: its kernels, the bytes they move, the part of the step they belong to.

gpu_program and bytes compile with `compile_for` and count with the rest. Bytes: operands and results of every
instruction that runs by itself, once each, if they lie in the device's large memory (a TPU's program says which do
not); what a cache saves is not known. A copy that runs beside other work counts where it starts, a loop counts what goes in
and comes out.
"""

import collections
import math
import re
import time
from typing import NamedTuple

from adco_jax.errors import require
from adco_jax.profile import roofline
from adco_jax.tasks import estimate

FREE = {
  "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier",
}  # fmt: skip
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "attn", "mlp", "norm", "head", "objective", "augmentation", "optimiser", "rest")  # fmt: skip


class Kernel(NamedTuple):
  """An instruction of the program that runs by itself."""

  name: str
  kind: str  # opcode, or a fusion's name without its number, or the library's function
  moved: float  # bytes of operands and results
  results: list  # (type, elements)
  stage: str  # of STAGES


def shapes(text):
  """[(type, elements)] of all arrays in an HLO type that lie in the large memory."""
  found = re.findall(r"\b([a-z]+[0-9]*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^}]*\})?", text)
  count = lambda sides: math.prod(map(int, filter(None, sides.split(","))))
  return [(kind, count(sides)) for kind, sides, layout in found if not re.search(r"S\([1-9]", layout)]  # fmt: skip


def size(arrays):
  """Bytes of [(type, elements)]."""
  bits = lambda kind: 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
  return sum(bits(kind) * count for kind, count in arrays if kind != "token") // 8


def kernels(text):
  """Every `Kernel` of an optimised HLO module's entry, in order."""
  lines = text[text.index("\nENTRY") :].split("\n")
  arrays, stages, found, sliced = {}, {}, [], _sliced(text)
  for line in lines:
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
    if not match:
      continue
    name, kind, opcode, rest = match.groups()
    arrays[name], operands = shapes(kind), re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
    path = re.search(r'op_name="([^"]*)"', line)  # what has none, a copy, goes with what it copies
    whose = stages.get(operands[0], "rest") if operands else "rest"
    stages[name] = stage_of(path[1]) if path else whose
    if opcode in FREE or opcode.endswith("-done"):
      continue
    called = re.search(r"calls=%([\w.\-]+)", rest)
    parts = sliced.get(called[1], {}) if called else {}
    whole = [x for i, x in enumerate(operands) if i not in parts]
    read = sum(size(arrays.get(x, ())) for x in dict.fromkeys(whole)) + sum(parts.values())
    moved = read + size(arrays[name])
    if opcode in ("copy-start", "slice-start"):
      moved = _started(kind)
    target = re.search(r'custom_call_target="([^"]+)"', rest)
    plain = re.sub(r"[._]?\d+$", "", name) if opcode == "fusion" else opcode
    found.append(Kernel(name, target[1] if target else plain, moved, arrays[name], stages[name]))
  return found


def _sliced(text):
  """{fused computation: {number of a parameter: bytes}} of those that are read through slices alone."""
  found = {}
  for name, body in re.findall(r"\n%([\w.\-]+) \(.*\{\n((?:  .*\n)*)\}", text):
    numbers = dict(re.findall(r"%([\w.\-]+) = \S+ parameter\((\d+)\)", body))
    reads = {parameter: [] for parameter in numbers}
    for kind, opcode, operands in re.findall(r" = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)", body):
      for operand in set(re.findall(r"%([\w.\-]+)", operands)) & reads.keys():
        reads[operand].append(size(shapes(kind)) if opcode == "slice" else None)
    found[name] = {int(numbers[p]): sum(r) for p, r in reads.items() if r and None not in r}
  return found


def _started(kind):
  """Bytes that a copy moves in the large memory: its result is (where to, from where, a flag), or sides swapped."""
  pieces = re.findall(r"\b[a-z]+\d+\[[\d,]*\](?:\{[^}]*\})?", kind)
  bare = lambda piece: size(shapes(re.sub(r"\{.*", "", piece)))
  both = [piece for piece in pieces if bare(piece) > 8]
  outside = [piece for piece in both if shapes(piece)]
  return len(outside) * min(map(bare, both), default=0)


def stage_of(path):
  """Which of STAGES an operation belongs to, by the names of the modules it stands in."""
  for pattern, stage in (
    (r"Encoder\)*/.*(layer\d(?=_)|attn|mlp)", ""), (r"Encoder\)*/.*blocks_", "norm"), (r"Encoder\)*/head", "head"), (r"Encoder", "stem"),
    (r"\bobjective\b", "objective"), (r"\baugmentation\b", "augmentation"), (r"shard_map", "rest"),
    (r"^old\..*(layer\d(?=_)|attn|mlp)", ""), (r"^old\..*blocks_", "norm"), (r"^old\..*head", "head"), (r"^old\..*backbone", "stem"),  # weights
  ):  # fmt: skip
    match = re.search(pattern, path)
    if match:
      return stage or match[1]
  return "optimiser"


def by_stage(found):
  """{stage: [instructions, gigabytes]} of the stages that there are."""
  count, moved = collections.Counter(), collections.Counter()
  for kernel in found:
    count[kernel.stage] += 1
    moved[kernel.stage] += kernel.moved / 1e9
  return {stage: [count[stage], moved[stage]] for stage in STAGES if count[stage]}


def flops_by_stage(step):
  """{stage: FLOPs} of the encoder's products for one slot of the batch: arithmetic, two per multiply-add.

  A key view is embedded, a query view is embedded and has two gradients per product; images have none.
  """
  pairing, found = step.plan.train_pairing, collections.Counter()
  for views, times in ((pairing.key_views, 1), (pairing.query_views, 3)):
    for view in views:
      rows = roofline.products(step.trainer.encoder, step.plan.view_sizes[view])
      for number, (path, flops, _) in enumerate(rows):
        found[stage_of(path)] += flops * (times - (number == 0 and times == 3))
  return found


def compile_for(topology, config):
  """(compiled step, its `estimate.Step`, seconds) on devices that `estimate.prepare` knows by that name."""
  require(config.task == "pretrain", "task", config.task, "use a pre-training config")
  devices, backend = estimate.prepare(topology)
  size = config.data.num_examples, config.data.num_classes
  step = estimate.make_step(config, devices, backend, *size)
  start = time.monotonic()
  return estimate.compile_step(config, step, ""), step, time.monotonic() - start
