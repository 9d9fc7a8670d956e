"""BatchNorm over groups of images, with what follows it: the shortcut's sum, ReLU, the stem's pooling.

Flow: resnet calls `BatchNorm`; in training that calls `batch_norm`, or `batch_norm_and_pool` for the stem on a GPU.
Shapes: x [N, H, W, C] in the compute dtype; parameters and statistics [C], moments of groups [G, C], both at
  least float32.
Holds: gradients are written out; they keep x and, where a shortcut was added, the result. The plain form is the
  reference and the TPU's program. On a GPU the same numbers come from fewer kernels that read and write less:
  both sums of a pass in one reduction, nothing recomputed across passes.
Not here: sums and barriers (sums), what a block is (resnet), pooling elsewhere (layers).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adco_jax.models import layers, sums
from adco_jax.models.sums import Form
from adco_jax.runtime.dtypes import at_least_float32
from adco_jax.runtime.sharding import AXIS

BN_DECAY = 0.9  # of the running statistics: torch's momentum 0.1
BN_EPSILON = 1e-5


class BatchNorm(nn.Module):
  """Normalises every channel over groups of `group_size` images, as one torch process would over each; 0: over the
  batch of all devices (synchronised; inside of train_step's shard_map alone).

  Running statistics take one step per call: towards the mean over this device's groups
  (running_from='mean'), or towards its first group's ('first'); variance is unbiased, as torch's.
  Reducing them over devices is train_step's part.
  """

  group_size: int
  running_from: str = "mean"
  dtype: jnp.dtype = jnp.float32
  platform: str = "cpu"
  affine: bool = True  # False: no scale and bias to learn

  def __call__(
    self,
    x: jax.Array,
    train: bool,
    shortcut: "jax.Array | tuple[BatchNorm, jax.Array] | None" = None,
    relu: bool = False,
    pool: bool = False,
  ) -> jax.Array:
    """x normalised, plus `shortcut`, then cut at zero, then pooled (the stem's 3 x 3).

    `shortcut`: of x's shape; or (another BatchNorm, what it normalises): that happens here, in the same pass.
    """
    unfinished = [self.begin(x)]
    if isinstance(shortcut, tuple):
      other, raw = shortcut
      unfinished, shortcut = [*unfinished, other.begin(raw)], None
    branches = tuple(u.branch for u in unfinished)
    if not train or self.is_initializing():
      y = _result(branches, tuple(u.running for u in unfinished), shortcut, relu)
      return layers.max_pool(y, self.platform) if pool else y

    form = Form(len(x) // (self.group_size or len(x)), relu, self.platform, not self.group_size)
    if pool and form.platform == "gpu":
      y, moments = batch_norm_and_pool(form, *branches)
    else:
      y, moments = batch_norm(form, branches, shortcut)
      y = layers.max_pool(y, self.platform) if pool else y
    for u, of_batch in zip(unfinished, moments, strict=True):
      u.keep(of_batch)
    return y

  @nn.compact
  def begin(self, x: jax.Array) -> "Unfinished":
    """All that it takes to normalise x, as `Unfinished`."""
    channels, kept = x.shape[-1], at_least_float32(self.dtype)
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), kept)
    var = self.variable("batch_stats", "var", jnp.ones, (channels,), kept)
    # As the statistics, each device's own.
    scale, bias = jnp.ones_like(mean.value), jnp.zeros_like(mean.value)
    if self.affine:
      scale = self.param("scale", nn.initializers.ones, (channels,), kept)
      bias = self.param("bias", nn.initializers.zeros, (channels,), kept)
    running = Moments(mean.value[None], var.value[None])
    keep = functools.partial(self._keep, mean, var, x.shape)
    return Unfinished(Branch(x, scale, bias, mean.value), running, keep)

  def _keep(self, mean, var, shape, moments):
    """Moves the running statistics towards the `Moments` of a batch of this shape [N, H, W, C]."""
    images = self.group_size or shape[0] * jax.lax.axis_size(AXIS)
    count = images * shape[1] * shape[2]
    unbiased = moments.var * (count / max(count - 1, 1))
    for running, batch in ((mean, moments.mean), (var, unbiased)):
      batch = batch[0] if self.running_from == "first" else jnp.mean(batch, 0)
      running.value = BN_DECAY * running.value + (1 - BN_DECAY) * batch


class Branch(NamedTuple):
  """What is normalised, and by what: x [N, H, W, C], the others [C]; `centre`: any guess of the mean."""

  x: jax.Array
  scale: jax.Array
  bias: jax.Array
  centre: jax.Array

  def gradient(self, dx: jax.Array, mean_dy: jax.Array, mean_dy_unit: jax.Array) -> "Branch":
    """The `Branch` of gradients, from means over groups [G, C]."""
    count = self.x.size // self.x.shape[-1] // len(mean_dy)
    total = lambda mean: count * jnp.sum(mean, 0)
    return Branch(dx, total(mean_dy_unit), total(mean_dy), jnp.zeros_like(self.centre))


class Unfinished(NamedTuple):
  """A BatchNorm before it is known what else is added."""

  branch: Branch
  running: "Moments"
  keep: Callable[["Moments"], None]  # what becomes of the batch's Moments


class Moments(NamedTuple):
  """Of every channel, [G, C]."""

  mean: jax.Array
  var: jax.Array

  def unit(self, x: jax.Array) -> jax.Array:
    """x [N, H, W, C] minus its group's mean, over its standard deviation, at least float32."""
    return (x.astype(self.mean.dtype) - _spread(self.mean, x)) * _spread(self.inverse(), x)

  def inverse(self) -> jax.Array:
    """1 / standard deviation."""
    return jax.lax.rsqrt(self.var + BN_EPSILON)

  def affine(self, branch: "Branch") -> tuple[jax.Array, jax.Array]:
    """unit(x) scale + bias."""
    x, scale, bias, _ = branch
    return self.unit(x) * _spread(scale[None], x) + _spread(bias[None], x)


# Python traces it once for all layers of one shape; the program is the same.
_once_per_shape = functools.partial(jax.jit, static_argnums=0, inline=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def batch_norm(
  form: Form, branches: tuple[Branch, ...], shortcut: jax.Array | None = None
) -> tuple[jax.Array, tuple[Moments, ...]]:
  """One or two `Branch`es -> (y [N, H, W, C], the `Moments` of each over its groups, without gradient).

  y is the sum of unit(x) scale + bias over the branches (+ shortcut), cut at zero if form.relu, rounded once.
  """
  return _forward(form, branches, shortcut)[0]


@_once_per_shape
def _forward(form, branches, shortcut):
  moments = tuple(_moments(form, branch.x, branch.centre) for branch in branches)
  adds = len(branches) > 1 or shortcut is not None
  if adds:
    xs, shortcut = sums.apart(form, [branch.x for branch in branches], shortcut)
    branches = tuple(b._replace(x=x) for b, x in zip(branches, xs, strict=True))
  y = _result(branches, moments, shortcut, form.relu)
  has_shortcut = None if shortcut is None else ()
  return (y, moments), (branches, moments, y if adds else None, has_shortcut)


@_once_per_shape
def _backward(form, kept, gradients):
  branches, moments, y, has_shortcut = kept

  def at_units(branches, dy, y):
    """The gradient of the sum of unit(x) scale + bias."""
    above = moments[0].affine(branches[0]) if y is None else y
    return jnp.where(above > 0, dy, 0) if form.relu else dy

  made = sums.apart(form, branches, gradients[0], y)
  dy = at_units(*made)
  means = [_gradient_means(form, b.x, dy, m) for b, m in zip(made[0], moments, strict=True)]
  *arrays, means = sums.apart(form, *made, means)
  dy = at_units(*arrays)
  pulled = tuple(
    branch.gradient(_pull(branch, dy, *parts), *parts[1])
    for branch, *parts in zip(arrays[0], moments, means, strict=True)
  )
  return pulled, None if has_shortcut is None else dy


batch_norm.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def batch_norm_and_pool(form: Form, branch: Branch) -> tuple[jax.Array, tuple[Moments, ...]]:
  """`batch_norm` with ReLU, then layers.max_pool, for a GPU: y is never written.

  Of every window it keeps the largest pixel of x (where scale < 0, the smallest) and, as a uint8, which it was: the
  sums of the gradient then run over those alone.
  """
  return _pooled_forward(form, branch)[0]


@_once_per_shape
def _pooled_forward(form, branch):
  x = branch.x
  moments = _moments(form, x, branch.centre)
  falling = _spread((branch.scale < 0)[None], x)
  largest, place = layers.largest_pixel(jnp.where(falling, -x, x))
  largest = branch._replace(x=jnp.where(falling, -largest, largest))
  y = _result((largest,), (moments,), None, True)
  largest, place = sums.apart(form, largest, place)
  return (y, (moments,)), (branch, moments, largest, place)


@_once_per_shape
def _pooled_backward(form, kept, gradients):
  branch, moments, largest, place = kept
  largest, dy = sums.apart(form, largest, gradients[0])
  dy = jnp.where(moments.affine(largest) > 0, dy, 0)
  share = largest.x.size / branch.x.size  # all other pixels have no gradient
  means = [share * mean for mean in _gradient_means(form, largest.x, dy, moments)]
  branch, place, dy, means = sums.apart(form, branch, place, dy, means)
  cells = branch._replace(x=layers.to_cells(branch.x))
  dx = _pull(cells, layers.to_largest_pixel(place, dy), moments, means)
  return (branch.gradient(layers.from_cells(dx, *branch.x.shape[1:3]), *means),)


batch_norm_and_pool.defvjp(_pooled_forward, _pooled_backward)


def _result(branches, moments, shortcut, relu):
  y = sum(m.affine(branch) for branch, m in zip(branches, moments, strict=True))
  y = y if shortcut is None else y + shortcut.astype(y.dtype)
  return (nn.relu(y) if relu else y).astype(branches[0].x.dtype)


def _gradient_means(form, x, dy, moments):
  """Means over each group of dy, the gradient of unit(x) scale + bias, and of dy unit(x)."""
  wide = dy.astype(moments.mean.dtype)
  return sums.means(form, wide, wide * moments.unit(x))


def _pull(branch, dy, moments, means):
  """dx from dy."""
  x, scale = branch.x, branch.scale
  mean_dy, mean_dy_unit = (_spread(mean, x) for mean in means)
  rest = dy.astype(scale.dtype) - mean_dy - moments.unit(x) * mean_dy_unit
  return (_spread(moments.inverse() * scale[None], x) * rest).astype(x.dtype)


def _moments(form, x, centre):
  """`Moments` of each group of x.

  One pass where x is narrower than the sums, around `centre`: what cancels there is less than x was rounded by. Else
  a second pass for the variance, around the mean.
  """
  wide = x.astype(centre.dtype) - _spread(centre[None], x)
  mean, square = sums.means(form, wide, jnp.square(wide))
  if x.dtype == centre.dtype:
    apart = wide - _spread(mean, x)
    return Moments(mean + centre[None], sums.means(form, jnp.square(apart), apart)[0])
  return Moments(mean + centre[None], jnp.maximum(square - jnp.square(mean), 0))


def _spread(groups_GxC, x):
  """Every image's own row, to be broadcast over x's pixels: [N, 1, ..., 1, C]; one group's is every image's."""
  if len(groups_GxC) > 1:
    groups_GxC = jnp.repeat(groups_GxC, len(x) // len(groups_GxC), 0)
  return groups_GxC.reshape(len(groups_GxC), *(1,) * (x.ndim - 2), -1)
