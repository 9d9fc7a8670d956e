"""Step for step what the authors' program computes, played by PyTorch from the same checkpoint."""

import jax
import numpy as np
import pytest
import torch

from adco_jax import build
from adco_jax.errors import ConfigError
from adco_jax.interop import authors, torch_weights
from adco_jax.runtime import sharding
from adco_jax.tasks.replay import _batch, replay
from adco_jax.training.train_step import make_update
from tests import torch_reference as reference
from tests.settings import tiny_config, tiny_plan

pytestmark = pytest.mark.steps  # the slow ones' group

K, D, B, SIDE = 32, 16, 8, 32
VIEWS = {
  "single": (SIDE, SIDE), "symmetric": (SIDE, SIDE), "multicrop": (SIDE, SIDE, 24, 16),
  "multicrop_64": (64, 64, 48, 32),
}  # fmt: skip
SHUFFLED = {"single": 1, "symmetric": 2, "multicrop": 1, "multicrop_64": 1}
SMALL = ("single", "symmetric", "multicrop")


def make_model(arch="resnet8", width=8):
  torch.manual_seed(1)
  return reference.scramble(reference.AdCo(arch, width, D))


def content(model, bank, momentum, optimizer=None):
  """As the authors save it, behind DistributedDataParallel."""
  state = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
  saved = {"epoch": 3, "arch": "resnet8", "best_acc": 12.5, "state_dict": state}
  saved["Memory_Bank"] = {"W": bank.clone(), "v": momentum.clone()}
  return saved | ({"optimizer": optimizer.state_dict()} if optimizer else {})


def make_steps(mode, count, dtype=np.float64, shuffle=False):
  rng = np.random.RandomState(0)
  steps = []
  for _ in range(count):
    step = {"views": [rng.standard_normal((B, s, s, 3)).astype(dtype) for s in VIEWS[mode]]}
    if shuffle:
      step["key_orders"] = [rng.permutation(B) for _ in range(SHUFFLED[mode])]
    steps.append(step)
  return steps


def config_for(mode, groups, rate=0.03, bank_rate=3.0):
  return tiny_config(
    mode.removesuffix("_64"),
    bn__group_size=B // groups, optim__learning_rate=rate, method__bank__learning_rate=bank_rate,
  )  # fmt: skip


def played(mode, groups, steps, dtype, rate=0.03, bank_rate=3.0):
  """(what PyTorch had after each step, what replay returned)."""
  kind = {np.float64: torch.float64, np.float32: torch.float32}[dtype]
  model = make_model().to(kind)
  torch.manual_seed(2)
  bank, momentum = torch.randn(D, K, dtype=kind), 0.01 * torch.randn(D, K, dtype=kind)
  start = content(model, bank, momentum)
  probe = np.random.RandomState(9).standard_normal((4, SIDE, SIDE, 3)).astype(dtype)
  trainer = reference.Trainer(
    model,
    bank,
    momentum,
    mode=mode.removesuffix("_64"),
    groups=groups,
    rate=rate,
    bank_rate=bank_rate,
  )
  theirs = {"loss": [], "bank": [], "query_embedding": [], "key_embedding": []}
  for step in steps:
    orders = step.get("key_orders", [None] * SHUFFLED[mode])
    model.train()
    theirs["loss"].append(trainer.step(step["views"], orders))
    theirs["bank"].append(trainer.bank.numpy().T)
    model.eval()
    with torch.no_grad():
      x = reference.images([probe])[0]
      theirs["query_embedding"].append(model.encoder_q(x).numpy())
      theirs["key_embedding"].append(model.encoder_k(x).numpy())
  config = config_for(mode, groups, rate, bank_rate)
  ours = replay(start, steps, config=config, probe=probe, dtype=np.dtype(dtype).name)
  return {name: np.stack(values) for name, values in theirs.items()}, ours


def gap(theirs, ours):
  """Largest relative difference of a step: of every array, over its largest value."""
  gaps = [
    np.abs(ours[name] - value).reshape(len(value), -1).max(-1) / np.abs(value).max()
    for name, value in theirs.items()
  ]
  return np.max(gaps, 0)


def slow(*values):
  """Parameters of a test for the night."""
  return pytest.param(*values, marks=pytest.mark.slow)


NIGHT = [("single", 1), ("multicrop", 1), ("symmetric", 1), ("symmetric", 2), ("multicrop", 2)]


@pytest.mark.parametrize("mode, groups", [("single", 2), *(slow(*x) for x in NIGHT)])
def test_float64_replay(mode, groups):
  """Eight steps, keys shuffled over groups: losses, bank, both encoders and their statistics."""
  theirs, ours = played(mode, groups, make_steps(mode, 8, shuffle=groups > 1), np.float64)
  assert np.ptp(theirs["loss"]) > 0.1
  assert gap(theirs, ours).max() < 1e-9


@pytest.mark.slow
def test_float64_replay_as_compiled_in_training(optimised):
  """The authors' multi-crop at 64, 64, 48 and 32 pixels, fused as training is: every size another program."""
  theirs, ours = played("multicrop_64", 2, make_steps("multicrop_64", 8, shuffle=True), np.float64)
  assert np.ptp(theirs["loss"]) > 0.1
  assert gap(theirs, ours).max() < 1e-9


@pytest.mark.slow
def test_float32_replay_gains_nothing_over_rounding():
  """Until the third step, within five times torch's own float32-float64 difference or 1e-4."""
  exact, _ = played("single", 1, make_steps("single", 3), np.float64)
  theirs, ours = played("single", 1, make_steps("single", 3, np.float32), np.float32)
  own = np.maximum(5 * gap(exact, theirs), 1e-4)
  assert (gap(theirs, ours) < own).all()


def test_checkpoint_from_disk_goes_on(tmp_path):
  """A .pth.tar written by PyTorch after two steps, its momentum too: three further steps are torch's."""
  model = make_model().double()
  bank = torch.randn(D, K, dtype=torch.float64)
  trainer = reference.Trainer(
    model, bank, 0 * bank, mode="single", groups=1, rate=0.03, bank_rate=3.0
  )
  model.train()
  steps = make_steps("single", 5)
  for step in steps[:2]:
    trainer.step(step["views"], [None])
  path = tmp_path / "checkpoint_0001.pth.tar"
  torch.save(content(model, trainer.bank, trainer.momentum, trainer.sgd), path)
  losses = [trainer.step(step["views"], [None]) for step in steps[2:]]
  ours = replay(path, steps[2:], config=config_for("single", 1), dtype="float64")
  np.testing.assert_allclose(ours["loss"], losses, rtol=1e-9)
  np.testing.assert_allclose(ours["bank"][-1], trainer.bank.numpy().T, rtol=1e-7, atol=1e-9)
  forgetful = content(model, trainer.bank, trainer.momentum)
  assert authors.parse_checkpoint(forgetful).momentum == {}


@pytest.mark.parametrize("mode", [slow("single"), slow("symmetric"), slow("multicrop")])
def test_the_authors_initialisation(float64, mode):
  """`trained` with the authors' views: three filling steps, then the key encoder's reset."""
  config = config_for(mode, 2)
  for name, value in {"init": "trained", "init_views": "authors", "size": 2 * B + 3}.items():
    config.method.bank[name] = value
  config.compute_dtype, config.data.batch_size, config.bn.running_from = "float64", B, "first"
  config.model.update(arch="resnet8", width=0.125, stem="imagenet", dim=D)
  config.views.crops = tuple((side, 1.0, 1.0) for side in VIEWS[mode])
  plan = tiny_plan(config, num_examples=B)
  mesh = sharding.create_mesh(jax.devices()[:1])
  _, spec, create = build.create_setup(config, plan, mesh)
  model = make_model().double()
  bank = torch.randn(D, 2 * B + 3, dtype=torch.float64)
  held = authors.parse_checkpoint(content(model, bank, 0 * bank))
  state = jax.device_get(jax.jit(create)())
  state, _ = authors.put_into(state, held)

  filling = plan.phases[0]
  update = make_update(spec, filling)
  trainer = reference.Trainer(model, bank, 0 * bank, mode=mode, groups=2, rate=0.03, bank_rate=3.0)
  model.train()
  for i, step in enumerate(make_steps(mode, 3, shuffle=True)):
    loss = trainer.fill(step["views"], step["key_orders"], i * B)
    state, metrics = jax.jit(update)(state, _batch(step, filling.pairing, "float64"))
    assert metrics["train/query_loss"] == pytest.approx(loss, rel=1e-9)
  trainer.reset_key()
  np.testing.assert_allclose(
    state.objective.adversary["bank"], trainer.bank.numpy().T, rtol=1e-7, atol=1e-9
  )
  after = authors.parse_checkpoint(content(model, trainer.bank, 0 * bank))
  for player, params, stats in (
    ("query", "query_params", "query_stats"),
    ("key", "key_params", "key_stats"),
  ):
    variables = {"params": getattr(state, params), **getattr(state, stats)}
    for name, value in torch_weights.export_encoder(jax.device_get(variables), head=True).items():
      if not name.endswith("num_batches_tracked"):
        np.testing.assert_allclose(
          value, getattr(after, player)[name], rtol=1e-6, atol=1e-9, err_msg=name
        )


def test_without_a_bank_or_with_too_few_views():
  model = make_model()
  bare = {"state_dict": {f"encoder_q.{n}": v for n, v in model.encoder_q.state_dict().items()}}
  with pytest.raises(ConfigError, match="no Memory_Bank"):
    replay(bare, make_steps("single", 1), config=config_for("single", 1))
  start = content(model, torch.randn(D, K), torch.zeros(D, K))
  with pytest.raises(ConfigError, match="views.mode='multicrop'|exactly two"):
    replay(start, make_steps("multicrop", 1), config=config_for("single", 1))
  with pytest.raises(ConfigError, match="steps: there are none"):
    replay(start, [], config=config_for("single", 1))
