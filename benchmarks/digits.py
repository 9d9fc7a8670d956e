"""The quickstart over several seeds: trained against untrained encoder and raw pixels, and the time.

  python -m benchmarks.digits [--seeds=3] [--runs=DIR] [--set=--config.objective=moco ...]

Per seed: pre-training with configs/adco_digits.py, kNN, linear probe, each a process of its own, as
launch/quickstart.sh runs them. Prints mean and spread over seeds; writes a JSON file with every number
to benchmarks/results/. Runs that are already in DIR are taken from there.
"""

import argparse
import glob
import json
import os
import subprocess
import sys
import time

import numpy as np

from benchmarks import record

TASKS = {"knn": "configs/knn.py", "linear": "configs/linear.py:small"}


def run_seed(workdir, seed, changes):
  """({task: results}, seconds of each process) of one seed."""
  main = [sys.executable, "-m", "adco_jax.main"]
  pretrain = [f"--config.seed={seed}", f"--workdir={workdir}", *changes]
  commands = {"pretrain": [*main, "--config=configs/adco_digits.py", *pretrain]}
  for task, config in TASKS.items():
    commands[task] = [*main, f"--config={config}", f"--config.pretrained={workdir}"]
  seconds = {}
  for name, command in commands.items():
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds[name] = round(time.perf_counter() - start, 1)
  found = {}
  for task in TASKS:
    (path,) = glob.glob(os.path.join(workdir, "eval", f"{task}-*.json"))
    with open(path) as file:
      found[task] = json.load(file)["results"]
  return found, seconds


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
        rows[name][labels] = [float(np.mean(values)), float(np.std(values))]
  return table


def main(argv):
  """Runs, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--runs", default="runs/digits_benchmark")
  parser.add_argument("--set", action="append", default=[], help="an override of the config")
  parser.add_argument("--name", default="digits", help="of the result file")
  options = parser.parse_args(argv)
  runs = []
  for seed in range(options.seeds):
    runs.append(run_seed(os.path.join(options.runs, f"seed{seed}"), seed, options.set))
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
  }
  command = "python -m benchmarks.digits " + " ".join(argv)
  print(record.write(record.RESULTS, options.name, command, result))


if __name__ == "__main__":
  main(sys.argv[1:])
