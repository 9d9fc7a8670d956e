"""Sums over the images and pixels of groups, in the form that is fastest on each platform.

Flow: norm takes the moments of a batch and of its gradients from here.
Shapes: [N, H, W, C] -> [G, C], N in G groups of neighbours; at least float32.
Holds: `form` tells the groups and the platform (`Form`); long sums are sums of short ones, for float32's sake.
Not here: what is done with them (norm).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.sharding import AXIS

LEAST_ROWS = 512  # of [N * H * W, C] that a partial sum on a GPU takes


class Form(NamedTuple):
  """What is known of a BatchNorm before any number is."""

  groups: int
  relu: bool
  platform: str
  over_devices: bool = False  # the one group is the whole batch: means are those of all devices


def means(form: Form, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both means over the images and pixels of each group: [N, H, W, C] -> two of [G, C]."""
  local = _local_means(form, first, second)
  if not form.over_devices:
    return local
  return jax.lax.pcast(jax.lax.pmean(local, AXIS), AXIS, to="varying")


def _local_means(form, first, second):
  if form.platform == "gpu":
    return _means_on_gpu(form, first, second)
  if form.platform == "cpu":
    rows = first.size // first.shape[-1] // form.groups
    by_group = (x.reshape(form.groups, rows, -1) for x in (first, second))
    return tuple(_sum_on_cpu(x) / rows for x in by_group)
  mean = lambda x: jnp.mean(jnp.mean(x, 2), 1).reshape(form.groups, -1, x.shape[-1]).mean(1)
  return mean(first), mean(second)


def _sum_on_cpu(x):
  """[G, rows, C] -> [G, C]: eight parts added up, then products with ones, and so on with what they give.

  XLA's own sum takes channel by channel, four to nine times as long.
  """
  groups, rows, channels = x.shape
  if rows < 128:
    return x.sum(1)
  # A single product would be fused with what makes x, and be slow.
  counts = (n for n in range(64, 3, -1) if rows % (8 * n) == 0 and rows > 8 * n)
  count = next(counts, min(64, rows // 16))
  x = jnp.pad(x, ((0, 0), (0, -rows % (8 * count)), (0, 0))).reshape(groups, 8, -1, channels)
  x = sum(x[:, part] for part in range(8)).reshape(-1, count, channels)
  sums = jnp.matmul(jnp.ones((len(x), 1, count), x.dtype), x, precision="highest")
  return _sum_on_cpu(sums.reshape(groups, -1, channels))


def _means_on_gpu(form, first, second):
  """As one sum of complex numbers, in two stages: two sums would be two kernels that write what they share."""
  channels, rows = first.shape[-1], first.size // first.shape[-1] // form.groups
  parts = 1
  while rows % (2 * parts) == 0 and rows // (2 * parts) >= LEAST_ROWS:
    parts *= 2
  pair = jax.lax.complex(first, second).reshape(form.groups * parts, -1, channels)
  (sums,) = apart(form, jnp.sum(pair, 1))
  means = sums.reshape(form.groups, parts, channels).sum(1) / rows
  return jnp.real(means), jnp.imag(means)


def apart(form: Form, *arrays: Tree) -> tuple[Tree, ...]:
  """On a GPU: XLA shall not fuse, merge or compute again across this line."""
  return jax.lax.optimization_barrier(arrays) if form.platform == "gpu" else arrays
