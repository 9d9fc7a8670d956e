"""What a classifier takes for what.

Flow: a probe's logits of test images -> `matrix` -> scores of the task, picture of the report.
Shapes: logits [N, C], labels [N], a matrix of counts [C, C]: rows are the true classes, columns the predicted ones.
Not here: its picture (report).
"""

import numpy as np


def matrix(labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts [C, C]."""
  counts = np.zeros((num_classes, num_classes), int)
  np.add.at(counts, (labels_N, predictions_N), 1)
  return counts


def per_class(counts_CxC: np.ndarray) -> np.ndarray:
  """Accuracy of each class [C]; NaN for one without images."""
  total = counts_CxC.sum(1)
  with np.errstate(invalid="ignore"):
    return np.diag(counts_CxC) / total


def top(logits_NxC: np.ndarray, labels_N: np.ndarray, k: int) -> float:
  """Share of images whose class is among the k of largest logit; of equal ones the lower number goes first. An image with a
  logit that is no number counts as wrong."""
  own = np.take_along_axis(logits_NxC, labels_N[:, None], 1)
  before = np.arange(logits_NxC.shape[1]) < labels_N[:, None]
  ahead = (logits_NxC > own) | (before & (logits_NxC == own))
  return float(np.mean((ahead.sum(1) < k) & ~np.isnan(logits_NxC).any(1)))
