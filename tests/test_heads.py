"""Projections of all forms against torch's Sequential: forward, running statistics, gradients; and their way out and back."""

import jax
import numpy as np
import pytest
import torch
from torch import nn

from adco_jax.interop import torch_weights
from adco_jax.models.heads import NORMS, Encoder, Head, Projection
from adco_jax.training.train_step import make_update
from tests import settings

N, F, D = 12, 6, 4
HEADS = [Head(1, 0, "none"), Head(1, 0, "all"), Head(1, 0, "all_plain"), Head(2, 0, "none"), Head(3, 0, "hidden")]  # fmt: skip
HEADS += [Head(layers, 5, norm) for layers in (2, 3) for norm in NORMS]


def sequential(head):
  """The same head of torch's modules, float64."""
  widths = [F, *[head.width or F] * (head.layers - 1), D]
  modules = []
  for layer in range(1, head.layers + 1):
    last = layer == head.layers
    normed = head.norm.startswith("all") or (head.norm == "hidden" and not last)
    modules.append(nn.Linear(*widths[layer - 1 : layer + 1], bias=not normed))
    if normed:
      modules.append(nn.BatchNorm1d(widths[layer], affine=head.norm != "all_plain" or not last))
    if not last:
      modules.append(nn.ReLU())
  return nn.Sequential(*modules).double()


def drawn(module, x):
  """Variables in which nothing is 0 or 1 by chance."""
  rng = np.random.RandomState(1)
  variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, False))
  return jax.tree.map(lambda v: rng.uniform(0.2, 1.2, v.shape).astype(v.dtype), variables)


def state_of(variables):
  """What torch's head loads, by names."""
  whole = {"params": {"head": variables["params"]}, "batch_stats": {"head": variables.get("batch_stats", {})}}  # fmt: skip
  state = torch_weights.export_encoder(whole, head=True)
  return {name.removeprefix("fc."): torch.tensor(value) for name, value in state.items()}


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_a_projection_is_torch_s(float64, head):
  """Loaded strictly; a batch in training, then its running statistics in evaluation; every gradient."""
  rng = np.random.RandomState(0)
  x, weights = rng.standard_normal((N, F)), rng.standard_normal((N, D))
  module = Projection(D, head, group_size=N, dtype=np.dtype(np.float64))
  variables, there = drawn(module, x), sequential(head)
  there.load_state_dict(state_of(variables), strict=True)
  stats = variables.get("batch_stats", {})

  def loss(params, x):
    given = {"params": params, "batch_stats": stats}
    z, changed = module.apply(given, x, True, mutable=["batch_stats"])
    return (z * weights).sum(), (z, changed.get("batch_stats", {}))

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (_, (z, after)), (gradients, dx) = run(variables["params"], x)
  given = torch.tensor(x, requires_grad=True)
  wanted = there(given)
  (wanted * torch.tensor(weights)).sum().backward()
  assert np.abs(z - wanted.detach().numpy()).max() < 1e-12
  assert np.abs(dx - given.grad.numpy()).max() < 1e-11
  ours = state_of({"params": gradients})
  theirs = {name: p.grad for name, p in there.named_parameters()}
  assert ours.keys() == theirs.keys() and ours
  assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-11
  found = module.apply({"params": variables["params"], "batch_stats": after}, x, False)
  assert np.abs(found - there.eval()(given).detach().numpy()).max() < 1e-12


@pytest.mark.parametrize("head", [Head(), Head(3, 5, "hidden"), Head(2, 0, "all_plain"), Head(1)], ids=str)  # fmt: skip
def test_an_exported_head_comes_back(head):
  encoder = Encoder(settings.TINY, 0.125, "small", 8, 4, projection=head)
  variables = drawn(encoder, np.zeros((4, 8, 8, 3)))
  state = torch_weights.export_encoder(variables, head=True)
  blank = jax.tree.map(np.zeros_like, variables)
  back, report = torch_weights.import_encoder(state, blank)
  assert settings.difference(back, variables) == 0
  assert not report["missing"] and not report["unexpected"]
  if head != Head(1):  # a head of other layers is left as it was, and told
    other = encoder.clone(projection=Head(1))
    blank = drawn(other, np.zeros((4, 8, 8, 3)))
    back, report = torch_weights.import_encoder(state, blank)
    assert settings.difference(back["params"]["head"], blank["params"]["head"]) == 0
    assert (
      report["missing"] == ["fc.0.weight", "fc.0.bias"] and "fc.0.weight" in report["unexpected"]
    )


@pytest.mark.parametrize("group", [2, 0])
@pytest.mark.parametrize("norm", NORMS)
def test_the_step_takes_every_head(norm, group):
  """Traced, not compiled: what differs by device has to be known as such, a norm's missing scale too."""
  config = settings.tiny_config(
    "symmetric",
    objective="byol",
    model__head__norm=norm,
    bn__group_size=group,
    method__predictor_width=8,
  )
  players, plan, state = settings.describe_players(config, 2)
  pairing = plan.train_pairing
  batch = settings.shuffled(settings.random_batch(plan, pairing, 0), pairing, 0)
  update = make_update(players, plan.phases[-1])
  after, _ = jax.eval_shape(update, state, batch.put(players.mesh))
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
