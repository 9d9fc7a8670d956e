"""From what a loader ships to the views of a batch, on each device, inside of the step.

Flow: train_step calls `make_prepare` once and its result in every update; replay_step looks at the same views.
Shapes: on each device b = B / devices slots, a part of them where the batch is taken in parts (microbatch).
Holds: a view's draws follow from (seed, step, number of the view) and the slot, however many devices there are.
Not here: boxes (crops), colour (augment), what a view meets (pairing).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp

from adco_jax.config.pairing import Pairing
from adco_jax.config.plan import Plan
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.rng import AUGMENT, rng_for
from adco_jax.runtime.sharding import AXIS
from adco_jax.views.augment import Policy, make_views

Cut = Callable[[Tree, int, dict[str, jax.Array]], jax.Array]  # a loader's, see data.loaders


class Views(NamedTuple):
  """Normalised float images of one device: a list per query view and one per key view."""

  queries: list[jax.Array]
  keys: list[jax.Array]


class ViewSettings(TypedDict):
  """What augmentation and normalisation of the views need."""

  policies: Sequence[Policy]  # of each view
  mean: Sequence[float]
  std: Sequence[float]


Prepare = Callable[..., Views]  # see `make_prepare`


def make_prepare(
  pairing: Pairing,
  plan: Plan,
  *,
  cut: Cut,
  policies: Sequence[Policy],
  mean: Sequence[float],
  std: Sequence[float],
) -> Prepare:
  """prepare(step, split, shared, part=0, parts=1) -> Views, on one device, `split` being that part's; `shared` has `seed` and the loader's own arrays.

  `cut(item, size, shared)` -> uint8 crops of one view (the loader's); `policies`: augmentation of each view;
  see data/order.ship for `split`.
  """

  def view(step, number, item, slots, shared):
    rng = jax.random.fold_in(rng_for(shared["seed"], AUGMENT, step), number)
    crops = cut(item, plan.view_sizes[number], shared)
    with jax.named_scope("augmentation"):
      return make_views(rng, crops, policies[number], slots, mean, std, plan.batch_size)

  def prepare(step, split, shared, part=0, parts=1):
    size = split["queries"][0][0].shape[0]
    own = (jax.lax.axis_index(AXIS) * parts + part) * size + jnp.arange(size)
    queries = [
      view(step, v, item, own, shared)
      for v, item in zip(pairing.query_views, split["queries"], strict=True)
    ]
    keys, shipped = [], iter(split["keys"])
    for v, order in zip(pairing.key_views, shared["key_orders"], strict=True):
      if plan.shuffle_block or v not in pairing.query_views:
        keys.append(view(step, v, next(shipped), order[own], shared))
      else:
        keys.append(queries[pairing.query_views.index(v)])
    return Views(queries, keys)

  return prepare
