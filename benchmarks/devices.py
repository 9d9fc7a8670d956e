"""The same run on other devices, processes and parts: how far its numbers are from those of one device.

  python -m benchmarks.devices            every mode in float64, 3 updates after the bank's initialisation
  python -m benchmarks.devices --curves   one mode in float32, 200 updates, curves laid over each other

Every run is one of launch/local.sh on CPU devices, data loading, augmentation and checkpoints included.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

from adco_jax.workdir.metrics import read_metrics
from benchmarks import record

SMALL = [
  "--config=configs/adco_digits.py", "--config.model.width=0.125", "--config.bn.group_size=8",
  "--config.method.bank.init=trained", "--config.eval.every_epochs=0",
]  # fmt: skip
EXACT = [
  "--config.compute_dtype=float64", "--config.method.bank.size=128", "--config.stop_at_step=5",
  "--config.log.every_steps=1",
]  # fmt: skip
LONG = ["--config.stop_at_step=208", "--config.log.every_steps=10"]
SETUPS = {  # processes, devices of each, flags
  "1 device": (1, 1, []),
  "2 devices": (1, 2, []),
  "4 devices": (1, 4, []),
  "8 devices": (1, 8, []),
  "2 processes": (2, 1, []),
  "4 processes": (4, 1, []),
  "2 processes of 4 devices": (2, 4, []),
  "8 devices, optim.shard": (1, 8, ["--config.optim.shard=True"]),
  "2 devices, accumulate=2": (1, 2, ["--config.accumulate=2"]),
  "2 devices, accumulate=4": (1, 2, ["--config.accumulate=4"]),
}
MODES = {
  "single": ((16, 0.6, 1.0),) * 2,
  "symmetric": ((16, 0.6, 1.0),) * 2,
  "multicrop": ((16, 0.6, 1.0), (16, 0.6, 1.0), (12, 0.3, 0.6)),
  "symmetric_multicrop": ((16, 0.6, 1.0), (16, 0.6, 1.0), (12, 0.3, 0.6)),
}


def train(workdir, setup, flags, exact):
  """(lines of metrics, {name: array} of the last state) of one run of launch/local.sh."""
  processes, devices, more = SETUPS[setup]
  around = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": str(int(exact)),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  command = ["bash", "launch/local.sh", str(processes), *SMALL, *flags, *more, f"--workdir={workdir}"]  # fmt: skip
  done = subprocess.run(command, env=around, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{setup}: status {done.returncode}\n{done.stderr[-2000:]}")
  assert f"{processes * devices} x cpu" in done.stdout, done.stdout
  logging.getLogger("absl").setLevel(logging.ERROR)
  (step,) = re.findall(r"stopped at step (\d+)", done.stdout)
  return read_metrics(workdir), restore(f"{workdir}/checkpoints/{step}/state")


def restore(folder):
  """Every array of a checkpoint, whoever wrote it, as NumPy."""
  handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  described = handler.metadata(os.path.abspath(folder)).item_metadata.tree
  numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  args = jax.tree.map(lambda _: numpy, described, is_leaf=lambda x: hasattr(x, "shape"))
  return handler.restore(os.path.abspath(folder), args=ocp.args.PyTreeRestore(restore_args=args))


def losses(lines):
  """{name: array over logged steps} of what the players are told."""
  names = ("train/query_loss", "bank/loss", "train/accuracy")
  return {n: np.array([line[n] for line in lines if n in line]) for n in names}


def largest(one, other):
  """Largest absolute difference of two trees of arrays."""
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return max(float(np.abs(np.asarray(a, np.float64) - b).max(initial=0)) for a, b in pairs)


def exact(scratch):
  """{mode: {setup: {'losses', 'bank', 'state'}}}: differences to one device, float64."""
  found = {}
  for mode, crops in MODES.items():
    flags = [*EXACT, f"--config.views.mode={mode}", f"--config.views.crops={crops}"]
    first = None
    for setup in SETUPS:
      lines, state = train(f"{scratch}/{mode}/{setup.replace(' ', '_')}", setup, flags, True)
      first = first or (losses(lines), state)
      assert state["ascend"]["bank"].dtype == np.float64
      one = found.setdefault(mode, {})[setup] = {
        "losses": largest(first[0], losses(lines)),
        "bank": largest(first[1]["ascend"], state["ascend"]),
        "state": largest(first[1], state),
      }
      print(f"{mode:20} {setup:26}", *(f"{k} {v:.1e}" for k, v in one.items()), flush=True)
  return found


def curves(scratch, picture):
  """{setup: losses of 20 logged steps}, float32; draws them."""
  found = {}
  for setup in SETUPS:
    lines, _ = train(f"{scratch}/long/{setup.replace(' ', '_')}", setup, LONG, False)
    found[setup] = losses(lines)["train/query_loss"].tolist()
    apart = np.abs(np.array(found[setup]) / found["1 device"] - 1).max()
    print(
      f"{setup:26} last {found[setup][-1]:.4f}, at most {apart:.1e} from one device", flush=True
    )
  draw(found, picture)
  return found


def draw(found, path):
  """All curves in one picture."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=110, layout="constrained")
  for (setup, values), style in zip(found.items(), 3 * ["-", "--", ":", "-."], strict=False):
    axes.plot(10 * np.arange(1, len(values) + 1), values, style, label=setup, linewidth=1.6)
  axes.set(xlabel="step (the first 8 initialise the bank)", ylabel="query loss, float32")
  axes.legend(frameon=False, fontsize=8, ncols=2)
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path)


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
  parser.add_argument("--curves", action="store_true")
  parser.add_argument("--picture", default="docs/scaling_curves.png")
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as scratch:
    found = curves(scratch, options.picture) if options.curves else exact(scratch)
  stem = "devices-curves" if options.curves else "devices"
  print(record.write(options.out, stem, "python -m benchmarks.devices " + " ".join(argv), {"differences" if not options.curves else "query_loss": found}))  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
