"""How the encoder moves: SGD, LARS or AdamW, clipping, its rate, weight decay and the key encoder's average over a run.

Flow: build makes the optimiser, the clipping and the curves; train_step applies them.
Holds: no learning rate, decay or count is stored in an optimiser's state: rate and decay follow from the state's step.
Not here: which gradient goes where (train_step), how an adversary moves (objectives), which layer an array is of (models).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from adco_jax.errors import require
from adco_jax.runtime.dtypes import Tree

Path = tuple[str, ...]  # names on the way to an array in {"encoder", "objective"}
Multiplier = Callable[[Path], float]  # -> what its learning rate is multiplied with
Frozen = Callable[[Path], bool]  # -> whether it keeps its value
# (gradients, whether the objective's parameters train) -> (what the optimiser gets, metrics)
Clip = Callable[[Tree, bool | jax.Array], tuple[Tree, dict[str, jax.Array]]]

NAMES = ("sgd", "lars", "adamw")
SCHEDULES = ("cosine_epoch", "cosine_step", "steps", "constant")
FREEZES = ("patch_embed",)
TOKENS = ("cls_token", "pos_embed", "reg_token")  # of a ViT: no weight decay, as in timm
CONSTANT = -1.0  # in the place of a weight decay's last value: it has no curve


def make_optimizer(
  name: str,
  momentum: float,
  weight_decay: float,
  *,
  no_decay: str = "",
  beta2: float = 0.999,
  trust: float = 0.001,
  multiplier: Multiplier | None = None,
  frozen: Frozen | None = None,
  apart: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """How the encoder moves; `update` takes learning_rate= and, where it is not `weight_decay`, weight_decay=.

  g: gradient, p: parameter, lr: learning rate, wd: weight decay.
  sgd: v = momentum v + g + wd p; p -= lr v (torch's, AdCo's and MoCo's).
  lars: v = momentum v + lr r (g + wd p); p -= v, with r = trust |p| / |g + wd p| of each array, 1 where either norm is 0
  (the classic order: SimCLR's lars_optimizer.py).
  adamw: p -= lr (m / (sqrt(s) + 1e-8) + wd p), m and s the unbiased averages of g and g^2 (torch's; momentum is beta1).
  multiplier: of each array's lr; 0 leaves it as it is. None: 1 everywhere.
  no_decay='vectors': arrays of one axis, biases and scales of norms, get no weight decay, nor do a ViT's cls_token, pos_embed
  and reg_token, which are known by name; under lars r = 1 for all of these.
  frozen: arrays that keep their value to the bit and have no momentum. None: there are none.
  apart: the objective's parameters are held at times, so that AdamW counts the updates of encoder and objective apart.
  """
  masked = lambda inner: optax.masked(inner, decays) if no_decay == "vectors" else inner
  decay = masked(add_decay(weight_decay))
  ratio = masked(optax.scale_by_trust_ratio(trust_coefficient=trust))
  adam = optax.scale_by_adam(momentum, beta2)
  chains = {
    "sgd": lambda: (decay, optax.trace(momentum), scale_by_rate(multiplier)),
    "lars": lambda: (decay, ratio, scale_by_rate(multiplier), optax.trace(momentum)),
    "adamw": lambda: (each_apart(adam) if apart else adam, decay, scale_by_rate(multiplier)),
  }
  chain = optax.chain(*chains[name]())
  return hold(chain, frozen) if frozen else chain


def each_apart(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner` of encoder and objective, each with a state of its own: a part that is held does not count on."""

  def update(updates, state, params=None):
    del params
    pairs = {part: inner.update(x, state[part]) for part, x in updates.items()}
    updates, states = ({part: pair[i] for part, pair in pairs.items()} for i in range(2))
    return updates, states

  start = lambda params: {part: inner.init(x) for part, x in params.items()}
  return optax.GradientTransformation(start, update)


def decays(tree: Tree) -> Tree:
  """Whether each array has weight decay where `no_decay` is 'vectors'."""
  return _map(lambda path, x: x.ndim > 1 and path[-1:] not in [(t,) for t in TOKENS], tree)


def add_decay(base: float) -> optax.GradientTransformationExtraArgs:
  """update + weight_decay * parameter, the decay given at every call or else `base`."""

  def update(updates, state, params, *, weight_decay=None, **_):
    if weight_decay is None and base == 0:
      return updates, state
    add = lambda u, p: u + (base if weight_decay is None else weight_decay.astype(p.dtype)) * p
    return jax.tree.map(add, updates, params), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def hold(
  inner: optax.GradientTransformationExtraArgs, frozen: Frozen
) -> optax.GradientTransformationExtraArgs:
  """`inner`, for which frozen arrays are zeros that nothing pulls; their own update is -0, which leaves every bit."""

  def update(updates, state, params, **given):
    blank = functools.partial(_blank, frozen)
    updates, state = inner.update(blank(updates), state, blank(params), **given)
    return _map(lambda path, u: jnp.full_like(u, -0.0) if frozen(path) else u, updates), state

  return optax.GradientTransformationExtraArgs(inner.init, update)


def make_clip(clip_norm: float, frozen: Frozen | None = None) -> Clip | None:
  """Clipping by the norm of all that descends: g min(1, clip_norm / (|g| + 1e-6)), as torch's clip_grad_norm_; 0: None.

  |g| is the length of all gradients as one vector, those of the encoder and of the objective's parameters together, without
  `frozen` arrays and without the objective's where they do not train. Metrics: optim/gradient_norm, which is |g|, and
  optim/clipped, 1. where that was too long and 0. elsewhere.
  """
  if not clip_norm:
    return None

  def clip(gradients, trains):
    gradients = _blank(frozen, gradients) if frozen else gradients
    if trains is not True:
      own = jax.tree.map(lambda g: jnp.where(trains, g, 0), gradients["objective"])
      gradients = gradients | {"objective": own}
    norm = optax.tree.norm(gradients)
    share = jnp.minimum(1, clip_norm / (norm + 1e-6))
    metrics = {"optim/gradient_norm": norm, "optim/clipped": (share < 1).astype(norm.dtype)}
    return jax.tree.map(lambda g: g * share.astype(g.dtype), gradients), metrics

  return clip


def scale_by_rate(
  multiplier: Multiplier | None = None,
) -> optax.GradientTransformationExtraArgs:
  """-learning_rate * multiplier * update, the rate given at every call."""

  def update(updates, state, params=None, *, learning_rate, **_):
    del params
    moved = lambda u: -learning_rate.astype(u.dtype) * u
    if multiplier is None:
      return jax.tree.map(moved, updates), state
    return _map(lambda path, u: multiplier(path) * moved(u), updates), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def make_multiplier(
  head_rate: float,
  layer_decay: float,
  layer_of: Callable[[Path], int] | None = None,
  layers: int = 0,
) -> Multiplier | None:
  """Rates of a backbone of so many layers and of the objective, None where all are 1.

  `head_rate`: of the objective's parameters. `layer_of(path)`, path below the backbone: 0 of the embeddings or the stem,
  1..`layers`, `layers` + 1 of what follows them; an array's rate is layer_decay ** (layers + 1 - its layer) (BEiT's rule). The
  projection has 1. Raises ConfigError for another layer, when the multiplier is asked.
  """
  if head_rate == 1 and layer_decay == 1:
    return None

  def multiplier(path):
    if path[0] == "objective":
      return head_rate
    if path[1:2] != ("backbone",) or layer_decay == 1 or layer_of is None:
      return 1.0
    layer = layer_of(path[2:])
    remedy = f"layer_of gives {layer} for {'.'.join(path[2:])}, give 0 to {layers + 1}"
    require(layer in range(layers + 2), "optim.layer_decay", layer_decay, remedy)
    return layer_decay ** (layers + 1 - layer)

  return multiplier


def frozen_by(part: str) -> Frozen | None:
  """Arrays of one part of the backbone; '': None."""
  return (lambda path: path[:3] == ("encoder", "backbone", part)) if part else None


def _map(function, tree):
  """function(names on the way to it, array) of every array."""
  names = lambda path: tuple(str(getattr(x, "key", x)) for x in path)
  return jax.tree_util.tree_map_with_path(lambda path, x: function(names(path), x), tree)


def _blank(frozen, tree):
  return _map(lambda path, x: jnp.zeros_like(x) if frozen(path) else x, tree)


def make_decay(
  base: float, final: float, total_steps: int
) -> Callable[[jax.Array], jax.Array] | None:
  """step (counted after the bank's initialisation) -> weight decay: final + (base - final) (1 + cos(pi step / total)) / 2.

  DINO's curve, per step; during initialisation: base. `final` CONSTANT: None, no curve.
  """
  if final == CONSTANT:
    return None

  def decay(step):
    dtype = jnp.result_type(float)
    share = jnp.clip(step.astype(dtype) / max(1, total_steps), 0, 1)
    return final + (base - final) * 0.5 * (1 + jnp.cos(jnp.pi * share))

  return decay


def make_rate(
  schedule: str,
  *,
  base: float,
  final: float,
  steps_per_epoch: int,
  epochs: float,
  warmup_epochs: float,
  step_epochs: Sequence[float],
) -> Callable[[jax.Array], jax.Array]:
  """step (traced, counted after the bank's initialisation; negative during it) -> learning rate.

  cosine_epoch: the authors' curve, constant within an epoch: final + (base - final) (1 + cos(pi e / E)) / 2; behind a warm-up of
  W epochs e and E are counted from its end (MoCo v3, SimCLR, BYOL, SwAV, CaCo). cosine_step: the same per step. steps: a tenth
  at each of `step_epochs`. Warm-up: linear per step, to base. During initialisation: base.
  """

  def rate(step):
    dtype = jnp.result_type(float)
    counted = jnp.maximum(step, 0)
    done, epoch = (
      counted.astype(dtype) / steps_per_epoch,
      (counted // steps_per_epoch).astype(dtype),
    )
    cosine = {"cosine_epoch": epoch, "cosine_step": done}
    if schedule in cosine:
      left = max(epochs - warmup_epochs, 1 / steps_per_epoch)
      share = jnp.clip((cosine[schedule] - warmup_epochs) / left, 0, 1)
      value = final + (base - final) * 0.5 * (1 + jnp.cos(jnp.pi * share))
    elif schedule == "steps":
      value = base * 0.1 ** jnp.sum(epoch >= jnp.array(step_epochs, dtype)).astype(dtype)
    else:
      value = jnp.full((), base, dtype)
    warmed = jnp.minimum(1.0, (step + 1).astype(dtype) / max(1.0, warmup_epochs * steps_per_epoch))
    return jnp.where(step < 0, base, value * warmed).astype(dtype)

  return rate


def make_ema_rate(
  decay: float, schedule: str, total_steps: int
) -> Callable[[jax.Array], jax.Array]:
  """step (counted after the bank's initialisation) -> 1 - decay of the key encoder.

  The complement is computed, not subtracted: 1 - float32(0.999) would be off by 1e-5 of itself.
  cosine: the decay grows from `decay` to 1 over the run (BYOL, CaCo).
  """

  def ema_rate(step):
    dtype = jnp.result_type(float)
    if schedule == "constant":
      return jnp.full((), 1 - decay, dtype)
    share = jnp.clip(step.astype(dtype) / max(1, total_steps), 0, 1)
    return (1 - decay) * 0.5 * (1 + jnp.cos(jnp.pi * share))

  return ema_rate
