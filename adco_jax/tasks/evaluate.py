"""The tasks `knn` and `linear`: score the frozen query encoder of a workdir on held-out images.

Flow: main -> `run_knn` / `run_linear`: workdir's config -> sources, encoder -> stored result, or features ->
  scores -> eval/<task>-<data>-<split>-<step>.json, written after each representation; report reads it.
Holds: model, data and normalisation are the pre-training's unless overridden; every test image is scored
  exactly once; what is chosen (k, temperature, penalty, tokens) is chosen on train images; the untrained
  encoder and raw pixels are scored by the same code with the same draws; nothing stored is shown for
  another encoder, data set, label, protocol or view.
Not here: the arithmetic of a score (evaluation/*), which images (scoring).
"""

import functools
import os
from collections.abc import Callable, Iterable

import numpy as np
from ml_collections import ConfigDict

from adco_jax.errors import RunError
from adco_jax.evaluation import confusion, few_labels, knn, linear, results
from adco_jax.evaluation.results import Facts
from adco_jax.runtime import sharding
from adco_jax.runtime.files import Json, write_npz
from adco_jax.tasks import probes, scored_data
from adco_jax.tasks.attention import save_attention
from adco_jax.tasks.chosen_tokens import choose, choose_knn, judge_knn, judge_linear
from adco_jax.tasks.feature_map import FeatureMap
from adco_jax.tasks.scoring import Frozen, Scored, load, representations, unusual
from adco_jax.workdir import pictures

MATRIX = 200  # classes of which the confusion of each with each is stored
AT_ONCE = 2**27  # numbers of the features of few labels that are fitted at once
Predict = Callable[[np.ndarray, int], Iterable[np.ndarray]]  # see few_labels.score


def run_knn(config: ConfigDict) -> str:
  """Writes eval/knn-<data>-<split>-<step>.json, whose path it returns, and its pictures. Raises ConfigError."""
  frozen = load(config)
  path, facts = begin(frozen, config)
  shown = np.linspace(0, frozen.test.num_examples - 1, config.neighbours).astype(int)
  picture, there = results.picture_of(path), set(facts["results"])
  plane = FeatureMap(frozen, config, path)
  for name, scored in representations(frozen, config, there - plane.lacks):
    judge = functools.partial(judge_knn, frozen=frozen, config=config)
    scored, _, told = choose(name, scored, frozen, judge)
    plane.add(name, scored.test)
    scores, chosen = score_knn(scored, frozen, config)
    if config.neighbours and name in ("trained", "untrained"):
      nearest = knn.search(scored.train, scored.test[shown], min(5, len(scored.train)))[1]
      facts["neighbours"][name] = nearest.tolist()
    keep(path, facts, frozen, name, scores, chosen | told)
  results.show(path, facts)
  if config.neighbours and (there != set(facts["results"]) or not os.path.exists(picture)):
    drawn = [rows for name, rows in facts["neighbours"].items() if name != "projected"]
    save_neighbours(picture, frozen, shown, drawn)
  plane.save()
  save_attention(frozen, config, path)
  return path


def run_linear(config: ConfigDict) -> str:
  """Writes eval/linear-<data>-<split>-<step>.json, whose path it returns, and the trained encoder's probe as .npz. Raises ConfigError."""
  frozen = load(config)
  path, facts = begin(frozen, config)
  file = f"{path.removesuffix('.json')}.npz"
  lost = set() if os.path.exists(file) else {"trained"}
  for name, scored in representations(frozen, config, set(facts["results"]) - lost):
    fit = probes.RECIPES[config.recipe if name == "trained" else "lbfgs"]
    judge = functools.partial(judge_linear, frozen=frozen, config=config)
    scored, encoder, told = choose(name, scored, frozen, judge)
    probe, chosen = fit(scored, encoder, config)
    if not all(np.isfinite(x).all() for x in probe.values()):
      rates = {"sgd": "sgd.learning_rate", "sweep": "sweep.learning_rates"}.get(config.recipe)
      remedy = (
        f"use a smaller config.{rates} or config.sgd.weight_decay"
        if rates
        else "nothing is told of it"
      )
      raise RunError(f"the classifier of the {name} features is not finite: {remedy}")
    if name == "trained":
      of = frozen.identity["checkpoint"] | {"tokens": told.get("tokens", frozen.tokens)}
      about = {name: np.array(value) for name, value in of.items()}
      write_npz(file, probe | about | {"classes": np.array(frozen.train.classes)})
    scores, counts = score_logits(scored.test @ probe["kernel"] + probe["bias"], frozen)
    facts["confusion"][name] = counts.tolist() if len(counts) <= MATRIX else []
    scores |= few(frozen, config, make_linear_few(scored, frozen))
    keep(path, facts, frozen, name, scores, chosen | told)
  results.show(path, facts)
  return path


def begin(frozen: Frozen, config: ConfigDict) -> tuple[str, Facts]:
  """(path, facts) of the result that is asked for: as stored, or with nothing computed yet."""
  data, task = frozen.identity["data"], config.task
  train, test = data["train"], data["test"]
  learnt = [] if train["split"] == "train" else [train["split"]]
  name = scored_data.file_name(test["name"], *learnt, test["split"])
  return results.begin(
    frozen.workdir,
    name,
    {
      "task": task,
      "step": frozen.step,
      "own": frozen.own,
      "identity": frozen.identity,
      "place": frozen.place,
      "unusual": unusual(config),
      "config": config.to_dict(),
      "train_images": train["images"],
      "test_images": test["images"],
      "results": {},
      "chosen": {},
      "neighbours": {},
      "confusion": {},
      "class_names": list(frozen.train.classes[:MATRIX]),
    },
  )


def keep(
  path: str,
  facts: Facts,
  frozen: Frozen,
  name: str,
  scores: dict[str, Json],
  chosen: dict[str, float],
) -> None:
  """Writes the result with one more representation, so that what fails later loses nothing of it."""
  facts["results"][name], facts["chosen"][name] = scores, chosen
  facts["broken"] = facts.get("broken", {}) | frozen.loaders.broken()
  results.write(path, facts)


def score_knn(
  scored: Scored, frozen: Frozen, config: ConfigDict
) -> tuple[dict[str, Json], dict[str, float]]:
  """({'all' and labels per class: accuracy}, what was chosen)."""
  labels, classes = frozen.train.targets, len(frozen.train.classes)
  k, temperature = choose_knn(scored.train, frozen, config)

  def predict(index, limit):
    return knn.predict(
      scored.train, labels, scored.test,
      k=min(k, limit), temperature=temperature, num_classes=classes, rows=index,
    )  # fmt: skip

  scores = {"all": knn.accuracy(predict(np.arange(len(labels)), k), frozen.test.targets)}
  if config.recall and frozen.test.num_examples > 1:
    found = knn.recall(scored.test, frozen.test.targets, config.recall)
    scores |= {f"recall@{k}": value for k, value in found.items()}
  scores |= few(frozen, config, lambda draws, n: [predict(d, n) for d in draws])
  return scores, {"k": k, "temperature": temperature}


def few(frozen: Frozen, config: ConfigDict, predict: Predict) -> dict[str, Json]:
  """Scores with few labels, see `few_labels.score`."""
  return few_labels.score(
    frozen.train.targets, frozen.test.targets, predict,
    labels_per_class=config.labels_per_class, label_shares=config.label_shares, draws=config.draws, seed=config.seed,
  )  # fmt: skip


def score_logits(logits: np.ndarray, frozen: Frozen) -> tuple[dict[str, float], np.ndarray]:
  """({'all', 'mean' of the classes' accuracies, 'top5' of more than five classes}, the matrix of confusion [C, C])."""
  labels, classes = frozen.test.targets, len(frozen.train.classes)
  counts = confusion.matrix(labels, logits.argmax(-1), classes)
  scores = {
    "all": confusion.top(logits, labels, 1),
    "mean": float(np.nanmean(confusion.per_class(counts))),
  }
  return scores | ({"top5": confusion.top(logits, labels, 5)} if classes > 5 else {}), counts


def make_linear_few(scored: Scored, frozen: Frozen) -> Predict:
  """Probes on few labels; the scale comes from all train features, which takes no labels."""
  scale = linear.scale_of(scored.train)
  train, test = scale(scored.train), scale(scored.test)
  labels, classes = frozen.train.targets, len(frozen.train.classes)

  def predict(draws, per_class):
    del per_class
    at_once = max(
      1, AT_ONCE // (draws.shape[1] * train.shape[1])
    )  # draws whose features are copied
    for part in (draws[i : i + at_once] for i in range(0, len(draws), at_once)):
      yield from linear.predict(linear.fit(train[part], labels[part], classes), test)

  return predict


def save_neighbours(
  path: str, frozen: Frozen, shown: np.ndarray, neighbours_of: list[list[list[int]]]
) -> None:
  """Rows: a test image of `shown`, its five nearest train images by the trained encoder, then by the untrained."""
  of_train, of_test = map(frozen.loaders.of, ("train", "test"))

  def drawn(loader, index):
    small = frozen.view | {"batch_size": sharding.round_up(len(index))}
    return np.concatenate([np.asarray(x)[:n] for x, n in loader.evaluation(index, **small)])

  queries = drawn(of_test, shown)
  rows = []
  for i, query in enumerate(queries):
    row = [query]
    for neighbours in neighbours_of:
      row += [None, *drawn(of_train, np.array(neighbours[i]))]
    rows.append(row)
  pictures.save_sheet(path, rows, side=64)
