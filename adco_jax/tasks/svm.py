"""The task `svm`: a linear SVM per class on frozen features, scored by average precision; VOC07's classification.

Flow: main -> `run`: workdir's config -> sources, encoder -> stored result, or features -> SVMs -> average precisions ->
  eval/svm-<data>-<split>-<step>.json, written after each representation; report reads it.
Holds: as evaluate's scores: every test image counts once for each class but where it is left out (difficult), untrained
  encoder and pixels are scored alike, nothing is chosen on test images.
Not here: the SVMs (evaluation.svm), the scores (evaluation.average_precision), which images (scoring).
"""

import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from adco_jax.data.sources.base import Source
from adco_jax.data.sources.lists import first_three
from adco_jax.errors import require
from adco_jax.evaluation import average_precision, results, svm
from adco_jax.evaluation.results import Facts
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json
from adco_jax.tasks.chosen_tokens import choose
from adco_jax.tasks.evaluate import begin, keep
from adco_jax.tasks.scoring import Frozen, Scored, load, representations


def run(config: ConfigDict) -> str:
  """Writes eval/svm-<data>-<split>-<step>.json, whose path it returns. Raises ConfigError."""
  frozen = load(config, check)
  classes = scorable(config, frozen.train, frozen.test)
  path, facts = begin(frozen, config)
  by_class = facts.setdefault("by_class", {})
  facts["left_out"] = [c for i, c in enumerate(frozen.train.classes) if i not in set(classes)]
  if facts["left_out"]:
    tell(
      f"not scored: {first_three(facts['left_out'])}, of which fewer than {config.folds} train images are labelled, or "
      f"fewer are without, or no test image"
    )
  for name, scored in representations(frozen, config, set(facts["results"])):
    judge = functools.partial(judge_svm, frozen=frozen, config=config, classes=classes)
    scored, _, told = choose(name, scored, frozen, judge)
    scores, by_class[name] = score(scored, frozen, config, classes)
    keep(path, facts, frozen, name, scores, told)
  results.show(path, facts)
  for line in by_class_lines(facts):
    tell(line)
  return path


def check(config: ConfigDict, train: Source, test: Source) -> None:
  """Refuses labels of which no class can be learnt and scored, or too few for draws of few. Raises ConfigError."""
  classes = scorable(config, train, test)
  remedy = f"of no class {config.folds} train images are labelled, as many without, and a test image; name other data, or lower config.folds"
  require(len(classes), "data.split", train.split, remedy)
  counts = (train.presence[:, classes] == 1).sum(0)
  least, most, name = int(counts.min()), int(counts.max()), train.classes[classes[counts.argmin()]]
  fitting = tuple(n for n in config.labels_per_class if n <= least and n < most)
  remedy = f"class {name} has only {least} train images, and of some class one must be left to choose the cost on; use {fitting}"
  asked = tuple(config.labels_per_class)
  require(len(fitting) == len(asked), "labels_per_class", asked, remedy)


def scorable(config: ConfigDict, train: Source, test: Source) -> np.ndarray:
  """The numbers of the classes that every fold can have with and without, and that a test image has."""
  there, without = ((train.presence == kind).sum(0) for kind in (1, 0))
  tested = (test.presence == 1).any(0)
  return np.flatnonzero((there >= config.folds) & (without >= config.folds) & tested)


def score(
  scored: Scored, frozen: Frozen, config: ConfigDict, classes: np.ndarray
) -> tuple[dict[str, Json], dict[str, Json]]:
  """({'all' and positives per class: mean average precision}, {class: its average precisions, cost and number of images})."""
  presence, tested = (source.presence[:, classes] for source in (frozen.train, frozen.test))
  setting = setting_of(config)
  train, test = map(svm.normalise, scored)
  fitted = svm.fit_all(train, presence, setting)
  found = fitted.scores(test)
  names = [frozen.train.classes[c] for c in classes]
  by_class = {
    name: {
      "area": average_precision.area(tested[:, c], found[:, c]),
      "eleven_points": average_precision.eleven_points(tested[:, c], found[:, c]),
      "cost": fitted.costs[c],
      "train_images": int((presence[:, c] == 1).sum()),
      "test_images": int((tested[:, c] == 1).sum()),
    }
    for c, name in enumerate(names)
  }
  scores: dict[str, Json] = {"all": float(np.mean([row["area"] for row in by_class.values()]))}
  for positives in config.labels_per_class:
    scores[str(positives)] = svm.fit_few(
      train,
      presence,
      test,
      tested,
      setting,
      positives=positives,
      draws=config.draws,
      seed=config.seed,
    )
  return scores, by_class


def judge_svm(train: np.ndarray, frozen: Frozen, config: ConfigDict, classes: np.ndarray) -> float:
  """Mean average precision over the folds of train, of each class at its best cost."""
  presence = frozen.train.presence[:, classes]
  return svm.fit_all(svm.normalise(train), presence, setting_of(config)).held_out


def setting_of(config: ConfigDict) -> svm.Setting:
  """How SVMs are fitted."""
  return svm.Setting(
    config.costs, config.folds, config.positive_weight, config.ignored_are_negatives
  )


def by_class_lines(facts: Facts) -> Sequence[str]:
  """A table for the console: average precision of every class by representation, and the costs of the trained encoder."""
  by_class = facts["by_class"]
  first: dict[str, Json] = next(iter(by_class.values()), {})
  width = max([len(name) for name in first] + [len("mean of eleven points")])
  lines = [" " * width + "".join(f"{name:>11}" for name in by_class) + "       cost"]
  for name, row in first.items():
    values = "".join(f"{rows[name]['area']:11.3f}" for rows in by_class.values())
    lines.append(f"{name:{width}}{values}{row['cost']:11g}")
  means = (np.mean([row["eleven_points"] for row in rows.values()]) for rows in by_class.values())
  lines.append(f"{'mean of eleven points':{width}}" + "".join(f"{mean:11.3f}" for mean in means))
  return lines
