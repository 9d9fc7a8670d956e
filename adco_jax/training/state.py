"""Everything a run must remember, and how it lies on the devices.

Flow: build makes `create_state`; train_step maps state to state; checkpoint saves it.
Shapes: trees of arrays; bank, queue and the bank's momentum are [K, D], rows split over devices; the
  rest is replicated.
Holds: what can be derived from the step is not in it; no two leaves share a buffer (the key encoder is
  a copy), so it can be donated.
Not here: how it changes (train_step, optimizers).
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from adco_jax.runtime.dtypes import at_least_float32
from adco_jax.runtime.sharding import AXIS

SMALL = 4096  # numbers below which an array is not worth splitting


@flax.struct.dataclass
class TrainState:
  """`step` counts completed updates, those of the bank's initialisation included."""

  step: jax.Array
  query_params: Any
  query_stats: Any
  key_params: Any
  key_stats: Any
  descend: Any  # of the objective, trained with the encoder
  ascend: Any  # of the objective, trained against it: AdCo's bank
  slots: Any  # of the objective, written without gradient: MoCo's queue
  optimizer: Any
  ascend_optimizer: Any


def state_specs(state):
  """PartitionSpecs of a state (or of its shapes): rows of the second player are split."""

  def rows(tree):
    return jax.tree.map(lambda x: P(AXIS) if x.ndim == 2 else P(), tree)

  whole = jax.tree.map(lambda _: P(), state)
  return whole.replace(
    ascend=rows(state.ascend),
    slots=rows(state.slots),
    ascend_optimizer=rows(state.ascend_optimizer),
  )


def stored_specs(state, devices):
  """`state_specs` with the encoder's momenta and the key encoder split as well (ZeRO-1), where an axis divides.

  They lie in parts and are gathered where a step needs them whole; arrays of fewer than SMALL numbers stay whole.
  """

  def part(x):
    fits = [x.size >= SMALL and size % devices == 0 for size in x.shape]
    return P(*[None] * fits.index(True), AXIS) if any(fits) else P()

  parts = lambda tree: jax.tree.map(part, tree)
  return state_specs(state).replace(
    key_params=parts(state.key_params), optimizer=parts(state.optimizer)
  )


def create_state(rngs, encoder, objective, descender, ascender, image_shape, bank_shape):
  """The state before the first update. Call it inside one jit with out_shardings.

  `rngs`: (encoder's, second player's); `image_shape` [1, H, W, 3]; `bank_shape` (K, D).
  """
  dtype = at_least_float32(encoder.dtype)
  variables = encoder.init(rngs[0], jnp.zeros(image_shape, dtype), train=False)
  descend, ascend, slots = objective.init(rngs[1], *bank_shape, dtype)
  params, stats = variables["params"], variables["batch_stats"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    query_params=params,
    query_stats=stats,
    key_params=jax.tree.map(jnp.copy, params),
    key_stats=jax.tree.map(jnp.copy, stats),
    descend=descend,
    ascend=ascend,
    slots=slots,
    optimizer=descender.init({"encoder": params, "descend": descend}),
    ascend_optimizer=ascender.init(ascend),
  )
