"""Numbers that tell two states apart by any flipped bit.

Flow: checkpoint writes them beside a state and holds them against what it restores; runs print one at their end.
Holds: the same on any number of devices, whatever the sharding.
"""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.runtime.dtypes import Tree


def fingerprints(tree: Tree) -> dict[str, int]:
  """{path: 32-bit number} of every leaf; any flipped bit changes its number, no sharding does."""
  return {name: int(n) for name, n in named(jax.device_get(_fingerprint_leaves(tree)))}


def named(tree: Tree) -> list[tuple[str, Tree]]:
  """[(path joined by /, leaf)] of a tree."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def fingerprint(tree: Tree) -> str:
  """One number for a whole tree, as eight hexadecimal digits."""
  return f"{zlib.crc32(json.dumps(fingerprints(tree), sort_keys=True).encode()):08x}"


def check_fingerprints(tree: Tree, stored: dict[str, int]) -> None:
  """Raises ValueError naming the first leaf of `tree` whose bits are not those that were saved."""
  for path, number in fingerprints(tree).items():
    if stored[path] != number:
      raise ValueError(f"{path} differs from what was saved")


@jax.jit
def _fingerprint_leaves(tree):
  def leaf(x):
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32).ravel()
    # Odd weights: a change in one bit can never vanish modulo 2^32.
    weights = (jax.lax.iota(jnp.uint32, bits.size) * np.uint32(2654435761)) | np.uint32(1)
    return jnp.sum(bits * weights, dtype=jnp.uint32)

  return jax.tree.map(leaf, tree)
