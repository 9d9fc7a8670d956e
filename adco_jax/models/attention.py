"""What a Vision Transformer's block adds to its tokens: attention, and an MLP.

Flow: vit.Block calls both on normalised tokens.
Shapes: tokens [B, T, F] -> [B, T, F]; queries, keys and values [B, T, heads, F / heads].
Paper: Dosovitskiy et al. 2021, in timm's arithmetic and names: exact GELU by the error function; softmax in float32 at least.
Holds: `xla` brings heads to the front and images and heads into one axis, since XLA multiplies such matrices fastest (CPU:
  forward and gradient of 197 tokens in .6 of the time of jax.nn.dot_product_attention, whose `cudnn` is the other choice).
Not here: norms, LayerScale, stochastic depth (vit).
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.runtime.dtypes import at_least_float32

ATTENTIONS = ("xla", "cudnn")
Attending = Literal["xla", "cudnn"]


class Attention(nn.Module):
  """Every token looks at all; what the class token looks at is sown as `class_attention` [B, heads, T] where it is asked for."""

  dim: int
  heads: int
  start: str
  attending: Attending
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, tokens, _ = x.shape
    qkv = Linear(3 * self.dim, self.start, 3, self.dtype, name="qkv")(x)
    qkv = qkv.reshape(batch, tokens, 3, self.heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))
    if self.is_mutable_collection("intermediates") and not self.is_initializing():
      logits = jnp.einsum("bhf,bthf->bht", q[:, 0], k) * q.shape[-1] ** -0.5
      shares = jax.nn.softmax(logits.astype(at_least_float32(self.dtype)))
      self.sow("intermediates", "class_attention", shares)
    y = attend(q, k, v, self.attending).reshape(batch, tokens, self.dim)
    return Linear(self.dim, self.start, 1, self.dtype, name="proj")(y)


class Mlp(nn.Module):
  """fc1 to four times the width, GELU, fc2."""

  dim: int
  start: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Linear(4 * self.dim, self.start, 1, self.dtype, name="fc1")(x)
    return Linear(self.dim, self.start, 1, self.dtype, name="fc2")(gelu(x))


class Linear(nn.Module):
  """x W + b, from timm's start (normal of .02: it is cut at 2, a hundred deviations) or MoCo v3's (Xavier, of each of its `parts`), b = 0."""

  features: int
  start: str
  parts: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kept = at_least_float32(self.dtype)
    bound = np.sqrt(6 / (x.shape[-1] + self.features // self.parts))
    start = uniform(bound) if self.start == "mocov3" else nn.initializers.normal(0.02)
    kernel = self.param("kernel", start, (x.shape[-1], self.features), kept)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), kept)
    return product(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)[None, None]


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [B, T, in] @ kernel [in, out].

  On a CPU the kernel's gradient is a product of two matrices: XLA's own, over two axes, has it write the output's gradient
  transposed, together with whatever makes it: a tenth of a block's time, forward pass included.
  """
  return x @ kernel


def _product_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _product_backward(kept, dy):
  x, kernel = kept
  flat = lambda a: a.reshape(-1, a.shape[-1])
  by_matrices = lambda x, dy: flat(x).T @ flat(dy)
  plain = lambda x, dy: jnp.einsum("bti,bto->io", x, dy)
  return dy @ kernel.T, jax.lax.platform_dependent(x, dy, cpu=by_matrices, default=plain)


product.defvjp(_product_forward, _product_backward)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, implementation: Attending) -> jax.Array:
  """softmax(q k / sqrt(f)) v of [B, T, heads, f]."""
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  batch, tokens, heads, size = q.shape
  q, k, v = (x.swapaxes(1, 2).reshape(batch * heads, tokens, size) for x in (q, k, v))
  wide = at_least_float32(q.dtype)
  scaled = q * size**-0.5
  logits = jnp.einsum("nqf,nkf->nqk", scaled, k, preferred_element_type=wide)
  y = jnp.einsum("nqk,nkf->nqf", jax.nn.softmax(logits).astype(v.dtype), v)
  return y.reshape(batch, heads, tokens, size).swapaxes(1, 2)


def gelu(x: jax.Array) -> jax.Array:
  """x times the normal distribution function at x: `jax.nn.gelu`'s exact one goes through erfc, which takes twice the time."""
  wide = x.astype(at_least_float32(x.dtype))
  return (wide * (jax.lax.erf(wide * 0.5**0.5) + 1) / 2).astype(x.dtype)


def uniform(bound: float) -> Callable[..., jax.Array]:
  """Start of an array: uniform within `bound`."""
  return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)
