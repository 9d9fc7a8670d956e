"""The picture of what the encoders are shown: images, and beside each its views.

Flow: pretrain draws it on the first process before the first step, inspect_data before anyone trains.
Holds: pixels take the very way of training: the loader's first batch, the step's own augmentation.
Not here: drawing (pictures).
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config.plan import Plan, in_place
from adco_jax.data.cuts import cut_centre
from adco_jax.data.loaders import Loader
from adco_jax.runtime import rng
from adco_jax.views import augment
from adco_jax.workdir import pictures


def save_view_sheet(
  path: str, config: ConfigDict, plan: Plan, loader: Loader, count: int = 8
) -> None:
  """First images of the first batch: the original, then every view as the encoders see it."""
  training = in_place(plan.phases[-1:])
  plan = dataclasses.replace(plan, shuffle_block=0, fill_steps=0, phases=training)
  pairing, setting = plan.pairing(0), build.view_settings(config)
  batch, indices, _ = next(
    loader.train(0, 1, seed=config.seed, plan=plan, ratio=config.views.ratio)
  )
  views = zip((*pairing.query_views, *pairing.key_views), batch.queries + batch.keys, strict=True)
  items = {view: item for view, item in views if item is not None}
  originals = (loader.reader.read_first([i])[0].pixels for i in indices[:count])
  columns: list[Iterable[np.ndarray]] = [
    [cut_centre(image, config.eval.size) for image in originals]
  ]
  paint, normal = (
    jax.jit(augment.make_views, static_argnums=(2, 4, 5, 6)),
    (setting["mean"], setting["std"]),
  )
  kept = jax.tree.map(lambda x: x.addressable_data(0), loader.images)
  for view in pairing.views:
    item = jax.tree.map(lambda array: jnp.asarray(array[:count]), items[view])
    crops = item.crops(plan.view_sizes[view], kept, plan.pad)
    key = jax.random.fold_in(rng.rng_for(config.seed, rng.AUGMENT, 0), view)
    policy, slots = setting["policies"][view], jnp.arange(len(crops))
    images = paint(key, crops, policy, slots, *normal, plan.batch_size)
    columns.append(pictures.to_uint8(images, *normal))
  sheet = [list(row) for row in zip(*columns, strict=True)]
  pictures.save_sheet(path, sheet, side=64 if config.eval.size <= 64 else 112)
