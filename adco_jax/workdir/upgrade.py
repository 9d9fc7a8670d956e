"""Fields of a state under the names that workdirs of format 3 have for them.

Flow: checkpoint asks when it restores parts of such a workdir: scores, exports and `init_from` go on from it.
Not here: resuming it, which is refused (opening).
"""

from adco_jax.objectives.base import Variables
from adco_jax.runtime.dtypes import Tree

FORMAT_3 = ("descend", "ascend", "slots")  # what is now objective: params, adversary, memory


def of_format_3(wanted: dict[str, Tree]) -> dict[str, Tree]:
  """The fields of a state as workdirs of format 3 hold them, in place of ours; `upgraded` is the way back."""
  found: dict[str, Tree] = {}
  for name, tree in wanted.items():
    if name == "objective":
      found |= dict(zip(FORMAT_3, tree, strict=True))
    else:
      found[name] = tree["batch_stats"] if name.endswith("_stats") else tree
  return found


def upgraded(parts: dict[str, Tree]) -> dict[str, Tree]:
  """Fields that were read from a workdir of format 3, as they are now."""
  found = {name: tree for name, tree in parts.items() if name not in FORMAT_3}
  found = {n: {"batch_stats": x} if n.endswith("_stats") else x for n, x in found.items()}
  if FORMAT_3[0] in parts:
    found["objective"] = Variables(*(parts[name] for name in FORMAT_3))
  return found
