"""What an encoder is worth downstream: other classes, few labels, fine-tuning. Every run is one command of the program.

  python -m benchmarks.downstream transfer --data=/datasets/cifar10.npz     pre-trained on half of the classes, scored on the others
  python -m benchmarks.downstream finetune --data=/datasets/cifar10.npz     1, 10, 100 % of the labels: from AdCo's encoder, from
                                                                            random weights, and a linear classifier on it

ResNet-18 of --width. Rates of fine-tuning are chosen on held-out train images of the first seed, once per share of labels (all
labels take those of 10 %); every score is of the last step and the test images. The same command goes on where it was
killed; what is over in --runs is only read. Writes benchmarks/results/downstream-PART.json.
"""

import argparse
import concurrent.futures
import glob
import json
import os
import queue
import subprocess
import sys

import numpy as np

from adco_jax.runtime.files import read_json
from adco_jax.workdir.metrics import read_metrics
from benchmarks import record

RATES = {
  "adco": ((0.01, 20), (0.05, 4)),
  "random": ((0.05, 1), (0.1, 1)),
}  # backbone's; the head's is so many times that
SHARES = {"0.01": (60, 50), "0.1": (15, 100), "1.0": (2, 100)}  # of the labels: (epochs, batch)


class Runs:
  """Commands of the program, so many side by side, each on cores of its own."""

  def __init__(self, folder, parallel):
    self.folder, self._slots, self._parallel = folder, queue.SimpleQueue(), parallel
    for slot in range(parallel):
      self._slots.put(slot)
    os.makedirs(folder, exist_ok=True)

  def place(self, name):
    """The workdir of a run."""
    return os.path.join(self.folder, name)

  def all(self, commands):
    """Runs {name: flags}; raises CalledProcessError for the first that fails."""
    with concurrent.futures.ThreadPoolExecutor(self._parallel) as pool:
      [*pool.map(self._one, commands.items())]

  def train(self, trainings):
    """The same for {workdir's name: flags of a training}."""
    self.all({n: [*flags, f"--workdir={self.place(n)}"] for n, flags in trainings.items()})

  def _one(self, item):
    name, flags = item
    slot = self._slots.get()
    cores = set(sorted(os.sched_getaffinity(0))[slot :: self._parallel])
    try:
      with open(f"{self.place(name)}.log", "ab") as log:
        subprocess.run(
          [sys.executable, "-m", "adco_jax.main", *flags], check=True, stdout=log, stderr=log,
          preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
    finally:
      self._slots.put(slot)
    print(f"{name}: done", flush=True)


def halves(path, folder):
  """Two .npz files, of the classes 0 to 4 and of the others."""
  found = []
  for number, wanted in enumerate((range(5), range(5, 10))):
    out = os.path.join(folder, f"half{number}.npz")
    if not os.path.exists(out):
      with np.load(path) as there:
        rows = {s: np.isin(there[f"{s}_labels"], wanted) for s in ("train", "test")}
        cut = {f"{s}_images": there[f"{s}_images"][rows[s]] for s in rows}
        cut |= {f"{s}_labels": there[f"{s}_labels"][rows[s]] - wanted[0] for s in rows}
      np.savez(out, **cut)
    found.append(out)
  return found


def adco(data, seed, options):
  """Flags of a pre-training."""
  return [
    "--config=adco_cifar10_r18", f"--config.data.dir={data}", f"--config.seed={seed}", f"--config.epochs={options.epochs}",
    f"--config.model.width={options.width}", "--config.data.batch_size=128", "--config.eval.every_epochs=2",
    "--config.eval.max_images=6000", "--config.data.num_examples=0",
  ]  # fmt: skip


def supervised(data, seed, options):
  """Flags of a training on labels, as long as a pre-training."""
  return [
    "--config=supervised_cifar10", f"--config.data.dir={data}", f"--config.seed={seed}", f"--config.model.width={options.width}",
    f"--config.epochs={options.epochs}", "--config.data.num_examples=0",
  ]  # fmt: skip


def transfer(runs, options):
  """{task: rows of its table} on the other classes; `adco-all` alone has seen images of them, without their labels."""
  first, second = halves(options.data, runs.folder)
  trainings = {"digits": ["--config=adco_digits"], "adco-all": adco(options.data, 0, options)}
  for seed in range(options.seeds):
    trainings[f"adco-{seed}"] = adco(first, seed, options)
    trainings[f"supervised-{seed}"] = supervised(first, seed, options)
  runs.train(trainings)
  tables = {}
  for task in ("knn", "linear:small"):
    flags = [f"--config={task}", f"--config.pretrained={','.join(map(runs.place, trainings))}",
             "--config.data.source=npz", f"--config.data.dir={second}", "--config.data.test_split=test"]  # fmt: skip
    name = task.partition(":")[0]
    before = {*glob.glob(f"{runs.folder}/comparison-{name}-*.json")}
    if not before:
      runs.all({f"score-{name}": flags})
    (path,) = {*glob.glob(f"{runs.folder}/comparison-{name}-*.json")}
    tables[name] = read_json(path)["rows"]
  return tables


def tuning(start, share, rates, seed, runs, options):
  """Flags of one fine-tuning; all labels hold none out."""
  (epochs, batch), (rate, head) = SHARES[share], rates
  few = float(share) < 1
  begin = [f"--config.pretrained={runs.place('adco-all')}"] + ["--config.init=random"] * (
    start == "random"
  )
  return [
    "--config=finetune:small", *begin, f"--config.label_share={share}", f"--config.seed={seed}", f"--config.epochs={epochs}",
    f"--config.data.batch_size={batch}", "--config.bn.group_size=0", f"--config.optim.learning_rate={rate}",
    f"--config.optim.head_rate={head}", f"--config.hold_out={0.1 if few else 0.0}",
    f"--config.eval.every_epochs={epochs if few else 0}",
  ]  # fmt: skip


def finetune(runs, options):
  """Test top-1 of every seed by start and share, rates, and what they were chosen from."""
  runs.train({"adco-all": adco(options.data, 0, options)})
  name = lambda start, share, rates, seed: f"{start}-{share}-{rates[0]}-{seed}"
  tries = [(s, share, r, 0) for s in RATES for share in ("0.01", "0.1") for r in RATES[s]]
  runs.train({name(*key): tuning(*key, runs, options) for key in tries})
  seen = {key[:3]: held_out(runs.place(name(*key))) for key in tries}
  best = {(s, share): max(RATES[s], key=lambda r: seen[s, share, r]) for s, share, _ in seen}
  best |= {(s, "1.0"): best[s, "0.1"] for s in RATES}
  wanted = {
    (s, share, seed): (s, share, r, seed)
    for (s, share), r in best.items()
    for seed in range(options.seeds)
  }
  runs.train({name(*key): tuning(*key, runs, options) for key in wanted.values()})
  table = {f"{s} {share}": [] for s, share in best}
  for (s, share, _), key in wanted.items():
    table[f"{s} {share}"].append(tested(runs.place(name(*key)), "finetune")["all"])
  linear = [probe(seed, runs) for seed in range(options.seeds)]
  table |= {f"linear {share}": [scores[share] for scores in linear] for share in SHARES}
  return {
    "top1": table, "rates": {f"{s} {share}": r for (s, share), r in best.items()},
    "held_out": [[*key, value] for key, value in seen.items()],
  }  # fmt: skip


def probe(seed, runs):
  """{share: top-1} of logistic regression on the frozen encoder; one draw of few labels, that of a fine-tuning's seed."""
  stored = os.path.join(runs.folder, f"linear-{seed}.json")
  if not os.path.exists(stored):
    flags = ["--config=linear:small", f"--config.pretrained={runs.place('adco-all')}", f"--config.seed={seed}",
             "--config.label_shares=(0.01,0.1)", "--config.labels_per_class=()", "--config.draws=1"]  # fmt: skip
    before = results(runs.place("adco-all"), "linear")
    runs.all({f"linear-{seed}": flags})
    (path,) = results(runs.place("adco-all"), "linear") - before
    os.link(path, stored)
  scores = read_json(stored)["results"]["trained"]
  few = {k: v["mean"] for k, v in scores.items() if isinstance(v, dict)}
  return dict(zip(("0.01", "0.1"), few.values(), strict=True)) | {"1.0": scores["all"]}


def results(workdir, task):
  """Paths of a task's results."""
  return {*glob.glob(os.path.join(workdir, "eval", f"{task}-*.json"))}


def tested(workdir, task):
  """Scores of the last step on test images."""
  return max(map(read_json, results(workdir, task)), key=lambda facts: facts["step"])["results"][
    "trained"
  ]


def held_out(workdir):
  """The last top-1 on held-out images."""
  return [x["classifier/top1"] for x in read_metrics(workdir) if "classifier/top1" in x][-1]


def main(argv):
  """Runs, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("part", choices=("transfer", "finetune"))
  parser.add_argument("--data", required=True, type=os.path.abspath)
  parser.add_argument("--runs", default="runs/downstream")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--epochs", type=int, default=6, help="of AdCo, two of which fill its bank")
  parser.add_argument("--width", type=float, default=0.25)
  parser.add_argument("--parallel", type=int, default=2)
  options = parser.parse_args(argv)
  part = {"transfer": transfer, "finetune": finetune}[options.part]
  found = part(Runs(os.path.abspath(options.runs), options.parallel), options)
  print(json.dumps(found, indent=1))
  command = " ".join(["python -m benchmarks.downstream", *(a for a in argv if "--data" not in a)])
  print(
    record.write(
      record.RESULTS,
      f"downstream-{options.part}",
      command,
      {"options": vars(options) | {"data": "", "runs": ""}, **found},
    )
  )


if __name__ == "__main__":
  main(sys.argv[1:])
