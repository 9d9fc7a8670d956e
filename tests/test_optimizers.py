"""SGD as torch computes it, the bank's ascent, and the curves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from adco_jax.objectives.adco import ascend_transform
from adco_jax.training import optimizers


def torch_sgd(weights, gradients, rates, momentum, decay, maximize=False):
  """torch.optim.SGD without nesterov or dampening, in NumPy."""
  buffer = 0.0
  for gradient, rate in zip(gradients, rates, strict=True):
    gradient = (-gradient if maximize else gradient) + decay * weights
    buffer = momentum * buffer + gradient
    weights = weights - rate * buffer
  return weights


def test_descent_is_torch_sgd(float64):
  """With a rate that changes: it stays outside the momentum buffer."""
  rng = np.random.RandomState(0)
  weights, gradients = rng.standard_normal(5), rng.standard_normal((20, 5))
  rates = np.linspace(0.3, 0.01, 20)
  transform = optimizers.make_optimizer("sgd", 0.9, 1e-2)
  found = jnp.asarray(weights)
  state = transform.init(found)
  for gradient, rate in zip(gradients, rates, strict=True):
    updates, state = transform.update(
      jnp.asarray(gradient), state, found, learning_rate=jnp.asarray(rate)
    )
    found = optax.apply_updates(found, updates)
  assert np.abs(found - torch_sgd(weights, gradients, rates, 0.9, 1e-2)).max() < 1e-13
  assert all(x.shape == (5,) for x in jax.tree.leaves(state))  # a trace, no counter, no rate


def lars(weights, gradients, rates, momentum, decay, trust, adapt):
  """SimCLR's LARS in NumPy: the rate inside of the momentum."""
  buffer = np.zeros_like(weights)
  for gradient, rate in zip(gradients, rates, strict=True):
    gradient = gradient + (decay * weights if adapt else 0)
    norms = np.linalg.norm(weights), np.linalg.norm(gradient)
    ratio = trust * norms[0] / norms[1] if adapt and all(norms) else 1.0
    buffer = momentum * buffer + rate * ratio * gradient
    weights = weights - buffer
  return weights


def moved(name, tree, gradients, rates, momentum, decay, **more):
  """The tree after as many steps as there are rates; gradients: {name: [steps, ...]}."""
  transform = optimizers.make_optimizer(name, momentum, decay, **more)
  found = jax.tree.map(jnp.asarray, tree)
  state = transform.init(found)
  step = jax.jit(lambda g, state, p, rate: transform.update(g, state, p, learning_rate=rate))
  for i, rate in enumerate(rates):
    updates, state = step({n: g[i] for n, g in gradients.items()}, state, found, jnp.asarray(rate))
    found = optax.apply_updates(found, updates)
  return jax.device_get(found)


def drawn(seed):
  """({kernel, bias}, their gradients of 20 steps, 20 rates), float64."""
  rng = np.random.RandomState(seed)
  tree = {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}
  gradients = {name: rng.standard_normal((20, *value.shape)) for name, value in tree.items()}
  return tree, gradients, np.linspace(0.3, 0.01, 20)


@pytest.mark.parametrize("no_decay", ["", "vectors"])
def test_lars_is_simclr_s(float64, no_decay):
  tree, gradients, rates = drawn(3)
  found = moved("lars", tree, gradients, rates, 0.9, 1e-2, no_decay=no_decay, trust=0.02)
  for name, start in tree.items():
    adapt = name == "kernel" or not no_decay
    wanted = lars(start, gradients[name], rates, 0.9, 1e-2, 0.02, adapt)
    assert np.abs(found[name] - wanted).max() < 1e-13
  assert np.abs(found["kernel"] - tree["kernel"]).max() > 1e-2


def test_lars_moves_what_is_zero(float64):
  """A scale that begins at zero has no length to step by: it takes the plain step."""
  _, gradients, rates = drawn(4)
  zero = {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}
  found = moved("lars", zero, gradients, rates[:1], 0.9, 1e-2)
  for name, gradient in gradients.items():
    assert np.abs(found[name] + rates[0] * gradient[0]).max() < 1e-15


@pytest.mark.parametrize("no_decay", ["", "vectors"])
def test_adamw_is_torch_s(float64, no_decay):
  tree, gradients, rates = drawn(5)
  rates = rates / 10
  found = moved("adamw", tree, gradients, rates, 0.9, 0.1, no_decay=no_decay, beta2=0.99)
  for name, start in tree.items():
    decay = 0.0 if no_decay and name == "bias" else 0.1
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], betas=(0.9, 0.99), weight_decay=decay)
    for gradient, rate in zip(gradients[name], rates, strict=True):
      theirs.grad = torch.tensor(gradient)
      optimizer.param_groups[0]["lr"] = rate
      optimizer.step()
    assert np.abs(found[name] - theirs.detach().numpy()).max() < 1e-13


def test_ascent_is_the_authors_bank_step(float64):
  """v = .9 v - dL + wd w; w -= lr v: climbs, and weight decay still shrinks."""
  rng = np.random.RandomState(1)
  bank, gradients = rng.standard_normal((4, 3)), rng.standard_normal((20, 4, 3))
  transform = ascend_transform(3.0, 0.9, 1e-4)
  found = jnp.asarray(bank)
  state = transform.init(found)
  for gradient in gradients:
    updates, state = transform.update(jnp.asarray(gradient), state, found)
    found = optax.apply_updates(found, updates)
  assert (
    np.abs(found - torch_sgd(bank, gradients, [3.0] * 20, 0.9, 1e-4, maximize=True)).max() < 1e-12
  )
  shrunk, _ = transform.update(
    jnp.zeros((4, 3)), transform.init(jnp.asarray(bank)), jnp.asarray(bank)
  )
  assert (np.sign(shrunk) == -np.sign(bank)).all()


def climb(bank, gradient_of, decay, steps, rate=3.0, momentum=0.9):
  """The bank after `steps` of ascent along gradient_of(bank)."""
  transform = ascend_transform(rate, momentum, decay)
  bank = jnp.asarray(bank)
  state = transform.init(bank)

  def step(carry, _):
    bank, state = carry
    updates, state = transform.update(gradient_of(bank), state, bank)
    return (optax.apply_updates(bank, updates), state), None

  (bank, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))((bank, state))
  return np.asarray(bank)


def test_decay_halves_a_row_that_is_not_pulled_in_224_steps(float64):
  """By about rate * decay / (1 - momentum) = .3% per step; counted after the momentum has filled."""
  bank = np.random.RandomState(2).standard_normal((4, 3))
  early, late = (climb(bank, jnp.zeros_like, 1e-4, n) for n in (200, 424))
  np.testing.assert_allclose(late / early, 0.5, rtol=2e-3)


def test_decay_sets_the_speed_of_a_row(float64):
  """A pull across the row, over its length: alone it only lengthens; more decay means a shorter row."""

  def across(bank):
    turned = jnp.stack([-bank[:, 1], bank[:, 0]], 1)
    return 0.01 * turned / jnp.sum(jnp.square(bank), 1, keepdims=True)

  start = np.array([[1.0, 0.0]])
  lengths = {
    decay: np.linalg.norm(climb(start, across, decay, 3000, rate=1.0, momentum=0.0))
    for decay in (0.0, 1e-4, 1e-3)
  }
  assert lengths[0.0] > 1 and lengths[0.0] > lengths[1e-4] > lengths[1e-3]
  # Balance: a step of d = .01 / r across adds d^2 / 2r, decay takes decay * r: r^4 = .01^2 / (2 decay).
  assert lengths[1e-3] == pytest.approx((1e-4 / 2e-3) ** 0.25, rel=0.02)


def rate(schedule, **changes):
  setting = dict(
    base=0.03, final=0.0006, steps_per_epoch=10, epochs=200, warmup_epochs=0, step_epochs=(120, 160)
  )
  curve = optimizers.make_rate(schedule, **(setting | changes))
  return lambda step: float(curve(jnp.int32(step)))


def test_cosine_per_epoch_is_the_authors():
  curve = rate("cosine_epoch")
  assert curve(0) == pytest.approx(0.03) and curve(9) == curve(0) and curve(10) < curve(9)
  assert curve(1000) == pytest.approx((0.03 + 0.0006) / 2)
  assert curve(1999) == pytest.approx(0.000602, abs=5e-7)  # algorithm of the last of 200 epochs
  assert curve(-3) == pytest.approx(0.03)  # bank initialisation


def test_other_schedules():
  per_step = rate("cosine_step")
  assert per_step(9) < per_step(0) and per_step(2000) == pytest.approx(0.0006)
  steps = rate("steps")
  assert [round(steps(e * 10), 8) for e in (119, 120, 159, 160)] == [0.03, 0.003, 0.003, 0.0003]
  assert rate("constant")(1999) == pytest.approx(0.03)


def test_warmup_is_linear_per_step():
  curve = rate("constant", warmup_epochs=2)
  assert [curve(s) for s in (0, 9, 19, 20)] == pytest.approx([0.0015, 0.015, 0.03, 0.03])


@pytest.mark.parametrize("schedule", ["cosine_step", "cosine_epoch"])
def test_a_cosine_begins_where_the_warmup_ends(schedule):
  """0.5 (1 + cos(pi (e - W) / (E - W))) of moco-v3's adjust_learning_rate."""
  curve = rate(schedule, warmup_epochs=20, final=0.0)
  assert [curve(s) for s in (99, 199, 200)] == pytest.approx([0.015, 0.03, 0.03])
  assert curve(1100) == pytest.approx(0.015) and curve(650) == pytest.approx(
    0.03 * (2 + 2**0.5) / 4
  )
  assert curve(5000) == 0
  assert rate(schedule, warmup_epochs=300)(1000) == pytest.approx(0.03 * 1001 / 3000)


def test_ema_rate():
  constant = optimizers.make_ema_rate(0.999, "constant", 100)(jnp.int32(50))
  assert constant == np.float32(0.001)  # not 1 - float32(.999), which is 1.3e-5 off
  cosine = optimizers.make_ema_rate(0.99, "cosine", 100)
  assert [float(cosine(jnp.int32(s))) for s in (0, 50, 100)] == pytest.approx(
    [0.01, 0.005, 0.0], abs=1e-9
  )
  assert float(cosine(jnp.int32(-5))) == pytest.approx(0.01)
