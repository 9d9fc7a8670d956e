"""Convolution, dense layer and pooling with torch's arithmetic and initialisation.

Flow: norm, resnet and heads are made of these.
Shapes: images and feature maps are NHWC; convolution kernels HWIO, dense kernels [in, out].
Holds: parameters are at least float32 whatever the compute dtype; `platform` (cpu, gpu, tpu) names the form that
  is fastest there, and all forms compute the same.
Not here: BatchNorm (norm), what is a block (resnet).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.runtime.dtypes import at_least_float32
from adco_jax.runtime.runs import run_length

BLOCK = 2**18  # numbers of a feature map that a core's cache holds beside what is made of them
LARGE_KERNEL = 2**20  # numbers from which XLA's CPU convolution is slower than products


class Conv(nn.Module):
  """k x k convolution without bias, padding k // 2."""

  features: int
  size: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  platform: str = "cpu"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    # kaiming_normal_(mode='fan_out', nonlinearity='relu') of torchvision's resnet.
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", init, shape, at_least_float32(self.dtype)).astype(self.dtype)
    form = _convolve
    if self.platform == "cpu":
      small = max(x.shape[1:3]) <= 2 * self.stride or kernel.size >= LARGE_KERNEL
      plain = _by_products if small else _convolve
      form = functools.partial(_on_cpu, _by_one_product if self.size == 1 else plain)
    elif self.platform == "gpu" and (self.size, self.stride) == (7, 2):
      form = _by_blocks
    return form(x, kernel, self.stride)


def _convolve(x, kernel, stride):
  """The plain form, for every size and platform."""
  pad = (len(kernel) // 2, len(kernel) // 2)
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _by_one_product(x, kernel, stride):
  """A 1 x 1 convolution as a matrix product: faster on CPU.

  On a GPU XLA before jax 0.12 aborts on a product of a strided slice; on a TPU the product reads and writes more.
  """
  return x[:, ::stride, ::stride] @ kernel[0, 0]


def _by_products(x, kernel, stride):
  """A convolution as one matrix product per kernel position, summed in float32 at least, as a convolution is.

  For results of 2 x 2 or less, where the gradient of XLA's CPU convolution takes 30 times as long, and for kernels so
  large that reading them is the work.
  """
  size, dtype = len(kernel), x.dtype
  pad = (size // 2, size // 2)
  x, kernel = (a.astype(at_least_float32(dtype)) for a in (x, kernel))
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
  height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
  along = lambda first, count: slice(first, first + stride * (count - 1) + 1, stride)
  terms = (
    x[:, along(i, height), along(j, width)] @ kernel[i, j] for i in range(size) for j in range(size)
  )
  return sum(terms).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _on_cpu(form, x, kernel, stride):
  """`form` with another gradient of the kernel: XLA's own takes two to six times as long on a CPU."""
  return form(x, kernel, stride)


def _on_cpu_forward(form, x, kernel, stride):
  return form(x, kernel, stride), (x, kernel)


def _on_cpu_backward(form, stride, kept, dy):
  x, kernel = kept
  # The barrier: else their makers are computed again, pixel by pixel transposed.
  x, dy = jax.lax.optimization_barrier((x, dy))
  (dx,) = jax.vjp(lambda x: form(x, kernel, stride), x)[1](dy)
  images = run_length(len(x), max(1, max(BLOCK, kernel.size) // x[0].size))

  def part(first):
    images_here, gradients = (jax.lax.dynamic_slice_in_dim(a, first, images) for a in (x, dy))
    return _gradient_by_rows(images_here, gradients, len(kernel), stride)

  parts = jax.lax.map(part, jnp.arange(0, len(x), images))
  return dx, parts.sum(0).astype(kernel.dtype)


_on_cpu.defvjp(_on_cpu_forward, _on_cpu_backward)


def _gradient_by_rows(x, dy, size, stride):
  """The kernel's gradient [size, size, C_in, C_out] as one matrix product per row of it."""
  (height, width, last), channels = dy.shape[1:], x.shape[-1]
  x, dy = jnp.pad(x, ((0, 0), *[(size // 2, size // 2)] * 2, (0, 0))), dy.reshape(-1, last)
  along = lambda first, count: slice(first, first + stride * (count - 1) + 1, stride)
  # XLA writes the first factor transposed: let that be the narrower one; dy it writes once for all rows.
  by_dy = last <= size * channels

  def row(i):
    seen = [x[:, along(i, height), along(j, width)] for j in range(size)]
    pair = jnp.stack(seen, 3).reshape(-1, size * channels), dy
    first, second = reversed(pair) if by_dy else pair
    return jnp.matmul(first.T, second, preferred_element_type=at_least_float32(x.dtype))

  # The barrier: else XLA would swap the factors to save the transposition of what is small.
  rows = jax.lax.optimization_barrier(jnp.stack([row(i) for i in range(size)]))
  rows = rows.swapaxes(1, 2) if by_dy else rows
  return rows.reshape(size, size, channels, last)


def _by_blocks(x, kernel, stride):
  """The ImageNet stem on blocks of 2 x 2 pixels: 4 x 4, stride 1, over 12 channels instead of 7 x 7, stride 2, over 3.

  Four zero channels more: cuDNN is six times as fast on 16 channels as on three, and would pad others by itself.
  """
  del stride
  x = jax.lax.optimization_barrier(
    x
  )  # what made it would otherwise be computed in the scattered order of blocks
  # Output o of the 7 x 7 begins at pixel 2 o - 3; one zero before it, and it begins at a block: number o - 2.
  kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
  kernel = kernel.reshape(4, 2, 4, 2, *kernel.shape[2:]).transpose(0, 2, 1, 3, 4, 5)
  x = to_cells(x).transpose(0, 1, 3, 2, 4, 5)
  x, kernel = x.reshape(*x.shape[:3], -1), kernel.reshape(4, 4, -1, kernel.shape[-1])
  more = -x.shape[-1] % 16
  x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
  kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), ((2, 1), (2, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


class Dense(nn.Module):
  """x W (+ b) with torch.nn.Linear's start: both uniform within 1 / sqrt(fan-in)."""

  features: int
  dtype: jnp.dtype = jnp.float32
  bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def uniform(rng, shape, dtype):
      bound = jnp.sqrt(1 / x.shape[-1]).astype(dtype)
      return jax.random.uniform(rng, shape, dtype, -bound, bound)

    kept = at_least_float32(self.dtype)
    kernel = self.param("kernel", uniform, (x.shape[-1], self.features), kept)
    product = x @ kernel.astype(self.dtype)
    if not self.bias:
      return product
    bias = self.param("bias", uniform, (self.features,), kept)
    return product + bias.astype(self.dtype)[None]


NO_PIXEL = np.uint8(9)  # of a window whose gradient goes nowhere


def max_pool(x: jax.Array, platform: str = "cpu") -> jax.Array:
  """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C], 3 x 3, stride 2, padding 1 (torchvision's stem).

  Its gradient goes to the first largest pixel of a window, as torch's. On a TPU pooling and its gradient are
  native; elsewhere XLA scatters the gradient (refused in deterministic mode on GPU, slow on CPU), so that
  the position of the largest pixel is kept instead.
  """
  return (_plain_max_pool if platform == "tpu" else max_pool_by_index)(x)


def _plain_max_pool(x):
  return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@jax.custom_vjp
def max_pool_by_index(x: jax.Array) -> jax.Array:
  """`max_pool` whose gradient knows from the forward pass, as a uint8 per window, which pixel was taken.

  Comparing pixels with the maximum again in the backward pass would lose gradient without a word: XLA
  computes the pixels a second time in another fusion, with other rounding, and none is equal any more.
  """
  return _plain_max_pool(x)


def largest_pixel(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(its value, 3 i + j as uint8) of each window's first largest pixel, both [B, ceil(H / 2), ceil(W / 2), C]."""
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
  height, width = (-(-side // 2) for side in x.shape[1:3])
  largest = jnp.full((len(x), height, width, x.shape[-1]), -jnp.inf, x.dtype)
  place = jnp.full(largest.shape, 4, jnp.uint8)  # the centre, which is never padding
  for i in range(3):
    for j in range(3):
      pixel = padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
      place = jnp.where(pixel > largest, np.uint8(3 * i + j), place)
      largest = jnp.maximum(largest, pixel)  # what is no number stays none
  return largest, place


def _max_pool_forward(x):
  kept = jax.lax.optimization_barrier(largest_pixel(x)[1])  # never computed again
  return _plain_max_pool(x), (kept, x[:0])  # x[:0]: its shape and dtype


def _max_pool_gradient(kept, gradient):
  place, like = kept
  return (from_cells(to_largest_pixel(place, gradient), *like.shape[1:3]),)


def to_largest_pixel(place: jax.Array, gradient: jax.Array) -> jax.Array:
  """Gradient of the pixels, in cells, from that of the windows: a pixel asks each that it lies in.

  Those of pixel r along one axis: window r // 2, in whose middle (r even) or at whose end (odd) it is, and for odd r
  the next one, at whose beginning it is.
  """
  wide = gradient.astype(at_least_float32(gradient.dtype))
  total: Any = 0
  for down in (0, 1):
    for right in (0, 1):
      rows, columns = _taps(down), _taps(right)
      taps = np.minimum(3 * rows[:, None] + columns, NO_PIXEL + 1)
      taps = jnp.asarray(taps, jnp.uint8)[None, None, :, None, :, None]
      window = lambda x, fill: _moved(x, down, right, fill)[:, :, None, :, None]  # noqa: B023
      total += jnp.where(window(place, NO_PIXEL) == taps, window(wide, 0), 0)
  return total.astype(gradient.dtype)


def to_cells(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> cells of 2 x 2 pixels [B, ceil(H / 2), 2, ceil(W / 2), 2, C], where parity needs no arithmetic."""
  x = jnp.pad(x, ((0, 0), *((0, side % 2) for side in x.shape[1:3]), (0, 0)))
  batch, height, width, channels = x.shape
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels)


def from_cells(x: jax.Array, height: int, width: int) -> jax.Array:
  """What `to_cells` was given."""
  batch, rows, _, columns, _, channels = x.shape
  return x.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]


def _taps(following):
  """Which row of window r // 2 (or of the one following) an even and an odd pixel are; large if not in there."""
  return np.array([9, 0] if following else [1, 2])


def _moved(x, up, left, fill):
  """x [B, H, W, C] one row up and (or) one column to the left."""
  pad = ((0, 0), (0, up), (0, left), (0, 0))
  return jnp.pad(x[:, up:, left:], pad, constant_values=fill)


max_pool_by_index.defvjp(_max_pool_forward, _max_pool_gradient)
