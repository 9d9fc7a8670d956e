"""ViTs of timm, torchvision and DINOv2 here and back, each side run; and files that are no ViT of ours."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adco_jax import load_encoder, main
from adco_jax.interop import authors, builders, files, torch_weights, vit_weights
from adco_jax.models import positions, vit
from adco_jax.models.heads import Encoder
from tests import settings
from tests.torch_packages import timm, torchvision

pytestmark = pytest.mark.steps  # the slow ones' group
TIMM = timm.models.vision_transformer.VisionTransformer
DIM, DEPTH, PATCH, GRID = 192, 2, 4, 3


def draw(model, wide=0.3):
  """Every parameter wide: LayerScale and class token begin so small that nothing would show."""
  rng = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.randn(p.shape, generator=rng) * wide)
  return model.double().eval()


def timm_vit(form, size=GRID * PATCH, classes=0):
  return draw(
    TIMM(
      size, form.patch, embed_dim=DIM, depth=DEPTH, num_heads=3, num_classes=classes, init_values=form.layer_scale or None,
      reg_tokens=form.registers, no_embed_class=form.registers > 0, dynamic_img_size=True, fc_norm=False,
      global_pool={"token": "token", "mean": "avg"}[form.pool],
    )
  )  # fmt: skip


def numbers(model, dtype=np.float64):
  return {name: value.numpy().astype(dtype) for name, value in model.state_dict().items()}


def ours(form, dtype):
  """(encoder, its variables as zeros)."""
  encoder = Encoder("vit_tiny", 1.0, "imagenet", 8, 0, dtype=jnp.dtype(dtype), vit=form)
  return encoder, blank_of(encoder)


def blank_of(encoder):
  """Its variables as zeros."""
  size = encoder.vit.grid * encoder.vit.patch
  images = jnp.zeros((1, size, size, 3), encoder.dtype)
  shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), dict(shapes))


def run(model, images):
  with torch.no_grad():
    return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


FORMS = {
  "plain": vit.Form(PATCH, GRID, depth=DEPTH),
  "mean of patches": vit.Form(PATCH, GRID, "mean", depth=DEPTH),
  "LayerScale": vit.Form(PATCH, GRID, depth=DEPTH, layer_scale=1e-5),
  "registers": vit.Form(PATCH, GRID, depth=DEPTH, layer_scale=1e-5, registers=4),
}


@pytest.mark.parametrize("size", [12, 20])
@pytest.mark.parametrize("kind", FORMS)
def test_timm_here_and_back(float64, kind, size):
  """Features agree in both precisions, what is exported again is what came in, and loads strictly."""
  form = FORMS[kind]
  model = timm_vit(form)
  state, images = numbers(model), np.random.RandomState(1).standard_normal((3, size, size, 3))
  theirs = run(model, images)
  for dtype, limit in (("float64", 1e-13 if size == 12 else 1e-6), ("float32", 2e-5)):
    encoder, blank = ours(form, dtype)
    variables, report = torch_weights.import_encoder(state, blank)
    assert [n for n in report["missing"] if not n.startswith("fc.")] == [] == report["unexpected"]
    found = jax.jit(lambda v, x, e=encoder: e.apply(v, x, method="features"))(
      variables, images.astype(dtype)
    )
    apart = np.abs(found - theirs).max() / np.abs(theirs).max()
    print(f"{kind}, {size} px, {dtype}: {apart:.1e}")
    assert apart < limit
  back = torch_weights.export_encoder(
    torch_weights.import_encoder(state, ours(form, "float64")[1])[0], head=False
  )
  assert [*back] == sorted(back, key=vit_weights.torch_order) and back.keys() == state.keys()
  assert all(np.array_equal(back[name], state[name]) for name in state)
  facts = torch_weights.describe(state)
  wanted = {
    "patch": PATCH,
    "grid": GRID,
    "depth": DEPTH,
    "registers": form.registers,
    "positions": "learned",
  }
  assert facts == {
    "arch": "vit_tiny",
    "width": 1.0,
    "dim": 0,
    "vit": wanted | {"layer_scale": form.layer_scale},
  }


def test_torchvision_here_and_back(float64):
  model = draw(
    torchvision.models.VisionTransformer(12, PATCH, DEPTH, 3, DIM, 4 * DIM, num_classes=5)
  )
  images = np.random.RandomState(1).standard_normal((2, 12, 12, 3))
  state = numbers(model)
  variables, report = torch_weights.import_encoder(state, ours(FORMS["plain"], "float64")[1])
  assert report["unexpected"] == ["head.weight", "head.bias"]
  encoder = ours(FORMS["plain"], "float64")[0]
  found = np.asarray(
    jax.jit(lambda v, x: encoder.apply(v, x, method="features"))(variables, images)
  )
  logits = found @ state["heads.head.weight"].T + state["heads.head.bias"]
  apart = np.abs(logits - run(model, images)).max() / np.abs(logits).max()
  print(f"torchvision: {apart:.1e}")
  assert apart < 1e-13
  back = vit_weights.to_torchvision(torch_weights.export_encoder(variables, head=False))
  assert {n: v for n, v in state.items() if not n.startswith("heads.")}.keys() == back.keys()
  assert all(np.array_equal(back[name], state[name]) for name in back)


def test_dinov2_s_own_names():
  """register_tokens, mask_token, and a position of the class token, which is added to it."""
  form, rng = FORMS["registers"], np.random.RandomState(0)
  state = numbers(timm_vit(form), np.float32)
  first = rng.standard_normal((1, 1, DIM)).astype(np.float32)
  theirs = {n.replace("reg_token", "register_tokens"): v for n, v in state.items()} | {
    "mask_token": first[0]
  }
  theirs["pos_embed"] = np.concatenate([first, state["pos_embed"]], 1)
  theirs["cls_token"] = state["cls_token"] - first
  found = vit_weights.to_timm(theirs)
  assert found.keys() == state.keys()
  assert all(np.allclose(found[name], state[name], atol=1e-6) for name in state)
  bare = vit_weights.to_timm(
    {n: v[:, 1:] if n == "pos_embed" else v for n, v in numbers(timm_vit(FORMS["plain"])).items()}
  )
  assert bare["pos_embed"].shape == (1, 10, DIM) and not bare["pos_embed"][:, 0].any()


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, arch, form",
  [
    ("vit_tiny_patch16_224", "vit_tiny", vit.Form(16, 14)),
    ("vit_small_patch16_224", "vit_small", vit.Form(16, 14)),
    ("vit_base_patch16_224", "vit_base", vit.Form(16, 14)),
    ("vit_base_patch8_224", "vit_base", vit.Form(8, 28)),
    ("vit_small_patch14_dinov2", "vit_small", vit.Form(14, 37, layer_scale=1e-5)),
    ("vit_small_patch14_reg4_dinov2", "vit_small", vit.Form(14, 37, layer_scale=1e-5, registers=4)),
  ],
)
def test_networks_that_timm_names(name, arch, form):
  """Every array has its place and shape; what a file is, is known from its arrays."""
  state = numbers(timm.create_model(name), np.float32)
  encoder = Encoder(arch, 1.0, "imagenet", 8, 0, vit=form)
  _, report = torch_weights.import_encoder(state, blank_of(encoder))
  assert {n.partition(".")[0] for n in (*report["missing"], *report["unexpected"])} <= {
    "fc",
    "head",
  }
  facts = torch_weights.describe(state)
  assert facts["arch"] == arch and facts["vit"]["grid"] == form.grid and facts["vit"]["depth"] == 0


WHOLE = {
  "vit_tiny_patch16_224": ("vit_tiny", vit.Form(16, 14), (224, 96)),
  "vit_base_patch16_224": ("vit_base", vit.Form(16, 14), (224, 96)),
  "vit_small_patch14_reg4_dinov2": ("vit_small", vit.Form(14, 37, layer_scale=1e-5, registers=4), (224, 98)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_tokens_of_whole_networks(float64, name):
  """Every normalised token and the pooled features, at the sizes of two crops, in both precisions."""
  arch, form, sides = WHOLE[name]
  model = draw(timm.create_model(name, num_classes=0, dynamic_img_size=True), 0.05)
  state = numbers(model)
  for size in sides:
    images = np.random.RandomState(1).standard_normal((1, size, size, 3))
    with torch.no_grad():
      theirs = model.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    for dtype, limit in (("float64", 1e-6), ("float32", 2e-5)):
      encoder = Encoder(arch, 1.0, "imagenet", 8, 0, dtype=jnp.dtype(dtype), vit=form)
      variables = torch_weights.import_encoder(state, blank_of(encoder))[0]
      found = jax.jit(lambda p, x, d=dtype: vit.ViT(arch, 1.0, form, jnp.dtype(d)).apply(p, x, last=1)[0])(
        {"params": variables["params"]["backbone"]}, images.astype(dtype)
      )  # fmt: skip
      features = encoder.apply(variables, images.astype(dtype), method="features")
      apart = np.abs(found - theirs).max() / np.abs(theirs).max()
      print(f"{name}, {size} px, {dtype}: {apart:.1e}")
      assert apart < limit
      np.testing.assert_allclose(features, found[:, 0], atol=limit)


@pytest.mark.slow
def test_the_whole_network_of_torchvision(float64):
  """vit_b_16: logits in both precisions, out again to the bit, loaded strictly."""
  model = draw(torchvision.models.vit_b_16(), 0.05)
  state, form = numbers(model), vit.Form(16, 14)
  images = np.random.RandomState(1).standard_normal((1, 224, 224, 3))
  theirs = run(model, images)
  for dtype, limit in (("float64", 1e-12), ("float32", 2e-5)):
    encoder = Encoder("vit_base", 1.0, "imagenet", 8, 0, dtype=jnp.dtype(dtype), vit=form)
    variables = torch_weights.import_encoder(state, blank_of(encoder))[0]
    found = np.asarray(encoder.apply(variables, images.astype(dtype), method="features"))
    logits = found @ state["heads.head.weight"].T + state["heads.head.bias"]
    apart = np.abs(logits - theirs).max() / np.abs(theirs).max()
    print(f"vit_b_16, {dtype}: {apart:.1e}")
    assert apart < limit
  wide = encoder.clone(dtype=jnp.dtype("float64"))
  variables = torch_weights.import_encoder(state, blank_of(wide))[0]
  back = vit_weights.to_torchvision(torch_weights.export_encoder(variables, head=False))
  assert all(np.array_equal(back[name], state[name]) for name in back)
  again = torchvision.models.vit_b_16().double()
  again.heads = torch.nn.Identity()
  again.load_state_dict({name: torch.from_numpy(value) for name, value in back.items()})


SMALL = [
  "--config.model.arch=vit_tiny", "--config.model.width=1.", f"--config.model.vit.patch={PATCH}", f"--config.model.vit.depth={DEPTH}", "--config.bn.group_size=0",
  "--config.views.crops=((12,.5,1.),(12,.5,1.))", "--config.eval.size=12", "--config.model.dim=16", "--config.method.bank.size=64",
]  # fmt: skip


def said(capsys, argv, status=0):
  assert main.main(argv) == status, capsys.readouterr().err
  out = capsys.readouterr()
  return out.out if status == 0 else out.err


def test_from_timm_into_a_run_and_out_again(tmp_path, capsys, monkeypatch):
  """Imported, scored, exported to each program by the card's lines, and begun from: the same features all along."""
  model = timm_vit(FORMS["plain"]).float()
  path, workdir = str(tmp_path / "timm.safetensors"), f"{tmp_path}/run"
  files.write_state(path, numbers(model, np.float32))
  flags = ["--config=configs/import.py:adco_digits", f"--config.file={path}", *SMALL]
  assert "vit_tiny" in said(capsys, [*flags, f"--workdir={workdir}"])
  images = np.random.RandomState(0).randint(0, 256, (3, 12, 12, 3), np.uint8)
  encoder = load_encoder(workdir)
  data = encoder.config.data
  seen = ((images / 255 - np.array(data.mean)) / np.array(data.std)).astype(np.float32)
  found, theirs = encoder.embed(images), run(model, seen)
  np.testing.assert_allclose(found, theirs, atol=2e-5 * np.abs(theirs).max())
  for form in ("timm", "torchvision", "npz", "stablehlo"):
    text = said(
      capsys, ["--config=export", f"--config.pretrained={workdir}", f"--config.format={form}"]
    )
    out = text.split(": ")[1].split(", card ")[0]
    if form in ("timm", "torchvision"):
      lines = re.search(r"\*\*Use\*\*:\n\n```\w+\n(.*?)```", open(f"{out}.md").read(), re.S)[1]
      given = {}
      with monkeypatch.context() as here:
        here.chdir(f"{workdir}/export")
        exec(lines, given)
      np.testing.assert_allclose(
        run(given["model"], seen), theirs, atol=2e-5 * np.abs(theirs).max()
      )
    if form != "stablehlo":
      np.testing.assert_allclose(
        load_encoder(out).embed(images), found, atol=2e-5 * np.abs(theirs).max()
      )
  refused = said(capsys, [*flags, f"--workdir={tmp_path}/other", "--config.model.vit.depth=3"], 2)
  assert (
    "config.model.vit.depth=3: " in refused and "holds 2; use --config.model.vit.depth=2" in refused
  )


def test_fixed_positions_travel(float64):
  """MoCo v3's are known when they come in, and are written when they go out."""
  form = FORMS["plain"]
  model = timm_vit(form)
  state = numbers(model) | {"pos_embed": positions.sincos(GRID, DIM, 1)}
  assert torch_weights.describe(state)["vit"]["positions"] == "sincos"
  _, blank = ours(form._replace(positions="sincos"), "float64")
  variables, report = torch_weights.import_encoder(state, blank)
  assert not report["unexpected"]
  back = torch_weights.export_encoder(variables, head=False)
  back |= vit_weights.fixed_positions(back, GRID)
  assert back.keys() == state.keys() and np.allclose(
    back["pos_embed"], state["pos_embed"], atol=1e-15
  )
  with pytest.raises(ValueError, match="positions were learnt"):
    torch_weights.import_encoder(numbers(model), blank)


BREAK = {
  "another MLP": ("blocks.0.mlp.fc1.weight", lambda v: v[:-4], "an MLP of 764 for 192 components"),
  "no bias": ("blocks.0.attn.qkv.bias", None, "it has no blocks.0.attn.qkv.bias"),
  "no class token": ("cls_token", None, "it has no cls_token"),
  "positions of no square": ("pos_embed", lambda v: v[:, :8], "positions of 8 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAK)
def test_what_is_no_vit_of_ours(case):
  name, change, words = BREAK[case]
  state = numbers(timm_vit(FORMS["plain"]), np.float32)
  state = (
    state | {name: change(state[name])} if change else {n: v for n, v in state.items() if n != name}
  )
  with pytest.raises(ValueError, match=words):
    torch_weights.describe(state)


def test_networks_of_another_family_are_refused():
  state = numbers(timm_vit(FORMS["plain"]), np.float32)
  scaled = numbers(timm_vit(FORMS["LayerScale"]), np.float32)
  _, blank = ours(FORMS["plain"], "float32")
  _, wanted = ours(FORMS["LayerScale"], "float32")
  with pytest.raises(ValueError, match="4 arrays that ours lacks, the first is blocks.0.ls1.gamma"):
    torch_weights.import_encoder(scaled, blank)
  with pytest.raises(
    ValueError, match="4 of the backbone's names are missing, the first is blocks.0.ls1.gamma"
  ):
    torch_weights.import_encoder(state, wanted)
  with pytest.raises(ValueError, match="arrays that ours lacks, the first is conv1.weight"):
    torch_weights.import_encoder({"conv1.weight": np.zeros((8, 3, 7, 7))}, blank)
  encoder = Encoder("resnet8", 0.125, "small", 8, 2)
  resnet = dict(
    jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), False))
  )
  with pytest.raises(ValueError, match="arrays that ours lacks, the first is cls_token"):
    torch_weights.import_encoder(state, resnet)
  assert "detectron2 has no vit_tiny" in builders.refusal(
    "detectron2", "vit_tiny", 1.0, "imagenet", FORMS["plain"]
  )
  assert "registers" in builders.refusal(
    "torchvision", "vit_tiny", 1.0, "imagenet", FORMS["registers"]
  )
  assert not builders.refusal("timm", "vit_tiny", 1.0, "imagenet", FORMS["registers"])


def test_imported_for_an_objective_without_a_key_encoder(tmp_path, capsys):
  path = str(tmp_path / "timm.safetensors")
  files.write_state(path, numbers(timm_vit(FORMS["plain"]), np.float32))
  flags = [f for f in SMALL if "bank" not in f]
  more = ["--config.objective=simclr", "--config.views.mode=symmetric", f"--workdir={tmp_path}/run"]
  text = said(
    capsys, ["--config=configs/import.py:adco_digits", f"--config.file={path}", *flags, *more]
  )
  assert "besides the query encoder: nothing" in text and load_encoder(tmp_path / "run").step == 0


@pytest.mark.parametrize("kind", FORMS)
def test_lines_that_make_each_form_in_timm(kind, tmp_path, monkeypatch):
  """Strictly loaded by the card's lines, and the same features."""
  form = FORMS[kind]
  model = timm_vit(form).float()
  files.write_state(str(tmp_path / "a.safetensors"), numbers(model, np.float32))
  lines = builders.lines(
    "timm", "a.safetensors", arch="vit_tiny", width=1.0, stem="imagenet", classes=0, size=12, mean=(0,), std=(1,), vit=form
  )  # fmt: skip
  given = {}
  with monkeypatch.context() as here:
    here.chdir(tmp_path)
    exec("\n".join(lines[1:-1]), given)
  images = np.random.RandomState(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
  theirs = run(model, images)
  np.testing.assert_allclose(run(given["model"], images), theirs, atol=1e-5 * np.abs(theirs).max())


def test_a_file_of_other_heads_starts_no_run(tmp_path, capsys):
  """Heads and pool change no shape: nothing but the keys tells them apart."""
  config = main.parse(["--config=adco_digits", *SMALL])[0]
  settings.save_run(tmp_path / "run", config, step=3)
  text = said(
    capsys, ["--config=export", f"--config.pretrained={tmp_path}/run", "--config.format=timm"]
  )
  begin = [
    "--config=adco_digits",
    *SMALL,
    f"--config.init_from={text.split(': ')[1].split(', card ')[0]}",
    f"--workdir={tmp_path}/on",
  ]
  for key, there in (
    ("heads=6", "heads=0"),
    ("pool=mean", "pool=token"),
    ("depth=3", f"depth={DEPTH}"),
  ):
    assert f"--config.model.vit.{there}" in said(capsys, [*begin, f"--config.model.vit.{key}"], 2)
  assert not (tmp_path / "on").exists()


def test_moco_v3_s_small_vit_has_twelve_heads():
  """Both encoders are found under its names, and the heads, which no array shows, by them; timm's own file says none."""
  model = draw(TIMM(12, PATCH, embed_dim=384, depth=DEPTH, num_heads=12, num_classes=0))
  state = numbers(model, np.float32)
  wrapped = {
    f"module.{e}.{n}": v for e in ("base_encoder", "momentum_encoder") for n, v in state.items()
  }
  found = authors.parse_checkpoint({"state_dict": wrapped})
  assert (
    found.facts["vit"]["heads"] == 12 and found.key.keys() == found.query.keys() == state.keys()
  )
  assert "heads" not in authors.parse_checkpoint(state).facts["vit"]
