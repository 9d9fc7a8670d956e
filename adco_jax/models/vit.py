"""Vision Transformers with timm's arithmetic and names: ViT-Ti/S/B/L of any patch, with registers, LayerScale, stochastic depth.

Flow: heads.Encoder calls it on normalised images; its pooled features are what the projection and probes see.
Shapes: images [B, H, W, 3] -> tokens [B, T, F] (class token, R registers, H W / patch^2 patches) -> features [B, F].
Paper: Dosovitskiy et al. 2021; MoCo v3's form (fixed positions, start) Chen et al. 2021; registers Darcet et al. 2024. LayerNorm
  1e-6, exact GELU, positions resampled as timm does.
Holds: with timm's weights it computes timm's tokens; names below `backbone` are timm's with dots for levels and `blocks_i` for blocks.i.
Not here: the projection (heads), loading of weights (interop).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.errors import require
from adco_jax.models.attention import Attending, Attention, Mlp, uniform
from adco_jax.models.positions import resample, sincos
from adco_jax.runtime.dtypes import at_least_float32
from adco_jax.runtime.files import Json

# name -> (F, blocks, heads).
ARCHITECTURES = {
  "vit_tiny": (192, 12, 3),
  "vit_small": (384, 12, 6),
  "vit_base": (768, 12, 12),
  "vit_large": (1024, 24, 16),
}
POOLS, POSITIONS, STARTS = ("token", "mean"), ("learned", "sincos"), ("timm", "mocov3")
EPSILON = 1e-6
EMBEDDINGS = ("patch_embed", "cls_token", "pos_embed", "reg_token")
NOISE = "dropout"  # of the rngs that flax knows; one key per image here


class Form(NamedTuple):
  """What a ViT looks like besides its name.

  grid: patches along a side for which positions are learnt; 0 is no size, build puts that of the views there. With
  registers the class token has no position, as in timm's DINOv2. depth, heads: 0 as named. layer_scale: where it starts, 0 none.
  """

  patch: int = 16
  grid: int = 0
  pool: str = "token"
  positions: str = "learned"
  registers: int = 0
  layer_scale: float = 0.0
  drop_path: float = 0.0
  depth: int = 0
  heads: int = 0
  start: str = "timm"
  attention: Attending = "xla"
  remat: bool = False


def sizes(arch: str, width: float, form: Form) -> tuple[int, int, int]:
  """(F, blocks, heads); F is a multiple of four times the heads."""
  dim, depth, heads = ARCHITECTURES[arch]
  depth, heads = form.depth or depth, form.heads or max(1, round(heads * width))
  unit = 4 * heads
  return max(1, round(dim * width / unit)) * unit, depth, heads


def layer_of(path: Sequence[str], depth: int) -> int:
  """Layer of an array below `backbone`, for layer-wise rates: embeddings 0, block i i + 1, the last norm depth + 1 (BEiT)."""
  if path[0] in EMBEDDINGS:
    return 0
  return int(path[0].removeprefix("blocks_")) + 1 if path[0].startswith("blocks_") else depth + 1


class ViT(nn.Module):
  """images -> pooled features, or the tokens that they are made of."""

  arch: str
  width: float
  form: Form
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False, noise: jax.Array | None = None, last: int = 0
  ) -> jax.Array | list[jax.Array]:
    """Features [B, F]; with `last` instead the normalised tokens [B, T, F] after each of so many last blocks, in a list.

    noise: a JAX key per image [B], of which stochastic depth draws; None: nothing is dropped.
    """
    form = self.form
    dim, depth, heads = sizes(self.arch, self.width, form)
    x = self._embed(images, dim)
    block = nn.remat(Block) if form.remat else Block
    norm = nn.LayerNorm(EPSILON, self.dtype, at_least_float32(self.dtype), name="norm")
    rates, after = np.linspace(0, form.drop_path, depth), []
    for i in range(depth):
      made = block(dim, heads, form, self.dtype, float(rates[i]), name=f"blocks_{i}")
      x = made(x, None if noise is None or not train else _per_block(noise, i))
      if i >= depth - last:
        after.append(norm(x))
    return after if last else pool(norm(x), form).astype(at_least_float32(self.dtype))

  def _embed(self, images, dim):
    """Tokens before the first block."""
    form, kept = self.form, at_least_float32(self.dtype)
    patches = PatchEmbed(dim, form.patch, form.start, self.dtype, name="patch_embed")(images)
    batch, *grid, _ = patches.shape
    token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, dim), kept)
    registers = (
      [self.param("reg_token", nn.initializers.normal(1e-6), (1, form.registers, dim), kept)]
      if form.registers
      else []
    )
    own = 0 if form.registers else 1  # tokens with a position besides patches
    positions = self._positions(own, dim, kept)
    x = patches.reshape(batch, -1, dim)
    first = [jnp.broadcast_to(t, (batch, *t.shape[1:])) for t in (token, *registers)]
    if own:
      first[0] = first[0] + positions[:, :own]
    spread = resample(positions[:, own:], (form.grid, form.grid), (grid[0], grid[1]))
    return jnp.concatenate([*(t.astype(self.dtype) for t in first), x + spread.astype(x.dtype)], 1)

  def _positions(self, own, dim, kept):
    form = self.form
    if form.positions == "sincos":
      return jnp.asarray(sincos(form.grid, dim, own), kept)
    start = nn.initializers.normal(0.02)
    return self.param("pos_embed", start, (1, own + form.grid**2, dim), kept)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), each scaled and now and then left out."""

  dim: int
  heads: int
  form: Form
  dtype: jnp.dtype
  drop: float

  @nn.compact
  def __call__(self, x: jax.Array, noise: jax.Array | None) -> jax.Array:
    kept = at_least_float32(self.dtype)
    norm = lambda name: nn.LayerNorm(EPSILON, self.dtype, kept, name=name)
    start, attending = self.form.start, self.form.attention
    y = Attention(self.dim, self.heads, start, attending, self.dtype, name="attn")(norm("norm1")(x))
    x = x + self._branch(y, "ls1", noise, 0)
    y = Mlp(self.dim, start, self.dtype, name="mlp")(norm("norm2")(x))
    return x + self._branch(y, "ls2", noise, 1)

  def _branch(self, y, name, noise, number):
    if self.form.layer_scale:
      y = LayerScale(self.form.layer_scale, self.dtype, name=name)(y)
    if noise is None or not self.drop:
      return y
    draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), 1 - self.drop)
    stays = jax.vmap(draw)(noise)
    return jnp.where(stays[:, None, None], y / (1 - self.drop), 0)


class LayerScale(nn.Module):
  """gamma times every token."""

  start: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    start = nn.initializers.constant(self.start)
    gamma = self.param("gamma", start, x.shape[-1:], at_least_float32(self.dtype))
    return x * gamma.astype(self.dtype)[None, None]


class PatchEmbed(nn.Module):
  """[B, H, W, 3] -> [B, H / patch, W / patch, F]: timm's patch_embed.proj as one product, from torch's start or MoCo v3's."""

  dim: int
  patch: int
  start: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    p, kept, dim = self.patch, at_least_float32(self.dtype), self.dim
    fan_in = 3 * p * p
    mocov3 = self.start == "mocov3"
    start = uniform(np.sqrt(6 / (fan_in + dim)) if mocov3 else 1 / np.sqrt(fan_in))
    first = nn.initializers.zeros if mocov3 else uniform(1 / np.sqrt(fan_in))
    kernel = self.param("kernel", start, (p, p, 3, dim), kept).astype(self.dtype)
    bias = self.param("bias", first, (dim,), kept).astype(self.dtype)
    batch, height, width, _ = images.shape
    x = images.astype(self.dtype).reshape(batch, height // p, p, width // p, p, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // p, width // p, fan_in)
    return x @ kernel.reshape(fan_in, dim) + bias[None, None, None]


def pool(tokens: jax.Array, form: Form) -> jax.Array:
  """[B, T, F] -> [B, F]: the class token, or the mean of the patches."""
  if form.pool == "token":
    return tokens[:, 0]
  return jnp.mean(tokens[:, 1 + form.registers :], 1, dtype=at_least_float32(tokens.dtype))


def _per_block(noise, block):
  return jax.vmap(lambda key: jax.random.fold_in(key, block))(noise)


def grid_of(form: Mapping[str, Json], crops: Sequence[Sequence[float]]) -> int:
  """Patches along a side for which a config's positions are: `model.vit.grid`, or those of its first views."""
  return form["grid"] or int(crops[0][0]) // form["patch"]


def form_of(keys: Mapping[str, Json], crops: Sequence[Sequence[float]]) -> Form:
  """The `Form` of a config's `model.vit` and `views.crops`."""
  return Form(**{**keys, "grid": grid_of(keys, crops)})


def check(arch: str, form: Mapping[str, Json], sides: Sequence[tuple[str, int]]) -> None:
  """Refuses sides [(key, pixels)] that patches do not divide. Raises ConfigError."""
  patch = form["patch"]
  for key, side in sides:
    near = " or ".join(str(n * patch) for n in (side // patch, side // patch + 1) if n)
    require(
      side % patch == 0, key, side, f"{arch} cuts it into patches of {patch} pixels; use {near}"
    )
