"""Weighted nearest neighbours on frozen features.

Flow: features of searched and scored images -> `predict` -> accuracy; `choose` picks k and temperature on
  train images that the search leaves out.
Shapes: index [N, F], queries [M, F], predictions [M] of class numbers.
Paper: Wu et al. 2018 (instance discrimination): votes exp(cosine / temperature) of the k nearest.
Holds: equals a brute-force search; ties go to the lower class number.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.objectives import infonce

CHUNK = 1024  # queries at a time


def predict(
  index_NxF: np.ndarray,
  labels_N: np.ndarray,
  queries_MxF: np.ndarray,
  *,
  k: int,
  temperature: float,
  num_classes: int,
) -> np.ndarray:
  """Class of each query by the votes of its k nearest neighbours (k is cut at N)."""
  similarity, neighbour = search(index_NxF, queries_MxF, min(k, len(index_NxF)))
  return vote(similarity, labels_N[neighbour], temperature, num_classes)


def choose(
  index_NxF: np.ndarray,
  labels_N: np.ndarray,
  held_out_MxF: np.ndarray,
  held_out_labels_M: np.ndarray,
  *,
  ks: Iterable[int],
  temperatures: Iterable[float],
  num_classes: int,
) -> tuple[int, float]:
  """The (k, temperature) of the grid with the best accuracy on held-out images; first wins a tie."""
  ks = sorted({min(k, len(index_NxF)) for k in ks})
  similarity, neighbour = search(index_NxF, held_out_MxF, max(ks))
  scores = {}
  for k in ks:
    for t in temperatures:
      predicted = vote(similarity[:, :k], labels_N[neighbour[:, :k]], t, num_classes)
      scores[k, t] = accuracy(predicted, held_out_labels_M)
  return max(scores, key=lambda setting: scores[setting])


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """Share of equal entries."""
  return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def search(index_NxF: np.ndarray, queries_MxF: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosines [M, k] and numbers [M, k] of the k nearest index rows, nearest first."""
  index = infonce.l2_normalize(jnp.asarray(index_NxF))
  parts = [queries_MxF[i : i + CHUNK] for i in range(0, len(queries_MxF), CHUNK)]
  nearest = [jax.device_get(_search_chunk(index, jnp.asarray(part), k)) for part in parts]
  cosines, numbers = zip(*nearest, strict=True)
  return np.concatenate(cosines), np.concatenate(numbers)


def vote(
  similarity_Mxk: np.ndarray, classes_Mxk: np.ndarray, temperature: float, num_classes: int
) -> np.ndarray:
  """Predicted classes [M] from neighbours' cosines and classes."""
  weights = np.exp((np.asarray(similarity_Mxk, np.float64) - 1) / temperature)
  votes = np.zeros((len(weights), num_classes))
  np.add.at(votes, (np.arange(len(weights))[:, None], classes_Mxk), weights)
  return votes.argmax(1)


@functools.partial(jax.jit, static_argnums=2)
def _search_chunk(index, queries, k):
  sim = jnp.matmul(infonce.l2_normalize(queries), index.T, precision=infonce.HIGHEST)
  return jax.lax.top_k(sim, k)
