"""The predictor of BYOL and MoCo v3: a second head that only queries go through.

Flow: byol and mocov3 keep its parameters (which descend) and its BatchNorm's running statistics (memory).
Shapes: queries [Q, b, D] -> predictions [Q, b, D], view by view: each is a batch of its own.
Holds: groups of BatchNorm as the encoder's; running statistics are the mean over devices.
"""

import jax
import jax.numpy as jnp

from adco_jax.config.plan import Sizes
from adco_jax.models.heads import Head, Projection
from adco_jax.objectives.base import Variables
from adco_jax.runtime.dtypes import Tree, at_least_float32
from adco_jax.runtime.sharding import AXIS


def make(sizes: Sizes, width: int, dtype: jax.typing.DTypeLike, norm: str = "hidden") -> Projection:
  """Linear, BatchNorm, ReLU, Linear, in float32 or better; `norm`: where BatchNorm is, see heads."""
  kept = at_least_float32(jnp.dtype(dtype))
  return Projection(sizes.dim, Head(2, width, norm), sizes.group_size, dtype=kept, platform="plain")


def init(
  rng: jax.Array,
  sizes: Sizes,
  width: int,
  dtype: jax.typing.DTypeLike,
  norm: str = "hidden",
) -> Variables:
  """{'predictor': parameters} and {'predictor': statistics}."""
  module = make(sizes, width, dtype, norm)
  made = module.init(rng, jnp.zeros((1, sizes.dim), module.dtype))
  return Variables(
    params={"predictor": made["params"]}, memory={"predictor": made.get("batch_stats", {})}
  )


def predict(
  v: Variables, queries_QxbxD: jax.Array, sizes: Sizes, width: int, norm: str = "hidden"
) -> tuple[list[jax.Array], Tree]:
  """(predictions of each view, not normalised; the memory after them, equal on all devices)."""
  module = make(sizes, width, queries_QxbxD.dtype, norm)
  params, stats = v.params["predictor"], v.memory["predictor"]
  predictions = []
  for z in queries_QxbxD:
    given = {"params": params, "batch_stats": stats}
    made, changed = module.apply(given, z, train=True, mutable=["batch_stats"])
    predictions.append(made)
    stats = changed["batch_stats"]
  return predictions, {"predictor": jax.lax.pmean(stats, AXIS)}
