"""The quickstart over several seeds: trained against untrained encoder and raw pixels, and the time.

  python -m benchmarks.digits [--seeds=3] [--runs=DIR] [--held-out] [--set=--config.objective=moco ...]

Per seed: pre-training with configs/adco_digits.py, kNN, linear probe, each a process of its own, as
launch/quickstart.sh runs them. Prints mean and spread over seeds; writes a JSON file with every number
to benchmarks/results/. Runs that are already in DIR are taken from there. --held-out fits on 897 train
images and scores the other 400 instead of the test images: how settings are compared (docs/small_data.md).
"""

import argparse
import glob
import json
import os
import subprocess
import sys
import time

import numpy as np

from adco_jax.data.sources.loading import load_source
from benchmarks import record

HELD_OUT = 400
TASKS = {"knn": "configs/knn.py", "linear": "configs/linear.py:small"}


def run_seed(workdir, seed, changes, config="configs/adco_digits.py", tasks=TASKS):
  """({task: results}, seconds of each process) of one seed."""
  main = [sys.executable, "-m", "adco_jax.main"]
  pretrain = [f"--config.seed={seed}", f"--workdir={workdir}", *changes]
  commands = {"pretrain": [*main, f"--config={config}", *pretrain]}
  for task in tasks:
    commands[task] = [*main, f"--config={TASKS[task]}", f"--config.pretrained={workdir}"]
  seconds = {}
  for name, command in commands.items():
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds[name] = round(time.perf_counter() - start, 1)
  found = {}
  for task in tasks:
    (path,) = glob.glob(os.path.join(workdir, "eval", f"{task}-*.json"))
    with open(path) as file:
      found[task] = json.load(file)["results"]
  return found, seconds


def hold_out(path):
  """Writes train without its last 400 images, and these as test; returns the overrides that use them."""
  source = load_source("digits", "", "train")
  images, labels = source.images, source.labels
  fit, held = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
  np.savez(
    path,
    train_images=images[fit],
    train_labels=labels[fit],
    test_images=images[held],
    test_labels=labels[held],
  )
  return ["--config.data.source=npz", f"--config.data.dir={path}"]


def summarise(results):
  """{task: {representation: {labels: (mean, spread) over seeds}}}; few labels enter by their mean."""
  table = {}
  for task in TASKS:
    rows = table[task] = {}
    for name, scores in results[0][task].items():
      rows[name] = {}
      for labels in scores:
        values = [r[task][name][labels] for r in results]
        values = [v if isinstance(v, float) else v["mean"] for v in values]
        rows[name][labels] = [
          float(np.mean(values)),
          float(np.std(values, ddof=min(1, len(values) - 1))),
        ]
  return table


def main(argv):
  """Runs, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--runs", default="runs/digits_benchmark")
  parser.add_argument("--held-out", action="store_true", help="score a slice of train, not test")
  parser.add_argument("--set", action="append", default=[], help="an override of the config")
  parser.add_argument("--name", default="digits", help="of the result file")
  options = parser.parse_args(argv)
  changes = list(options.set)
  if options.held_out:
    os.makedirs(options.runs, exist_ok=True)
    changes += hold_out(os.path.join(options.runs, "held_out.npz"))
  runs = []
  for seed in range(options.seeds):
    runs.append(run_seed(os.path.join(options.runs, f"seed{seed}"), seed, changes))
    print(f"seed {seed}: seconds {runs[-1][1]}", flush=True)
  table = summarise([found for found, _ in runs])
  for task, rows in table.items():
    print(f"{task} top-1, mean +- spread over {options.seeds} seeds")
    for name, scores in rows.items():
      print(f"  {name:10}" + "".join(f"{k:>5}: {m:.3f} +- {s:.3f}" for k, (m, s) in scores.items()))
  result = {
    "table": table,
    "seconds": [s for _, s in runs],
    "seeds": options.seeds,
    "changes": options.set,
    "scored": "400 held-out train images" if options.held_out else "500 test images",
  }
  command = "python -m benchmarks.digits " + " ".join(argv)
  print(record.write(record.RESULTS, options.name, command, result))


if __name__ == "__main__":
  main(sys.argv[1:])
