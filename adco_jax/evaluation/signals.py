"""What embeddings say of themselves without a label: their rank, how far they are spread, how much of them is in use.

Flow: online evaluation asks for `spread`; alarms and report read the numbers.
Shapes: features [N, F] and embeddings [N, D] of N different images.
Paper: RankMe (Garrido et al. 2023, equation 1) is the effective rank of Roy and Vetterli (2007) of the matrix as it is; that of
  the centred matrix is the one of dimensional collapse (Jing et al. 2022). Uniformity: Wang and Isola (2020). Dead dimensions:
  the deviations over images whose mean SimSiam watches (Chen and He 2021, figure 2), counted where they vanish.
Holds: float64 on the host, at most MOST_IMAGES images: a second for 2,048 features each.
Not here: alignment (losses: every step knows it), encoders and images (online), what the numbers mean for a run (alarms).
"""

import numpy as np

MOST_IMAGES = 2000
DEAD = (
  0.01  # of 1 / sqrt(D), the deviation of each of D dimensions where unit vectors are spread evenly
)


def spread(features_NxF: np.ndarray, embeddings_NxD: np.ndarray) -> dict[str, float]:
  """{'signal/...'} of different images; empty for fewer than two, or where a number is not finite.

  rank_features, rank_embeddings: RankMe, from 1 (all alike) to min(N, F) or min(N, D).
  effective_rank_...: the same without the mean: directions in which images differ, by however little.
  dead_...: share of dimensions that hardly differ between images, see `dead`; norm_...: mean length.
  mean_cosine: of the embeddings of two images: 1 if all are alike, 0 if they are spread evenly.
  uniformity: log of the mean of exp(-2 d^2), 0 if all are alike, about -4 if they are spread evenly.
  """
  both = {"features": features_NxF, "embeddings": embeddings_NxD}
  both = {name: np.asarray(x, np.float64) for name, x in both.items()}
  count = len(embeddings_NxD)
  if count < 2 or not all(np.isfinite(x).all() for x in both.values()):
    return {}
  units = unit(both["embeddings"])
  others = (units @ units.T)[~np.eye(count, dtype=bool)]
  found = {
    "rank": rank,
    "effective_rank": lambda x: rank(x - x.mean(0)),
    "dead": dead,
    "norm": lambda x: float(np.linalg.norm(x, axis=-1).mean()),
  }
  numbers = {f"signal/{what}_{of}": f(x) for what, f in found.items() for of, x in both.items()}
  return numbers | {
    "signal/mean_cosine": float(others.mean()),
    "signal/uniformity": float(np.log(np.exp(4 * (others - 1)).mean())),
  }


def rank(x_NxF: np.ndarray) -> float:
  """RankMe: exp of the entropy of the singular values over their sum; 0 for a matrix of zeros."""
  values = np.linalg.svd(x_NxF, compute_uv=False)
  shares = values[values > 0] / values.sum() if values.any() else np.ones(0)
  return float(np.exp(-np.sum(shares * np.log(shares)))) if len(shares) else 0.0


def dead(x_NxF: np.ndarray) -> float:
  """Share of dimensions whose standard deviation over images, of rows brought to length 1, is below DEAD / sqrt(F)."""
  deviations = unit(x_NxF).std(0)
  return float(np.mean(deviations < DEAD / np.sqrt(x_NxF.shape[-1])))


def unit(x_NxD: np.ndarray) -> np.ndarray:
  """Rows of length 1; a row of zeros stays one."""
  return x_NxD / np.maximum(np.linalg.norm(x_NxD, axis=-1, keepdims=True), 1e-12)


def evenly(count: int, most: int = MOST_IMAGES) -> np.ndarray:
  """Numbers of at most `most` of `count` rows, spread over all of them: a data set may be sorted by class."""
  return np.linspace(0, count - 1, min(count, most)).astype(int)
