"""Many linear classifiers by SGD at once, on the same features: rates, forms of the features, crops.

Flow: batches of features of augmented images -> `fit` -> a probe per setting; the task scores them on held-out train images.
Shapes: features [V, B, F] of V kinds of crops, labels [B], weights [B] (0: not learnt from), S settings.
Paper: DINOv2's linear evaluation trains all its heads on shared features; SGD, momentum .9, cosine to 0, fc ~ N(0, .01).
Holds: a setting's probe is the one that it would be alone: sums of losses share nothing.
Not here: which setting is chosen (tasks.probes).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adco_jax.evaluation.linear import Scale

HEADS = ("plain", "scaled")  # features as they are; centred and of mean squared length 1


class Setting(NamedTuple):
  """What one of the classifiers is trained with; `crop`: which of the V kinds it sees."""

  rate: float
  head: str
  crop: int


def fit(
  batches: Iterable[tuple[jax.Array | np.ndarray, np.ndarray, np.ndarray]],
  start: jax.Array,
  num_classes: int,
  scale: Scale,
  settings: Sequence[Setting],
  *,
  steps: int,
  momentum: float,
  weight_decay: float,
) -> list[dict[str, np.ndarray]]:
  """A probe {'kernel' [F, C], 'bias' [C]} on features as they are for every setting.

  `start`: JAX key of the first weights, which all settings share; `steps`: batches of the cosine. The loss is the weighted
  mean of cross-entropies, without the images of weight 0.
  """
  rates, heads, crops = zip(*settings, strict=True)
  scaled = np.array([head == "scaled" for head in heads])
  shift = scaled[:, None] * scale.mean
  factor = np.where(scaled, 1 / scale.length, 1.0)
  which, rates_S = np.array(crops), np.array(rates, np.float32)
  optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(momentum))

  def loss(params, features, labels, weights):
    x = (features[which] - shift[:, None]) * factor[:, None, None]
    logits = jnp.einsum("sbf,sfc->sbc", x, params["kernel"]) + params["bias"][:, None]
    each = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.broadcast_to(labels, logits.shape[:2])
    )
    return jnp.sum(each * weights[None]) / jnp.maximum(weights.sum(), 1)

  @jax.jit
  def update(params, state, step, features, labels, weights):
    gradient = jax.grad(loss)(params, features, labels, weights)
    updates, state = optimizer.update(gradient, state, params)
    rate = rates_S * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
    move = lambda p, u: p - rate.reshape(-1, *[1] * (p.ndim - 1)) * u
    return jax.tree.map(move, params, updates), state

  one = 0.01 * jax.random.normal(start, (len(scale.mean), num_classes))
  params = {
    "kernel": jnp.broadcast_to(one, (len(settings), *one.shape)),
    "bias": jnp.zeros((len(settings), num_classes)),
  }
  state = optimizer.init(params)
  for step, (features, labels, weights) in enumerate(batches):
    params, state = update(
      params, state, jnp.float32(step), features, labels, jnp.asarray(weights, jnp.float32)
    )
  kernels, biases = (np.asarray(params[name]) for name in ("kernel", "bias"))
  return [_undone(*each) for each in zip(kernels, biases, shift, factor, strict=True)]


def _undone(kernel, bias, shift, factor):
  """On features as they are."""
  kernel = kernel * factor
  return {"kernel": kernel, "bias": bias - shift @ kernel}
