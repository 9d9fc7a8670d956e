"""The encoder that the loss sees: a ResNet or ViT and the projection.

Flow: build makes one `Encoder`; train_step applies it to queries and to keys with two sets of
  parameters; evaluation asks for `features` only. Objectives with a predictor make it of `Projection` too.
Shapes: images [B, H, W, 3] -> embeddings [B, D], not yet normalised.
Paper: g of the authors' model (model/AdCo.py: fc.0, ReLU, fc.2), no BatchNorm, biases in both layers.
"""

import functools
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adco_jax.config import outside
from adco_jax.models import resnet, tokens
from adco_jax.models import vit as transformers
from adco_jax.models.layers import Dense
from adco_jax.models.norm import BatchNorm
from adco_jax.models.resnet import ResNet
from adco_jax.runtime.dtypes import Tree

ARCHITECTURES: Mapping[str, Any] = ChainMap[str, Any](
  transformers.ARCHITECTURES, resnet.ARCHITECTURES
)  # ResNets first
NORMS = ("none", "hidden", "all", "all_plain")


class Head(NamedTuple):
  """What a projection looks like.

  layers: linear ones, ReLU between them; width: of the hidden ones, 0: as wide as what comes in; norm: BatchNorm behind
  'none' of them, the 'hidden' ones or 'all', the last one without scale and bias in 'all_plain'.
  """

  layers: int = 2
  width: int = 0
  norm: str = "none"


class Encoder(nn.Module):
  """Backbone and head as one module, so that both players share one parameter tree.

  arch: a name of ARCHITECTURES, or `package.module:name` of what makes a Linen module, given dtype: (images [B, H, W, 3], train) ->
  features [B, F].
  """

  arch: str
  width: float
  stem: str
  dim: int
  group_size: int
  running_from: str = "mean"
  dtype: jnp.dtype = jnp.float32
  platform: str = ""  # cpu, gpu or tpu: the form that is fastest there; "": where JAX computes
  projection: Head = Head()
  vit: transformers.Form = transformers.Form()  # of a ViT

  def setup(self) -> None:
    self.backbone = self._backbone()
    group = self.group_size, self.running_from, self.dtype, self.platform or jax.default_backend()
    self.head = Projection(self.dim, self.projection, *group)

  def _backbone(self):
    if outside.is_outside(self.arch):
      return outside.load(self.arch, "model.arch")(dtype=self.dtype)
    if self.arch in transformers.ARCHITECTURES:
      return transformers.ViT(self.arch, self.width, self.vit, self.dtype)
    size = self.arch, self.width, self.stem, self.group_size, self.running_from
    return ResNet(*size, self.dtype, self.platform or jax.default_backend())

  def __call__(
    self, images: jax.Array, train: bool, head: bool = True, noise: jax.Array | None = None
  ) -> jax.Array:
    """Embeddings, or features where `head` is left out; `noise`: see ViT, which alone has any."""
    features = self.backbone(images, train, *([] if noise is None else [noise]))
    return self.head(features, train) if head else features

  def features(self, images: jax.Array, form: str = tokens.POOLED) -> jax.Array:
    """Pooled features [B, F] of the frozen backbone (running statistics), or those of a form of a ViT's tokens, see tokens."""
    if form == tokens.POOLED:
      return self.backbone(images, False)
    depth = transformers.sizes(self.arch, self.width, self.vit)[1]
    after = self.backbone(images, last=min(tokens.BLOCKS, depth))
    found = tokens.every(after, self.vit.registers)
    return found if form == tokens.EVERY else found[:, self.forms()[form]]

  def forms(self) -> dict[str, slice]:
    """{form: its columns of `every`} of a ViT."""
    return tokens.columns(*transformers.sizes(self.arch, self.width, self.vit)[:2])


class Projection(nn.Module):
  """[B, F] -> [B, D]; layers are named by their place, as torch's Sequential does: fc0, ReLU, fc2.

  A linear layer has a bias unless BatchNorm follows, which would take it away.
  """

  dim: int
  shape: Head = Head()
  group_size: int = 1
  running_from: str = "mean"
  dtype: jnp.dtype = jnp.float32
  platform: str = "cpu"

  @nn.compact
  def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
    x, shape = features.astype(self.dtype), self.shape
    width, place = shape.width or x.shape[-1], 0
    for layer in range(1, shape.layers + 1):
      last = layer == shape.layers
      normed = shape.norm.startswith("all") or (shape.norm == "hidden" and not last)
      x = Dense(self.dim if last else width, self.dtype, not normed, name=f"fc{place}")(x)
      if normed:
        norm = BatchNorm(
          self.group_size, self.running_from, self.dtype, self.platform,
          affine=not last or shape.norm == "all", name=f"fc{place + 1}",
        )  # fmt: skip
        x = norm(x[:, None, None], train)[:, 0, 0]
      x = x if last else nn.relu(x)
      place += 3 if normed else 2
    return x


def layers_of(encoder: Encoder) -> tuple[Callable[[Sequence[str]], int], int] | None:
  """(layer of an array, by the names on its way below `backbone`; how many layers lie between the embeddings, which are layer
  0, and what follows them), None of an outside backbone that does not say."""
  if encoder.arch in resnet.ARCHITECTURES:
    return resnet.layer_of, len(resnet.ARCHITECTURES[encoder.arch][1])
  if encoder.arch in transformers.ARCHITECTURES:
    _, depth, _ = transformers.sizes(encoder.arch, encoder.width, encoder.vit)
    return functools.partial(transformers.layer_of, depth=depth), depth
  made: Any = outside.load(encoder.arch, "model.arch")
  if isinstance(made, type) and hasattr(made, "layer_of"):
    made = made(dtype=encoder.dtype)
  layer_of, layers = getattr(made, "layer_of", None), getattr(made, "layers", None)
  return None if layer_of is None or layers is None else (layer_of, layers)


def embed(
  encoder: nn.Module,
  params: Tree,
  stats: dict[str, Tree],
  images: jax.Array,
  head: bool = True,
  train: bool = True,
  noise: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Tree]]:
  """(projections [B, D], or features without `head`; statistics after them) in training; `stats`: {collection: tree}, empty
  without BatchNorm; not `train`: they normalise and stay as they are."""
  variables, mutable = {"params": params, **stats}, list(stats) or False
  more = () if noise is None else (noise,)
  outputs: Any = encoder.apply(variables, images, train, head, *more, mutable=mutable)
  return outputs if stats else (outputs, stats)
