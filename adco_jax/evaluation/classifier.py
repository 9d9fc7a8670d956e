"""The classifier that a run on labels trains, scored on images that it never trains on.

Flow: pretrain calls an `OnlineClassifier` where the plan evaluates, and keeps the checkpoint of its `Best`; classified scores test
  images at the end with the same `make_classify` and `accuracies`.
Shapes: logits float32 [N, C]; labels int [N].
Holds: every image is scored exactly once; of equal logits the first class counts as the larger, as argmax has it.
Not here: which images are held out (labelled), classifiers of frozen features (linear).
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from adco_jax.data.loaders import Loader
from adco_jax.evaluation import confusion
from adco_jax.objectives import infonce
from adco_jax.objectives.base import Classifying, averages
from adco_jax.runtime import sharding
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json
from adco_jax.runtime.guard import Guard
from adco_jax.views.augment import standardize

KS = (1, 5)  # of top-k
BEST = "classifier/top1"  # by which a checkpoint is the best

Classify = Callable[[Tree, Tree, jax.Array], jax.Array]  # see `make_classify`


def make_classify(
  encoder: nn.Module, mean: Sequence[float], std: Sequence[float], mesh: Mesh
) -> Classify:
  """(variables, {'kernel', 'bias'}, uint8 [B, H, W, 3]) -> logits float32 [B, C], with running statistics."""

  def classify(variables, classifier, images):
    x = standardize(images.astype(jnp.float32) / 255, mean, std)
    features: jax.Array = encoder.apply(variables, x, method="features")  # type: ignore[assignment]
    features = features.astype(classifier["kernel"].dtype)
    logits = jnp.matmul(features, classifier["kernel"], precision=infonce.HIGHEST)
    return (logits + classifier["bias"][None]).astype(jnp.float32)

  return jax.jit(classify, out_shardings=sharding.replicated(mesh))


def accuracies(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """{'top1', 'top5', 'loss'}: shares in 0..1, the latter only of more than five classes, and the mean cross-entropy."""
  shares = {f"top{k}": confusion.top(logits, labels, k) for k in KS if k < max(2, logits.shape[1])}
  wide = logits.astype(np.float64)
  shifted = wide - wide.max(1, keepdims=True)
  loss = np.log(np.exp(shifted).sum(1)) - np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
  return shares | {"loss": float(loss.mean())}


class Best:
  """The step whose classifier was the best on held-out images, the first of equals; None before any was trained and scored."""

  def __init__(self) -> None:
    self.step: int | None = None
    self.top1 = -1.0

  def see(self, step: int, top1: float) -> None:
    """Of a step that was scored."""
    if step and top1 > self.top1:
      self.step, self.top1 = step, top1

  @staticmethod
  def lines_of(lines: Iterable[dict[str, Json]]) -> list[dict[str, Json]]:
    """Of lines of metrics, what `recall` needs."""
    return [{"step": line["step"], BEST: line[BEST]} for line in lines if BEST in line]

  def recall(self, lines: Iterable[dict[str, Json]]) -> None:
    """What `lines_of` gave, oldest first, as if it had been seen."""
    for line in lines:
      self.see(line["step"], line[BEST])


def scored(objective: Classifying, state: Tree) -> tuple[Tree, Tree]:
  """(variables, classifier) of a state: those of its average where one is kept."""
  average = averages(objective)  # type: ignore[arg-type]
  player = "key" if average else "query"
  params, stats = (getattr(state, f"{player}_{kind}") for kind in ("params", "stats"))
  return {"params": params, **stats}, objective.classifier(state.objective, average)


class OnlineClassifier:
  """Called with a state; `size`: held-out images; `best` is told of every score. `view`: size, fraction, batch_size."""

  pictures: tuple[str, ...] = ()

  def __init__(
    self,
    classify: Classify,
    objective: Classifying,
    loader: Loader,
    view: dict[str, Json],
    guard: Guard,
    best: Best,
  ) -> None:
    self._classify, self._objective, self._loader = classify, objective, loader
    self._view, self._guard, self._best = view, guard, best
    self.size, self.broken = loader.reader.source.num_examples, loader.reader.broken

  def __call__(self, state: Tree) -> dict[str, float]:
    scores = self.score(*scored(self._objective, state))
    self._best.see(int(state.step), scores["top1"])
    return {f"classifier/{name}": value for name, value in scores.items()}

  def score(self, variables: Tree, classifier: Tree) -> dict[str, float]:
    """`accuracies` of an encoder and a classifier on all images of the loader. Raises guard.Leaving."""
    batches = self._loader.evaluation(np.arange(self.size), **self._view)
    parts = [
      np.asarray(self._classify(variables, classifier, images))[:count]
      for images, count in self._guard.over(batches)
    ]
    return accuracies(np.concatenate(parts), self._loader.reader.source.targets)
