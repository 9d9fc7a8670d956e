"""Everything a run must remember, and how it lies on the devices.

Flow: build makes `create_state`; train_step maps state to state; checkpoint saves it.
Shapes: trees of arrays; how an objective's lie, it says itself (AdCo's bank and its momentum: rows split over devices); the
  rest is replicated.
Holds: what can be derived from the step is not in it; no two leaves share a buffer (the key encoder is
  a copy), so it can be donated.
Not here: how it changes (train_step, optimizers).
"""

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from adco_jax.config.plan import Sizes
from adco_jax.objectives.base import Objective, Variables, averages
from adco_jax.runtime.dtypes import Tree, at_least_float32
from adco_jax.runtime.sharding import AXIS

SMALL = 4096  # numbers below which an array is not worth splitting


class TrainState(flax.struct.PyTreeNode):
  """`step` counts completed updates, those of all phases. Key trees are empty where an objective has no key encoder, and keeps no average."""

  step: jax.Array
  query_params: Tree
  # {collection: tree} of all but the parameters: batch_stats, where there is BatchNorm
  query_stats: Tree
  key_params: Tree
  key_stats: Tree
  objective: Variables
  optimizer: Tree  # of the query encoder's and the objective's parameters
  adversary_optimizer: Tree


def state_specs(state: TrainState, objective: Objective) -> TrainState:
  """PartitionSpecs of a state (or of its shapes); an adversary's momenta lie as its rows do."""
  whole = jax.tree.map(lambda _: P(), state)
  own = [
    jax.tree.map(lambda _, spec=spec: spec, tree)
    for tree, spec in zip(state.objective, objective.specs(), strict=True)
  ]
  rows = objective.specs().adversary
  return whole.replace(
    objective=Variables(*own),
    adversary_optimizer=jax.tree.map(lambda x: rows if x.ndim else P(), state.adversary_optimizer),
  )


def stored_specs(state: TrainState, objective: Objective, devices: int) -> TrainState:
  """`state_specs` with both encoders, what descends with them and its momenta split as well, where an axis divides (ZeRO).

  They lie in parts, and each encoder is gathered once in a step; arrays of fewer than SMALL numbers stay whole.
  """

  def part(x):
    fits = [x.size >= SMALL and size % devices == 0 for size in x.shape]
    return P(*[None] * fits.index(True), AXIS) if any(fits) else P()

  parts = lambda tree: jax.tree.map(part, tree)
  specs = state_specs(state, objective)
  return specs.replace(
    query_params=parts(state.query_params), key_params=parts(state.key_params), optimizer=parts(state.optimizer),
    objective=specs.objective._replace(params=parts(state.objective.params)),
  )  # fmt: skip


def create_state(
  rngs: tuple[jax.Array, jax.Array],
  encoder: nn.Module,
  objective: Objective,
  descender: optax.GradientTransformationExtraArgs,
  image_shape: tuple[int, ...],
  sizes: Sizes,
) -> TrainState:
  """The state before the first update. Call it inside one jit with out_shardings.

  `rngs`: (encoder's, objective's); `image_shape` [1, H, W, 3].
  """
  dtype = at_least_float32(encoder.dtype)
  stats = dict(encoder.init(rngs[0], jnp.zeros(image_shape, dtype), train=False))
  params = stats.pop("params")
  if objective.sees == "features":
    seen = {"params": params, **stats}
    shape = jax.eval_shape(lambda: encoder.apply(seen, jnp.zeros(image_shape, dtype), False, False))
    sizes = sizes._replace(dim=shape.shape[-1])
  variables = objective.init(rngs[1], sizes, dtype)
  has_key = objective.keys_from == "momentum" or averages(objective)
  copy = lambda tree: jax.tree.map(jnp.copy, tree) if has_key else {}
  key = {"params": copy(params), **copy(stats)}
  if has_key and objective.momentum_init == "independent":
    own = jax.random.fold_in(rngs[0], 1)
    key = dict(encoder.init(own, jnp.zeros(image_shape, dtype), train=False))
  key_params = key.pop("params", {})
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    query_params=params,
    query_stats=stats,
    key_params=key_params,
    key_stats=key,
    objective=variables,
    optimizer=descender.init({"encoder": params, "objective": variables.params}),
    adversary_optimizer=objective.ascent(sizes).init(variables.adversary),
  )
