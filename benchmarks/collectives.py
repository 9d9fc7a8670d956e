"""What the compiled step sends between devices: kinds, counts, bytes, without running it.

  python -m benchmarks.collectives --config=configs/adco_r50.py [--devices=8]      the whole step, by kind
  python -m benchmarks.collectives --config=configs/adco_r50.py --bank=split       the objective alone
  python -m benchmarks.collectives --config=configs/adco_r50.py --bank=replicated  the same by the authors' design
  python -m benchmarks.collectives --sweep                    four modes, 2 to 256 devices: the objective's part

Compiles for CPU devices and reads the collectives out of the optimised program. Ring bytes per device and
step: an all-gather or reduce-scatter of n bytes over d devices sends n (d - 1) / d, an all-reduce twice that.
The objective's part is all but the encoder's gradient and its running statistics, which are known sizes. The
sweep has a tiny encoder, whose embeddings are as many as those of a large one.
"""

import argparse
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adco_jax import build, main
from adco_jax.config.plan import Machine
from adco_jax.errors import ConfigError, require
from adco_jax.objectives import infonce
from adco_jax.profile import collectives
from adco_jax.runtime import sharding
from adco_jax.runtime.sharding import AXIS
from benchmarks import record, step

TINY = ["--config.model.arch=resnet8", "--config.model.width=0.125", "--config.model.stem=small"]
CONFIGS = ("adco_r50", "adco_r50_sym", "adco_r50_multicrop", "adco_r50_sym_multicrop")
DEVICES = (2, 4, 8, 16, 32, 64, 128, 256)


def compile_step(config):
  """(the step's program, bytes of the encoder's gradient and of both encoders' statistics)."""
  train_step, state, batch, constants, _ = step.prepare(config)
  encoder = state.query_params, state.query_stats, state.key_stats
  compiled = train_step.lower(state, batch, constants).compile()
  return compiled, sum(x.nbytes for x in jax.tree.leaves(encoder))


def compile_objective(config, replicated):
  """The program of both players' losses and gradients alone; `replicated`: every device holds the whole bank."""
  mesh, setting = sharding.create_mesh(), config.method.bank
  plan = build.plan_for(
    config, config.data.num_examples, 0, Machine(backend="cpu", devices=mesh.size)
  )
  pairing, split = plan.train_pairing, P(None, AXIS)
  player = build.create_objective(config)

  def play(queries, keys, bank):
    def loss(queries, bank):
      if replicated:
        return replicated_loss(queries, keys, bank, pairing.pairs, config.method.temperature, setting.temperature)  # fmt: skip
      return player.contrast({"bank": bank}, queries, infonce.gather(keys), pairing.pairs)

    (_, _), (pull, push) = jax.value_and_grad(loss, (0, 1), has_aux=True)(queries, bank)
    return pull, jax.lax.psum(push, AXIS) if replicated else push

  def rows(count, spec):
    where = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct((*count, config.model.dim), jnp.float32, sharding=where)

  where = P() if replicated else P(AXIS)
  mapped = jax.shard_map(
    play, mesh=mesh, in_specs=(split, split, where), out_specs=(split, where), check_vma=not replicated
  )  # fmt: skip
  views = [(len(v), plan.batch_size) for v in (pairing.query_views, pairing.key_views)]
  arguments = (*(rows(v, split) for v in views), rows((setting.size,), where))
  return jax.jit(mapped).lower(*arguments).compile()


def replicated_loss(queries_Qxbxd, keys_Vxbxd, bank_kxD, pairs, temperature, bank_temperature):
  """(sum of both players' infonce, the queries' loss): this device's rows of means over the batch.

  Queries, keys and bank are unit vectors; each player gets the gradient of its own loss only.
  """
  keys = infonce.gather(keys_Vxbxd)
  rows = keys_Vxbxd.shape[1]
  own = jax.lax.axis_index(AXIS) * rows + jnp.arange(rows)
  still = jax.lax.stop_gradient

  def entropy(queries, bank, t):
    total = 0
    for q, k, weight in pairs:
      inside = queries[q] @ keys[k].T / t
      logits = jnp.concatenate([inside, queries[q] @ bank.T / t], -1)
      positive = jnp.take_along_axis(inside, own[:, None], 1)[:, 0]
      total += weight * jnp.sum(jax.nn.logsumexp(logits, -1) - positive) / keys.shape[1]
    return total

  value = entropy(queries_Qxbxd, still(bank_kxD), temperature)
  return value + entropy(still(queries_Qxbxd), bank_kxD, bank_temperature), value


def measure(config, devices, bank):
  """{kind: [count, bytes]} of a device, with the objective's part and the memory that the program takes.

  `bank`: '' for the whole step, 'split' or 'replicated' for the objective alone.
  """
  compiled, encoder = (compile_objective(config, bank == "replicated"), 0) if bank else compile_step(config)  # fmt: skip
  rows, memory = collectives.table(compiled.as_text(), devices), compiled.memory_analysis()
  found = {row.kind: [row.number, round(row.bytes)] for row in rows}
  share = (devices - 1) / devices
  objective = round(sum(row.bytes for row in rows) - 2 * share * encoder)
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return found | {"objective": objective, "memory": held - memory.alias_size_in_bytes}


def sweep():
  """{config: {devices: `measure`}}, each in a process of its own."""
  found = {}
  for name in CONFIGS:
    for devices in DEVICES:
      groups = f"--config.bn.group_size={min(32, 256 // devices)}"
      flags = [f"--config=configs/{name}.py", *TINY, groups, "--config.data.batch_size=256", "--config.method.bank.size=65536"]  # fmt: skip
      flags += ["--config.bn.shuffle_block=0", f"--devices={devices}", "--json"]
      command = [sys.executable, "-m", "benchmarks.collectives", *flags]
      said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
      found.setdefault(name, {})[devices] = one = json.loads(said.splitlines()[-1])
      print(f"{name:24} {devices:4} devices  {one['objective'] / 1e6:.3f} MB", flush=True)
  return found


def run(argv):
  """Compiles and prints; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--devices", type=int, default=8)
  parser.add_argument(
    "--bank", choices=("split", "replicated"), default="", help="the objective alone"
  )
  parser.add_argument("--sweep", action="store_true")
  parser.add_argument("--json", action="store_true", help="one line for programs")
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options, rest = parser.parse_known_args(argv)
  if options.sweep:
    command = "python -m benchmarks.collectives " + " ".join(argv)
    print(record.write(options.out, "collectives", command, {"sent_bytes": sweep()}))
    return 0
  try:
    config, _ = main.parse(rest)
    if options.devices < 1:
      raise ConfigError(f"--devices={options.devices}: use 1 or more")
    require(config.task == "pretrain", "task", config.task, "use a pre-training config")
    if options.bank:
      require(
        config.objective == "adco", "objective", config.objective, "--bank compares banks of adco"
      )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    found = measure(config, options.devices, options.bank)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if options.json:
    print(json.dumps(found))
    return 0
  objective, memory = found.pop("objective"), found.pop("memory")
  for kind, (count, size) in found.items():
    print(f"{count:4} x {kind:16} {size:14,.0f} bytes")
  total = sum(size for _, size in found.values())
  print(f"objective {objective:,} bytes of {total:,} per device and step; memory {memory / 2**30:.3f} GiB per device")  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
