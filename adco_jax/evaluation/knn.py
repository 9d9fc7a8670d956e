"""Weighted nearest neighbours on frozen features, and retrieval.

Flow: features of searched and scored images -> `predict` -> accuracy; `choose` picks k and temperature on
  train images that the search leaves out; `recall` asks for any neighbour of the same class.
Shapes: index [N, F], which may be a memory-mapped file of any float type, queries [M, F], predictions [M] of class numbers;
  `rows`: which of the index are searched (all), neighbours are positions among them.
Paper: Wu et al. 2018 (instance discrimination): votes exp(cosine / temperature) of the k nearest.
Holds: equals a brute-force search; ties go to the lower class number and to the lower row; memory holds a block of the index,
  not the index.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.objectives import infonce

CHUNK = 1024  # queries at a time
BLOCK = 2**15  # rows of the index at a time


def predict(
  index_NxF: np.ndarray,
  labels_N: np.ndarray,
  queries_MxF: np.ndarray,
  *,
  k: int,
  temperature: float,
  num_classes: int,
  rows: np.ndarray | None = None,
) -> np.ndarray:
  """Class of each query by the votes of its k nearest neighbours (k is cut at the number of rows)."""
  rows = np.arange(len(index_NxF)) if rows is None else rows
  similarity, neighbour = search(index_NxF, queries_MxF, min(k, len(rows)), rows)
  return vote(similarity, labels_N[rows][neighbour], temperature, num_classes)


def choose(
  index_NxF: np.ndarray,
  labels_N: np.ndarray,
  searched: np.ndarray,
  held_out: np.ndarray,
  *,
  ks: Iterable[int],
  temperatures: Iterable[float],
  num_classes: int,
) -> tuple[int, float]:
  """The (k, temperature) of the grid with the best accuracy of the rows `held_out` among `searched`; first wins a tie."""
  ks = sorted({min(k, len(searched)) for k in ks})
  similarity, neighbour = search(index_NxF, index_NxF[held_out], max(ks), searched)
  classes, truth = labels_N[searched][neighbour], labels_N[held_out]
  scores = {}
  for k in ks:
    for t in temperatures:
      predicted = vote(similarity[:, :k], classes[:, :k], t, num_classes)
      scores[k, t] = accuracy(predicted, truth)
  return max(scores, key=lambda setting: scores[setting])


def recall(features_MxF: np.ndarray, labels_M: np.ndarray, ks: Iterable[int]) -> dict[int, float]:
  """{k: share of images with one of their own class among the k nearest others}, of 2 or more images."""
  ks = sorted({min(k, len(labels_M) - 1) for k in ks})
  _, others = _search_others(features_MxF, ks[-1])
  same = labels_M[others] == labels_M[:, None]
  return {k: float(same[:, :k].any(1).mean()) for k in ks}


def left_out(
  features_NxF: np.ndarray, labels_N: np.ndarray, *, k: int, temperature: float, num_classes: int
) -> float:
  """Accuracy of each image by the votes of its k nearest others: every one is held out of its own search."""
  similarity, others = _search_others(features_NxF, min(k, len(labels_N) - 1))
  return accuracy(vote(similarity, labels_N[others], temperature, num_classes), labels_N)


def _search_others(features_MxF, k):
  """`search` of all among all, [M, k] and [M, k], without themselves."""
  similarity, neighbour = search(features_MxF, features_MxF, k + 1)
  own = neighbour == np.arange(len(neighbour))[:, None]
  # An image that as many equal ones hide from itself: any of these may go in its place.
  own[~own.any(1), -1] = True
  return similarity[~own].reshape(-1, k), neighbour[~own].reshape(-1, k)


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Share of equal entries."""
  return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def search(
  index_NxF: np.ndarray, queries_MxF: np.ndarray, k: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Cosines [M, k] and positions [M, k] among `rows` of the k nearest, nearest first."""
  rows = np.arange(len(index_NxF)) if rows is None else rows
  starts = range(0, len(queries_MxF), CHUNK)
  best = [
    (np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int32))
    for n in (min(CHUNK, len(queries_MxF) - start) for start in starts)
  ]
  for first in range(0, len(rows), BLOCK):
    block = infonce.l2_normalize(_as_float(index_NxF[rows[first : first + BLOCK]]))
    for part, start in enumerate(starts):
      queries = _as_float(queries_MxF[start : start + CHUNK])
      best[part] = jax.device_get(_search_block(block, queries, *best[part], np.int32(first)))
  cosines, numbers = zip(*best, strict=True)
  return np.concatenate(cosines), np.concatenate(numbers)


def vote(
  similarity_Mxk: np.ndarray, classes_Mxk: np.ndarray, temperature: float, num_classes: int
) -> np.ndarray:
  """Predicted classes [M] from neighbours' cosines and classes."""
  weights = np.exp((np.asarray(similarity_Mxk, np.float64) - 1) / temperature)
  votes = np.zeros((len(weights), num_classes))
  np.add.at(votes, (np.arange(len(weights))[:, None], classes_Mxk), weights)
  return votes.argmax(1)


def _as_float(array):
  """On the device, in float32 at least."""
  return jnp.asarray(array, jnp.promote_types(array.dtype, np.float32))


@jax.jit
def _search_block(block, queries, cosines, numbers, first):
  """The best k of the best so far and of a block; the first of equal ones stay."""
  found = jnp.matmul(infonce.l2_normalize(queries), block.T, precision=infonce.HIGHEST)
  here = jnp.broadcast_to(first + jnp.arange(len(block)), found.shape)
  best, place = jax.lax.top_k(jnp.concatenate([cosines, found], 1), cosines.shape[1])
  return best, jnp.take_along_axis(jnp.concatenate([numbers, here], 1), place, 1)
