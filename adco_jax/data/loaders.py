"""What a loader is: batches of training and of evaluation, wherever the pixels lie.

Flow: build picks `pipeline.PipelineLoader` or `resident.ResidentLoader`; everything else takes either of them.
Shapes: see batch.
Holds: what a batch holds is a function of (seed, step) alone (order); a loader decides where its pixels come from.
Not here: the loaders themselves.
"""

from collections.abc import Generator, Iterator
from typing import Protocol

import jax
import numpy as np

from adco_jax.config.plan import Plan
from adco_jax.data.batch import Item, LoadedBatch
from adco_jax.data.images import Reader


class Loader(Protocol):
  """`reader`: whose images; `ahead`: batches to have ready."""

  reader: Reader
  ahead: int

  @property
  def item(self) -> type[Item]:
    """As what its views travel."""

  @property
  def images(self) -> jax.Array | None:
    """Those of the whole set, on the devices, where the step cuts its views of them."""

  def train(
    self, start: int, stop: int, *, seed: int, plan: Plan, ratio: tuple[float, float]
  ) -> Generator[LoadedBatch, None, None]:
    """Yields the `LoadedBatch` of the updates start..stop-1. Raises RunError where too many images are broken."""

  def evaluation(
    self, indices: np.ndarray, *, size: int, fraction: float, batch_size: int
  ) -> Iterator[tuple[jax.Array, int]]:
    """Yields (uint8 [batch_size, size, size, 3] on the devices, how many of them count)."""
