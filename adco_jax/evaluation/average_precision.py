"""Average precision of a class: by the area, by eleven points, and as scikit-learn sums it.

Flow: svm scores with it what it fitted.
Shapes: presence [N] of 1, 0 and -1 (left out), scores float [N].
Holds: equal scores are one threshold, so that the order of images changes nothing; of all orders of equal scores this
  is the least that a count image by image gives. Without a positive it is nan.
"""

from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
  """At each threshold, from the highest score down: `hits` positives among `seen` images; of `positives` in all."""

  hits: np.ndarray
  seen: np.ndarray
  positives: int


def curve(presence: np.ndarray, scores: np.ndarray) -> Curve:
  """The `Curve` of the images that count."""
  counts = presence >= 0
  wanted, scores = presence[counts] == 1, scores[counts]
  order = np.argsort(-scores, kind="stable")
  falls = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last image of each score
  return Curve(np.cumsum(wanted[order])[falls], falls + 1, int(wanted.sum()))


def area(presence: np.ndarray, scores: np.ndarray) -> float:
  """The area under the precision that is reached at this recall or a higher one: VOC's since 2010, and VISSL's."""
  found = curve(presence, scores)
  reached = np.maximum.accumulate((found.hits / found.seen)[::-1])[::-1]
  return _sum(found, reached)


def summed(presence: np.ndarray, scores: np.ndarray) -> float:
  """Precision times the recall that is won, over all thresholds, as scikit-learn's average_precision_score."""
  found = curve(presence, scores)
  return _sum(found, found.hits / found.seen)


def eleven_points(presence: np.ndarray, scores: np.ndarray) -> float:
  """The mean of the precisions that are reached at a recall of 0, .1, ..., 1 or higher: VOC2007's own."""
  found = curve(presence, scores)
  if not found.positives:
    return float("nan")
  precision = found.hits / found.seen
  points = [precision[10 * found.hits >= tenth * found.positives].max() for tenth in range(11)]
  return float(np.mean(points))


def _sum(found, precision):
  if not found.positives:
    return float("nan")
  return float(np.diff(found.hits, prepend=0) @ precision / found.positives)
