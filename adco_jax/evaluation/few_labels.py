"""Scores with few labels: the same random draws of labelled train images for every representation.

Flow: evaluate hands `score` a function from draws to predictions (knn's or linear's).
Shapes: a draw is n = classes * labels per class train examples; predictions [R, M] for R draws.
Holds: draw r of a seed is the same whatever is scored and whatever else is asked for.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from adco_jax.data import labelled
from adco_jax.errors import require
from adco_jax.evaluation import knn
from adco_jax.runtime.files import Json


def score(
  labels: np.ndarray,
  test_labels: np.ndarray,
  predict: Callable[[np.ndarray, int], Iterable[np.ndarray]],
  *,
  labels_per_class: Sequence[int],
  draws: int,
  seed: int,
) -> dict[str, Json]:
  """{labels per class: {'mean', 'spread', 'draws'} of top-1 over the draws}.

  `predict`: (draws [R, n] of train examples, labels per class) -> classes [R, M] of the test images.
  """
  results = {}
  for per_class in labels_per_class:
    drawn = np.stack([draw(labels, per_class, seed, number) for number in range(draws)])
    each = [knn.accuracy(predicted, test_labels) for predicted in predict(drawn, per_class)]
    results[str(per_class)] = {
      "mean": float(np.mean(each)),
      "spread": float(np.std(each)),
      "draws": each,
    }
  return results


def check(labels: np.ndarray, classes: Sequence[str], labels_per_class: Sequence[int]) -> None:
  """Refuses more labels per class than the smallest class has. Raises ConfigError."""
  present, counts = np.unique(labels, return_counts=True)
  least, name = int(counts.min()), classes[present[counts.argmin()]]
  fitting = tuple(n for n in labels_per_class if n <= least)
  fits, remedy = (
    len(fitting) == len(labels_per_class),
    f"class {name} has only {least} train images",
  )
  require(fits, "labels_per_class", tuple(labels_per_class), f"{remedy}; use {fitting}")


def draw(labels: np.ndarray, per_class: int, seed: int, number: int) -> np.ndarray:
  """Numbers of `per_class` examples of every class, each of which has as many, see `check`."""
  return labelled.draw(labels, lambda _: per_class, seed, number)
