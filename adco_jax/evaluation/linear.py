"""A Flax linear classifier on frozen features: by L-BFGS for small sets, by the authors' SGD for large.

Flow: features and labels -> `scale_of` -> `fit` -> `predict`; or batches of features of augmented images,
  which change every epoch, -> `fit_sgd`.
Shapes: features [N, F], labels [N], a probe's parameters {'kernel' [F, C], 'bias' [C]}.
Paper: lincls.py of the authors (SGD, rate 10, cosine per epoch, fc ~ N(0, .01)).
Holds: `fit` goes on until it is at the minimum of a convex loss, so it has no seed and no schedule: a number of steps
  that suffices for one encoder's features leaves another's half-way, and the two are not compared then.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adco_jax.runtime.dtypes import Tree

ITERATIONS = (
  1000  # of L-BFGS at most: 500 at a penalty of .001 on features of 10,000 photographs, 60 at 10
)
TOLERANCE = (
  1e-5  # of the gradient's norm over the number of images; accuracy stands still from 1e-4 on
)
PENALTY = 0.1  # on features of mean squared length 1; digits' pixels score the same from .01 to .3


class Probe(nn.Module):
  """One dense layer; its start matters to SGD only."""

  num_classes: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    init = nn.initializers.normal(0.01)
    return nn.Dense(self.num_classes, kernel_init=init, name="fc")(features)


class Scale(NamedTuple):
  """Features centred on `mean` [F] and divided by `length`: what a probe is fitted on.

  One length for all components: raw pixels lose four points when each is standardised by itself.
  """

  mean: np.ndarray
  length: np.ndarray

  def __call__(self, features: np.ndarray) -> np.ndarray:
    return (features - self.mean) / self.length

  def undo(self, params: Tree) -> dict[str, np.ndarray]:
    """A probe of scaled features as {'kernel', 'bias'} on features as they are."""
    kernel = np.asarray(params["fc"]["kernel"]) / self.length
    return {"kernel": kernel, "bias": np.asarray(params["fc"]["bias"]) - self.mean @ kernel}


def scale_of(features: np.ndarray) -> Scale:
  """The mean of features [N, F], and their root mean squared distance from it."""
  mean = features.mean(0)
  return Scale(mean, np.sqrt(np.square(features - mean).sum(-1).mean()) + 1e-12)


def fit(
  features: np.ndarray, labels: np.ndarray, num_classes: int, penalty: float = PENALTY
) -> Tree:
  """Multinomial logistic regression: sum of cross-entropies + penalty / 2 * |kernel|^2.

  With a leading axis on both arguments, [R, N, F] and [R, N], R fits are made at once.
  """
  solve = _fit_many if np.ndim(labels) == 2 else _fit_one
  return solve(jnp.asarray(features), jnp.asarray(labels), num_classes, penalty)


def predict(params: Tree, features: np.ndarray) -> np.ndarray:
  """Classes [N], or [R, N] for R probes."""
  logits = jnp.asarray(features) @ params["fc"]["kernel"] + params["fc"]["bias"][..., None, :]
  return np.asarray(logits.argmax(-1))


def choose_penalty(
  features: np.ndarray,
  labels: np.ndarray,
  held_out: np.ndarray,
  held_out_labels: np.ndarray,
  num_classes: int,
  penalties: Iterable[float],
) -> float:
  """The penalty with the best accuracy on held-out images; the largest wins a tie."""
  scores = {}
  for penalty in penalties:
    classes = predict(fit(features, labels, num_classes, penalty), held_out)
    scores[penalty] = float(np.mean(classes == held_out_labels))
  return max(scores, key=lambda penalty: (scores[penalty], penalty))


def fit_sgd(
  batches: Iterable[tuple[jax.Array | np.ndarray, np.ndarray]],
  start: jax.Array,
  size: int,
  num_classes: int,
  rate: Callable[[jax.Array], ArrayLike],
  momentum: float,
  weight_decay: float,
) -> dict[str, np.ndarray]:
  """The authors' recipe over (features [B, F], labels [B]) batches -> {'kernel', 'bias'}.

  `start`: JAX key of the first weights; `rate`: step -> learning rate.
  """
  probe = Probe(num_classes)
  optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(momentum))

  def loss(params, features, labels):
    logits = probe.apply({"params": params}, features)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  @jax.jit
  def update(params, state, step, features, labels):
    updates, state = optimizer.update(jax.grad(loss)(params, features, labels), state, params)
    return jax.tree.map(lambda p, u: p - rate(step) * u, params, updates), state

  params = probe.init(start, jnp.zeros((1, size)))["params"]
  state = optimizer.init(params)
  for step, (features, labels) in enumerate(batches):
    params, state = update(params, state, jnp.int32(step), features, labels)
  return jax.device_get(params["fc"])


@functools.partial(jax.jit, static_argnums=2)
def _fit_one(features, labels, num_classes, penalty):
  probe = Probe(num_classes)
  size = features.shape[-1]
  params = {"fc": {"kernel": jnp.zeros((size, num_classes)), "bias": jnp.zeros(num_classes)}}

  def loss(params):
    logits = probe.apply({"params": params}, features)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return each.sum() + penalty / 2 * jnp.sum(jnp.square(params["fc"]["kernel"]))

  optimizer = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  def unfinished(carry):
    _, state, count = carry
    slope = optax.tree.norm(optax.tree.get(state, "grad"))
    return (count < ITERATIONS) & ((count == 0) | (slope > TOLERANCE * len(labels)))

  def step(carry):
    params, state, count = carry
    value, gradient = value_and_grad(params, state=state)
    updates, state = optimizer.update(
      gradient, state, params, value=value, grad=gradient, value_fn=loss
    )
    return optax.apply_updates(params, updates), state, count + 1

  return jax.lax.while_loop(unfinished, step, (params, optimizer.init(params), 0))[0]


@functools.partial(jax.jit, static_argnums=2)
def _fit_many(features, labels, num_classes, penalty):
  return jax.vmap(lambda f, y: _fit_one(f, y, num_classes, penalty))(features, labels)
