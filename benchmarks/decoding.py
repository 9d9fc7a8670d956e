"""kNN after short runs whose photographs are decoded as small as their views allow, and whole: the same seeds.

  python -m benchmarks.decoding --data=FOLDER [--seeds=3] [--runs=DIR] [--set=--config.epochs=10 ...]

FOLDER: train/<class>/... and test/<class>/... of JPEGs more than twice as large as the views. Per seed one run of
configs/adco_photos.py with data.cut=fast, one with data.cut=pillow, and kNN of each, every one a process of its own. Prints and
writes top-1 of each seed, mean and spread, to benchmarks/results/decoding.json. Runs that are already in DIR are taken from there.
"""

import argparse
import os
import sys

import numpy as np

from benchmarks import digits, record

WAYS = ("fast", "pillow")


def main(argv):
  """Runs, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--data", required=True, type=os.path.abspath)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--runs", default="runs/decoding_benchmark")
  parser.add_argument("--set", action="append", default=[], help="an override of the config")
  options = parser.parse_args(argv)
  changes = [f"--config.data.dir={options.data}", *options.set]
  scores = {way: [] for way in WAYS}
  for seed in range(options.seeds):
    for way in WAYS:
      workdir = os.path.join(options.runs, f"{way}{seed}")
      found, _ = digits.run_seed(
        workdir, seed, [*changes, f"--config.data.cut={way}"], "configs/adco_photos.py", ("knn",)
      )
      scores[way].append({name: row["all"] for name, row in found["knn"].items()})
      print(f"seed {seed}, data.cut={way}: {scores[way][-1]}", flush=True)
  table = {}
  for way, rows in scores.items():
    table[way] = {name: [row[name] for row in rows] for name in rows[0]}
    means = (f"{name} {np.mean(v):.3f} +- {np.std(v):.3f}" for name, v in table[way].items())
    print(f"data.cut={way}: kNN top-1 " + ", ".join(means))
  command = "python -m benchmarks.decoding --data=FOLDER " + " ".join(options.set)
  print(record.write(record.RESULTS, "decoding", command, {"knn": table, "changes": options.set}))


if __name__ == "__main__":
  main(sys.argv[1:])
