"""The same training step here and in PyTorch, in turns on one machine: milliseconds, pairs/s, memory, start.

  python -m benchmarks.against_torch --config=adco_r50 --config.data.batch_size=256                # on a GPU
  python -m benchmarks.against_torch --config=adco_r50 --config.data.batch_size=8 --config.bn.group_size=8 --steps=2
  python -m benchmarks.against_torch --config=adco_cifar10_r18 --torch=eager,compile --ours=plain

Takes any pre-training config of AdCo with any override. Views are random uint8 images on the device: no data set, no
TensorFlow. Ours is the compiled step of training, `plain` (augment.policy=none) and `augmented` (the config's policy);
torch's (benchmarks/torch_step, which says how it is made fast) is plain. BatchNorm: ours over groups of bn.group_size, torch's over the batch.
Variants of torch: eager; compile (torch.compile); reduce-overhead (its CUDA graphs); graph (the whole step as one graph).
Every side is a process of its own that compiles once. In each round every side runs --steps steps and waits once, at their
end. Milliseconds are medians over the rounds; CPU time is user + system of the side's process, all threads: what to go by
where others use the machine too. Ratio: torch's best variant over ours, above 1 where ours is faster.
On a CPU torch's threads sleep while they wait (OMP_WAIT_POLICY=passive): on two cores that others used as well, waiting
busily took twenty times the time of a small step and cannot be told from work. OMP_WAIT_POLICY=active is for an idle machine.
Memory: the most that arrays took on a GPU, and the whole process on a CPU. Seconds to the first step begin after all
imports; one side is built after the other. What does not fit beside the others plays alone after them.
A JSON file with everything goes to benchmarks/results/ (--out=DIR for another place).
"""

import argparse
import functools
import importlib.util
import os
import resource
import statistics
import sys

from adco_jax import build, main
from adco_jax.config.plan import Machine
from adco_jax.errors import ConfigError
from benchmarks import turns

OURS = ("plain", "augmented")
TORCH = ("eager", "compile", "reduce-overhead", "graph")
PLAIN = "--config.augment.policy=none"


class Ours:
  """The compiled step of training on synthetic views."""

  def __init__(self, words):
    import jax

    from benchmarks import step

    config, _ = main.parse(words)
    train_step, self.state, *self.views, self.plan = step.prepare(config)
    self.compiled = train_step.lower(self.state, *self.views).compile()
    self.warm_up = 1
    self.jax = jax

  def play(self, steps):
    """The loss after so many more steps."""
    for _ in range(steps):
      self.state, metrics = self.compiled(self.state, *self.views)
    self.jax.block_until_ready(self.state)
    return float(metrics["train/query_loss"])

  def rest(self):
    """Nothing can be given back."""

  def facts(self):
    """What is known after some steps."""
    device, memory = self.jax.local_devices()[0], self.compiled.memory_analysis()
    stats = device.memory_stats() or {}
    return {
      "peak_bytes": stats.get("peak_bytes_in_use") or peak_of_process(),
      "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
      "compute_dtype": self.plan.compute_dtype,
      "device": device.device_kind,
      "version": self.jax.__version__,
    }


class Torch:
  """A variant of torch's step on synthetic views."""

  def __init__(self, words, variant):
    import torch

    from benchmarks import torch_step

    self.cuda = torch.cuda if torch.cuda.is_available() else None
    device = torch.device("cuda" if self.cuda else "cpu")
    if self.cuda:
      torch.backends.cudnn.benchmark = True
      torch.set_float32_matmul_precision("high")
    config, _ = main.parse(words)
    plan = make_plan(config, "gpu" if self.cuda else "cpu")
    torch.manual_seed(0)

    def image(view):
      shape = (plan.batch_size, plan.view_sizes[view], plan.view_sizes[view], 3)
      return torch.randint(256, shape, dtype=torch.uint8, device=device)

    pairing = plan.train_pairing
    made = torch_step.Step(config, plan, getattr(torch, plan.compute_dtype)).to(device)
    views = [image(v) for v in pairing.query_views], [image(v) for v in pairing.key_views]
    self.update = torch_step.make_update(made, variant, *views)
    self.keeps = variant in ("reduce-overhead", "graph")  # memory that its graphs point into
    self.version = torch.__version__
    self.warm_up = 3 if self.cuda else 1  # its graphs are captured, its algorithms chosen

  def play(self, steps):
    """The loss after so many more steps."""
    for _ in range(steps):
      loss = self.update()
    return loss.item()

  def rest(self):
    """Gives back what the next turn takes again."""
    if self.cuda and not self.keeps:
      self.cuda.empty_cache()

  def facts(self):
    """What is known after some steps."""
    return {
      "peak_bytes": self.cuda.max_memory_allocated() if self.cuda else peak_of_process(),
      "reserved_bytes": self.cuda.max_memory_reserved() if self.cuda else None,
      "device": self.cuda.get_device_name() if self.cuda else "cpu",
      "version": self.version,
    }


def peak_of_process():
  """Bytes."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_plan(config, backend):
  """The `Plan` on one device."""
  images, classes = config.data.num_examples, config.data.num_classes
  return build.plan_for(config, images, classes, Machine(backend=backend, devices=1))


def make_sides(words, ours, torch):
  """A `Side` for each name."""
  shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the card is
  changes = {"plain": [PLAIN], "augmented": []}
  sides = [
    turns.Side(f"ours {name}", functools.partial(Ours, words + changes[name]), "benchmarks.step", shared)
    for name in ours
  ]  # fmt: skip
  policy = os.environ.get("OMP_WAIT_POLICY", "passive")
  alone = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": policy}
  return sides + [
    turns.Side(f"torch {name}", functools.partial(Torch, words, name), "torch", alone)
    for name in torch
  ]


def describe(side, batch, pairs):
  """A side's numbers."""
  if not side.turns:
    return {"error": "no time left", **side.facts}
  wall, cpu, values = zip(*side.turns, strict=True)
  median = statistics.median(wall)
  return {
    "milliseconds": median,
    "pairs_per_second": 1e3 * batch * pairs / median,
    "cpu_milliseconds": statistics.median(cpu),
    "rounds": wall,
    "cpu_rounds": cpu,
    "loss": values[-1],
    **side.facts,
  }


def compare(sides):
  """{our side: {ratio by wall clock, by CPU time, torch's best variant}} of described sides."""
  timed = {name: x for name, x in sides.items() if "milliseconds" in x}
  theirs = [name for name in timed if name.startswith("torch")]
  if not theirs:
    return {}
  found = {}
  for name in timed.keys() - theirs:
    ratios = {"best": min(theirs, key=lambda other: timed[other]["milliseconds"])}
    for key in ("milliseconds", "cpu_milliseconds"):
      best = min(timed[other][key] for other in theirs)
      ratios[f"ratio_of_{key}"] = best / timed[name][key]
    found[name] = ratios
  return dict(sorted(found.items(), reverse=True))


def show(sides, ratios):
  """Lines of a table."""
  lines = [
    f"{'':22} {'ms/step':>9} {'pairs/s':>9} {'CPU ms':>9} {'GiB':>6} {'first step':>10}  ratio, by CPU time"
  ]
  for name, x in sides.items():
    if "milliseconds" not in x:
      lines.append(f"{name:22} failed: {x['error']}")
      continue
    row = f"{name:22} {x['milliseconds']:9.2f} {x['pairs_per_second']:9.1f} {x['cpu_milliseconds']:9.2f} "
    row += f"{x['peak_bytes'] / 2**30:6.2f} {x['seconds_to_first_step']:8.1f} s"
    if name in ratios:
      row += f"  {ratios[name]['ratio_of_milliseconds']:.2f}, {ratios[name]['ratio_of_cpu_milliseconds']:.2f}"
    row += ", alone" if x.get("alone") else ""
    lines.append(row + (f"  ended early: {x['error']}" if "error" in x else ""))
  return lines


def names_of(text, known, option):
  """The comma-separated names. Raises ConfigError."""
  names = text.split(",") if text else []
  for name in names:
    if name not in known:
      raise ConfigError(f"{option}={text}: no {name!r} there; use some of {','.join(known)}")  # fmt: skip
  return names


def parse(argv):
  """(options, words that the config is made of)."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=10, help="of each side in a round")
  parser.add_argument("--ours", default=",".join(OURS))
  parser.add_argument("--torch", default="", help="default: all on a GPU, else eager")
  parser.add_argument("--seconds", type=float, default=1e6, help="after them nothing more begins")
  parser.add_argument("--out", type=os.path.expanduser, default="")
  return parser.parse_known_args(argv)


def measure(words, config, options):
  """Everything as a dictionary. Raises ConfigError."""
  from benchmarks import torch_step

  torch_step.check(config)
  ours = names_of(options.ours, OURS, "--ours")
  variants = names_of(options.torch, TORCH, "--torch")
  if not variants:
    import torch

    variants = TORCH if torch.cuda.is_available() else ("eager",)
  load = os.getloadavg()
  sides = make_sides(words, ours, variants)
  turns.play(sides, options.rounds, options.steps, options.seconds)
  batch, pairs = config.data.batch_size, len(make_plan(config, "cpu").train_pairing.pairs)
  sides = {side.name: describe(side, batch, pairs) for side in sides}
  return {
    "batch_size": batch,
    "bn_group_size": config.bn.group_size,
    "steps_per_round": options.steps,
    "load_before_and_after": [load, os.getloadavg()],
    "ratios": compare(sides),
    "sides": sides,
  }


def run(argv):
  """Measures, prints, writes."""
  options, words = parse(argv)
  if not importlib.util.find_spec("torch"):
    print("error: PyTorch is not installed; pip install torch", file=sys.stderr)
    return 2
  try:
    config, workdir = main.parse(words)
    result = measure(words, config, options)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  from benchmarks import record

  facts = next((x for x in result["sides"].values() if "compute_dtype" in x), {})
  device = facts.get("device", "unknown").replace(" ", "_").lower()
  stem = f"against_torch-{os.path.basename(workdir)}-{device}-b{result['batch_size']}-{facts.get('compute_dtype', 'unknown')}"
  told = [word for word in argv if not word.startswith("--out")]
  command = "python -m benchmarks.against_torch " + " ".join(told)
  path = record.write(options.out or record.RESULTS, stem, command, result)
  print(*show(result["sides"], result["ratios"]), path, sep="\n")
  return 0 if result["ratios"] else 1


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
