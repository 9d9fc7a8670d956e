"""Vision Transformers: the module's laws, the step with one, and what is refused. (Weights of others: test_vit_weights.)"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from adco_jax import main
from adco_jax.models import attention, positions, vit
from adco_jax.runtime import sharding
from adco_jax.training import train_step
from adco_jax.training.microbatch import image_keys
from tests import settings
from tests.test_every_objective import BASE, TWO
from tests.test_train_step import run, slow

pytestmark = pytest.mark.steps  # the slow ones' group

FORM = vit.Form(patch=4, grid=2, depth=2, registers=1, layer_scale=0.5)
VIT = dict(
  model__arch="vit_tiny", model__width=1 / 6, model__vit__patch=4, model__vit__depth=2, model__vit__registers=1,
  model__vit__layer_scale=0.5, model__vit__drop_path=0.5, bn__group_size=0,
)  # fmt: skip
SIZES = ((8, 0.4, 1.0), (8, 0.4, 1.0), (12, 0.2, 0.5))  # positions are resampled for the last


def create(form=FORM, dtype=jnp.float32, size=8, seed=0):
  """(module, parameters drawn wide: tiny starts hide what is wrong)."""
  module = vit.ViT("vit_tiny", 1 / 6, form, dtype)
  params = module.init(jax.random.key(seed), jnp.zeros((1, size, size, 3), dtype))["params"]
  rng = np.random.RandomState(seed)
  return module, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), params)


def images(count, size, dtype=np.float32, seed=1):
  return jnp.asarray(np.random.RandomState(seed).standard_normal((count, size, size, 3)), dtype)


@pytest.mark.parametrize(
  "objective, mode, sizes",
  [
    ("adco", "symmetric_multicrop", SIZES),
    slow("mocov3", "symmetric", SIZES[:2]),
    slow("simclr", "symmetric", SIZES[:2]),
    slow("adco", "single", SIZES[:2]),
  ],
)
def test_one_equals_eight_devices(float64, objective, mode, sizes):
  """3 steps, images whose branches are left out by lot: which ones does not depend on the devices."""
  given = VIT | dict(objective=objective, compute_dtype="float64", views__crops=sizes)
  given |= dict(method__bank__init="random") if objective == "adco" else {}
  given |= (
    dict(method__predictor_width=8, model__head__norm="hidden") if objective == "mocov3" else {}
  )
  config = settings.tiny_config(mode, **given)
  shuffle = objective != "simclr"  # which has no keys
  one, metrics_one = run(config, 1, 3, np.float64, shuffle)
  eight, metrics_eight = run(config, 8, 3, np.float64, shuffle)
  assert settings.difference(one, eight) < 1e-9
  assert settings.difference(metrics_one, metrics_eight) < 1e-9
  without = settings.tiny_config(mode, **given | {"model__vit__drop_path": 0.0})
  still, _ = run(without, 1, 3, np.float64, shuffle)
  assert settings.difference(one, still) > 1e-3


@pytest.mark.parametrize("unrolled", [True, slow(False)])
def test_parts_give_the_whole_batch_s_step(float64, unrolled, monkeypatch):
  """2 parts on 2 devices: both passes leave out the same branches; no BatchNorm asks for groups."""
  monkeypatch.setattr(train_step, "_unrolled", lambda _: unrolled)
  given = VIT | dict(compute_dtype="float64", method__bank__init="random")
  whole, metrics = run(settings.tiny_config(**given), 2, 2, np.float64)
  parts, found = run(settings.tiny_config(accumulate=2, **given), 2, 2, np.float64)
  assert settings.difference(whole, parts) < 1e-11
  assert settings.difference(metrics, found) < 1e-11


def test_only_queries_draw():
  """One encoder call per view and role; those of keys get no noise, and no two views the same."""
  players, plan, state = settings.create_players(settings.tiny_config("symmetric", **VIT))
  seen = []

  def embed(params, stats, x, noise=None):
    seen.append(noise)
    return players.embed(params, stats, x, noise=noise)

  update = train_step.make_update(players._replace(embed=embed), plan.phases[-1])
  batch = settings.random_batch(plan, plan.train_pairing, 0)
  jax.eval_shape(update, state, batch)
  assert [noise is not None for noise in seen] == [False, False, True, True]


def test_no_two_images_share_a_draw():
  """2 views of 4 slots on 2 devices, in 2 parts: sixteen keys, each once, and those of a slot wherever it lies."""

  def keys(devices, parts):
    mesh = sharding.create_mesh(jax.devices()[:devices])
    views = [jnp.zeros((8 // devices // parts, 1))] * 2
    rng = jax.random.key(0)
    of = lambda: [image_keys(rng, views, part, parts) for part in range(parts)]
    data = lambda: jax.tree.map(lambda k: jax.random.key_data(k)[None], of())
    made = jax.jit(jax.shard_map(data, mesh=mesh, in_specs=(), out_specs=P(sharding.AXIS)))()
    slots = lambda view: np.stack([part[view] for part in made], 1).reshape(8, -1)
    return np.stack([slots(0), slots(1)])

  one, split = keys(1, 1), keys(2, 2)
  assert len(np.unique(one.reshape(16, -1), axis=0)) == 16
  assert np.array_equal(one, split)


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_what_is_not_left_out_weighs_more(branch):
  """A block whose other branch gives 0: each image moves by nothing, or by what it would, over .6."""
  _, params = create()
  params = dict(params["blocks_0"])
  other = {"attn": ("mlp", "fc2"), "mlp": ("attn", "proj")}[branch]
  params[other[0]] = dict(params[other[0]])
  params[other[0]][other[1]] = jax.tree.map(jnp.zeros_like, params[other[0]][other[1]])
  block = vit.Block(32, 1, FORM, jnp.float32, 0.4)
  x = jnp.asarray(np.random.RandomState(2).standard_normal((40, 6, 32)), jnp.float32)
  apply = jax.jit(lambda noise: block.apply({"params": params}, x, noise) - x)
  moved, whole = apply(jax.random.split(jax.random.key(1), 40)), apply(None)
  there = np.asarray(jnp.abs(moved).max((1, 2)) > 0)
  assert 15 < there.sum() < 34
  np.testing.assert_allclose(moved[there], whole[there] / 0.6, atol=2e-5)


def test_branches_are_left_out_by_image():
  """600 times one image: the last block's two branches are there or not, each by its own lot, and weigh 1 / .6 where they are."""
  form = FORM._replace(drop_path=0.4)
  module, params = create(form)
  x = jnp.repeat(images(1, 8), 600, 0)
  keys = jax.random.split(jax.random.key(3), 600)
  apply = jax.jit(lambda noise: module.apply({"params": params}, x, True, noise))
  found, shares = np.unique(np.round(np.asarray(apply(keys)), 3), axis=0, return_counts=True)
  assert len(found) == 4  # none, either, both
  wanted = np.sort([0.16, 0.24, 0.24, 0.36])
  assert np.abs(np.sort(shares / 600) - wanted).max() < 0.06
  assert np.array_equal(apply(keys), apply(keys))
  none = module.apply({"params": params}, x, True)
  assert np.array_equal(none, module.apply({"params": params}, x, False, keys))
  assert np.ptp(np.asarray(none), 0).max() == 0


@pytest.mark.parametrize("size", [8, 12])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_that_are_computed_again_change_nothing(size, dtype):
  module, params = create(dtype=dtype)
  again = vit.ViT("vit_tiny", 1 / 6, FORM._replace(remat=True), dtype)
  x, keys = images(3, size), jax.random.split(jax.random.key(0), 3)

  def gradient(module):
    loss = lambda p: jnp.sum(module.apply({"params": p}, x, True, keys) ** 2)
    return jax.jit(jax.value_and_grad(loss))(params)

  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient(module)[1]))
  limit = 1e-5 if dtype == jnp.float32 else 0.02
  assert settings.difference(gradient(module)[1], gradient(again)[1]) < limit * scale


def products(x, kernel, dy):
  """Result and gradients of attention.product."""
  y, backward = jax.vjp(attention.product, x, kernel)
  return y, *backward(dy)


@pytest.mark.parametrize(
  "batch, tokens, first, last", [(2, 5, 8, 12), (1, 17, 24, 8), (3, 1, 4, 4)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_s_gradients(batch, tokens, first, last, dtype):
  rng = np.random.RandomState(tokens)
  shapes = (batch, tokens, first), (first, last), (batch, tokens, last)
  given = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
  x, kernel, dy = (np.asarray(a, np.float64) for a in given)
  wanted = x @ kernel, dy @ kernel.T, np.einsum("bti,bto->io", x, dy)
  for found, right in zip(jax.jit(products)(*given), wanted, strict=True):
    assert found.dtype == dtype
    error = np.abs(np.asarray(found, np.float64) - right).max() / np.abs(right).max()
    assert error < 4 * jnp.finfo(dtype).eps


def test_accelerators_have_the_product_of_three_axes():
  """There a reshape may cost a copy: [B, T] is one axis for the CPU's compiler alone."""
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 5, 8), (8, 12), (2, 5, 12))]
  traced = jax.jit(products).trace(*shapes)
  lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")}
  found = {p: "contracting_dims = [0, 1] x [0, 1]" in text for p, text in lowered.items()}
  assert found == {"cpu": False, "tpu": True, "cuda": True}


def test_tokens_of_the_last_blocks():
  """The last of them is what is pooled; each is what a shallower network of the same blocks would give."""
  module, params = create()
  x = images(2, 8)
  one, two = module.apply({"params": params}, x, last=2)
  shallow = vit.ViT("vit_tiny", 1 / 6, FORM._replace(depth=1))
  kept = {name: value for name, value in params.items() if name != "blocks_1"}
  np.testing.assert_allclose(shallow.apply({"params": kept}, x, last=1)[0], one, atol=1e-5)
  np.testing.assert_allclose(module.apply({"params": params}, x), two[:, 0], atol=1e-6)
  mean = vit.ViT("vit_tiny", 1 / 6, FORM._replace(pool="mean"))
  np.testing.assert_allclose(mean.apply({"params": params}, x), two[:, 2:].mean(1), atol=1e-5)


@pytest.mark.parametrize(
  "before, now", [((4, 4), (4, 4)), ((4, 4), (7, 7)), ((6, 6), (3, 4)), ((5, 5), (2, 9))]
)
def test_positions_are_resampled_as_torch_does(before, now):
  """torch's bicubic with antialiasing, which timm's resample_abs_pos_embed calls."""
  rng = np.random.RandomState(0)
  given = rng.standard_normal((1, before[0] * before[1], 5)).astype(np.float32)
  grid = torch.tensor(given).reshape(1, *before, 5).permute(0, 3, 1, 2)
  made = torch.nn.functional.interpolate(grid, size=now, mode="bicubic", antialias=True)
  wanted = made.permute(0, 2, 3, 1).reshape(1, -1, 5).numpy()
  found = jax.jit(lambda x: positions.resample(x, before, now))(given)
  np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_fixed_positions_by_hand():
  """Row 1, column 2 of a grid of 3: sines and cosines of the column, then of the row, at rates 1 and 1 / 100."""
  found = positions.sincos(3, 8, 1)
  assert found.shape == (1, 10, 8) and not found[0, 0].any()
  row, column, rates = 1, 2, np.array([1, 0.01])
  wanted = [f(place * rates) for place in (column, row) for f in (np.sin, np.cos)]
  np.testing.assert_allclose(found[0, 1 + 3 * row + column], np.concatenate(wanted), atol=1e-15)


@pytest.mark.parametrize("start", vit.STARTS)
def test_where_weights_start(start):
  form = vit.Form(patch=8, grid=4, depth=1, start=start, registers=2, layer_scale=0.1)
  module = vit.ViT("vit_tiny", 1.0, form)
  params = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
  block, patches = params["blocks_0"], params["patch_embed"]["kernel"]
  for name, parts in (("qkv", 3), ("proj", 1)):
    kernel = np.asarray(block["attn"][name]["kernel"])
    bound = np.sqrt(6 / (192 + kernel.shape[1] // parts))
    assert kernel.std() == pytest.approx(
      bound / np.sqrt(3) if start == "mocov3" else 0.02, rel=0.03
    )
    assert not np.asarray(block["attn"][name]["bias"]).any()
  fan_in = 3 * 8 * 8
  bound = np.sqrt(6 / (fan_in + 192)) if start == "mocov3" else 1 / np.sqrt(fan_in)
  assert 0.98 * bound < np.abs(patches).max() <= bound
  assert np.asarray(params["patch_embed"]["bias"]).any() == (start == "timm")
  assert np.asarray(params["pos_embed"]).std() == pytest.approx(0.02, rel=0.05)
  assert params["pos_embed"].shape == (1, 16, 192) and params["reg_token"].shape == (1, 2, 192)
  assert np.unique(block["ls1"]["gamma"]) == np.float32(0.1)


def test_layers_for_rates():
  names = [
    ["patch_embed", "kernel"],
    ["pos_embed"],
    ["blocks_0", "norm1"],
    ["blocks_11", "mlp"],
    ["norm", "scale"],
  ]
  assert [vit.layer_of(path, 12) for path in names] == [0, 0, 1, 12, 13]


SMALL = [
  *BASE, "--config.model.arch=vit_tiny", "--config.model.width=.17", "--config.model.vit.patch=4", "--config.model.vit.depth=2",
  "--config.bn.group_size=0", *(f"--config.{flag}" for flag in TWO if not flag.startswith("--")), *(f for f in TWO if f.startswith("--")),
]  # fmt: skip


@pytest.mark.slow
def test_stopped_and_resumed_equals_straight(tmp_path, capsys):
  """Through `main`, with branches left out and a momentum encoder: the same state and the same lines."""
  flags = [
    *SMALL,
    "--config.method.bank.size=256",
    "--config.model.vit.drop_path=.3",
    "--config.optim.name=adamw",
  ]
  whole, parts = f"--workdir={tmp_path}/whole", f"--workdir={tmp_path}/parts"
  assert main.main([*flags, whole]) == 0
  straight = capsys.readouterr().out
  assert main.main([*flags, parts, "--config.stop_at_step=5"]) == 0 == main.main([*flags, parts])
  resumed = capsys.readouterr().out
  of = lambda text: text.rpartition("; state ")[2].partition(";")[0]
  assert "resuming at step 5" in resumed and of(straight) == of(resumed)
  lines = [json.loads(line) for line in open(tmp_path / "whole/metrics.jsonl")]
  losses = [line["train/query_loss"] for line in lines if "train/query_loss" in line]
  assert len(losses) >= 10 and np.isfinite(losses).all()


@pytest.mark.slow
def test_fine_tuned_at_another_size(tmp_path, capsys):
  """Positions stay those of the pre-training's views, and are resampled."""
  config = main.parse([*SMALL, "--config.method.bank.size=256"])[0]
  settings.save_run(tmp_path / "run", config, step=3)
  flags = [
    "--config=finetune",
    f"--config.pretrained={tmp_path}/run",
    f"--workdir={tmp_path}/tuned",
    "--config.epochs=1",
  ]
  flags += ["--config.data.batch_size=128", "--config.eval.size=16", "--config.hold_out=0."]
  assert main.main(flags) == 0, capsys.readouterr().err
  stored = json.load(open(tmp_path / "tuned/config.json"))["config"]
  assert stored["model"]["vit"]["grid"] == 2 and stored["views"]["crops"][0][0] == 16
  other = ["--config.views.crops=((16,.5,1.),(16,.5,1.))", f"--config.init_from={tmp_path}/run"]
  assert main.main([*SMALL, *other, f"--workdir={tmp_path}/other"]) == 2
  assert "model.vit.grid=2 (here 4); use --config.model.vit.grid=2" in capsys.readouterr().err
  scaled = ["--config.model.vit.layer_scale=.1", f"--config.init_from={tmp_path}/run"]
  assert main.main([*SMALL, *scaled, f"--workdir={tmp_path}/scaled"]) == 2
  said = "model.vit.layer_scale=0.0 (here 0.1); use --config.model.vit.layer_scale=0.0"
  assert said in capsys.readouterr().err


REFUSED = {
  "a side that patches do not divide": ("views.crops=((8,.5,1.),(10,.5,1.))", "config.views.crops=10: vit_tiny cuts it into patches of 4 pixels; use 8 or 12"),
  "one that is scored": ("eval.size=9", "config.eval.size=9: vit_tiny cuts it into patches of 4 pixels; use 8 or 12"),
  "groups of nothing": ("bn.group_size=8", "config.bn.group_size=8: vit_tiny and its head have no BatchNorm; use 0"),
  "a pool of ours alone": ("model.vit.pool=max", "config.model.vit.pool='max': use token or mean"),
  "no patch": ("model.vit.patch=0", "config.model.vit.patch=0: use 1 or more"),
  "all left out": ("model.vit.drop_path=1.", "config.model.vit.drop_path=1.0: use 0.9 or less"),
  "parts of one BatchNorm": ("accumulate=2 model.head.norm=hidden", "config.accumulate=2: a batch in parts has no statistics of all its images"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, tmp_path, capsys):
  words, line = REFUSED[case]
  given = [f"--config.{word}" for word in words.split()]
  assert main.main([*SMALL, *given, f"--workdir={tmp_path}/run"]) == 2
  said = capsys.readouterr()
  assert line in said.err and said.err.count("\n") == 1 and not (tmp_path / "run").exists()
