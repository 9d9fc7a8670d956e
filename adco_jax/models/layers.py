"""Convolution, dense layer, pooling and grouped BatchNorm with torch's arithmetic and initialisation.

Flow: resnet and heads are made of these.
Shapes: images and feature maps are NHWC; convolution kernels HWIO, dense kernels [in, out].
Holds: parameters and statistics are at least float32 whatever the compute dtype; a BatchNorm group is
  a run of `group_size` consecutive images of this device.
Not here: what is a block (resnet).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adco_jax.dtypes import at_least_float32

BN_DECAY = 0.9  # of the running statistics: torch's momentum 0.1
BN_EPSILON = 1e-5


class Conv(nn.Module):
  """k x k convolution without bias, padding k // 2."""

  features: int
  size: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    # kaiming_normal_(mode='fan_out', nonlinearity='relu') of torchvision's resnet.
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", init, shape, at_least_float32(self.dtype)).astype(self.dtype)
    if self.size == 1:
      form = functools.partial(_by_one_product, stride=self.stride)
    elif max(x.shape[1:3]) <= 2 * self.stride:
      form = functools.partial(_by_products, stride=self.stride)
    else:
      return _convolve(x, kernel, self.stride)
    whole = functools.partial(_convolve, stride=self.stride)
    return jax.lax.platform_dependent(x, kernel, cpu=form, default=whole)


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

  For results of 2 x 2 or less, where the gradient of XLA's CPU convolution takes 30 times as long.
  """
  size = len(kernel)
  pad = (size // 2, size // 2)
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
  height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
  along = lambda first, count: slice(first, first + stride * (count - 1) + 1, stride)
  product = functools.partial(jnp.matmul, preferred_element_type=at_least_float32(x.dtype))
  terms = (
    product(x[:, along(i, height), along(j, width)], kernel[i, j])
    for i in range(size)
    for j in range(size)
  )
  return sum(terms).astype(x.dtype)


class Dense(nn.Module):
  """x W + b with torch.nn.Linear's start: both uniform within 1 / sqrt(fan-in)."""

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    def uniform(rng, shape, dtype):
      bound = jnp.sqrt(1 / x.shape[-1]).astype(dtype)
      return jax.random.uniform(rng, shape, dtype, -bound, bound)

    kept = at_least_float32(self.dtype)
    kernel = self.param("kernel", uniform, (x.shape[-1], self.features), kept)
    bias = self.param("bias", uniform, (self.features,), kept)
    return x @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None]


class BatchNorm(nn.Module):
  """Normalises every channel over groups of `group_size` images, as one torch process would over each.

  Running statistics take one step per call: towards the mean over this device's groups
  (running_from='mean'), or towards its first group's ('first'); variance is unbiased, as torch's.
  Reducing them over devices is train_step's part.
  """

  group_size: int
  running_from: str = "mean"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    channels, kept = x.shape[-1], at_least_float32(self.dtype)
    scale = self.param("scale", nn.initializers.ones, (channels,), kept)
    bias = self.param("bias", nn.initializers.zeros, (channels,), kept)
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), kept)
    var = self.variable("batch_stats", "var", jnp.ones, (channels,), kept)
    if not train or self.is_initializing():
      return self._normalise(x, mean.value, var.value, scale, bias)

    groups = x.reshape(-1, self.group_size, *x.shape[1:])
    y, batch_mean, batch_var = normalise_groups(groups, scale, bias)
    count = groups[0].size // channels
    unbiased = batch_var * (count / max(count - 1, 1))
    for running, batch in ((mean, batch_mean), (var, unbiased)):
      batch = batch.reshape(-1, channels)
      batch = batch[0] if self.running_from == "first" else jnp.mean(batch, 0)
      running.value = BN_DECAY * running.value + (1 - BN_DECAY) * batch
    return y.reshape(x.shape)

  def _normalise(self, x, mean, var, scale, bias):
    mean, var, scale, bias = (_channels(v, x.ndim) for v in (mean, var, scale, bias))
    gain = jax.lax.rsqrt(var + BN_EPSILON) * scale
    return ((x.astype(mean.dtype) - mean) * gain + bias).astype(self.dtype)


@jax.custom_vjp
def normalise_groups(x, scale, bias):
  """x [G, n, H, W, C], every channel normalised over each of G groups -> (y, mean, variance).

  Moments are [G, 1, 1, 1, C] in float32 or better, without gradient. The gradient is written out:
  it keeps only x, reads it once more, and adds up in two stages, as `_mean`.
  """
  return _normalise_groups(x, scale, bias)[0]


def _normalise_groups(x, scale, bias):
  wide = x.astype(scale.dtype)
  mean = _mean(wide)
  var = _mean(jnp.square(wide - mean))
  inverse = jax.lax.rsqrt(var + BN_EPSILON)
  y = (wide - mean) * (inverse * _channels(scale, 5)) + _channels(bias, 5)
  return (y.astype(x.dtype), mean, var), (x, mean, inverse, scale)


def _normalise_groups_gradient(kept, gradients):
  x, mean, inverse, scale = kept
  dy = gradients[0].astype(scale.dtype)
  unit = (x.astype(scale.dtype) - mean) * inverse
  mean_dy, mean_dy_unit = _mean(dy), _mean(dy * unit)
  dx = (inverse * _channels(scale, 5)) * (dy - mean_dy - unit * mean_dy_unit)
  count = x[0].size // x.shape[-1]
  total = lambda m: count * jnp.sum(m, (0, 1, 2, 3))
  return dx.astype(x.dtype), total(mean_dy_unit), total(mean_dy)


normalise_groups.defvjp(_normalise_groups, _normalise_groups_gradient)


def _mean(x):
  """Mean over [n, H, W] of [G, n, H, W, C]: rows first, because XLA's CPU adds up one after the other."""
  return jnp.mean(jnp.mean(x, 3, keepdims=True), (1, 2), keepdims=True)


def _channels(v, ndim):
  return v.reshape(*(1,) * (ndim - 1), -1)


def max_pool(x):
  """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C], 3 x 3, stride 2, padding 1 (torchvision's stem).

  Its gradient goes to the first largest pixel of a window, as torch's. On a TPU pooling and its gradient are
  native; elsewhere XLA scatters the gradient (refused in deterministic mode on GPU, slow on CPU), so that
  the position of the largest pixel is kept instead.
  """
  return jax.lax.platform_dependent(x, tpu=_plain_max_pool, default=max_pool_by_index)


def _plain_max_pool(x):
  return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@jax.custom_vjp
def max_pool_by_index(x):
  """`max_pool` whose gradient knows from the forward pass, as a uint8 per window, which pixel was taken.

  Comparing pixels with the maximum again in the backward pass would lose gradient without a word: XLA
  computes the pixels a second time in another fusion, with other rounding, and none is equal any more.
  """
  return _plain_max_pool(x)


def _largest_pixel(x):
  """uint8 [B, ceil(H / 2), ceil(W / 2), C]: 3 i + j of the first largest pixel of each window."""
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
  height, width = (-(-side // 2) for side in x.shape[1:3])
  largest = jnp.full((len(x), height, width, x.shape[-1]), -jnp.inf, x.dtype)
  place = jnp.full(largest.shape, 4, jnp.uint8)  # the centre, which is never padding
  for i in range(3):
    for j in range(3):
      pixel = padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
      larger = pixel > largest
      largest = jnp.where(larger, pixel, largest)
      place = jnp.where(larger, np.uint8(3 * i + j), place)
  return jax.lax.optimization_barrier(place)  # kept, never computed again


def _max_pool_forward(x):
  return _plain_max_pool(x), (_largest_pixel(x), x[:0])  # x[:0]: its shape and dtype


def _max_pool_gradient(kept, gradient):
  """Every pixel gathers from the windows that took it: one along an even row or column, two along an odd."""
  place, like = kept
  wide = gradient.astype(at_least_float32(gradient.dtype))
  part = lambda i, j: _moved(jnp.where(place == 3 * i + j, wide, 0), i == 0, j == 0)
  even, odd = (1,), (2, 0)  # rows (columns) of the window that meet such a pixel
  total = lambda rows, columns: sum(part(i, j) for i in rows for j in columns)
  pixels = [[total(rows, columns) for columns in (even, odd)] for rows in (even, odd)]
  batch, height, width, channels = place.shape
  rows = jnp.stack([jnp.stack(row, 3) for row in pixels], 2)  # [B, h, 2, w, 2, C]
  whole = rows.reshape(batch, 2 * height, 2 * width, channels)
  return (whole[:, : like.shape[1], : like.shape[2]].astype(like.dtype),)


def _moved(x, up, left):
  """x one row up and (or) one column to the left, zeros where nothing comes from."""
  return jnp.pad(x[:, int(up) :, int(left) :], ((0, 0), (0, int(up)), (0, int(left)), (0, 0)))


max_pool_by_index.defvjp(_max_pool_forward, _max_pool_gradient)
