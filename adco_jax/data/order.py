"""Which example fills which slot of which step, in NumPy, as functions of (seed, step) alone.

Flow: a loader takes the `request` of a step, reads and cuts, and makes its batch (batch).
Shapes: slots are the B positions of the global batch; a process owns a contiguous part of them.
Holds: one epoch visits each example at most once (the last N mod B are dropped, as the authors do);
  a start at step n equals a run that got there; processes partition the global batch; a broken image
  is replaced by the first of its slot's spares that can be read, and nothing else moves.
Not here: how a crop is drawn (crops), pixels (pipeline, resident).
"""

import functools
from typing import NamedTuple

import numpy as np

from adco_jax.config.pairing import Pairing
from adco_jax.config.plan import Plan
from adco_jax.data import batch
from adco_jax.runtime import rng
from adco_jax.views import crops

SPARES = 4  # examples that may take the place of a broken one


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """The order of one epoch, int64 [N]."""
  return rng.host_rng_for(seed, rng.ORDER, epoch).permutation(num_examples)


def batch_indices(seed: int, batch: int, num_examples: int, batch_size: int) -> np.ndarray:
  """Examples of the `batch`-th batch ever drawn, int64 [B]."""
  epoch, i = divmod(batch, num_examples // batch_size)
  return permutation(seed, epoch, num_examples)[i * batch_size : (i + 1) * batch_size]


def key_order(seed: int, step: int, view: int, batch_size: int, block: int) -> np.ndarray:
  """Slot whose image sits at each position of the shuffled key batch, int32 [B].

  Positions are permuted inside blocks of `block` slots; a process that owns whole blocks reads each of its
  images once, others read the images of their keys as well (the authors gather all images on the wire:
  `batch_shuffle_ddp`).
  """
  drawn = [
    rng.host_rng_for(seed, rng.SHUFFLE, step, start, view).permutation(block) + start
    for start in range(0, batch_size, block)
  ]
  return np.concatenate(drawn).astype(np.int32)


def key_orders(seed: int, step: int, plan: Plan, pairing: Pairing) -> np.ndarray | None:
  """`key_order` of every key view, int32 [V_keys, B]; None where none is shuffled."""
  if not batch.shuffles(plan, pairing):
    return None
  size = plan.batch_size, plan.shuffle_block
  return np.stack([key_order(seed, step, v, *size) for v in pairing.key_views])


class Request(NamedTuple):
  """What one process needs of one step: b positions, R readings of each, V views cut in all (`views_per_read`)."""

  candidates: np.ndarray  # [b, R, 1 + SPARES]: examples, each followed by those that may replace it
  draws: np.ndarray  # [b, V, TRIES, 4], of crops; boxes [b, V, 4] where all images have one size
  all_draws: np.ndarray  # [b, R, W, ...], alike: of all W views of each reading's image
  key_orders: np.ndarray | None = None  # see `key_orders`


def request(
  seed: int, step: int, plan: Plan, ratio: tuple[float, float], draws: np.ndarray | None = None
) -> Request:
  """The `Request` of update `step`; `draws`: of all its views [B, V, ...], if they are known."""
  first, count = plan.slots
  pairing, own = plan.pairing(step), np.arange(first, first + count)
  slots, orders = [own], key_orders(seed, step, plan, pairing)
  if orders is not None and plan.shuffles_over_processes:
    slots += [order_B[own] for order_B in orders]
  indices = batch_indices(seed, plan.batch(step), plan.num_examples, plan.batch_size)
  spares = rng.host_rng_for(seed, rng.SPARES, step).randint(
    plan.num_examples, size=(plan.batch_size, SPARES)
  )
  candidates = np.concatenate([indices[:, None], spares], 1)
  if draws is None:
    draws = crops.random_draws(seed, step, plan.batch_size, plan.view_scales, ratio)
  groups = zip(slots, batch.views_per_read(plan, pairing), strict=True)
  cut = [draws[np.ix_(rows, np.array(views, int))] for rows, views in groups]
  stack = lambda array: np.stack([array[rows] for rows in slots], 1)
  every = stack(draws[:, list(pairing.views)])
  return Request(stack(candidates), np.concatenate(cut, 1), every, orders)


def hold_out(
  seed: int, num_examples: int, fraction: float, limit: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Splits examples into (searched, scored) index arrays, one example or more in each if there are two;
  `limit` > 0 first takes that many of N."""
  order = rng.host_rng_for(seed, rng.HOLD_OUT).permutation(num_examples)
  order = order[:limit] if limit else order
  scored = min(max(1, round(len(order) * fraction)), len(order) - 1)
  return np.sort(order[scored:]), np.sort(order[:scored])
