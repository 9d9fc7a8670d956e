"""From what a loader ships to the views of a batch, on each device, inside of the step.

Flow: build calls `make_prepare` once per phase, train_step its result in every update; replay_step looks at the same views.
Shapes: on each device b = B / devices slots, a part of them where the batch is taken in parts (microbatch).
Holds: a view's draws follow from (seed, step, number of the view) and the slot, however many devices there are.
Not here: boxes (crops), colour (augment), what a view meets (pairing).
"""

from collections.abc import Callable, Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp

from adco_jax.config.pairing import Pairing
from adco_jax.config.plan import Plan
from adco_jax.data.batch import Batch
from adco_jax.runtime.rng import AUGMENT, OBJECTIVE, rng_for
from adco_jax.runtime.sharding import AXIS
from adco_jax.views.augment import Policy, make_views
from adco_jax.views.mix import mix, shares


class ViewSettings(TypedDict):
  """What augmentation and normalisation of the views need."""

  policies: Sequence[Policy]  # of each view
  mean: Sequence[float]
  std: Sequence[float]


Prepare = Callable[..., Batch]  # see `make_prepare`


def make_prepare(
  pairing: Pairing,
  plan: Plan,
  *,
  policies: Sequence[Policy],
  mean: Sequence[float],
  std: Sequence[float],
) -> Prepare:
  """prepare(step, batch, constants, part=0, num_microbatches=1) -> the same `Batch` with every view ready, on one device,
  `batch` being that part's; `policies`: augmentation of each view."""

  def view(step, number, item, slots, constants):
    rng = jax.random.fold_in(rng_for(constants.seed, AUGMENT, step), number)
    crops = item.crops(plan.view_sizes[number], constants.images, plan.pad)
    with jax.named_scope("augmentation"):
      views = make_views(rng, crops, policies[number], slots, mean, std, plan.batch_size)
      if not plan.mixup:
        return views
      kept = shares(rng_for(constants.seed, OBJECTIVE, step), plan.batch_size, plan.mixup)
      return mix(views, kept[slots])

  def prepare(step, batch, constants, part=0, num_microbatches=1):
    size = jax.tree.leaves(batch.queries)[0].shape[0]
    own = (jax.lax.axis_index(AXIS) * num_microbatches + part) * size + jnp.arange(size)
    queries = [
      view(step, v, item, own, constants)
      for v, item in zip(pairing.query_views, batch.queries, strict=True)
    ]
    keys = []
    for place, (v, item) in enumerate(zip(pairing.key_views, batch.keys, strict=True)):
      if item is None:
        keys.append(queries[pairing.query_views.index(v)])
        continue
      slots = own if batch.key_orders is None else batch.key_orders[place][own]
      keys.append(view(step, v, item, slots, constants))
    return batch._replace(queries=queries, keys=keys)

  return prepare
