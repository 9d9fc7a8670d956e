"""Random numbers are functions of (seed, stream, step); no generator and no key is ever stored.

Flow: everything that draws (build, train_step, data/*, evaluation) asks here; nothing comes before.
Holds: two streams never share numbers; the same (seed, stream, step) gives the same numbers on any
  number of devices and processes, before and after a restart.
  A host generator takes .3 ms to make and .03 to seed again, so a thread has one of them.
Not here: what is drawn.
"""

import threading

import jax
import numpy as np
from jax.typing import ArrayLike

# Stream numbers are part of the format of a run: never reuse or renumber one.
# Device streams, for `rng_for`.
ENCODER = 0
BANK = 1
AUGMENT = 2
PROBE = 3
OBJECTIVE = 4
NOISE = 5
# Host streams, for `host_rng_for`.
ORDER = 16
CROPS = 17
SHUFFLE = 18
HOLD_OUT = 19
FEW_SHOT = 20
SUBSET = 21
SPARES = 22

_local = threading.local()


def rng_for(seed: ArrayLike, stream: int, step: ArrayLike = 0) -> jax.Array:
  """A typed JAX key; `seed` and `step` may be traced integers, `stream` is one of the constants."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def host_rng_for(seed: int, stream: int, *counters: int) -> np.random.RandomState:
  """A NumPy generator whose streams NumPy promises never to change (RandomState, not Generator).

  The thread's own: what this stream is to give has to be drawn before the next one is asked for.
  """
  if not hasattr(_local, "generator"):
    _local.generator = np.random.RandomState()
  _local.generator.seed([seed, stream, *counters])
  return _local.generator
