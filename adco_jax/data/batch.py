"""What one update takes: the views of its images as they travel to the devices, and the order of its keys.

Flow: a loader reads what `order.request` asks for and makes a `Batch` of it (`assemble_batch`); pretrain puts it on the
  devices, the step makes normalised images of it (prepare). `--plan` compiles for `Batch.shapes`.
Shapes: slots are the B positions of the global batch, of which a process ships b; keys sit at positions, slot
  key_orders[v, p] at position p of key view v, so that position key_positions[v, s] holds slot s.
Holds: whether a key view travels on its own is said once (`_travels`); a batch's structure, None for what does not travel,
  tells it to the step.
Not here: which examples and which orders (order), pixels (pipeline, resident).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from adco_jax.config.pairing import Pairing
from adco_jax.config.plan import Plan
from adco_jax.runtime import sharding
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.sharding import AXIS


class Item(Protocol):
  """One view of some slots as a loader ships it: a tree of arrays [b, ...]."""

  def crops(self, size: int, images: jax.Array | None, pad: int = 0) -> jax.Array:
    """Inside the step: uint8 [b, size, size, 3]; `images`: the loader's, see `Constants`; `pad`: see Plan."""

  @classmethod
  def shapes(cls, slots: int, size: int) -> Self:
    """Shapes and dtypes of its arrays."""


class Constants(NamedTuple):
  """What all updates of a run take besides: equal on all devices."""

  seed: Tree  # uint32 []
  images: jax.Array | None = None  # uint8 [N, H, W, 3] of a set that is kept on the devices

  @classmethod
  def put(cls, mesh: Mesh, seed: int, images: jax.Array | None = None) -> Self:
    """On the devices; `images` are there already (`Loader.images`)."""
    return cls(sharding.put(np.uint32(seed), sharding.replicated(mesh)), images)

  @classmethod
  def shapes(cls, mesh: Mesh) -> Tree:
    """Without images, for a machine that need not be there."""
    return cls(jax.ShapeDtypeStruct((), np.uint32, sharding=sharding.replicated(mesh)))


class Batch(NamedTuple):
  """What one update takes, a pytree. A view is an `Item`, or float images [b, H, W, 3] where it comes ready (`prepare`).

  `queries`, `keys`: a list of views: of each query view in slot order, of each key view in the order of its positions, None
  for one that is the same query view. `key_orders` and its inverse `key_positions`: int32 [V, B], see Shapes; None: every
  slot's key sits at its own position.
  """

  queries: Tree
  keys: Tree
  key_orders: Tree = None
  key_positions: Tree = None
  labels: Tree = None  # int32 [b] of the images in the slots, for an objective that needs them

  @classmethod
  def of(
    cls, queries: Sequence[Tree], keys: Sequence[Tree | None], key_orders: np.ndarray | None = None
  ) -> Self:
    """The batch of these views, whose keys lie as `key_orders` says."""
    positions = None if key_orders is None else np.argsort(key_orders, -1).astype(np.int32)
    return cls(list(queries), list(keys), key_orders, positions)

  @classmethod
  def specs(cls) -> Tree:
    """PartitionSpecs of its fields: views are split over the devices."""
    return cls(P(AXIS), P(AXIS), P(), P(), P(AXIS))

  @classmethod
  def shapes(cls, plan: Plan, pairing: Pairing, mesh: Mesh, item: type[Item]) -> Tree:
    """Shapes, dtypes and shardings of the global batch of a loader that ships `item`s."""
    view = lambda v: item.shapes(plan.batch_size, plan.view_sizes[v])
    keys = [view(v) if _travels(v, plan, pairing) else None for v in pairing.key_views]
    shape = len(pairing.key_views), plan.batch_size
    order = jax.ShapeDtypeStruct(shape, np.int32) if shuffles(plan, pairing) else None
    labels = jax.ShapeDtypeStruct((plan.batch_size,), np.int32) if plan.has_labels else None
    batch = cls([view(v) for v in pairing.query_views], keys, order, order, labels)
    return sharding.abstract(batch, sharding.from_specs(mesh, cls.specs()))

  def put(self, mesh: Mesh) -> Self:
    """The global batch on the devices, of this process's slots of it."""
    return sharding.put(self, sharding.from_specs(mesh, self.specs()))


class LoadedBatch(NamedTuple):
  """What a loader yields for one update."""

  batch: Batch  # this process's slots, on the host
  indices: np.ndarray  # int [b], the examples in them
  replaced: int  # how many of them took the place of a broken one

  @classmethod
  def of(
    cls, batch: Batch, indices: np.ndarray, replaced: int, plan: Plan, labels: np.ndarray | None
  ) -> Self:
    """The batch with the labels of its slots' images, of all `labels` [N], where the plan has them travel."""
    if plan.has_labels and labels is not None:
      batch = batch._replace(labels=labels[indices].astype(np.int32))
    return cls(batch, indices, replaced)


def shuffles(plan: Plan, pairing: Pairing) -> bool:
  """Whether keys change places at all."""
  return bool(plan.shuffle_block and pairing.key_views)


def _travels(view, plan, pairing):
  """Whether a key view travels on its own: shuffled, or no query view as well."""
  return shuffles(plan, pairing) or view not in pairing.query_views


def views_per_read(plan: Plan, pairing: Pairing) -> list[Sequence[int]]:
  """Views that are cut of each image that is read for a position: all of its slot's; or the queries of its
  slot, then every key of the slot that its order says, where blocks reach over processes."""
  if not plan.shuffles_over_processes:
    return [pairing.views]
  return [pairing.query_views, *((v,) for v in pairing.key_views)]


def assemble_batch(
  items: Sequence[Item], key_orders: np.ndarray | None, plan: Plan, pairing: Pairing
) -> Batch:
  """The `Batch` of a process; `items`: of each view that was cut (`views_per_read`), rows in the order of its positions."""
  if plan.shuffles_over_processes:
    count = len(pairing.query_views)
    return Batch.of(items[:count], items[count:], key_orders)
  of = dict(zip(pairing.views, items, strict=True))
  keys = [of[v] if _travels(v, plan, pairing) else None for v in pairing.key_views]
  if key_orders is not None:
    first, count = plan.slots
    places = key_orders[:, first : first + count] - first
    pairs = zip(keys, places, strict=True)
    keys = [jax.tree.map(lambda x, at=place: x[at], item) for item, place in pairs]
  return Batch.of([of[v] for v in pairing.query_views], keys, key_orders)
