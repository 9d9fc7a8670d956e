"""One run of a comparison: trains it (or goes on), then scores its encoder by every protocol; all numbers in one file.

  python -m benchmarks.one_run OUT.json --config=adco_digits --workdir=DIR ...   everything behind OUT.json is a run's flags

kNN of backbone and of projected features at two settings, logistic regression, both also with few labels; always the last
checkpoint and all test images. k and temperature are fixed, the penalty is chosen on train images, but with few labels the
usual one: what was chosen with all of them would be more than these tell. `knn_left_out` is of train images, each among
all others. OUT.json also has the time of training's steps (by the log: others may run beside), the peak memory of the
process or of the device, what images were trained on and scored, all settings, and every commit that had a part in it.
With --untrained nothing is trained: the encoder that the run would begin with is scored.
"""

import os
import resource
import sys
import time

import jax
import numpy as np

from adco_jax import build, encoders, main
from adco_jax.config import plan as planning
from adco_jax.config.ranges import resolve_dtype
from adco_jax.data import order
from adco_jax.evaluation import few_labels, knn, linear, online
from adco_jax.runtime import sharding
from adco_jax.runtime.files import read_json, write_json
from adco_jax.tasks import scored_data
from adco_jax.workdir.files import canonical, flatten
from adco_jax.workdir.metrics import read_metrics
from benchmarks import record

KNN = {"k20": (20, 0.07), "k200": (200, 0.1)}  # DINO's best, and that of MoCo's demo and lightly
PENALTIES = (
  0.001,
  0.01,
  0.1,
  1.0,
  10.0,
)  # of the logistic regression, chosen on held-out train images
PER_CLASS, SHARES = (
  (1, 5, 10),
  (0.01, 0.1),
)  # few labels: so many of each class, or so large a share of train
DRAWS = 5
UNTRAINED = "--untrained"
NO_CURVE = {"held_out": [], "seconds_per_step": None, "pairs_per_second": None}


def embed(run, source):
  """(features [N, F], embeddings [N, D]) of all images of a source, each once."""
  config, mesh = run.config, run.mesh
  loader = build.create_loader(config, source, mesh)
  forward = online.make_forward(run.module, config.data.mean, config.data.std, mesh)
  view = dict(
    size=config.eval.size, fraction=config.eval.crop_fraction, batch_size=sharding.round_up(500)
  )
  outputs = [
    [np.asarray(x)[:count] for x in forward(run.variables, images)]
    for images, count in loader.evaluation(np.arange(source.num_examples), **view)
  ]
  return [np.concatenate(column) for column in zip(*outputs, strict=True)]


def few_per_class(labels):
  """Labels per class of every few-label score, those of the smallest class at most."""
  _, counts = np.unique(labels, return_counts=True)
  wanted = [*PER_CLASS, *(max(1, round(share * counts.mean())) for share in SHARES)]
  return sorted({n for n in wanted if n <= counts.min()})


def score_knn(index, labels, queries, targets, classes):
  """{setting: accuracy} with all labels."""
  return {
    name: knn.accuracy(
      knn.predict(index, labels, queries, k=k, temperature=t, num_classes=classes), targets
    )
    for name, (k, t) in KNN.items()
  }


def score_linear(index, labels, queries, targets, classes, seed):
  """{'all': accuracy, 'penalty': the one that was chosen, labels per class: mean over draws}."""
  scale = linear.scale_of(index)
  index, queries = scale(index), scale(queries)
  searched, held_out = order.hold_out(seed, len(labels), 0.1)
  fitted = index[searched], labels[searched], index[held_out], labels[held_out]
  penalty = linear.choose_penalty(*fitted, classes, PENALTIES)
  predict = lambda rows, penalty: linear.predict(
    linear.fit(index[rows], labels[rows], classes, penalty), queries
  )
  few = few_labels.score(
    labels, targets, lambda draws, _: predict(draws, linear.PENALTY),
    labels_per_class=few_per_class(labels), draws=DRAWS, seed=seed,
  )  # fmt: skip
  every = knn.accuracy(predict(np.arange(len(labels)), penalty), targets)
  return {"all": every, "penalty": penalty, **{n: each["mean"] for n, each in few.items()}}


def parse(flags):
  """The config of a run's flags."""
  config, *_ = main.parse([f for f in flags if f != UNTRAINED])
  return config


def untrained(config):
  """The encoder that a run begins with."""
  dtype = resolve_dtype(config.compute_dtype, jax.default_backend())
  module, mesh, create = encoders.begin(config, dtype)
  return encoders.LoadedEncoder(module, create(), config, 0, mesh, create)


def score(run):
  """({protocol: {setting: accuracy}} of an encoder, facts of the images)."""
  config = run.config
  train, test = scored_data.open_train_and_test(config.data)
  (features, projected), (test_features, test_projected) = embed(run, train), embed(run, test)
  known = train.targets, test.targets, len(train.classes)
  labels, targets, classes = known
  few = few_labels.score(
    labels, targets,
    lambda draws, n: [
      knn.predict(features[d], labels[d], test_features, k=min(20, n), temperature=0.07, num_classes=classes)
      for d in draws
    ],
    labels_per_class=few_per_class(labels), draws=DRAWS, seed=config.seed,
  )  # fmt: skip
  return {
    "knn_left_out": {
      name: knn.left_out(features, labels, k=k, temperature=t, num_classes=classes)
      for name, (k, t) in KNN.items()
    },
    "knn": score_knn(features, labels, test_features, targets, classes),
    "knn_projected": score_knn(projected, labels, test_projected, targets, classes),
    "knn_few": {n: each["mean"] for n, each in few.items()},
    "linear": score_linear(features, labels, test_features, targets, classes, config.seed),
    "step": run.step,
  }, {"train": scored_data.describe(train), "test": scored_data.describe(test)}


def curve(workdir):
  """Held-out scores over epochs, and the median pace of the lines: of metrics.jsonl, whatever processes wrote it."""
  lines = read_metrics(workdir)
  batch = read_json(os.path.join(workdir, "config.json"))["config"]["data"]["batch_size"]
  paces = [x["time/seconds_per_step"] for x in lines if "time/seconds_per_step" in x]
  pace = float(np.median(paces)) if paces else None
  return {
    "held_out": [[x["epoch"], x["step"], x["knn/top1"]] for x in lines if "knn/top1" in x],
    "seconds_per_step": pace,
    "pairs_per_second": batch / pace if pace else None,
  }


def settings(flags):
  """{dotted key: value} of what these flags mean today, but for what a run may change and where things lie."""
  flat = flatten(canonical(parse(told(flags)).to_dict()))
  return {key: value for key, value in flat.items() if key not in planning.MAY_CHANGE}


def sizes(workdir):
  """What plan.json says of how long the run is."""
  plan = read_json(os.path.join(workdir, "plan.json"))
  epochs = (plan["total_steps"] - plan["fill_steps"]) / plan["steps_per_epoch"]
  return {"epochs": epochs, "steps": plan["total_steps"]}


def sign(workdir):
  """Where this process began, after those that had a part in the run before it: a list of `record.origin`.

  Before main: nothing here may wake JAX's devices, which main prepares for.
  """
  path = f"{workdir.rstrip('/')}.made.json"
  made = read_json(path) if os.path.exists(path) else []
  here = record.origin()
  made += [] if here in made else [here]
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  write_json(path, made)
  return made


def peak_bytes(workdir):
  """(of a process's memory, of a device's or None): the most of all processes that trained, of which this need not be one."""
  path = f"{workdir.rstrip('/')}.peak.json"
  device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device]
  if os.path.exists(path):
    peaks = [
      x if y is None else y if x is None else max(x, y)
      for x, y in zip(peaks, read_json(path), strict=True)
    ]
  write_json(path, peaks)
  return peaks


def run(out, flags):
  """Trains and scores; returns the exit status."""
  (workdir,) = (f.partition("=")[2] for f in flags if f.startswith("--workdir="))
  made = sign(workdir)
  if UNTRAINED in flags:
    encoder, facts = untrained(parse(flags)), {"epochs": 0, "steps": 0, **NO_CURVE}
  else:
    if status := main.main(flags):
      return status
    encoder = encoders.open_run(workdir, encoders.run_config(workdir))
    facts = sizes(workdir) | curve(workdir)
  trained = time.monotonic()
  process, device = peak_bytes(workdir)
  facts |= {"process_peak_bytes": process, "device_peak_bytes": device}
  made = [one | {"device": record.device()} for one in made]
  scores, images = score(encoder)
  facts |= {"flags": told(flags), "settings": settings(flags), "made": made, "images": images}
  facts |= {"scores": scores, "score_seconds": round(time.monotonic() - trained, 1)}
  write_json(out, facts)
  return 0


def told(flags):
  """Those that say what is run, not where things lie."""
  return [f for f in flags if not f.startswith(("--workdir=", "--config.data.dir="))]


if __name__ == "__main__":
  sys.exit(run(sys.argv[1], sys.argv[2:]))
