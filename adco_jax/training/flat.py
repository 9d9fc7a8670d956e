"""All parameters of an encoder as one vector, and all its statistics as another, while a GPU trains.

Flow: build wraps the encoder (`FlatEncoder`); pretrain packs the state before its loop and unpacks it for all that
  looks at it: checkpoints, evaluation, capsules.
Shapes: a tree of arrays <-> one vector of all their numbers, in the order of the tree's leaves.
Holds: the same numbers at every step; optimiser, average, finite guard and running statistics are then one kernel each
  instead of one per array: a third of the launches of a small network's step.
Not here: where it is worth while (build).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from adco_jax.models.heads import embed
from adco_jax.runtime.dtypes import Tree
from adco_jax.training.state import TrainState


class Layout(NamedTuple):
  """How a tree lies in its vector."""

  structure: jax.tree_util.PyTreeDef
  shapes: tuple[tuple[int, ...], ...]

  @classmethod
  def of(cls, tree: Tree) -> Self:
    """That of a tree of arrays (or of their shapes), all of one dtype."""
    leaves, structure = jax.tree.flatten(tree)
    return cls(structure, tuple(x.shape for x in leaves))

  def pack(self, tree: Tree) -> jax.Array:
    """The vector of a tree."""
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])

  def unpack(self, vector: jax.Array) -> Tree:
    """The tree of a vector. The gradient is packed again, not summed up from as many vectors of zeros."""
    return _unpack(self, vector)

  def holds(self, tree: Tree) -> bool:
    """Whether this is (in structure) the tree of this layout."""
    return jax.tree.structure(tree) == self.structure


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpack(layout, vector):
  parts, start = [], 0
  for shape in layout.shapes:
    size = math.prod(shape)
    parts.append(vector[start : start + size].reshape(shape))
    start += size
  return jax.tree.unflatten(layout.structure, parts)


_unpack.defvjp(
  lambda layout, vector: (_unpack(layout, vector), None),
  lambda layout, _, gradient: (layout.pack(gradient),),
)


class FlatEncoder(NamedTuple):
  """An encoder whose variables are two vectors, as train_step asks for it."""

  encoder: nn.Module
  params: Layout
  stats: Layout
  head: bool = True  # False: it gives features
  train: bool = True  # False: its statistics stand still

  @classmethod
  def of(cls, encoder: nn.Module, state: TrainState, head: bool = True, train: bool = True) -> Self:
    """That of an encoder whose variables are in this state (or in its shapes)."""
    return cls(encoder, Layout.of(state.query_params), Layout.of(state.query_stats), head, train)

  def embed(
    self, params: jax.Array, stats: jax.Array, images: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """As `train_step.embed`."""
    variables = self.params.unpack(params), self.stats.unpack(stats)
    z, after = embed(self.encoder, *variables, images, self.head, self.train)
    return z, self.stats.pack(after)

  def pack(self, state: TrainState) -> TrainState:
    """Every tree of parameters (momenta are one) and of statistics in a state as its vector."""
    vector = lambda x: self._layout(x).pack(x) if self._layout(x) else x
    return jax.tree.map(vector, state, is_leaf=lambda x: bool(self._layout(x)))

  def unpack(self, packed: TrainState, like: TrainState) -> TrainState:
    """The state again; `like`: a state (or its shapes) of the same structure."""
    whole = lambda old, x: self._layout(old).unpack(x) if self._layout(old) else x
    return jax.tree.map(whole, like, packed, is_leaf=lambda x: bool(self._layout(x)))

  def packing(
    self, state: TrainState, whole: Tree, parts: Tree
  ) -> tuple[Callable[[TrainState], TrainState], Callable[[TrainState], TrainState]]:
    """(pack, unpack), compiled; `state`: shapes of one, `whole` and `parts`: shardings of a state and of a packed one.

    pack deletes the state that it is given: both at once would take twice the memory for as long as a run lasts.
    """
    copy = jax.jit(self.pack, out_shardings=parts)

    def pack(state):
      packed = copy(state)
      for array in jax.tree.leaves(state):
        array.delete()
      return packed

    return pack, jax.jit(lambda packed: self.unpack(packed, state), out_shardings=whole)

  def _layout(self, tree):
    return next((layout for layout in (self.params, self.stats) if layout.holds(tree)), None)
