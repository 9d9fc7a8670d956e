"""What a loader is: batches of training and of evaluation, wherever the pixels lie.

Flow: build picks `pipeline.PipelineLoader` or `resident.ResidentLoader`; everything else takes either of them.
Shapes: an item of a view is a tuple of arrays [b, ...], which `cut` makes the view uint8 [b, size, size, 3] of.
Holds: what a batch holds is a function of (seed, step) alone (order); a loader decides where its pixels come from.
Not here: the loaders themselves.
"""

from collections.abc import Generator, Iterator
from typing import Protocol

import jax
import numpy as np
from jax.typing import DTypeLike

from adco_jax.config.plan import Plan
from adco_jax.data.images import Reader
from adco_jax.data.order import Batch
from adco_jax.runtime.dtypes import Tree


class Loader(Protocol):
  """`reader`: whose images; `shared`: arrays on the devices that `cut` needs; `ahead`: batches to have ready."""

  reader: Reader
  shared: dict[str, jax.Array]
  ahead: int

  def cut(self, item: Tree, size: int, shared: dict[str, jax.Array]) -> jax.Array:
    """Inside the step: an item of a view -> uint8 [b, size, size, 3]."""

  def shipped(self, size: int) -> list[tuple[tuple[int, ...], DTypeLike]]:
    """[(shape, dtype)] of the arrays of one slot of a view."""

  def train(
    self, start: int, stop: int, *, seed: int, plan: Plan, ratio: tuple[float, float]
  ) -> Generator[Batch, None, None]:
    """Yields the `order.Batch` of the updates start..stop-1. Raises RunError where too many images are broken."""

  def evaluation(
    self, indices: np.ndarray, *, size: int, fraction: float, batch_size: int
  ) -> Iterator[tuple[jax.Array, int]]:
    """Yields (uint8 [batch_size, size, size, 3] on the devices, how many of them count)."""
