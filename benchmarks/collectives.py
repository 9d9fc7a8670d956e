"""What the compiled step sends between devices: kinds, counts, bytes, without running it.

  python -m benchmarks.collectives --config=configs/adco_r50.py [--devices=8]      the whole step, by kind
  python -m benchmarks.collectives --config=configs/adco_r50.py --replicated       the objective of the authors' design
  python -m benchmarks.collectives --sweep                    four modes, 2 to 256 devices: the objective's part

Compiles for CPU devices and reads the collectives out of the optimised program. Ring bytes per device and
step: an all-gather or reduce-scatter of n bytes over d devices sends n (d - 1) / d, an all-reduce twice that.
The objective's part is all but the encoder's gradient and its running statistics, which are known sizes. The
sweep has a tiny encoder, whose embeddings are as many as those of a large one.
"""

import argparse
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from adco_jax import collectives, losses, main, sharding
from adco_jax import plan as planning
from adco_jax.sharding import AXIS
from benchmarks import record, step

TINY = ["--config.model.arch=resnet8", "--config.model.width=0.125", "--config.model.stem=small"]
CONFIGS = ("adco_r50", "adco_r50_sym", "adco_r50_multicrop", "adco_r50_sym_multicrop")
DEVICES = (2, 4, 8, 16, 32, 64, 128, 256)


def compile_step(config):
  """(text of the step's program, bytes of the encoder's gradient and of both encoders' statistics)."""
  train_step, state, split, shared, _ = step.prepare(config)
  compiled = train_step.lower(state, split, shared).compile()
  encoder = state.query_params, state.query_stats, state.key_stats
  return compiled.as_text(), sum(x.nbytes for x in jax.tree.leaves(encoder))


def compile_replicated(config):
  """The same of the authors' objective: every device holds the bank and reduces its whole gradient."""
  mesh, setting = sharding.create_mesh(), config.bank
  plan = planning.make_plan(config, config.data.num_examples, 0, backend="cpu", devices=mesh.size)
  pairing = plan.train_pairing
  shape = lambda count: jnp.zeros((len(count), plan.batch_size, config.model.dim))

  def objective(queries, keys, bank):
    def loss(queries, bank):
      return replicated_loss(
        queries, keys, bank, pairing.pairs, config.temperature, setting.temperature
      )

    (_, value), (pull, push) = jax.value_and_grad(loss, (0, 1), has_aux=True)(queries, bank)
    return pull, jax.lax.psum(push, AXIS), jax.lax.psum(value, AXIS)

  split = P(None, AXIS)
  mapped = jax.shard_map(
    objective, mesh=mesh, in_specs=(split, split, P()), out_specs=(split, P(), P()), check_vma=False
  )
  arguments = shape(pairing.query_views), shape(pairing.key_views), jnp.zeros((setting.size, config.model.dim))  # fmt: skip
  return jax.jit(mapped).lower(*arguments).compile().as_text(), 0


def replicated_loss(queries_Qxbxd, keys_Vxbxd, bank_kxD, pairs, temperature, bank_temperature):
  """(sum of both players' losses, the queries' loss): this device's rows of means over the batch.

  Queries, keys and bank are unit vectors; each player gets the gradient of its own loss only.
  """
  keys = losses.gather(keys_Vxbxd)
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


def measure(config, devices, replicated):
  """{kind: [count, bytes]}, with the objective's part."""
  text, encoder = (compile_replicated if replicated else compile_step)(config)
  rows = collectives.table(text, devices)
  found = {row.kind: [row.count, round(row.bytes)] for row in rows}
  share = (devices - 1) / devices
  return found | {"objective": round(sum(row.bytes for row in rows) - 2 * share * encoder)}


def sweep():
  """{config: {devices: `measure`}}, each in a process of its own."""
  found = {}
  for name in CONFIGS:
    for devices in DEVICES:
      groups = f"--config.bn.group_size={min(32, 256 // devices)}"
      flags = [f"--config=configs/{name}.py", *TINY, groups, "--config.data.batch_size=256", "--config.bank.size=65536"]  # fmt: skip
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
  parser.add_argument("--replicated", action="store_true")
  parser.add_argument("--sweep", action="store_true")
  parser.add_argument("--json", action="store_true", help="one line for programs")
  parser.add_argument("--out", default=record.RESULTS)
  options, rest = parser.parse_known_args(argv)
  if options.sweep:
    command = "python -m benchmarks.collectives " + " ".join(argv)
    print(record.write(options.out, "collectives", command, {"sent_bytes": sweep()}))
    return 0
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", options.devices)
  try:
    config, _ = main.parse(rest)
    found = measure(config, options.devices, options.replicated)
  except planning.ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if options.json:
    print(json.dumps(found))
    return 0
  objective = found.pop("objective")
  for kind, (count, size) in found.items():
    print(f"{count:4} x {kind:16} {size:14,.0f} bytes")
  print(f"objective {objective:,.0f} bytes of {sum(size for _, size in found.values()):,.0f} per device and step")  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
