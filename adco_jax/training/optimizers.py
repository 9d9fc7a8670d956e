"""How the encoder moves: SGD, LARS or AdamW, its rate and the key encoder's average over a run.

Flow: build makes the optimiser and the curves; train_step applies them.
Holds: no learning rate is stored in an optimiser's state: it follows from the state's step.
Not here: which gradient goes where (train_step), how an adversary moves (objectives).
"""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

# Names on the way to an array in {"encoder", "objective"} -> what its learning rate is multiplied with.
Multiplier = Callable[[tuple[str, ...]], float]

NAMES = ("sgd", "lars", "adamw")
SCHEDULES = ("cosine_epoch", "cosine_step", "steps", "constant")


def make_optimizer(
  name: str,
  momentum: float,
  weight_decay: float,
  *,
  no_decay: str = "",
  beta2: float = 0.999,
  trust: float = 0.001,
  multiplier: Multiplier | None = None,
) -> optax.GradientTransformationExtraArgs:
  """How the encoder moves; `update` takes learning_rate=. g: gradient, p: parameter, lr: learning rate, wd: weight decay.

  sgd: v = momentum v + g + wd p; p -= lr v (torch's, AdCo's and MoCo's).
  lars: v = momentum v + lr r (g + wd p); p -= v, with r = trust |p| / |g + wd p| of each array, 1 where either norm is 0
  (the classic order: SimCLR's lars_optimizer.py).
  adamw: p -= lr (m / (sqrt(s) + 1e-8) + wd p), m and s the unbiased averages of g and g^2 (torch's; momentum is beta1).
  multiplier: of each array's lr; 0 leaves it as it is. None: 1 everywhere.
  no_decay='vectors': arrays of one axis, biases and scales of norms, get no weight decay, and under lars r = 1.
  """
  mask = (lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)) if no_decay == "vectors" else None
  decay = optax.add_decayed_weights(weight_decay, mask)
  ratio = optax.scale_by_trust_ratio(trust_coefficient=trust)
  chains = {
    "sgd": lambda: (decay, optax.trace(momentum), scale_by_rate(multiplier)),
    "lars": lambda: (
      decay, optax.masked(ratio, mask) if mask else ratio, scale_by_rate(multiplier), optax.trace(momentum),
    ),
    "adamw": lambda: (optax.scale_by_adam(momentum, beta2), decay, scale_by_rate(multiplier)),
  }  # fmt: skip
  return optax.chain(*chains[name]())


def scale_by_rate(
  multiplier: Multiplier | None = None,
) -> optax.GradientTransformationExtraArgs:
  """-learning_rate * multiplier * update, the rate given at every call."""

  def update(updates, state, params=None, *, learning_rate, **_):
    del params
    moved = lambda u: -learning_rate.astype(u.dtype) * u
    if multiplier is None:
      return jax.tree.map(moved, updates), state
    times = lambda path, u: multiplier(tuple(str(getattr(x, "key", x)) for x in path)) * moved(u)
    return jax.tree_util.tree_map_with_path(times, updates), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def make_multiplier(head_rate: float, layer_decay: float, stages: int) -> Multiplier | None:
  """That of a ResNet of so many stages, None where all are 1.

  `head_rate`: of the objective's parameters. An array of the backbone has layer_decay ** (its distance from the head): 1 in
  the last stage, `stages` in the first, one more in the stem (BEiT's rule, with stages for layers). The projection has 1.
  """
  if head_rate == 1 and layer_decay == 1:
    return None

  def multiplier(path):
    if path[0] == "objective":
      return head_rate
    if path[1:2] != ("backbone",) or layer_decay == 1:
      return 1.0
    stage = re.match(r"layer(\d+)_", path[2])
    return layer_decay ** (stages + 1 - (int(stage[1]) if stage else 0))

  return multiplier


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

  cosine_epoch: the authors' curve, constant within an epoch: final + (base - final) (1 + cos(pi e / E)) / 2.
  cosine_step: the same per step. steps: a tenth at each of `step_epochs`. During initialisation: base.
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
      value = final + (base - final) * 0.5 * (1 + jnp.cos(jnp.pi * cosine[schedule] / epochs))
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
