"""Where in a file the networks lie, whatever other programs have wrapped around their names.

Flow: files gives a file's content -> `flatten` -> `choose` -> authors takes the names under what was chosen.
Shapes: a prefix is a string that ends in a dot, or '' for names that stand alone.
Holds: networks are found by their names' ends alone (a ResNet: conv1.weight, layer1.0.conv1.weight), so no list of
  wrappers is needed; where several could be meant none is taken, and all are named.
Not here: what a network is (torch_weights), banks and momenta (authors).
"""

from collections import Counter

import numpy as np

from adco_jax.interop import vit_weights
from adco_jax.runtime.dtypes import Tree

# What begins every ResNet in torchvision's names, and every ViT in timm's or torchvision's.
FIRSTS = (
  ("conv1.weight", "layer1.0.conv1.weight"),
  vit_weights.FIRST,
  vit_weights.FIRST_TORCHVISION,
)
PAIRS = {"encoder_q.": "encoder_k.", "base_encoder.": "momentum_encoder."}  # MoCo, AdCo; MoCo v3


def flatten(content: dict[str, Tree], prefix: str = "") -> dict[str, np.ndarray]:
  """{dotted name: array} of all arrays in nested dictionaries, in their order."""
  flat: dict[str, np.ndarray] = {}
  for key, value in content.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    elif hasattr(value, "shape"):
      flat[f"{prefix}{key}"] = np.asarray(value)
  return flat


def under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays whose names begin with `prefix`, without it."""
  return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}


def choose(arrays: dict[str, np.ndarray], wanted: str = "") -> tuple[str, str | None]:
  """(prefix of the query encoder, prefix of its key encoder or None) among flat names.

  `wanted`: a whole prefix, else parts of one, such as 'teacher' or 'model.encoder'; '.' for names without any. Raises
  ValueError, naming all that is there, unless one network or one known pair is meant.
  """
  networks = roots(arrays)
  exact = [root for root in networks if wanted and _short(root) == wanted.rstrip(".")]
  chosen = exact or [root for root in networks if _means(wanted, root)]
  if len(chosen) == 1:
    return chosen[0], None
  if len(chosen) == 2 and _key_of(chosen[0]) == chosen[1]:
    return chosen[0], chosen[1]
  if not networks:
    raise ValueError(
      f"no ResNet in torchvision's names (conv1.weight, layer1.0.conv1.weight, ...) and no ViT in timm's; it holds {describe(arrays)}"
    )
  there = ", ".join(f"{root or '.'} ({len(under(root, arrays))} arrays)" for root in networks)
  if not chosen:
    raise ValueError(f"config.prefix={wanted!r} is none of its networks {there}")
  raise ValueError(
    f"holds {len(chosen)} networks, {there}; choose one with --config.prefix={_short(chosen[-1])}"
  )


def roots(arrays: dict[str, np.ndarray]) -> list[str]:
  """Prefixes under which a network lies, the query encoder of a known pair before its key encoder."""
  prefixes = []
  for one, other in FIRSTS:
    ends = [name.removesuffix(other) for name in arrays if name.endswith(other)]
    prefixes += [end for end in ends if end + one in arrays and (not end or end.endswith("."))]
  return sorted(prefixes, key=lambda root: root in [_key_of(other) for other in prefixes])


def owner(prefix: str) -> str:
  """What stands before the encoder in a known pair's prefix, 'module.' of 'module.encoder_q.'; else all of it."""
  for part in (part for pair in PAIRS.items() for part in pair):
    before, separator, _ = f".{prefix}".partition(f".{part}")
    if separator:
      return f"{before}."[1:]
  return prefix


def describe(arrays: dict[str, np.ndarray]) -> str:
  """How many arrays lie under which beginnings of names, in words."""
  counts = Counter(".".join(name.split(".")[:2]) if "." in name else name for name in arrays)
  some = [f"{name}... ({count})" for name, count in counts.most_common(6)]
  more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
  return f"{', '.join(some)}{more}" if some else "no arrays"


def _key_of(root):
  """The prefix of the key encoder beside this query encoder, or None."""
  for query, key in PAIRS.items():
    if f".{query}" in f".{root}":
      return f".{root}".replace(f".{query}", f".{key}", 1)[1:]
  return None


def _means(wanted, root):
  if wanted == ".":
    return not root
  return not wanted or f".{wanted.strip('.')}." in f".{root}"


def _short(root):
  return root.rstrip(".") or "."
