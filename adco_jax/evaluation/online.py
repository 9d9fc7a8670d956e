"""What is known of an encoder while it trains: scores on train images left out of the search, and what needs no label.

Flow: pretrain makes one `OnlineEvaluation` and calls it at the steps that the plan names; log writes what it returns. What the
  objective's rows of negatives do is asked of gallery, with the same embeddings.
Shapes: features float32 [N, F] of the backbone, embeddings [N, D] of the head, both with running statistics.
Holds: without labels there are no scores, but rank, cosines, uniformity and nearest neighbours; nothing drawn
  here depends on the step, so that points of a curve differ by the encoder alone.
Not here: scores of a finished run (evaluate), the arithmetic (evaluation/*).
"""

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adco_jax.config.plan import Plan
from adco_jax.data import order
from adco_jax.data.cuts import cut_centre
from adco_jax.data.loaders import Loader
from adco_jax.data.sources.base import Source
from adco_jax.evaluation import knn, linear, signals
from adco_jax.evaluation.gallery import Gallery
from adco_jax.objectives.base import Objective
from adco_jax.runtime import processes, sharding
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.guard import Guard
from adco_jax.runtime.processes import say
from adco_jax.views.augment import standardize
from adco_jax.workdir import pictures

SHEET = "neighbours.png"


class OnlineEvaluation:
  """Called with a state. `size`: how many images it looks at; `pictures`: those that it draws.

  Of embeddings that nothing trains, where an objective sees features alone, nothing is told.
  """

  def __init__(
    self,
    config: ConfigDict,
    plan: Plan,
    source: Source,
    loader: Loader,
    encoder: nn.Module,
    objective: Objective,
    mesh: Mesh,
    guard: Guard,
    workdir: str,
  ) -> None:
    labels = None if source.has_several else source.labels
    if one := labels is not None and len(np.unique(labels)) < 2:
      labels = None
    if labels is None:
      told = "several labels per image" if source.has_several else "no labels"
      told = "labels of a single class" if one else told
      say(f"{told}: no kNN and no probe; ranks, cosines and nearest neighbours remain")
    self._setting, self._num_classes, self._labels = config.eval, plan.num_classes, labels
    self._loader, self._guard, self._head = loader, guard, objective.sees == "projections"
    self._gallery = Gallery(objective, plan.batch_size, mesh, workdir, self._thumbnail)
    self.pictures: tuple[str, ...] = (os.path.join(workdir, SHEET), self._gallery.picture)
    most = config.eval.max_images
    most = most if labels is not None else min(most or signals.MOST_IMAGES, signals.MOST_IMAGES)
    self._searched, self._scored = order.hold_out(
      config.seed, source.num_examples, config.eval.hold_out, most
    )
    self.size = len(self._searched) + len(self._scored)
    self._forward = make_forward(encoder, config.data.mean, config.data.std, mesh)

  def __call__(self, state: Tree) -> dict[str, float]:
    variables = {"params": state.query_params, **state.query_stats}
    index, queries = (self._extract(variables, rows) for rows in (self._searched, self._scored))
    values = {} if self._labels is None else self._scores(self._labels, index[0], queries[0])
    some = [signals.evenly(len(rows)) for rows in (self._scored, self._searched)]
    some[1] = some[1][signals.evenly(len(some[1]), signals.MOST_IMAGES - len(some[0]))]
    both = [np.concatenate([q[some[0]], x[some[1]]]) for q, x in zip(queries, index, strict=True)]
    spread = signals.spread(*both)
    values |= {name: x for name, x in spread.items() if self._head or "features" in name}
    processes.on_first(lambda: self._draw(index[0], queries[0]))
    return values | self._gallery(int(state.step), state.objective, self._searched, index[1])

  def _extract(self, variables, rows):
    """(features, embeddings) of these examples, each exactly once."""
    setting = self._setting
    batches = self._loader.evaluation(
      rows, size=setting.size, fraction=setting.crop_fraction,
      batch_size=sharding.round_up(setting.batch_size),
    )  # fmt: skip
    outputs = [
      [x[:count] for x in jax.device_get(self._forward(variables, images))]
      for images, count in self._guard.over(batches)
    ]
    return [np.concatenate(column) for column in zip(*outputs, strict=True)]

  def _scores(self, labels, index, queries):
    setting = self._setting
    near = knn.predict(
      index, labels[self._searched], queries,
      k=setting.knn_k, temperature=setting.knn_temperature, num_classes=self._num_classes,
    )  # fmt: skip
    scale = linear.scale_of(index)
    index, queries = scale(index), scale(queries)
    probe = linear.predict(linear.fit(index, labels[self._searched], self._num_classes), queries)
    scored = labels[self._scored]
    return {
      "knn/top1": knn.accuracy(near, scored),
      "knn/chance": guessing(scored),
      "probe/top1": knn.accuracy(probe, scored),
    }

  def _draw(self, index, queries, rows=8, columns=5):
    """Rows: an image that was left out of the search, its nearest ones among the others."""
    nearest = knn.search(
      index, queries[signals.evenly(len(queries), rows)], min(columns, len(index))
    )[1]
    shown = self._scored[signals.evenly(len(queries), rows)]
    sheet = [
      [self._thumbnail(i), None, *map(self._thumbnail, self._searched[near])]
      for i, near in zip(shown, nearest, strict=True)
    ]
    pictures.save_sheet(self.pictures[0], sheet, side=64)

  def _thumbnail(self, i):
    """Example i as the encoder sees it, uint8 [H, W, 3]."""
    return cut_centre(self._loader.reader.read_first([i])[0].pixels, self._setting.size)


def guessing(labels_N: np.ndarray) -> float:
  """The most that an encoder which tells nothing will score on these: the largest class's share and two standard errors."""
  share = np.unique(labels_N, return_counts=True)[1].max() / len(labels_N)
  return min(1.0, float(share + 2 * np.sqrt(share * (1 - share) / len(labels_N))))


def make_forward(
  encoder: nn.Module, mean: Sequence[float], std: Sequence[float], mesh: Mesh
) -> Callable[[Tree, jax.Array], tuple[jax.Array, jax.Array]]:
  """(variables, uint8 [B, H, W, 3]) -> (features [B, F], embeddings [B, D]) with running statistics."""

  def outputs(module, x):
    features = module.backbone(x, False)
    return features.astype(jnp.float32), module.head(features).astype(jnp.float32)

  def forward(variables, images):
    x = standardize(images.astype(jnp.float32) / 255, mean, std)
    return encoder.apply(variables, x, method=outputs)

  return jax.jit(forward, out_shardings=sharding.replicated(mesh))
