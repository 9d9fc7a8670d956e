"""What objectives with K rows of negatives share: writing them, how many there may be, what chance gives.

Flow: adco and moco; nothing comes before.
Shapes: rows [K, D], split over devices (here k of them).
"""

import math

import jax
import jax.numpy as jnp

from adco_jax.config.plan import Phase
from adco_jax.errors import require
from adco_jax.objectives import infonce
from adco_jax.runtime.sharding import AXIS


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
