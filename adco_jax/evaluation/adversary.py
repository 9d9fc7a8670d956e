"""What rows of negatives and the queries that they meet have to do with each other: which rows are used, which queries pull.

Flow: gallery hands over embeddings of train images and an objective's `Rows` at every evaluation.
Shapes: embeddings [N, D] of images, which are the queries, vectors [K, D], of any length; mass [K]; density and pulls [N].
Paper: section 3.3: row j moves along the queries, each weighted by p(n_j | q_i), which sums to 1 over candidates; section 4
  says that this favours queries of low density, beside weights p(q_i | n_j), which sum to 1 over queries.
Holds: float32 products on the host, a run of softmaxes at a time; the two pulls are of the same rows and queries and differ
  by the rule alone.
Not here: whose the rows are (objectives), pictures (gallery, report), the share of the batch's keys in training (its loss).
"""

from typing import NamedTuple

import jax
import numpy as np

from adco_jax.evaluation import signals
from adco_jax.objectives.base import Rows

RUN = 2**22  # cosines at once
DENSITY = 0.25  # temperature of exp(-2 d^2), up to a factor: that of signal/uniformity
TENTH = 0.1  # of the queries, those of lowest density


class Play(NamedTuple):
  """Of N queries and K rows. A pull, 1 for the average query, is what a query weighs for all rows, which move towards it so much."""

  mass: np.ndarray  # [K] share of a row in what all queries weigh for the rows, by AdCo's rule
  density: np.ndarray  # [N] log of the mean of exp(-2 d^2) to the other images
  over_rows: (
    np.ndarray
  )  # [N] pull where every query shares its weight out among rows and keys: AdCo
  over_queries: np.ndarray  # [N] pull where every row shares its weight out among queries


def play(embeddings_NxD: np.ndarray, rows: Rows, batch_size: int) -> Play | None:
  """`Play` of different images; None for fewer than two, or where a number is not finite.

  For keys of a batch of `batch_size` stand the other images' embeddings; an own key counts as a perfect match, which in training
  it is not. Where rows share their weight out among queries, these are those of a batch.
  """
  images, vectors = (
    signals.unit(np.asarray(x, np.float32)) for x in (embeddings_NxD, rows.vectors)
  )
  if len(images) < 2 or not (np.isfinite(images).all() and np.isfinite(vectors).all()):
    return None
  others = np.log(len(images) - 1)
  density = softmaxes(images, images, DENSITY, among_others=True)[1] - others - 1 / DENSITY
  _, log_rows, largest = softmaxes(images, vectors, rows.temperature)
  if rows.keys == "none":
    over_rows = 1 - largest  # the nearest row is the positive, which moves by what it lacks (CaCo)
  else:
    log_keys = np.full(len(images), 1 / rows.temperature)
    if rows.keys == "batch":
      near = softmaxes(images, images, rows.temperature, among_others=True)[1] - others
      log_keys = np.logaddexp(log_keys, np.log(max(1, batch_size - 1)) + near)
    log_pull = -np.logaddexp(0, log_keys - log_rows)
    over_rows = np.exp(log_pull - log_pull.max())
  over_rows = _relative(over_rows)
  mass, *_ = softmaxes(images, vectors, rows.temperature, weights=over_rows)
  over_queries = np.empty(len(images))
  for batch in _batches(len(images), batch_size):
    over_queries[batch] = len(batch) * softmaxes(vectors, images[batch], rows.temperature)[0]
  return Play(mass, density, over_rows, _relative(over_queries))


def _batches(count, size):
  """Numbers below `count` in parts of about `size`, mixed: images of a class may follow each other."""
  order = np.random.RandomState(0).permutation(count)
  return np.array_split(order, max(1, round(count / max(1, size))))


def softmaxes(
  a_AxD: np.ndarray,
  b_BxD: np.ndarray,
  temperature: float,
  among_others: bool = False,
  weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(mean over a, of `weights` [A], of the share of each b [B], log of the sum of exponentials [A], largest share [A]) of softmaxes
  of all `a` over `b`, both of unit rows; `among_others`: both are the same, and each leaves itself out."""
  weights = np.ones(len(a_AxD)) if weights is None else weights
  shares, logs, largest = np.zeros(len(b_BxD)), np.empty(len(a_AxD)), np.empty(len(a_AxD))
  run = max(1, RUN // len(b_BxD))
  for start in range(0, len(a_AxD), run):
    part = slice(start, start + run)
    x = a_AxD[part] @ b_BxD.T / np.float32(temperature)
    if among_others:
      x[np.arange(len(x)), start + np.arange(len(x))] = -np.inf
    most = x.max(1, keepdims=True)
    np.exp(x - most, out=x)
    sums = x.sum(1)
    shares += (weights[part] / sums) @ x
    logs[part], largest[part] = most[:, 0] + np.log(sums), 1 / sums
  return shares / len(a_AxD), logs, largest


def numbers(found: Play, over: str) -> dict[str, float]:
  """{'adversary/...'} of an objective whose own rule is `over`.

  rows_in_play: exp of the entropy of the rows' masses, from 1 to K.
  density_correlation: rank correlation of its pull and density; left out where all queries pull or lie alike.
  low_density_over_rows, low_density_over_queries: mean pull of the tenth of the queries with the lowest density, by both rules.
  """
  shares, pull = found.mass[found.mass > 0], getattr(found, f"over_{over}")
  values = {"adversary/rows_in_play": float(np.exp(-np.sum(shares * np.log(shares))))}
  if np.ptp(pull) and np.ptp(found.density):
    values["adversary/density_correlation"] = spearman(pull, found.density)
  low = np.argsort(found.density, kind="stable")[: max(1, round(TENTH * len(pull)))]
  return values | {
    f"adversary/low_density_{rule}": float(getattr(found, rule)[low].mean())
    for rule in ("over_rows", "over_queries")
  }


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
  """Rank correlation; values that are equal share their mean rank."""
  return float(np.corrcoef(_ranks(a_N), _ranks(b_N))[0, 1])


def _relative(pull_N):
  """1 on average."""
  return pull_N / pull_N.mean() if pull_N.any() else np.ones_like(pull_N)


def _ranks(x_N):
  _, place, count = np.unique(x_N, return_inverse=True, return_counts=True)
  return (np.cumsum(count) - (count - 1) / 2)[place]


def cosines(rows_RxD: jax.Array | np.ndarray, embeddings_NxD: np.ndarray) -> np.ndarray:
  """[R, N] of vectors of any length."""
  rows, images = (signals.unit(np.asarray(x, np.float32)) for x in (rows_RxD, embeddings_NxD))
  return rows @ images.T
