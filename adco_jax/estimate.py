"""What a run would take, before it takes it: `--plan`. Compiles the real step for a machine that need not be there.

Flow: main -> `run`: config -> plan -> the step's program for the topology -> its memory, collectives, FLOPs ->
  lines; no data is opened and nothing is trained.
Holds: memory and bytes come from the compiler; times are lower bounds by arithmetic that is shown, never
  measurements.
Not here: how fast it really is (benchmarks/step).
"""

import math
import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adco_jax import build, collectives, sharding
from adco_jax import plan as planning
from adco_jax.data.pipeline import PipelineLoader
from adco_jax.metrics import duration, say
from adco_jax.plan import ConfigError, require

GIB = 2**30
HOST_SECONDS_PER_IMAGE = 1.73e-3  # of one core, two 224 pixel views: benchmarks/results/input.json


class Chip(NamedTuple):
  """Data-sheet figures: bfloat16 FLOP/s, bytes/s of memory, bytes of memory."""

  flops: float
  bandwidth: float
  memory: float


CHIPS = {
  "v4": Chip(275e12, 1.2e12, 32 * GIB), "v5e": Chip(197e12, 0.81e12, 16 * GIB), "v5p": Chip(459e12, 2.77e12, 95 * GIB),
  "v6e": Chip(918e12, 1.64e12, 32 * GIB), "A100": Chip(312e12, 2.0e12, 80 * GIB), "H100": Chip(989e12, 3.35e12, 80 * GIB),
  "H200": Chip(989e12, 4.8e12, 141 * GIB),
}  # fmt: skip


def prepare(topology):
  """(devices, backend) of 'here', 'cpu:N' or a TPU topology such as 'v5e:2x4'. Raises ConfigError."""
  name, _, size = topology.partition(":")
  if topology == "here":
    return jax.devices(), jax.default_backend()
  if name == "cpu" and size.isdigit() and int(size):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(size))
    return jax.devices(), "cpu"
  known = "here, cpu:N, v4:2x2x2, v5e:2x4, v5p:4x4x4, v6e:8x8, ..."
  if name not in ("v4", "v5e", "v5p", "v6e") or not size:
    raise ConfigError(f"--plan_topology={topology}: use one of {known}")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  jax.config.update("jax_platforms", "cpu")
  try:
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # of many kinds, the package's absence among them
    what = " ".join(str(error).split())[:160]
    raise ConfigError(
      f"--plan_topology={topology}: the TPU compiler does not answer ({what}); pip install libtpu, or use cpu:8"
    ) from error
  return list(found.devices), "tpu"


def run(config, topology):
  """Prints the estimate. Raises ConfigError for what cannot run, or does not fit."""
  planning.check_ranges(config)
  build.check_names(config)
  devices, backend = prepare(topology)
  plan = planning.make_plan(
    config, config.data.num_examples, config.data.num_classes, backend=backend, devices=len(devices)
  )
  mesh = sharding.create_mesh(devices)
  built = build.build(config, plan, mesh, PipelineLoader.cut)
  sizes = describe_sizes(config, plan, built.abstract_state)
  say(
    f"{len(devices)} x {devices[0].device_kind}, {plan.compute_dtype}, batch {plan.batch_size}; compiling ..."
  )
  start = time.monotonic()
  compiled = built.train_step.lower(built.abstract_state, *inputs(plan, mesh)).compile()
  say(f"compiled in {time.monotonic() - start:.0f} s")
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  sent = read_collectives(compiled, len(devices))
  peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes  # fmt: skip
  for line in (*sizes, *describe_program(memory, peak, cost, sent), *warnings(config, plan)):
    say(line)
  chip = topology.partition(":")[0]
  for line in describe_times(config, plan, cost, chip, len(devices)):
    say(line)
  check_fits(config, plan, memory, peak, chip)


def read_collectives(compiled, devices):
  """collectives.table of a program, None where jaxlib is too old for the compiler that made it."""
  try:
    return collectives.table(compiled.as_text(), devices)
  except jax.errors.JaxRuntimeError:
    return None


def inputs(plan, mesh):
  """Shapes of (split, shared), as a pipeline ships them."""
  pairing = plan.train_pairing
  put = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # fmt: skip
  image = lambda v: (put((plan.batch_size, plan.view_sizes[v], plan.view_sizes[v], 3), jnp.uint8, P("data")),)  # fmt: skip
  shipped = [v for v in pairing.key_views if plan.shuffle_block or v not in pairing.query_views]
  split = {"queries": [image(v) for v in pairing.query_views], "keys": [image(v) for v in shipped]}
  orders = put((len(pairing.key_views), plan.batch_size), jnp.int32, P())
  return split, {"seed": put((), jnp.uint32, P()), "key_orders": orders}


def describe_sizes(config, plan, state):
  """Parameters, bank, checkpoint, steps."""
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  count = sum(x.size for x in jax.tree.leaves(state.query_params))
  mine = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  held = sum(mine(x) for x in jax.tree.leaves(state))
  return (
    f"parameters            {count:,} per encoder",
    f"bank                  {config.bank.size:,} x {config.model.dim}, {size(state.ascend) / GIB:.3f} GiB over all devices",
    f"checkpoint            {size(state) / GIB:.2f} GiB; of it {held / GIB:.2f} GiB on each device",
    f"steps                 {plan.total_steps:,} = {plan.fill_steps:,} of initialisation + {config.epochs:g} epochs of {plan.steps_per_epoch:,}",
  )


def describe_program(memory, peak, cost, sent):
  """What the compiler says of the step, per device."""
  lines = [
    f"memory per device     {peak / GIB:.2f} GiB = state and inputs {memory.argument_size_in_bytes / GIB:.2f} + temporaries {memory.temp_size_in_bytes / GIB:.2f} + new outputs",
    f"FLOPs per device      {cost.get('flops', 0) / 1e9:,.1f} G per step; {cost.get('bytes accessed', 0) / 1e9:,.2f} GB touched (compiler's count)",
  ]
  if sent is None:
    return [
      *lines,
      "sent per device       unknown: this jaxlib cannot read a program of that compiler; use a newer jax",
    ]
  lines.append(f"sent per device       {sum(row.bytes for row in sent) / 1e6:,.2f} MB per step:")
  return lines + [f"  {row.count:4} x {row.kind:18} {row.bytes / 1e6:10,.3f} MB" for row in sent]


def describe_times(config, plan, cost, chip, devices):
  """Hours by arithmetic: on the planned chip, or on every chip of the table if that is a CPU."""
  chips = {chip: CHIPS[chip]} if chip in CHIPS else CHIPS
  lines = [
    "times: not below max(FLOPs / peak, bytes / bandwidth) of the compiler's counts; no measurement"
  ]
  for name, (flops, bandwidth, _) in chips.items():
    compute, traffic = cost.get("flops", 0) / flops, cost.get("bytes accessed", 0) / bandwidth
    known = chip in CHIPS  # a CPU's program touches other bytes than the chip's would
    step = max(compute, traffic if known else 0)
    parts = f"compute {1e3 * compute:.1f}" + (
      f", memory {1e3 * traffic:.1f}" if known else " alone"
    )
    if not step:
      return ["times: the compiler counts nothing here"]
    speed = plan.batch_size / step
    cores = speed * HOST_SECONDS_PER_IMAGE
    host = f" from {cores:.0f} host cores" if cores < 1000 else ""
    lines.append(
      f"  {devices} x {name:5} step >= {1e3 * step:.1f} ms ({parts}); at most "
      f"{speed:,.0f} images/s{host}; {config.epochs:g} epochs >= {duration(step * plan.total_steps)}"
    )
  return lines


def warnings(config, plan):
  """What a careful colleague would say."""
  bank, group = config.bank, config.bn.group_size
  told = (
    (bank.size > plan.num_examples, f"the bank has {bank.size:,} rows, the data {plan.num_examples:,} images: rows outnumber what they are to resemble; use fewer"),
    (group == 1, "BatchNorm groups of one image: statistics of a single image; use 8 or more"),
    (1 < group < 8, f"BatchNorm groups of {group} images are noisy; 8 or more are usual"),
    (config.objective == "adco" and bank.learning_rate and plan.batch_size > 1024, f"bank.learning_rate={bank.learning_rate:g} is known at batch 256 only; at {plan.batch_size} the bank takes fewer steps per epoch"),
    (plan.batch_size > 512 and not config.optim.warmup_epochs, f"batch {plan.batch_size} without warm-up (optim.warmup_epochs)"),
  )  # fmt: skip
  return [f"warning: {text}" for condition, text in told if condition]


def check_fits(config, plan, memory, peak, chip):
  """Refuses what the chip's memory does not hold, with what would. Raises ConfigError."""
  if chip not in CHIPS or peak <= CHIPS[chip].memory:
    return
  room = CHIPS[chip].memory - (peak - memory.temp_size_in_bytes)
  parts = next((n for n in (2, 4, 8, 16, 32) if memory.temp_size_in_bytes / n <= room), None)
  remedy = f"try --config.accumulate={parts * config.accumulate}" if parts and room > 0 else "use more devices or a smaller bank"  # fmt: skip
  require(False, "data.batch_size", plan.batch_size, f"needs {peak / GIB:.1f} GiB on each {chip} of {CHIPS[chip].memory / GIB:.0f}; {remedy}, or a smaller batch")  # fmt: skip
