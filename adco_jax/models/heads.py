"""The encoder that the loss sees: a ResNet and the two-layer projection.

Flow: build makes one `Encoder`; train_step applies it to queries and to keys with two sets of
  parameters; evaluation asks for `features` only.
Shapes: images [B, H, W, 3] -> embeddings [B, D], not yet normalised.
Paper: g of the authors' model (model/AdCo.py: fc.0, ReLU, fc.2), no BatchNorm, biases in both layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adco_jax.config import outside
from adco_jax.models.layers import Dense
from adco_jax.models.resnet import ResNet
from adco_jax.runtime.dtypes import Tree


class Encoder(nn.Module):
  """Backbone and head as one module, so that both players share one parameter tree.

  arch: a ResNet's name, or `package.module:name` of what makes a Linen module, given dtype: (images [B, H, W, 3], train) ->
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

  def setup(self) -> None:
    self.backbone = self._backbone()
    self.head = Projection(self.dim, self.dtype)

  def _backbone(self):
    if outside.is_outside(self.arch):
      return outside.load(self.arch, "model.arch")(dtype=self.dtype)
    size = self.arch, self.width, self.stem, self.group_size, self.running_from
    return ResNet(*size, self.dtype, self.platform or jax.default_backend())

  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    return self.head(self.backbone(images, train))

  def features(self, images: jax.Array) -> jax.Array:
    """Pooled features [B, F] of the frozen backbone (running statistics)."""
    return self.backbone(images, False)


class Projection(nn.Module):
  """Linear(F, F), ReLU, Linear(F, D)."""

  dim: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    x = features.astype(self.dtype)
    x = nn.relu(Dense(x.shape[-1], self.dtype, name="fc0")(x))
    return Dense(self.dim, self.dtype, name="fc2")(x)


def embed(
  encoder: nn.Module, params: Tree, stats: dict[str, Tree], images: jax.Array
) -> tuple[jax.Array, dict[str, Tree]]:
  """(projections [B, D], statistics after them) in training; `stats`: {collection: tree}, empty without BatchNorm."""
  variables, mutable = {"params": params, **stats}, list(stats) or False
  outputs: Any = encoder.apply(variables, images, train=True, mutable=mutable)
  return outputs if stats else (outputs, stats)
