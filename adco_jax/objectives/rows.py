"""What objectives with K rows of negatives share: the loss against rows that stand still, filling and writing them, how many
there may be, what chance gives.

Flow: adco, moco and the controls; nothing comes before.
Shapes: rows [K, D], split over devices (here k of them); queries, keys as in infonce.
Paper: filling is the authors' `init_memory`: temperature of the encoder, positives are own keys, negatives the rows as they
  stand (Gaussian at first), no in-batch negatives.
Holds: update i of a filling writes the rows from i B on; the last write is cut at K, or where it goes on for `init_epochs`,
  goes around.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adco_jax.config.pairing import Pair, make_fill_pairing
from adco_jax.config.plan import Phase, Sizes
from adco_jax.errors import require
from adco_jax.objectives import infonce
from adco_jax.objectives.base import Context
from adco_jax.runtime.sharding import AXIS

FILLING = "the bank's initialisation"


def filling(
  rows: int, sizes: Sizes, init: str, init_views: str = "training", init_epochs: float = 0.0
) -> tuple[Phase, ...]:
  """The `Phase` that fills so many rows with keys: none for init='random', without training for 'keys'.

  Every row is written once; for longer, and again, where init_epochs take more steps. The key encoder takes over the query's
  parameters only after the short one (as the authors'): rows of the long one are its own keys.
  """
  if init == "random":
    return ()
  once = math.ceil(rows / sizes.batch_size)
  steps = max(once, round(init_epochs * sizes.steps_per_epoch))
  trains = init == "trained"
  pairing = make_fill_pairing(sizes.mode, sizes.num_views, init_views)
  return (
    Phase(
      FILLING, pairing, steps, trains_encoder=trains, copies_query_to_key=trains and steps == once
    ),
  )


def fill(
  rows_kxD: jax.Array,
  queries_QxbxD: jax.Array,
  keys_VxBxD: jax.Array,
  c: Context,
  phase: Phase,
  count: int,
  temperature: float,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
  """(loss, metrics, rows) of an update that fills `count` rows: InfoNCE of the one pair against the rows so far, of unit
  vectors; then the key's view stands in the next B rows."""
  ((query, key, weight),) = c.pairs
  rows_kxD = jax.lax.stop_gradient(rows_kxD)
  alone = queries_QxbxD[query][None], keys_VxBxD[key][None], ((0, 0, weight),)
  loss, metrics = queue_loss(rows_kxD, *alone, temperature, False)
  batch, keys = keys_VxBxD.shape[1], keys_VxBxD[key]
  places = c.step * batch + jnp.arange(batch)
  if phase.steps > math.ceil(count / batch):  # of a batch larger than the rows, its last keys
    keys, places = keys[-count:], places[-count:] % count
  return loss, metrics, write_rows(rows_kxD, keys, places)


def queue_loss(
  queue_kxD: jax.Array,
  queries_QxbxD: jax.Array,
  keys_VxBxD: jax.Array,
  pairs: Sequence[Pair],
  temperature: float,
  in_batch: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """This device's part of the loss of unit vectors against constant rows, and metrics."""
  similarities = infonce.pair_similarities(queries_QxbxD, keys_VxBxD, pairs)
  rows_kxD, query = infonce.l2_normalize(queue_kxD), infonce.QueryLoss(temperature)
  ((loss, mass, accuracy),) = infonce.losses(similarities, rows_kxD, in_batch, query)
  return loss, infonce.metrics(similarities, loss, mass, accuracy)


def write_rows(queue_kxD: jax.Array, keys_nxD: jax.Array, rows_n: jax.Array) -> jax.Array:
  """Puts key i into row rows[i] of the whole queue; rows of other devices or past its end are left."""
  size = queue_kxD.shape[0]
  local = rows_n - jax.lax.axis_index(AXIS) * size
  local = jnp.where((local >= 0) & (local < size), local, size)
  return queue_kxD.at[local].set(keys_nxD.astype(queue_kxD.dtype), mode="drop")


def chance(phase: Phase, rows: int, batch_size: int, in_batch: bool) -> float:
  """The loss of an encoder that tells nothing apart: log of the number of candidates, for each pair of a phase."""
  candidates = rows + (batch_size if in_batch else 1)
  return sum(weight for *_, weight in phase.pairing.pairs) * math.log(candidates)


def check_rows(option: str, rows: int, devices: int) -> None:
  """Refuses a bank or queue whose rows do not divide over the devices; `option`: that sets them. Raises ConfigError."""
  lower, upper = rows // devices * devices, -(-rows // devices) * devices
  near = " or ".join(str(k) for k in dict.fromkeys((lower, upper)) if k)
  count = "1 device" if devices == 1 else f"{devices} devices"
  require(rows % devices == 0, option, rows, f"does not divide over {count}; use {near}")


def warn_rows(option: str, rows: int, images: int) -> tuple[str, ...]:
  """What a careful colleague would say of so many rows, as a tuple of lines."""
  few = f"{option}={rows} for {images:,} images: negatives outnumber what they are to resemble; use fewer"
  return (few,) if rows > images else ()


def check_temperature(option: str, temperature: float, mode: str) -> None:
  """Refuses one so low that `infonce.make_shift` cannot serve queries that meet two keys. Raises ConfigError."""
  low, alone = 2 / infonce.SAFE_RANGE, mode != "symmetric_multicrop"
  remedy = f"use {low:.4f} or more in symmetric_multicrop"
  require(alone or temperature >= low, option, temperature, remedy)
