"""The tasks `knn` and `linear`: score the frozen query encoder of a workdir on held-out images.

Flow: main -> `run_knn` / `run_linear`: workdir's config -> sources, encoder -> features -> scores ->
  eval/<task>-<step>.json; report reads it.
Holds: model, data and normalisation are the pre-training's unless overridden; every test image is scored
  exactly once; what is chosen (k, temperature, penalty) is chosen on train images; the untrained
  encoder and raw pixels are scored by the same code with the same draws.
Not here: the arithmetic of a score (evaluation/*).
"""

import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from adco_jax import augment, build, optimizers, pictures, remote, rng, sharding
from adco_jax import plan as planning
from adco_jax.data import order, sources
from adco_jax.evaluation import features, few_labels, knn, linear, results
from adco_jax.frozen import open_run, run_config
from adco_jax.metrics import duration
from adco_jax.plan import require
from adco_jax.workdir import check_writable


class Frozen(NamedTuple):
  """A pre-trained encoder with the data that it is scored on."""

  workdir: str
  step: int
  mesh: Any
  train: Any  # Source
  test: Any
  loaders: tuple  # of train and test
  view: dict  # how an image is cut for scoring: size, fraction, batch_size
  forward: Any  # (variables, images) -> features
  trained: dict  # variables
  create_untrained: Any  # () -> variables


class Scored(NamedTuple):
  """Train and test features of one representation."""

  train: np.ndarray
  test: np.ndarray


def run_knn(config):
  """Writes eval/knn-<step>.json and the picture of neighbours. Raises ConfigError."""
  frozen = load(config)
  path = results.path_for(frozen.workdir, config.task, frozen.step, config.to_dict())
  if os.path.exists(path):
    return results.show(path)
  scores, chosen, drawn = {}, {}, []
  for name, scored in representations(frozen, config).items():
    scores[name], chosen[name] = score_knn(scored, frozen, config)
    if name != "pixels":
      drawn.append(knn.search(scored.train, scored.test[: config.neighbours], 5)[1])
  if config.neighbours:
    picture = f"neighbours-{frozen.step}.png"
    save_neighbours(os.path.join(os.path.dirname(path), picture), frozen, drawn)
  return finish(path, frozen, config, scores, chosen)


def run_linear(config):
  """Writes eval/linear-<step>.json and the trained encoder's probe as .npz. Raises ConfigError."""
  frozen = load(config)
  path = results.path_for(frozen.workdir, config.task, frozen.step, config.to_dict())
  if os.path.exists(path):
    return results.show(path)
  scores, chosen = {}, {}
  for name, scored in representations(frozen, config).items():
    fit = fit_sgd if config.recipe == "sgd" and name == "trained" else fit_lbfgs
    probe, chosen[name] = fit(scored, frozen, config)
    found = scored.test @ probe["kernel"] + probe["bias"]
    scores[name] = {"all": knn.accuracy(found.argmax(-1), frozen.test.labels)}
    scores[name] |= few(frozen, config, make_linear_few(scored, frozen))
    if name == "trained":
      np.savez(path.replace(".json", ".npz"), **probe)
  return finish(path, frozen, config, scores, chosen)


def score_knn(scored, frozen, config):
  """({'all' and labels per class: accuracy}, what was chosen)."""
  labels, classes = frozen.train.labels, len(frozen.train.classes)
  searched, held = order.hold_out(config.seed, len(labels), config.hold_out)
  k, temperature = knn.choose(
    scored.train[searched], labels[searched], scored.train[held], labels[held],
    ks=config.knn.k, temperatures=config.knn.temperature, num_classes=classes,
  )  # fmt: skip

  def predict(index, limit):
    return knn.predict(
      scored.train[index], labels[index], scored.test,
      k=min(k, limit), temperature=temperature, num_classes=classes,
    )  # fmt: skip

  scores = {"all": knn.accuracy(predict(np.arange(len(labels)), k), frozen.test.labels)}
  scores |= few(frozen, config, lambda draws, n: [predict(d, n) for d in draws])
  return scores, {"k": k, "temperature": temperature}


def few(frozen, config, predict):
  """Scores with few labels, see `few_labels.score`."""
  return few_labels.score(
    frozen.train.labels, frozen.test.labels, predict,
    labels_per_class=config.labels_per_class, draws=config.draws, seed=config.seed,
  )  # fmt: skip


def make_linear_few(scored, frozen):
  """Probes on few labels; the scale comes from all train features, which takes no labels."""
  train, test = linear.scale(scored.train, scored.test)
  labels, classes = frozen.train.labels, len(frozen.train.classes)

  def predict(draws, per_class):
    del per_class
    return linear.predict(linear.fit(train[draws], labels[draws], classes), test)

  return predict


def fit_lbfgs(scored, frozen, config):
  """(probe on features as they are, {'penalty' chosen on held-out train images})."""
  labels, classes = frozen.train.labels, len(frozen.train.classes)
  (train,) = linear.scale(scored.train)
  searched, held = order.hold_out(config.seed, len(labels), config.hold_out)
  penalty = linear.choose_penalty(
    train[searched], labels[searched], train[held], labels[held], classes, config.penalties
  )
  probe = linear.unscale(linear.fit(train, labels, classes, penalty), scored.train)
  return probe, {"penalty": penalty}


def fit_sgd(scored, frozen, config):
  """(probe, nothing chosen) by the authors' recipe, on freshly cropped and flipped train images."""
  sgd, classes = config.sgd, len(frozen.train.classes)
  plan = planning.make_probe_plan(
    frozen.train.num_examples, classes, batch_size=config.batch_size, crops=((frozen.view["size"], *sgd.scale),),
    epochs=sgd.epochs, devices=jax.device_count(), processes=1, process=0,
  )  # fmt: skip
  rate = optimizers.make_rate(
    "cosine_epoch", base=sgd.learning_rate, final=sgd.lr_final, epochs=sgd.epochs,
    steps_per_epoch=plan.steps_per_epoch, warmup_epochs=0, step_epochs=(),
  )  # fmt: skip
  batches = cropped_features(frozen, config.seed, plan)
  start = rng.rng_for(config.seed, rng.PROBE)
  size = scored.train.shape[-1]
  return linear.fit_sgd(batches, start, size, classes, rate, sgd.momentum, sgd.weight_decay), {}


def cropped_features(frozen, seed, plan):
  """Yields (features [B, F], labels [B]) of every step of a probe's plan."""
  loader, flip = frozen.loaders[0], augment.policies_for("flip", 1)[0]
  shared = loader.shared | sharding.put_replicated(frozen.mesh, {"seed": np.uint32(seed)})

  @jax.jit
  def flipped(item, step, shared):
    crops = loader.cut(item, plan.view_sizes[0], shared)
    drawn = augment.draw(rng.rng_for(shared["seed"], rng.PROBE, step + 1), len(crops), flip)
    return augment.augment(crops, drawn, flip)

  batches = loader.train(0, plan.total_steps, seed=seed, plan=plan, ratio=(3 / 4, 4 / 3))
  start = time.monotonic()
  for step, batch in enumerate(batches):
    item = sharding.put_split(frozen.mesh, batch.split["queries"][0])
    crops = flipped(item, step, shared)
    yield frozen.forward(frozen.trained, crops), frozen.train.labels[batch.indices]
    if step and step % plan.steps_per_epoch == 0:
      left = (time.monotonic() - start) / step * (plan.total_steps - step)
      print(f"probe epoch {step // plan.steps_per_epoch}, left {duration(left)}", flush=True)


def load(config):
  """The `Frozen` of a task's config. Raises ConfigError."""
  stored = run_config(config.pretrained, config.data)
  workdir = remote.local(config.pretrained)
  check_writable(workdir)
  data = stored.data
  train = build.open_source(data)
  test = build.open_source(data, data.test_split)
  test = sources.align_classes(test, train.classes)
  for split, source in ((data.split, train), (data.test_split, test)):
    require(source.labels is not None, "data.split", split, "has no labels to score against")
  run = open_run(config.pretrained, stored)
  view = {
    "size": config.size or stored.eval.size,
    "fraction": config.crop_fraction or stored.eval.crop_fraction,
    "batch_size": sharding.round_up(config.batch_size),
  }
  return Frozen(
    workdir=workdir,
    step=run.step,
    mesh=run.mesh,
    train=train,
    test=test,
    loaders=tuple(build.create_loader(stored, source, run.mesh) for source in (train, test)),
    view=view,
    forward=features.make_features(run.encoder, data.mean, data.std, run.mesh),
    trained=run.variables,
    create_untrained=run.create_untrained,
  )


def representations(frozen, config):
  """{'trained', 'untrained', 'pixels'} -> `Scored`; the last two only with config.baselines."""
  forwards = {"trained": lambda x: frozen.forward(frozen.trained, x)}
  if config.baselines:
    untrained = frozen.create_untrained()
    forwards["untrained"] = lambda x: frozen.forward(untrained, x)
    forwards["pixels"] = features.make_pixels(frozen.mesh)
  found = {}
  for name, forward in forwards.items():
    start = time.monotonic()
    splits = zip((frozen.train, frozen.test), frozen.loaders, strict=True)
    both = [
      features.extract(forward, loader.evaluation(np.arange(source.num_examples), **frozen.view))
      for source, loader in splits
    ]
    for loader in frozen.loaders:
      loader.reader.check()
    found[name] = Scored(*both)
    count = len(both[0]) + len(both[1])
    print(f"features of {count} images, {name}: {time.monotonic() - start:.0f}s", flush=True)
  return found


def save_neighbours(path, frozen, found):
  """Rows: a test image, its five nearest train images by the trained encoder, then by the untrained."""

  def drawn(source, loader, index):
    small = frozen.view | {"batch_size": sharding.round_up(len(index))}
    return np.concatenate([np.asarray(x)[:n] for x, n in loader.evaluation(index, **small)])

  queries = drawn(frozen.test, frozen.loaders[1], np.arange(len(found[0])))
  rows = []
  for i, query in enumerate(queries):
    row = [query]
    for neighbours in found:
      row += [None, *drawn(frozen.train, frozen.loaders[0], neighbours[i])]
    rows.append(row)
  pictures.save_sheet(path, rows, side=64)


def finish(path, frozen, config, scores, chosen):
  """Writes and shows the result file."""
  results.write(
    path, task=config.task, step=frozen.step, config=config.to_dict(), results=scores, chosen=chosen,
    train_images=frozen.train.num_examples, test_images=frozen.test.num_examples,
  )  # fmt: skip
  results.show(path)
