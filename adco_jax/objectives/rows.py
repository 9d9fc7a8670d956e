"""What objectives with K rows of negatives share: the loss against rows that stand still, filling and writing them, how many
there may be, what chance gives.

Flow: adco, moco and the controls; nothing comes before.
Shapes: rows [K, D], split over devices (here k of them); queries, keys as in infonce.
Paper: filling is the authors' `init_memory`: temperature of the encoder, positives are own keys, negatives the rows as they
  stand (Gaussian at first), no in-batch negatives.
Holds: update i of the authors' filling writes the rows from i B on; the last write is cut at K; an update that is not finite
  writes nothing, so that its rows stay random. One of `init_epochs` is the
  beginning of training: batches, views, both directions, schedules and the average are those of training, and rows are
  written as MoCo's queue is.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adco_jax.config.pairing import Pair, make_fill_pairing, make_pairing
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

  Every row is written once, before the run's epochs, and the key encoder then takes over the query's parameters, as the
  authors'; or again and again for the first `init_epochs` of the run. Raises ConfigError where those are too few for the rows.
  """
  lasts = f"goes with method.bank.init=trained and init_views=training, here {init} and {init_views}; use 0"
  require(not init_epochs or (init, init_views) == ("trained", "training"), "method.bank.init_epochs", init_epochs, lasts)  # fmt: skip
  if init == "random":
    return ()
  steps, once = round(init_epochs * sizes.steps_per_epoch), math.ceil(rows / sizes.batch_size)
  if init_epochs:
    least = (
      f"{rows} rows take {once} steps; use {_above(once / sizes.steps_per_epoch)} or more, or 0"
    )
    require(steps >= once, "method.bank.init_epochs", init_epochs, least)
    return (Phase(FILLING, make_pairing(sizes.mode, sizes.num_views, sizes.reduction), steps),)
  pairing = make_fill_pairing(sizes.mode, sizes.num_views, init_views)
  trains = init == "trained"
  return (
    Phase(FILLING, pairing, once, trains_encoder=trains, copies_query_to_key=trains, counted=False),
  )


def _above(x):
  """x, rounded up to two places."""
  return math.ceil(100 * x) / 100


def fill(
  rows_kxD: jax.Array,
  queries_QxbxD: jax.Array,
  keys_VxBxD: jax.Array,
  c: Context,
  phase: Phase,
  count: int,
  temperature: float,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
  """(loss, metrics, rows) of an update that fills `count` rows: InfoNCE against the rows so far, of unit vectors; then the
  keys stand in the next rows, those of the one pair or, in training, all."""
  still = jax.lax.stop_gradient(rows_kxD)
  if phase.counted:
    loss, metrics = queue_loss(still, queries_QxbxD, keys_VxBxD, c.pairs, temperature, False)
    return loss, metrics, enqueue(still, keys_VxBxD, c.step, count)
  ((query, key, weight),) = c.pairs
  alone = queries_QxbxD[query][None], keys_VxBxD[key][None], ((0, 0, weight),)
  loss, metrics = queue_loss(still, *alone, temperature, False)
  batch = keys_VxBxD.shape[1]
  return loss, metrics, write_rows(still, keys_VxBxD[key], c.step * batch + jnp.arange(batch))


def enqueue(queue_kxD: jax.Array, keys_VxBxD: jax.Array, step: jax.Array, size: int) -> jax.Array:
  """The queue of `size` rows with the keys of update `step`, all key views, in place of the oldest."""
  keys = keys_VxBxD.reshape(-1, keys_VxBxD.shape[-1])
  places = (step * len(keys) + jnp.arange(len(keys))) % size
  return write_rows(queue_kxD, keys[-size:], places[-size:])


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
