"""Scores with few labels: the same random draws of labelled train images for every representation.

Flow: evaluate hands `score` a function from draws to predictions (knn's or linear's).
Shapes: a draw is n train examples, so many of each class or such a share of each; predictions [R, M] for R draws.
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
  label_shares: Sequence[float] = (),
) -> dict[str, Json]:
  """{labels per class, or share as '1 %': {'mean', 'spread', 'draws'} of top-1 over the draws}.

  `label_shares`: of the labels of each class, in 0..1, one at least. `predict`: (draws [R, n] of train examples, labels per class,
  on average) -> classes [R, M] of the test images.
  """
  results, classes = {}, len(np.unique(labels))
  for amount in (*labels_per_class, *label_shares):
    drawn = np.stack([draw(labels, amount, seed, number) for number in range(draws)])
    per_class = max(1, drawn.shape[1] // classes)
    each = [knn.accuracy(predicted, test_labels) for predicted in predict(drawn, per_class)]
    name = f"{100 * amount:g} %" if isinstance(amount, float) else str(amount)
    results[name] = {"mean": float(np.mean(each)), "spread": float(np.std(each)), "draws": each}
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


def draw(labels: np.ndarray, amount: float, seed: int, number: int) -> np.ndarray:
  """Numbers of examples of every class: `amount` of each, which has as many, see `check`; a float: that share of each."""
  share = isinstance(amount, float)
  count = lambda there: max(1, round(amount * there)) if share else int(amount)
  return labelled.draw(labels, count, seed, number)
