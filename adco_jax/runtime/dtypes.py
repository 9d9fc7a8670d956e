"""Casts are floors: what must be exact is kept in float32, or in float64 where the whole step is.

Flow: losses, models and state ask here; nothing comes before.
Not here: which dtype a run computes in (config.ranges).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Tree = Any  # nested dictionaries of arrays


def at_least_float32(dtype: DTypeLike) -> np.dtype:
  """float32 for narrower floating types, else `dtype` itself."""
  dtype = jnp.dtype(dtype)
  return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype
