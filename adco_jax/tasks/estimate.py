"""What a run would take, before it takes it: `--plan`. Compiles the real step for a machine that need not be there.

Flow: main -> `run`: config -> plan -> the step's program for the topology -> its memory, collectives, FLOPs ->
  lines; images are counted where data is named, and nothing is trained.
Holds: memory and what is sent come from the compiler; times are bounds by arithmetic (roofline) that is shown,
  never measurements.
Not here: how fast it really is (benchmarks/step).
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config.plan import Machine, Plan
from adco_jax.data.batch import Batch, Constants
from adco_jax.data.images import Reader
from adco_jax.data.pipeline import Pixels
from adco_jax.data.resident import kept_bytes
from adco_jax.data.sources.base import Source
from adco_jax.errors import ConfigError, require
from adco_jax.models import vit
from adco_jax.profile import collectives, roofline
from adco_jax.profile.roofline import CHIPS, GIB
from adco_jax.runtime import sharding
from adco_jax.runtime.processes import say
from adco_jax.runtime.progress import duration
from adco_jax.tasks import beginning
from adco_jax.training.state import TrainState
from adco_jax.training.trainer import Trainer

MOST_CPUS = 1024  # made up by JAX, each with threads of its own
HOST_SECONDS_PER_IMAGE = 3.84e-3  # of one core, two 224 pixel views: benchmarks/results/input.json

KINDS = {  # as devices name themselves
  "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA A100-SXM4-80GB": "A100",
  "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA H200 141GB HBM3e": "H200",
}  # fmt: skip
# The TPU compiler looks for the machine it runs on, says pages when there is none, and wants to be alone.
NO_TPU = {
  "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


class Step(NamedTuple):
  """All that the program of an update follows from."""

  plan: Plan
  mesh: Mesh
  trainer: Trainer


def prepare(topology: str) -> tuple[Sequence[jax.Device], str]:
  """(devices, backend) of 'here', 'cpu:N', a TPU topology such as 'v5e:2x4', or 'gpu:FILE'. Raises ConfigError.

  FILE describes one GPU as XLA's own specifications do; see benchmarks/gpu_program.
  """
  name, _, size = topology.partition(":")
  if topology == "here":
    return jax.devices(), jax.default_backend()
  if name == "cpu" and size.isascii() and size.isdecimal() and 0 < int(size) <= MOST_CPUS:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(size))
    return jax.devices(), "cpu"
  known = f"here, cpu:N (up to {MOST_CPUS}), v4:2x2x2, v5e:2x4, v5p:4x4x4, v6e:8x8, ..., gpu:FILE (what describes one GPU)"
  if name == "gpu" and os.path.isfile(size):
    with open(size) as file:
      how = {"platform": "cuda", "target_config": file.read(), "topology": "1x1x1"}
    need = "jax_cuda13_plugin", "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt"
    return _absent(topology, how, need, known), "gpu"
  if not re.fullmatch(r"(v4|v5p):[1-9]\d*x[1-9]\d*x[1-9]\d*|(v5e|v6e):[1-9]\d*x[1-9]\d*", topology):
    raise ConfigError(f"--plan_topology={topology}: use one of {known}")
  for variable, value in NO_TPU.items():
    os.environ.setdefault(variable, value)
  how = {"platform": "tpu", "topology_name": topology}
  if name == "v4":  # a v4 chip can be two devices; as everybody uses it, it is one
    how["chip_config_name"] = "megacore"
  return _absent(topology, how, ("libtpu", "pip install libtpu"), known), "tpu"


def _absent(topology, how, need, known):
  """Devices that are not here, from their compiler; `need`: (the package it comes in, how to get it)."""
  jax.config.update("jax_platforms", "cpu")
  try:
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(**how).devices)
  except Exception as error:  # of many kinds, the package's absence among them
    what = " ".join(str(error).split())[:160]
    remedy = f"use one of {known}" if importlib.util.find_spec(need[0]) else f"{need[1]}, or use cpu:8"  # fmt: skip
    raise ConfigError(
      f"--plan_topology={topology}: the {how['platform'].upper()} compiler does not answer ({what}); {remedy}"
    ) from error


def make_step(
  config: ConfigDict, devices: Sequence[jax.Device], backend: str, images: int, classes: int
) -> Step:
  """The `Step` of a config on these devices. Raises ConfigError for what cannot run."""
  plan = build.plan_for(config, images, classes, Machine(backend=backend, devices=len(devices)))
  mesh = sharding.create_mesh(devices)
  return Step(plan, mesh, build.build(config, plan, mesh))


def run(config: ConfigDict, topology: str) -> None:
  """Prints the estimate. Raises ConfigError for what cannot run, or does not fit."""
  devices, backend = prepare(topology)
  images, classes, told, source = count_images(config)
  step = make_step(config, devices, backend, images, classes)
  plan, _, trainer = step
  kind = devices[0].device_kind
  sizes = describe_sizes(config, plan, trainer.abstract_state)
  for line in (told, *sizes, *build.warnings(config, plan)):
    say(line)
  say(f"{len(devices)} x {kind}, {plan.compute_dtype}, batch {plan.batch_size}; compiling ...")
  chip = KINDS.get(kind, "")
  start = time.monotonic()
  compiled = compile_step(config, step, chip)
  say(f"compiled in {time.monotonic() - start:.0f} s")
  memory: Any = compiled.memory_analysis()
  given, rest = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  kept = resident_bytes(config, source, chip, devices[0].platform)
  peak = kept + given + memory.output_size_in_bytes - memory.alias_size_in_bytes + rest
  sent = read_collectives(compiled, len(devices))
  times = describe_times(config, plan, trainer, chip, len(devices), compiled.cost_analysis() or {})
  for line in (*describe_program(given, rest, peak, kept, sent), *times):
    say(line)
  if chip in CHIPS and peak > CHIPS[chip].memory:
    raise refusal(config, plan, memory.temp_size_in_bytes, peak, chip)


def count_images(config: ConfigDict) -> tuple[int, int, str, Source | None]:
  """(images, classes, a line that says whose, where they lie): as a run would count them where config.data names any.

  Raises ConfigError for data that cannot be opened.
  """
  data = config.data
  if data.dir or data.source == "digits" or (data.source == "tfds" and data.name):
    source = build.open_training(config).trained
    images, classes = source.num_examples, 0 if source.has_several else len(source.classes)
    return (
      images,
      classes,
      f"data                  {images:,} images of {source.name}, counted",
      source,
    )
  images = data.num_examples
  require(images, "data.num_examples", images, "say how many images there are, or name data.dir")
  told = f"data                  none given: assumed {images:,} images (config.data.num_examples); name config.data.dir and they are counted"
  return images, data.num_classes, told, None


def resident_bytes(config: ConfigDict, source: Source | None, chip: str, platform: str) -> int:
  """What images that are there take on each device for the whole run: the program below is of views that come from the host."""
  data = config.data
  if source is None:
    return 0
  reader = Reader(source, data.max_bad_fraction, data.max_megapixels)
  known = CHIPS.get(chip)
  memory = known.memory if known else sharding.memory_bytes(jax.local_devices()[0])
  return kept_bytes(reader, data.loader, data.resident_size, data.resident_share, platform, memory)


def compile_step(config: ConfigDict, step: Step, chip: str) -> jax.stages.Compiled:
  """The step's program, compiled. Raises ConfigError where the compiler says that it does not fit."""
  plan, mesh, trainer = step
  batch = Batch.shapes(plan, plan.train_pairing, mesh, Pixels)
  lowered = trainer.updates[-1].lower(trainer.abstract_packed, batch, Constants.shapes(mesh))
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = re.search(r"HLO temporaries \(([0-9.]+)G\)", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not needed or chip not in CHIPS:
      raise
    given = sum(_local_bytes(x) for x in jax.tree.leaves(trainer.abstract_state))
    temporaries = float(needed[1]) * GIB
    raise refusal(config, plan, temporaries, given + temporaries, chip) from error


def _local_bytes(x):
  """Bytes of an abstract array on each device."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def read_collectives(compiled: jax.stages.Compiled, devices: int) -> list[collectives.Row] | None:
  """collectives.table of a program, None where jaxlib is too old for the compiler that made it."""
  try:
    return collectives.table(compiled.as_text() or "", devices)
  except jax.errors.JaxRuntimeError:
    return None


def describe_sizes(config: ConfigDict, plan: Plan, state: TrainState) -> tuple[str, ...]:
  """Parameters, bank, checkpoint, steps."""
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  count = _count(state.query_params)
  local = sum(_local_bytes(x) for x in jax.tree.leaves(state))
  own = state.objective, state.adversary_optimizer
  mine = sum(_local_bytes(x) for x in jax.tree.leaves(own))
  rows = ", ".join(
    f"{name} {' x '.join(f'{n:,}' for n in x.shape)}" for name, x in _arrays(state.objective)
  )
  return (
    f"parameters            {count:,} per encoder",
    f"objective             {rows or 'no arrays'}, with momentum: {size(own) / GIB:.3f} GiB, {mine / GIB:.3f} on each device",
    f"checkpoint            {size(state) / GIB:.2f} GiB; of it {local / GIB:.2f} GiB on each device",
    f"steps                 {plan.total_steps:,} = {beginning.length(config, plan)}",
  )


def _arrays(objective):
  """(name, array) of the largest things that an objective keeps."""
  return [
    (path[-1].key, x) for path, x in jax.tree_util.tree_leaves_with_path(objective) if x.ndim > 1
  ]


def describe_program(
  given: int, rest: int, peak: int, kept: int, sent: Sequence[collectives.Row] | None
) -> list[str]:
  """What the compiler says of the step, per device: bytes that it is given, of temporaries, at most at once, `kept` images among them."""
  line = f"memory per device     {peak / GIB:.2f} GiB = state and inputs {given / GIB:.2f} + activations and other temporaries {rest / GIB:.2f} + new outputs"
  line += f" + images that stay there {kept / GIB:.2f}" if kept else ""
  if sent is None:
    what = "unknown: this jaxlib cannot read a program of that compiler; use a newer jax"
    return [line, f"sent per device       {what}"]
  total = f"sent per device       {sum(row.bytes for row in sent) / 1e6:,.2f} MB per step:"
  return [line, total, *(f"  {x.number:4} x {x.kind:18} {x.bytes / 1e6:10,.3f} MB" for x in sent)]


def describe_times(
  config: ConfigDict, plan: Plan, trainer: Trainer, chip: str, devices: int, cost: dict[str, float]
) -> list[str]:
  """Bounds on the planned chip, or on every chip of the table if that is a CPU, and where they come from."""
  pairing = plan.train_pairing
  counted = {
    s: roofline.count(trainer.encoder, s) for s in {plan.view_sizes[v] for v in pairing.views}
  }
  of = lambda views: [counted[plan.view_sizes[v]] for v in views]
  passes = roofline.VIT if config.model.arch in vit.ARCHITECTURES else roofline.RESNET
  work = roofline.work(of(pairing.query_views), of(pairing.key_views), config.accumulate, passes)
  slots, count = plan.batch_size // devices, _count(trainer.abstract_state.query_params)
  holders = devices if config.optim.shard else 1
  flops, fixed = slots * work.flops, count * (roofline.CAST_BYTES + roofline.UPDATE_BYTES / holders)
  # A loop's body, of which accumulate makes two, counts once there.
  theirs = f" (the compiler counts {_figure(cost['flops'] / 1e9)})" if cost.get("flops") and config.accumulate == 1 else ""  # fmt: skip
  both = f" ({len(pairing.pairs)} pairs each)" if len(pairing.pairs) > 1 else ""
  lines = [
    "bounds by arithmetic, no measurements (bfloat16; network and optimiser, without bank, colour and sending):",
    f"  per image           {_figure(work.flops / 1e9)} GFLOP; {_figure(work.fused / 1e6)} MB moved if all between products is fused into them, {_figure(work.unfused / 1e6)} MB if nothing is",
    f"  per device and step {slots} images{both}: {_figure(flops / 1e9)} GFLOP{theirs}; {_figure(slots * work.fused / 1e9)} or {_figure(slots * work.unfused / 1e9)} GB + {_figure(fixed / 1e9)} GB of parameters",
  ]
  for name in [chip] if chip else CHIPS:
    lines += _chip_lines(name, plan, devices, flops, [slots * b + fixed for b in work[1:]])
  return lines


def _chip_lines(name, plan, devices, flops, moved):
  """Two lines: what bounds a step, and what follows from it."""
  chip = CHIPS[name]
  step, compute, memory = roofline.step_seconds(chip, flops, moved[0])
  unfused, *_ = roofline.step_seconds(chip, flops, moved[1])
  speed = plan.batch_size / step
  cores = f", for which hosts need {math.ceil(speed * HOST_SECONDS_PER_IMAGE):,} cores in all (photographs)" if plan.view_sizes == (224, 224) else ""  # fmt: skip
  return (
    f"  {devices} x {name:5} step >= max({_figure(flops / 1e9)} G / {chip.flops / 1e12:.0f} T = {_figure(1e3 * compute)} ms, {_figure(moved[0] / 1e9)} G / {chip.bandwidth / 1e12:.2f} T = {_figure(1e3 * memory)} ms) = {_figure(1e3 * step)} ms; {_figure(1e3 * unfused)} ms unfused",
    f"            at most {speed:,.0f} images/s ({plan.batch_size / unfused:,.0f} unfused){cores}; the run takes at least {duration(step * plan.total_steps)} ({duration(unfused * plan.total_steps)} unfused)",
  )


def _figure(x):
  """Three digits that count, never an exponent."""
  return f"{float(f'{x:.3g}'):,.12g}"


def _count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def refusal(
  config: ConfigDict, plan: Plan, temporaries: float, peak: float, chip: str
) -> ConfigError:
  """The ConfigError of what the chip's memory does not hold, with what it would."""
  memory, slots = CHIPS[chip].memory, plan.batch_size // plan.num_devices
  groups = slots // config.bn.group_size if config.bn.group_size else 1  # a part holds whole ones
  parts = [n for n in range(2, groups + 1) if groups % (n * config.accumulate) == 0]
  fits = [n * config.accumulate for n in parts if temporaries / n <= memory - (peak - temporaries)]
  remedy = f"try --config.accumulate={fits[0]}, or a smaller batch" if fits else "use more devices, a smaller batch or a smaller bank"  # fmt: skip
  return ConfigError(
    f"config.data.batch_size={plan.batch_size}: needs {peak / GIB:.1f} GiB on each {chip} of {memory / GIB:.0f}; {remedy}"
  )
