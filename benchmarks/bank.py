"""What the second player costs: AdCo's objective for growing banks, ours and as the authors write it.

  python -m benchmarks.bank [--rows 4096 16384 65536 262144] [--rounds=7]
  python -m benchmarks.bank --target=benchmarks/targets/h200.txtpb --step_gigabytes=157.2     its share of a GPU's step

One call is all that a bank adds to a step of 256 pairs: both infonce, the gradient of the queries, the bank's gradient and
its update, the accuracy. Theirs (training/train.py:30-67): keys and bank concatenated to one array of logits, softmax
twice, top-1 of the logits, the bank [D, K] moved by its closed form. Both are compiled by jax.jit for one device; infonce,
gradients and momenta of the bank are compared first. Rounds alternate in one process; user + sys time beside the clock's.
With --target nothing runs: the objective is compiled for that GPU (see benchmarks/gpu_program) and its bytes are counted
against --step_gigabytes, what gpu_program says of the whole step.
"""

import argparse
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from adco_jax.errors import ConfigError
from adco_jax.objectives import infonce
from adco_jax.objectives.adco import AdCo, Bank, ascend_transform
from adco_jax.runtime import sharding
from adco_jax.runtime.sharding import AXIS
from adco_jax.tasks import estimate
from benchmarks import hlo, record

BATCH, DIM = 256, 128
TEMPERATURE, BANK_TEMPERATURE, RATE, MOMENTUM, DECAY = (
  0.12,
  0.02,
  3.0,
  0.9,
  1e-4,
)  # configs/adco_r50
PAIRS = ((0, 0, 1.0),)
HIGHEST = jax.lax.Precision.HIGHEST


def ours(mesh):
  """(update, start): update is (queries [B, D], keys [B, D], bank [K, D], momentum) -> (loss, accuracy, gradient, bank, momentum);
  start makes (bank, momentum) of rows [K, D].
  """
  player = AdCo(TEMPERATURE, True, Bank(temperature=BANK_TEMPERATURE))
  ascender = ascend_transform(RATE, MOMENTUM, DECAY)

  def play(queries, keys, bank):
    def loss(queries, bank):
      keys_VxBxD = infonce.gather(keys[None])
      return player.contrast({"bank": bank}, queries[None], keys_VxBxD, PAIRS)

    (_, aux), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(queries, bank)
    return jax.lax.psum((aux["train/query_loss"], aux["train/accuracy"]), AXIS), gradients

  rows = P(AXIS)
  mapped = jax.shard_map(play, mesh=mesh, in_specs=rows, out_specs=(P(), (rows, rows)))

  def update(queries, keys, bank, state):
    (loss, accuracy), (gradient, push) = mapped(queries, keys, bank)
    updates, state = ascender.update(push, state, bank)
    return loss, accuracy, gradient, optax.apply_updates(bank, updates), state

  return update, lambda bank: (jnp.asarray(bank), ascender.init(jnp.asarray(bank)))


def authors(mesh):
  """The same by the authors' operations; bank and momentum are [D, K]."""
  del mesh

  def update(queries, keys, bank, momentum):
    norms = jnp.linalg.norm(bank, axis=0, keepdims=True)
    rows = bank / jnp.maximum(norms, 1e-12)

    def logits(queries):
      own, negatives = (jnp.matmul(queries, x, precision=HIGHEST) for x in (keys.T, rows))
      return jnp.concatenate([own, negatives], 1), negatives

    def entropy(queries):
      both, negatives = logits(queries)
      labels = jnp.arange(len(queries))
      loss = optax.softmax_cross_entropy_with_integer_labels(both / TEMPERATURE, labels)
      return jnp.mean(loss), (both, negatives, jnp.mean(jnp.argmax(both, 1) == labels))

    (loss, (both, negatives, accuracy)), gradient = jax.value_and_grad(entropy, has_aux=True)(queries)  # fmt: skip
    p = jax.nn.softmax(both / BANK_TEMPERATURE, 1)[:, len(keys) :]
    pull = jnp.matmul(queries.T, p, precision=HIGHEST) / len(queries)
    push = -(pull - jnp.mean(p * negatives, 0) * rows) / norms / BANK_TEMPERATURE
    momentum = MOMENTUM * momentum + push + DECAY * bank
    return loss, accuracy, gradient, bank - RATE * momentum, momentum

  return update, lambda bank: (jnp.asarray(bank.T), jnp.zeros(bank.T.shape, bank.dtype))


WAYS = {"ours": ours, "authors": authors}


def prepare(rows):
  """{way: (compiled, queries, keys, (bank, momentum))}: queries near their keys, a bank of norms about one."""
  rng = np.random.RandomState(0)
  draw = lambda n: rng.standard_normal((n, DIM)).astype(np.float32) / np.float32(DIM**0.5)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  keys, bank = unit(draw(BATCH)), draw(rows)
  queries = unit(keys + draw(BATCH))
  found, mesh = {}, sharding.create_mesh(jax.devices()[:1])
  for name, way in WAYS.items():
    update, start = way(mesh)
    own = start(bank)
    compiled = jax.jit(update, donate_argnums=(2, 3)).lower(queries, keys, *own).compile()
    found[name] = (compiled, queries, keys, own)
  return found


def largest_difference(ready):
  """Of loss, queries' gradient and bank's momentum between both ways, relative to the largest number of each."""
  outputs = {}
  for name, (compiled, queries, keys, own) in ready.items():
    loss, _, gradient, _, state = compiled(queries, keys, *jax.tree.map(jnp.copy, own))
    (momentum,) = jax.tree.leaves(state)
    outputs[name] = (loss, gradient, momentum.T if name == "authors" else momentum)
  pairs = zip(*outputs.values(), strict=True)
  return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def measure(rows, rounds, seconds=0.5):
  """Medians of a call in milliseconds, what both ways differ by, megabytes of temporaries."""
  ready = prepare(rows)
  found = {"rows": rows, "largest_difference": largest_difference(ready)}
  spent, calls = {name: [] for name in WAYS}, {}
  for number in range(rounds + 1):  # the first only counts how many calls fill `seconds`
    for name, (compiled, queries, keys, own) in ready.items():
      count = calls.get(name, 2)
      cpu, wall = time.process_time(), time.perf_counter()
      for _ in range(count):
        *_, bank, momentum = compiled(queries, keys, *own)
        own = bank, momentum
      jax.block_until_ready(own)
      cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
      ready[name] = (compiled, queries, keys, own)
      calls.setdefault(name, max(1, round(seconds * count / wall)))
      if number:
        spent[name].append((1e3 * cpu / count, 1e3 * wall / count))
  for name, times in spent.items():
    cpu, wall = map(statistics.median, zip(*times, strict=True))
    held = ready[name][0].memory_analysis().temp_size_in_bytes / 1e6
    found[name] = {
      "cpu_milliseconds": cpu,
      "wall_milliseconds": wall,
      "temporaries_megabytes": held,
    }
  for unit in ("cpu", "wall"):
    pairs = zip(spent["authors"], spent["ours"], strict=True)
    ratios = [a[unit == "wall"] / b[unit == "wall"] for a, b in pairs]
    found[f"{unit}_ratio"] = statistics.median(ratios)
  return found


def share(rows, target, step_gigabytes):
  """Gigabytes that the objective and the bank's update move on a GPU, and their share of the step's."""
  devices, _ = estimate.prepare(f"gpu:{target}")
  mesh = sharding.create_mesh(devices)
  update, _ = ours(mesh)
  array = lambda n: jax.ShapeDtypeStruct(
    (n, DIM), jnp.float32, sharding=sharding.batch_sharding(mesh)
  )
  ascender = ascend_transform(RATE, MOMENTUM, DECAY)
  state = jax.tree.map(lambda _: array(rows), jax.eval_shape(ascender.init, array(rows)))
  options = sharding.compiler_options("gpu")
  step = jax.jit(update, donate_argnums=(2, 3), compiler_options=options)
  compiled = step.lower(array(BATCH), array(BATCH), array(rows), state).compile()
  found = hlo.kernels(compiled.as_text())
  moved = sum(kernel.moved for kernel in found) / 1e9
  return {"rows": rows, "launches": len(found), "gigabytes": moved, "share": moved / step_gigabytes}


def run(argv):
  """Measures or compiles, prints, writes; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384, 65536, 262144])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--target", help="file that describes a GPU")
  parser.add_argument("--step_gigabytes", type=float, default=157.2, help="of adco_r50, batch 256")
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options = parser.parse_args(argv)
  found = []
  for rows in options.rows:
    if options.target:
      try:
        one = share(rows, options.target, options.step_gigabytes)
      except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
      print("{rows:8,} rows: {launches} launches, {gigabytes:.2f} GB, {share:.2%} of the step".format(**one))  # fmt: skip
    else:
      one = measure(rows, options.rounds)
      times = "  ".join(f"{n} {one[n]['cpu_milliseconds']:.1f}" for n in WAYS)
      print(f"{rows:8,} rows: {times} ms of CPU, ratio {one['cpu_ratio']:.2f} (clock {one['wall_ratio']:.2f}), largest difference {one['largest_difference']:.1e}", flush=True)  # fmt: skip
    found.append(one)
  stem = "bank-gpu" if options.target else "bank"
  print(record.write(options.out, stem, "python -m benchmarks.bank " + " ".join(argv), {"banks": found, "load": os.getloadavg()}))  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
