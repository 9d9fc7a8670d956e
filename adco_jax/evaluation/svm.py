"""A linear SVM per class on frozen features, its cost chosen by cross-validation, and the same with few positives.

Flow: task svm -> `normalise` -> `fit_all` or `fit_few` -> average precisions of held-out images.
Shapes: features [N, F], presence int8 [N, C] of 1, 0 and -1, SVMs as kernel [F, C] and bias [C].
Paper: VISSL's protocol for VOC07 (Goyal et al. 2019): squared hinge, l2, positives weighted twice, a bias that is
  penalised as a weight, features divided by their length, costs by the mean AP of three folds.
Holds: the solver is Newton's in the primal, which has no random numbers: one problem, one answer, whatever the threads.
  No cost is chosen on test images.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from adco_jax.evaluation import average_precision
from adco_jax.runtime import host, rng
from adco_jax.runtime.files import Json
from adco_jax.runtime.progress import Progress

TOLERANCE, ITERATIONS = 1e-4, 2000  # VISSL's; Newton's method takes some tens
MOST_BYTES = 8 * 2**30  # of copies of the features that the solver makes in all threads

T = TypeVar("T")


class Setting(NamedTuple):
  """How SVMs are fitted."""

  costs: Sequence[float]
  folds: int = 3
  positive_weight: float = 2.0
  ignored_are_negatives: bool = True  # in cross-validation and fit of all images


class Fitted(NamedTuple):
  """SVMs of C classes, the cost of each, and the mean of the classes' mean AP over folds at these costs."""

  kernel: np.ndarray
  bias: np.ndarray
  costs: list[float]
  held_out: float

  def scores(self, features: np.ndarray) -> np.ndarray:
    """[N, C], of normalised features."""
    return features @ self.kernel + self.bias


def normalise(features: np.ndarray) -> np.ndarray:
  """Features divided by their lengths, float64."""
  features = features.astype(np.float64)
  return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def fit(
  features: np.ndarray, wanted: np.ndarray, costs: Sequence[float], weight: float
) -> np.ndarray:
  """(kernel, bias) of an SVM for each cost, [F + 1, costs]; `wanted`: bool [N], some of either kind.

  Fewer images than features lie in a space of their own number, in which nothing of the problem changes.
  """
  from sklearn.svm import LinearSVC

  within, rows = None, features
  if len(features) < features.shape[1]:
    within, triangle = np.linalg.qr(features.T)
    rows = triangle.T
  svms = []
  for cost in costs:
    weights = {True: weight, False: 1.0}
    model = LinearSVC(C=cost, class_weight=weights, dual=False, tol=TOLERANCE, max_iter=ITERATIONS)
    model.fit(rows, wanted)
    kernel = model.coef_[0] if within is None else within @ model.coef_[0]
    svms.append(np.append(kernel, model.intercept_[0]))
  return np.stack(svms, 1)


def fit_all(features: np.ndarray, presence: np.ndarray, setting: Setting) -> Fitted:
  """An SVM per class at the cost with the best mean AP over folds of these images; the smallest wins a tie."""
  from sklearn.model_selection import StratifiedKFold

  def learnt(c):
    rows = np.arange(len(presence))
    rows = rows if setting.ignored_are_negatives else rows[presence[:, c] >= 0]
    return rows, presence[rows, c] == 1

  def validate(job):
    c, fold = job
    rows, wanted = learnt(c)
    train, left = [*StratifiedKFold(setting.folds).split(rows, wanted)][fold]
    svms = fit(features[rows[train]], wanted[train], setting.costs, setting.positive_weight)
    found = features[rows[left]] @ svms[:-1] + svms[-1]
    return [average_precision.summed(wanted[left].astype(np.int8), scores) for scores in found.T]

  def refit(c):
    return fit(features[learnt(c)[0]], learnt(c)[1], [costs[c]], setting.positive_weight)[:, 0]

  classes, folds = range(presence.shape[1]), range(setting.folds)
  jobs = [(c, fold) for c in classes for fold in folds]
  each = _map("choice of costs", validate, jobs, features, len(setting.costs))
  means = np.reshape(each, (len(classes), setting.folds, -1)).mean(1)
  costs = [setting.costs[i] for i in means.argmax(-1)]
  svms = np.stack(_map("all images", refit, classes, features), 1)
  return Fitted(svms[:-1], svms[-1], costs, float(means.max(-1).mean()))


def draw(presence: np.ndarray, positives: int, seed: int, number: int) -> list[np.ndarray]:
  """For each class the rows of so many images with it, and of C - 1 times as many without it, as far as there are so many.

  Draw `number` of a seed with more positives holds that with fewer; what does not count is never drawn.
  """
  negatives = positives * max(presence.shape[1] - 1, 1)
  rows = []
  for c, column in enumerate(presence.T):
    picks = rng.host_rng_for(seed, rng.FEW_SHOT, number, c)
    orders = [picks.permutation(np.flatnonzero(column == kind)) for kind in (1, 0)]
    rows.append(np.concatenate([orders[0][:positives], orders[1][:negatives]]))
  return rows


def fit_few(
  features: np.ndarray,
  presence: np.ndarray,
  test: np.ndarray,
  test_presence: np.ndarray,
  setting: Setting,
  *,
  positives: int,
  draws: int,
  seed: int,
) -> dict[str, Json]:
  """{'mean', 'spread', 'draws'} of the mean AP over draws with so many positives per class, at the one 'cost' that is best
  on the train images which the draws leave out; 'on_test': the same at the cost that is best on the test images, as VISSL
  reports it, which is too good."""
  drawn = [draw(presence, positives, seed, number) for number in range(draws)]

  def one(job):
    number, c = job
    rows = drawn[number][c]
    svms = fit(features[rows], presence[rows, c] == 1, setting.costs, setting.positive_weight)
    left = presence[:, c].copy()
    left[rows] = -1
    found = [x @ svms[:-1] + svms[-1] for x in (features, test)]
    scored = zip((left, test_presence[:, c]), found, strict=True)
    return [[average_precision.area(there, scores) for scores in x.T] for there, x in scored]

  classes = range(presence.shape[1])
  jobs = [(number, c) for number in range(draws) for c in classes]
  found = _map(f"{positives} positives per class", one, jobs, features, len(setting.costs))
  # Of a class that the draws use up nothing is left out, and it has no say in the choice.
  left, scored = np.nanmean(np.reshape(found, (draws, len(classes), 2, -1)), 1).transpose(1, 0, 2)
  told = lambda c: {"mean": float(scored[:, c].mean()), "spread": float(scored[:, c].std()), "cost": setting.costs[c]}  # fmt: skip
  chosen = _best(left)
  return told(chosen) | {"draws": scored[:, chosen].tolist(), "on_test": told(_best(scored))}


def _best(scores):
  """The column of scores [R, costs] with the largest mean, the first of equals."""
  means = scores.mean(0)
  return int(np.argmax(np.where(np.isnan(means), -1, means)))


def _map(
  name: str, work: Callable[..., T], jobs: Sequence, features: np.ndarray, each: int = 1
) -> list[T]:
  """work(job) of all of them, `each` so many SVMs, in threads: the solver lets others run."""
  from threadpoolctl import threadpool_limits

  copies = max(1, MOST_BYTES // (3 * features.nbytes + 1))
  threads = min(host.cores(), copies)
  # Threads of its own in every product of ours would fight over the cores: 12 times the processor time, measured.
  with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
    return [*Progress(name, each * len(jobs), "SVMs").over(pool.map(work, jobs), each)]
