"""Vision Transformers under timm's names, and under those of torchvision and DINOv2's own program.

Flow: torch_weights asks for the names of a ViT's arrays and brings what a file holds to them with `to_timm`; export turns them to
  torchvision's with `to_torchvision`; import compares `describe` with its config.
Shapes: as timm's: kernels [out, in], patch_embed.proj OIHW, cls_token [1, 1, F], pos_embed [1, T, F].
Holds: what has no place here (other MLPs, a norm behind the mean, windows) is refused by name, never left out.
Not here: layouts and matching (torch_weights), where in a file a network lies (wrappings).
"""

import math
import re
from collections.abc import Collection, Sequence

import numpy as np

from adco_jax.models.positions import sincos
from adco_jax.models.vit import ARCHITECTURES
from adco_jax.runtime.files import Json

FIRST = ("patch_embed.proj.weight", "blocks.0.norm1.weight")
FIRST_TORCHVISION = ("conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight")
BACKBONE = re.compile(r"(patch_embed|blocks|norm|fc_norm|cls_token|pos_embed|reg_token)(\.|$)")
LEAVES = {"scale": "weight", "kernel": "weight"}
BLOCK = ("norm1", "attn.qkv", "attn.proj", "ls1", "norm2", "mlp.fc1", "mlp.fc2", "ls2")
PLACES = ("cls_token", "reg_token", "pos_embed", "patch_embed", "blocks", "norm", "fc")
# torchvision's name (i: number of the block) -> timm's; what they share (weight, bias) follows.
TORCHVISION = {
  "class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj.": "patch_embed.proj.", "encoder.ln.": "norm.",
  "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj.": "attn.proj.", "ln_1.": "norm1.", "ln_2.": "norm2.",
  "mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2.", "mlp.linear_1.": "mlp.fc1.", "mlp.linear_2.": "mlp.fc2.", "heads.head.": "head.",
}  # fmt: skip
LAYER, BLOCKS = "encoder.layers.encoder_layer_", "blocks."


def torch_name(keys: Sequence[str]) -> str:
  """timm's name of the array at `keys` below the backbone."""
  first, *rest = keys
  if first == "patch_embed":
    first = "patch_embed.proj"
  names = [re.sub("^blocks_", BLOCKS, first), *rest]
  return ".".join([*names[:-1], LEAVES.get(names[-1], names[-1])])


def torch_order(name: str) -> tuple[Sequence[int | str], ...]:
  """Where timm registers a parameter."""
  parts = name.split(".")
  inside = [0, 0]
  if parts[0] == "blocks":
    inside = [int(parts[1]), BLOCK.index(".".join(parts[2:-1]))]
  return [PLACES.index(parts[0]), *inside], [
    parts[1] if parts[0] == "fc" else "",
    parts[-1] != "weight",
  ]


def is_vit(state: Collection[str]) -> bool:
  """Whether the names of a state dict are a ViT's, under any of the known names."""
  return FIRST[0] in state or FIRST_TORCHVISION[0] in state


def to_timm(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The state dict of a ViT in timm's names, with positions as ours has them; another one as it is. Raises ValueError."""
  if not is_vit(state):
    return state
  if FIRST_TORCHVISION[0] in state:
    state = {_renamed(name, TORCHVISION, LAYER, BLOCKS): value for name, value in state.items()}
  state = {n: v for n, v in state.items() if n != "mask_token"}  # of masked patches
  if "register_tokens" in state:
    state["reg_token"] = state.pop("register_tokens")
  check(state)
  return _placed(state)


def to_torchvision(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The other way, for networks that torchvision has. Raises ValueError."""
  names = {timm: theirs for theirs, timm in TORCHVISION.items() if "linear" not in theirs}
  return {_renamed(name, names, BLOCKS, LAYER): value for name, value in state.items()}


def check(state: dict[str, np.ndarray]) -> None:
  """Refuses ViTs of another kind. Raises ValueError."""
  needed = (
    "cls_token",
    "pos_embed",
    "norm.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.mlp.fc1.weight",
  )
  lacking = [name for name in needed if name not in state]
  if lacking:
    raise ValueError(f"a ViT of another kind than ours: it has no {', '.join(lacking)}")
  width, dim = np.shape(state["blocks.0.mlp.fc1.weight"])
  known = {"norm", "attn", "ls1", "ls2", "mlp", "norm1", "norm2"}
  other = [n for n in state if n.startswith(BLOCKS) and n.split(".")[2] not in known]
  other += [
    n
    for n in state
    if n.startswith(("fc_norm.", "norm_pre."))
    or ".mlp.norm." in n
    or "_norm." in n
    and ".attn." in n
  ]
  if other or width != 4 * dim:
    what = f"its {other[0]}" if other else f"an MLP of {width} for {dim} components"
    raise ValueError(f"a ViT of another kind than ours: {what}")


def describe(state: dict[str, np.ndarray]) -> dict[str, Json]:
  """{'arch', 'width', 'dim', 'vit'} of a state dict in timm's names; `vit`: values of model.vit, those of which a file
  knows nothing left out. Raises ValueError."""
  dim, _, patch, _ = np.shape(state["patch_embed.proj.weight"])
  named = {sizes[0]: (name, sizes[1]) for name, sizes in ARCHITECTURES.items()}
  if dim not in named:
    raise ValueError(f"a ViT of {dim} components, which is none of {', '.join(ARCHITECTURES)}")
  arch, usual = named[dim]
  depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith(BLOCKS))
  registers = np.shape(state["reg_token"])[1] if "reg_token" in state else 0
  own = 0 if registers else 1
  grid = math.isqrt(np.shape(state["pos_embed"])[1] - own)
  fixed = np.abs(state["pos_embed"] - sincos(grid, dim, own)).max() < 1e-5
  form = {
    "patch": patch, "grid": grid, "depth": 0 if depth == usual else depth, "registers": registers,
    "positions": "sincos" if fixed else "learned", "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
  }  # fmt: skip
  head = np.shape(state["fc.2.weight"])[0] if "fc.2.weight" in state else 0
  return {"arch": arch, "width": 1.0, "dim": head, "vit": form}


def fixed_positions(state: dict[str, np.ndarray], grid: int) -> dict[str, np.ndarray]:
  """{'pos_embed': ...} of a ViT whose positions are fixed, as its state dict has none."""
  dim = len(state["patch_embed.proj.weight"])
  found = sincos(grid, dim, 0 if "reg_token" in state else 1)
  return {"pos_embed": found.astype(state["cls_token"].dtype)}


def _placed(state):
  """Positions for the patches, and for the class token where there are no registers."""
  positions, registers = state["pos_embed"], "reg_token" in state
  count = np.shape(positions)[1]
  own = count - math.isqrt(count) ** 2
  if own not in (0, 1):
    raise ValueError(f"positions of {count} tokens are none of a square of patches")
  if registers and own:  # a constant of the class token
    state = state | {
      "cls_token": state["cls_token"] + positions[:, :1],
      "pos_embed": positions[:, 1:],
    }
  if not registers and not own:
    state = state | {"pos_embed": np.pad(positions, ((0, 0), (1, 0), (0, 0)))}
  return state


def _renamed(name, names, before, after):
  """`name` with the first of `names` that it begins with, behind the number of its block, replaced."""
  block = re.match(rf"({re.escape(before)}\d+\.)(.*)", name)
  start, rest = block.groups() if block else ("", name)
  for old, new in names.items():
    if rest.startswith(old) and bool(block) == (
      old.startswith(("self_", "attn.", "ln_", "norm1", "norm2", "mlp."))
    ):
      return start.replace(before, after) + new + rest.removeprefix(old)
  return start.replace(before, after) + rest
