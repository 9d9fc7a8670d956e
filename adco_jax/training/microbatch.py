"""A batch in parts, for batches whose activations do not fit: the same gradient as of the whole, in two passes.

Flow: train_step embeds every part (`embed_parts`), takes the loss of all embeddings at once, and pulls its
  gradient back through each part again (`pull_parts`).
Shapes: a device's b slots are `num_microbatches` times s of them; embeddings [V, b, D].
Paper: Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup".
Holds: both passes draw the same views; statistics come from the first alone; BatchNorm's groups lie inside
  of parts, so nothing but the order of sums differs from the whole batch.
  On CPU, unrolled, the compiler finds the second pass in the first: nothing is computed twice and no memory
  saved. On accelerators it is a loop.
Not here: losses, and what a part is made of (train_step).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adco_jax.data.batch import Batch
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.sharding import AXIS


def take(batch: Batch, part: ArrayLike, num_microbatches: int) -> Batch:
  """Part number `part` of the slots of a device's batch."""

  def rows(x):
    size = x.shape[0] // num_microbatches
    return jax.lax.dynamic_slice_in_dim(x, part * size, size)

  queries, keys = jax.tree.map(rows, (batch.queries, batch.keys))
  return batch._replace(queries=queries, keys=keys)


def image_keys(
  rng: jax.Array, views: Sequence[jax.Array], part: ArrayLike, num_microbatches: int
) -> list[jax.Array]:
  """A JAX key for every image of a part, view by view: a function of its view and its slot in the whole batch."""
  size = len(views[0])
  slots = (jax.lax.axis_index(AXIS) * num_microbatches + part) * size + jnp.arange(size)
  key = lambda view, slot: jax.random.fold_in(jax.random.fold_in(rng, view), slot)
  return [jax.vmap(functools.partial(key, view))(slots) for view in range(len(views))]


def embed_parts(
  embed: Callable[[ArrayLike], tuple[jax.Array, Tree]],
  num_microbatches: int,
  running_from: str,
  unrolled: bool,
) -> tuple[jax.Array, Tree]:
  """([V, b, D], statistics) from embed(part) -> ([V, s, D], statistics after that part alone).

  Statistics are linear in a batch's moments, so the mean over parts is what the whole batch gives;
  running_from='first' keeps those of the first part, whose first group is the batch's.
  """
  if unrolled:
    outputs = [embed(part) for part in range(num_microbatches)]
    embedded, stats = jax.tree.map(lambda *x: jnp.stack(x), *outputs)
  else:
    _, (embedded, stats) = jax.lax.scan(
      lambda _, part: ((), embed(part)), (), jnp.arange(num_microbatches)
    )
  _, views, size, dim = embedded.shape
  embedded = jnp.moveaxis(embedded, 0, 1).reshape(views, num_microbatches * size, dim)
  merge = (lambda x: x[0]) if running_from == "first" else (lambda x: jnp.mean(x, 0))
  return embedded, jax.tree.map(merge, stats)


def pull_parts(
  embed: Callable[..., jax.Array],
  params: Tree,
  gradient_VxbxD: jax.Array,
  num_microbatches: int,
  unrolled: bool,
) -> Tree:
  """Gradient with respect to `params` of embed(params, part) -> [V, s, D], summed over parts."""

  def pull(part):
    _, back = jax.vjp(functools.partial(embed, part=part), params)
    size = gradient_VxbxD.shape[1] // num_microbatches
    return back(jax.lax.dynamic_slice_in_dim(gradient_VxbxD, part * size, size, 1))[0]

  add = lambda a, b: jax.tree.map(jnp.add, a, b)
  if unrolled:
    return functools.reduce(add, [pull(part) for part in range(num_microbatches)])
  zero = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(
    lambda total, part: (add(total, pull(part)), None), zero, jnp.arange(num_microbatches)
  )[0]
