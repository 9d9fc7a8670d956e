"""Encoders under torchvision's names (ViTs under timm's): which network a file holds, and its weights both ways.

Flow: files gives a state dict -> `describe` says what it is -> `import_encoder` fills an encoder's
  variables; `export_encoder` is the way back. Replay, import and export tasks use it.
Shapes: kernels OIHW there and HWIO here, dense kernels [out, in] there and [in, out] here.
Holds: import after export is the identity, bit for bit; nothing is matched by guess: a name that is
  missing, unexpected or of another shape is reported or refused.
Not here: reading files (files), the authors' bank and momentum (authors).
"""

import re

import jax
import numpy as np

from adco_jax.interop import vit_weights
from adco_jax.models.resnet import ARCHITECTURES
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json

LEAVES = {
  "scale": "weight",
  "kernel": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
COUNTER = "num_batches_tracked"
BACKBONE = re.compile(r"(conv|bn|layer)\d+\.")
ASIDE = "projection."  # in place of "fc.", in a file whose fc is a classifier


def torch_names(variables: Tree) -> dict[str, tuple[str, tuple[str, ...]]]:
  """{torchvision's name: (collection, path)} of an encoder's variables, in torch's order of modules."""
  names = {}
  for collection in ("params", "batch_stats"):
    for path, _ in jax.tree_util.tree_leaves_with_path(variables.get(collection, {})):
      keys = tuple(entry.key for entry in path)
      names[_torch_name(keys)] = (collection, keys)
  order = vit_weights.torch_order if vit_weights.is_vit(names) else _torch_order
  return {name: names[name] for name in sorted(names, key=order)}


def describe(state: dict[str, np.ndarray]) -> dict[str, Json]:
  """{'arch', 'width', 'stem', 'dim'} of a state dict in torchvision's names; dim 0: no head. Of a ViT see vit_weights.

  Raises ValueError if no ResNet of ours has these blocks.
  """
  state = taken_back(state)
  if vit_weights.is_vit(state):
    return vit_weights.describe(vit_weights.to_timm(state))
  blocks: dict[int, int] = {}
  for name in state:
    if match := re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", name):
      stage, block = (int(n) for n in match.groups())
      blocks[stage] = max(blocks.get(stage, 0), block + 1)
  if "conv1.weight" not in state or not blocks:
    raise ValueError("no ResNet in torchvision's names (conv1.weight, layer1.0.conv1.weight, ...)")
  kind = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
  stages = tuple(blocks[stage] for stage in sorted(blocks))
  known = [arch for arch, parts in ARCHITECTURES.items() if parts == (kind, stages)]
  if not known:
    raise ValueError(
      f"a ResNet of {kind} blocks {stages}, which is none of {', '.join(ARCHITECTURES)}"
    )
  channels, _, size, _ = np.shape(state["conv1.weight"])
  return {
    "arch": known[0],
    "width": channels / 64,
    "stem": "imagenet" if size == 7 else "small",
    "dim": np.shape(state["fc.2.weight"])[0] if has_head(state) else 0,
  }


def has_head(state: dict[str, np.ndarray]) -> bool:
  """Whether fc is a projection as ours: two dense layers with ReLU between, the first one square."""
  shapes = {name: np.shape(value) for name, value in state.items() if name.startswith("fc.")}
  if set(shapes) != {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"}:
    return False
  (out, width), last = shapes["fc.0.weight"], shapes["fc.2.weight"]
  return out == width == last[1]


def import_encoder(
  state: dict[str, np.ndarray], variables: Tree
) -> tuple[Tree, dict[str, list[str]]]:
  """(variables with `state`'s values, report) for `variables` of arrays that give shapes and dtypes.

  The report lists names: 'matched', 'missing' (kept as they were), 'unexpected' (not used: heads of
  another kind among them). Raises ValueError where a shape differs or the backbone is another.
  """
  names, state = torch_names(variables), vit_weights.to_timm(taken_back(state))
  if vit_weights.is_vit(names) and vit_weights.is_vit(state) and "pos_embed" not in names:
    if vit_weights.describe(state)["vit"]["positions"] != "sincos":
      raise ValueError("its positions were learnt; use --config.model.vit.positions=learned")
    state = {name: value for name, value in state.items() if name != "pos_embed"}
  backbone = lambda n: BACKBONE.match(n) or vit_weights.BACKBONE.match(n)
  other = [n for n in state if backbone(n) and n not in names and not n.endswith(COUNTER)]
  if other:
    raise ValueError(
      f"its backbone has {len(other)} arrays that ours lacks, the first is {other[0]}"
    )
  usable = _usable(state, variables, names)
  taken = {}
  for name, (collection, keys) in names.items():
    if name in usable:
      value, like = to_here(np.asarray(state[name])), _get(variables[collection], keys)
      if value.shape != like.shape:
        raise ValueError(
          f"{name} is {list(np.shape(state[name]))}, wanted {list(to_there(like).shape)}"
        )
      taken[collection, keys] = value.astype(like.dtype)
  missing = [name for name in names if name not in usable]
  if torso := [name for name in missing if not name.startswith("fc.")]:
    raise ValueError(f"{len(torso)} of the backbone's names are missing, the first is {torso[0]}")
  report = {
    "matched": [name for name in names if name in usable],
    "missing": missing,
    "unexpected": [
      n for n in state if not (n in names and n in usable) and not n.endswith(COUNTER)
    ],
  }
  filled = jax.tree_util.tree_map_with_path(
    lambda path, x: taken.get((path[0].key, tuple(entry.key for entry in path[1:])), x), variables
  )
  return filled, report


def _usable(state, variables, names):
  """The state dict without a head of another kind. (A projection of the authors' form and of other sizes is refused.)"""
  layers = {
    n: np.shape(v) for n, v in state.items() if n.startswith("fc.") and not n.endswith(COUNTER)
  }
  shape = lambda collection, keys: _get(variables[collection], keys).shape[::-1]
  ours = {name: shape(*place) for name, place in names.items() if name.startswith("fc.")}
  if layers == ours or (layers.keys() == ours.keys() and has_head(state)):
    return state
  return {name: value for name, value in state.items() if not name.startswith("fc.")}


def export_encoder(variables: Tree, *, head: bool, steps: int = 0) -> dict[str, np.ndarray]:
  """A state dict in torchvision's names; with the projection as fc.0, fc.2 (its places in a Sequential) if `head`.

  `steps`: the value of every num_batches_tracked, which torch needs to load strictly.
  """
  state = {}
  for name, (collection, keys) in torch_names(variables).items():
    if head or not name.startswith("fc."):
      state[name] = to_there(np.asarray(_get(variables[collection], keys)))
    if name.endswith("running_var"):
      state[name.replace("running_var", COUNTER)] = np.asarray(steps, np.int64)
  return state


def set_aside(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same with the projection, if there is one, under names that leave `fc` to a classifier."""
  return {re.sub(r"^fc\.", ASIDE, name): value for name, value in state.items()}


def taken_back(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """What `set_aside` was given, of a file with a classifier as fc; any other state as it is, whatever of it has such names."""
  heads = {n: v for n, v in state.items() if n.startswith((ASIDE, "fc."))}
  aside = {n: v for n, v in heads.items() if re.match(re.escape(ASIDE) + r"\d+\.", n)}
  if not aside or heads.keys() - aside.keys() != {"fc.weight", "fc.bias"}:
    return state
  rest = {n: v for n, v in state.items() if n not in heads}
  return rest | {f"fc.{n.removeprefix(ASIDE)}": v for n, v in aside.items()}


def to_here(array: np.ndarray) -> np.ndarray:
  """torch's layout -> ours."""
  axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
  return array.transpose(axes) if axes else array


def to_there(array: np.ndarray) -> np.ndarray:
  """Our layout -> torch's, contiguous."""
  axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
  return np.ascontiguousarray(array.transpose(axes)) if axes else array


def _torch_name(keys):
  part, *middle, leaf = keys
  if part == "backbone" and not middle:
    return leaf  # cls_token and the like
  if part == "head":
    return f"fc.{middle[0].removeprefix('fc')}.{LEAVES[leaf]}"
  if middle[0] in vit_weights.PLACES or middle[0].startswith("blocks_"):
    return vit_weights.torch_name((*middle, leaf))
  name = ".".join([re.sub("^(layer[0-9]+)_", r"\1.", middle[0]), *middle[1:], LEAVES[leaf]])
  return name.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")


def _torch_order(name):
  """Where torch registers a parameter: stem, layers by number, fc; weight, bias, then statistics."""
  *modules, leaf = name.split(".")
  place = {"conv1": -2, "bn1": -1, "fc": 99}
  inside = {"conv1": 0, "bn1": 1, "conv2": 2, "bn2": 3, "conv3": 4, "bn3": 5, "downsample": 6}
  numbers = [place[modules[0]] if modules[0] in place else int(modules[0][5:])]
  numbers += [inside[m] if m in inside else int(m) for m in modules[1:]]
  return numbers, ["weight", "bias", "running_mean", "running_var"].index(leaf)


def _get(tree, keys):
  for key in keys:
    tree = tree[key]
  return tree
