"""Weighted nearest neighbours on frozen features.

Flow: features of searched and scored images -> `predict` -> accuracy; `choose` picks k and temperature on
  train images that the search leaves out.
Shapes: index [N, F], queries [M, F], predictions [M] of class numbers.
Paper: Wu et al. 2018 (instance discrimination): votes exp(cosine / temperature) of the k nearest.
Holds: equals a brute-force search; ties go to the lower class number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.objectives import infonce

CHUNK = 1024  # queries at a time


def predict(index_NxF, labels_N, queries_MxF, *, k, temperature, num_classes):
  """Class of each query by the votes of its k nearest neighbours (k is cut at N)."""
  similarity, neighbour = search(index_NxF, queries_MxF, min(k, len(index_NxF)))
  return vote(similarity, labels_N[neighbour], temperature, num_classes)


def choose(index_NxF, labels_N, held_MxF, held_labels_M, *, ks, temperatures, num_classes):
  """The (k, temperature) of the grid with the best accuracy on held-out images; first wins a tie."""
  ks = sorted({min(k, len(index_NxF)) for k in ks})
  similarity, neighbour = search(index_NxF, held_MxF, max(ks))
  scores = {}
  for k in ks:
    for t in temperatures:
      found = vote(similarity[:, :k], labels_N[neighbour[:, :k]], t, num_classes)
      scores[k, t] = accuracy(found, held_labels_M)
  return max(scores, key=scores.get)


def accuracy(predictions, labels):
  """Share of equal entries."""
  return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def search(index_NxF, queries_MxF, k):
  """Cosines [M, k] and numbers [M, k] of the k nearest index rows, nearest first."""
  index = infonce.normalize(jnp.asarray(index_NxF))
  parts = [queries_MxF[i : i + CHUNK] for i in range(0, len(queries_MxF), CHUNK)]
  found = [jax.device_get(_search_chunk(index, jnp.asarray(part), k)) for part in parts]
  return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def vote(similarity_Mxk, classes_Mxk, temperature, num_classes):
  """Predicted classes [M] from neighbours' cosines and classes."""
  weights = np.exp((np.asarray(similarity_Mxk, np.float64) - 1) / temperature)
  votes = np.zeros((len(weights), num_classes))
  np.add.at(votes, (np.arange(len(weights))[:, None], classes_Mxk), weights)
  return votes.argmax(1)


@functools.partial(jax.jit, static_argnums=2)
def _search_chunk(index, queries, k):
  sim = jnp.matmul(infonce.normalize(queries), index.T, precision=infonce.HIGHEST)
  return jax.lax.top_k(sim, k)
