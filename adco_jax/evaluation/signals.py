"""What embeddings say of themselves without a label: their rank, and how far they are spread.

Flow: online evaluation asks for `spread`; alarms and report read the numbers.
Shapes: features [N, F] and embeddings [N, D] of N different images.
Paper: RankMe (Garrido et al. 2023, equation 1); uniformity (Wang and Isola 2020).
Holds: float64 on the host, at most MOST_IMAGES images: a second for 2,048 features each.
Not here: alignment (losses: every step knows it), encoders and images (online), what the numbers mean for a run (alarms).
"""

import numpy as np

MOST_IMAGES = 2000


def spread(features_NxF: np.ndarray, embeddings_NxD: np.ndarray) -> dict[str, float]:
  """{'signal/...'} of different images; empty for fewer than two, or where a number is not finite.

  rank_features, rank_embeddings: RankMe, from 1 (all alike) to min(N, F) or min(N, D).
  mean_cosine: of the embeddings of two images: 1 if all are alike, 0 if they are spread evenly.
  uniformity: log of the mean of exp(-2 d^2), 0 if all are alike, about -4 if they are spread evenly.
  """
  features, embeddings = (np.asarray(x, np.float64) for x in (features_NxF, embeddings_NxD))
  count = len(embeddings)
  if count < 2 or not (np.isfinite(features).all() and np.isfinite(embeddings).all()):
    return {}
  cosines = unit(embeddings) @ unit(embeddings).T
  others = cosines[~np.eye(count, dtype=bool)]
  return {
    "signal/rank_features": rank(features),
    "signal/rank_embeddings": rank(embeddings),
    "signal/mean_cosine": float(others.mean()),
    "signal/uniformity": float(np.log(np.exp(4 * (others - 1)).mean())),
  }


def rank(x_NxF: np.ndarray) -> float:
  """RankMe: exp of the entropy of the singular values over their sum; 0 for a matrix of zeros."""
  values = np.linalg.svd(x_NxF, compute_uv=False)
  shares = values[values > 0] / values.sum() if values.any() else np.ones(0)
  return float(np.exp(-np.sum(shares * np.log(shares)))) if len(shares) else 0.0


def unit(x_NxD: np.ndarray) -> np.ndarray:
  """Rows of length 1; a row of zeros stays one."""
  return x_NxD / np.maximum(np.linalg.norm(x_NxD, axis=-1, keepdims=True), 1e-12)


def evenly(count: int, most: int = MOST_IMAGES) -> np.ndarray:
  """Numbers of at most `most` of `count` rows, spread over all of them: a data set may be sorted by class."""
  return np.linspace(0, count - 1, min(count, most)).astype(int)
