"""What checkpoints hold, without reading an array of them, and under which names.

Flow: checkpoint asks before it restores parts of a state; `folders` are those of its states, the newest first.
Holds: a checkpoint that cannot tell is passed over for the one before it, as it is when it is read.
Not here: whether its bits are those that were saved (fingerprints); resuming a workdir of format 3, which is refused.
"""

from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from adco_jax.objectives.base import Variables
from adco_jax.runtime.dtypes import Tree
from adco_jax.workdir.fingerprints import named

FORMAT_3 = ("descend", "ascend", "slots")  # what is now objective: params, adversary, memory


def of_format_3(wanted: dict[str, Tree]) -> dict[str, Tree]:
  """The fields of a state as workdirs of format 3 hold them, in place of ours; `upgraded` is the way back."""
  fields: dict[str, Tree] = {}
  for name, tree in wanted.items():
    if name == "objective":
      fields |= dict(zip(FORMAT_3, tree, strict=True))
    else:
      fields[name] = tree["batch_stats"] if name.endswith("_stats") else tree
  return fields


def upgraded(parts: dict[str, Tree]) -> dict[str, Tree]:
  """Fields that were read from a workdir of format 3, as they are now."""
  renewed = {name: tree for name, tree in parts.items() if name not in FORMAT_3}
  renewed = {n: {"batch_stats": x} if n.endswith("_stats") else x for n, x in renewed.items()}
  if FORMAT_3[0] in parts:
    renewed["objective"] = Variables(*(parts[name] for name in FORMAT_3))
  return renewed


def is_old(folders: Sequence[epath.Path]) -> bool:
  """Whether these are states of format 3."""
  return FORMAT_3[-1] in fields(folders, empty=True)


def fields(folders: Sequence[epath.Path], empty: bool) -> tuple[str, ...]:
  """Names of a state's fields, those that hold no array only with `empty`."""
  return tuple(name for name, value in _newest(folders).items() if empty or jax.tree.leaves(value))


def holds(folders: Sequence[epath.Path], wanted: dict[str, Tree]) -> bool:
  """Whether these fields, with all their arrays, are there in the same shapes and dtypes."""
  wanted = of_format_3(wanted) if is_old(folders) else wanted
  tree = _newest(folders)
  there = named({name: tree[name] for name in wanted if name in tree})
  told = lambda leaves: {name: _told(x) for name, x in leaves}
  return told(there) == told(named(wanted))


def unlike(folder: epath.Path, wanted: Tree) -> str:
  """The first array of `wanted` that lies there in another shape or dtype, in words; '' if all fit."""
  there = dict(named(_tree(folder)))
  for name, x in named(wanted):
    if name in there and _told(there[name]) != _told(x):
      return f"{name} is {_told(there[name])}, wanted {_told(x)}"
  return ""


def _newest(folders: Sequence[epath.Path]) -> dict[str, Tree]:
  return next(filter(None, map(_tree, folders)), {})


def _told(x):
  return f"{np.dtype(x.dtype)}{[*x.shape]}"


def _tree(folder):
  """{field: tree of what is known of its arrays}, empty where the folder is damaged: who reads it finds out and says."""
  try:
    return ocp.PyTreeCheckpointHandler().metadata(folder).tree
  except Exception:
    return {}
