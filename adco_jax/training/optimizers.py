"""How the encoder moves: torch's SGD, its rate and the key encoder's average over a run.

Flow: build makes `descend_transform` and the curves; train_step applies them.
Holds: no step counter and no learning rate is stored in an optimiser's state; both follow from the
  state's step. Weight decay is added before the momentum, on every parameter, as torch and the authors do.
Not here: which gradient goes where (train_step), how an adversary moves (objectives).
"""

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("cosine_epoch", "cosine_step", "steps", "constant")


def descend_transform(name, momentum, weight_decay):
  """v = momentum v + g + weight_decay p;  p -= learning_rate v. `update` takes learning_rate=."""
  transforms = {"sgd": lambda: optax.trace(momentum)}
  return optax.chain(optax.add_decayed_weights(weight_decay), transforms[name](), scale_by_rate())


def scale_by_rate():
  """-learning_rate * update, the rate given at every call."""

  def update(updates, state, params=None, *, learning_rate, **_):
    del params
    return jax.tree.map(lambda u: -learning_rate.astype(u.dtype) * u, updates), state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def make_rate(schedule, *, base, final, steps_per_epoch, epochs, warmup_epochs, step_epochs):
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


def make_ema_rate(decay, schedule, total_steps):
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
