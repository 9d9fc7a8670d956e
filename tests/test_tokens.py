"""Forms of a ViT's tokens as features, which of them is chosen, and the picture of its attention."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from adco_jax import encoders, main
from adco_jax.errors import ConfigError
from adco_jax.evaluation import features, results
from adco_jax.models import heads, tokens, vit
from adco_jax.report import feature_map, sheets
from adco_jax.runtime import sharding
from adco_jax.tasks import attention, chosen_tokens, export, scoring
from adco_jax.tasks.scoring import Scored
from adco_jax.workdir import pictures
from tests import settings

pytestmark = pytest.mark.steps  # the slow ones' group

NORMAL = (0.5, 0.5, 0.5), (0.25, 0.2, 0.3)


def create(form, dtype=jnp.float32, size=8, seed=0):
  """(encoder, variables drawn wide)."""
  encoder = heads.Encoder("vit_tiny", 1 / 6, "", 4, 0, dtype=dtype, vit=form)
  like = jax.eval_shape(
    lambda: encoder.init(jax.random.key(seed), jnp.zeros((1, size, size, 3), dtype), False)
  )
  rng = np.random.RandomState(seed)
  return encoder, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), like)


def first_blocks(variables, depth):
  """Of a ViT's variables those of a shallower one."""
  kept = lambda name: not name.startswith("blocks_") or int(name.removeprefix("blocks_")) < depth
  backbone = {k: v for k, v in variables["params"]["backbone"].items() if kept(k)}
  return {"params": {"backbone": backbone}}


@pytest.mark.parametrize(
  "depth, registers, pool, size, x64",
  [
    (5, 0, "token", 8, False),
    pytest.param(4, 2, "mean", 12, True, marks=pytest.mark.slow),
    (2, 1, "mean", 12, True),
  ],
)
def test_forms_are_those_of_shallower_vits(depth, registers, pool, size, x64):
  """class_4: the class tokens of the ViTs that end after each of the last four blocks, applied one by one."""
  with jax.enable_x64(x64):
    dtype = jnp.float64 if x64 else jnp.float32
    form = vit.Form(patch=4, grid=2, depth=depth, registers=registers, pool=pool)
    encoder, variables = create(form, dtype, size)
    x = jnp.asarray(np.random.RandomState(1).standard_normal((3, size, size, 3)), dtype)

    def pooled(variables, pool, depth):
      shorter = encoder.clone(vit=form._replace(pool=pool, depth=depth))
      return shorter.apply(first_blocks(variables, depth), x, method="features")

    @jax.jit
    def apart(v):
      depths = range(max(1, depth - 3), depth + 1)
      return (
        pooled(v, "mean", depth),
        pooled(v, pool, depth),
        [pooled(v, "token", d) for d in depths],
      )

    of = jax.jit(lambda v, x: {
      name: encoder.apply(v, x, name, method="features") for name in (*encoder.forms(), "pooled", "every")
    })  # fmt: skip
    found = of(variables, x)
    mean, usual, last = apart(variables)
    token = last[-1]
    wanted = {
      "class": token, "mean": mean, "class_mean": np.concatenate([token, mean], 1), "pooled": usual,
    }  # fmt: skip
    if depth >= 4:
      wanted["class_4"] = np.concatenate(last, 1)
    wanted["every"] = np.concatenate([*last, mean], 1)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
      np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12 if x64 else 2e-5)
    assert np.abs(token - mean).max() > 0.1 and np.abs(last[0] - last[-1]).max() > 0.1


@pytest.mark.parametrize(
  "size, form",
  [
    (8, vit.Form(patch=4, grid=2, depth=2, heads=3)),
    (12, vit.Form(patch=4, grid=2, depth=1, heads=4, registers=2, remat=True)),
  ],
)
def test_attention_is_the_softmax_of_the_last_block(size, form):
  encoder, variables = create(form, size=size)
  images = np.random.RandomState(2).randint(0, 256, (3, size, size, 3)).astype(np.uint8)
  found = features.make_attention(encoder, *NORMAL, sharding.create_mesh())(variables, images)
  x = (images / 255 - NORMAL[0]) / NORMAL[1]
  _, kept = jax.jit(lambda v, x: encoder.apply(
    v, x, method="features", mutable=["intermediates"], capture_intermediates=lambda module, _: module.name == "norm1",
  ))(variables, jnp.asarray(x, jnp.float32))  # fmt: skip
  last = f"blocks_{form.depth - 1}"
  of = kept["intermediates"]["backbone"][last]
  x = np.asarray(of["norm1"]["__call__"][0], np.float64)
  qkv = jax.device_get(variables["params"]["backbone"][last]["attn"]["qkv"])
  q, k = np.split(x @ qkv["kernel"] + qkv["bias"], 3, 2)[:2]
  split = lambda y: y.reshape(*y.shape[:2], form.heads, -1)
  logits = np.einsum("bhf,bthf->bht", split(q)[:, 0], split(k))
  logits /= np.sqrt(q.shape[-1] / form.heads)
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  shares /= shares.sum(-1, keepdims=True)
  own = 1 + form.registers
  patches = shares[:, :, own:].reshape(3, form.heads, size // 4, size // 4)
  np.testing.assert_allclose(found, patches, atol=2e-5)
  np.testing.assert_allclose(found.sum((2, 3)) + shares[:, :, :own].sum(-1), 1, atol=2e-5)
  np.testing.assert_allclose(of["attn"]["class_attention"][0].sum(-1), 1, atol=1e-5)
  assert found.max() > 3 * found.min()


# What is chosen.

CONFIG = ConfigDict({
  "seed": 0, "hold_out": 0.2, "knn": {"k": (1, 3), "temperature": (0.1,)}, "penalties": (0.1, 1.0),
})  # fmt: skip


def planted(best, train=60, test=20, dim=4):
  """(scored, frozen) of random features, of which those of the columns of `best` alone tell three classes apart on train images, and
  those of another form on test images."""
  rng, forms = np.random.RandomState(0), tokens.columns(dim, 4)
  labels = [np.arange(n) % 3 for n in (train, test)]
  parts = [rng.standard_normal((n, 5 * dim)) for n in (train, test)]
  mark = {"class": 3, "mean": 4, "class_4": 0}
  for part, y, form in zip(
    parts, labels, (best, "mean" if best != "mean" else "class"), strict=True
  ):
    part[:, mark[form] * dim] += 9 * y
    part[:, mark[form] * dim + 1] += 9 * (y == 1)
  source = lambda y: type("Source", (), {"targets": y, "classes": ["a", "b", "c"]})
  empty = scoring.Frozen(*[None] * len(scoring.Frozen._fields))
  frozen = empty._replace(
    forms=forms, tokens="every", train=source(labels[0]), test=source(labels[1]),
    forward=lambda variables, images: variables + images,
  )  # fmt: skip
  return Scored(*parts), frozen


@pytest.mark.parametrize("judge", [chosen_tokens.judge_knn, chosen_tokens.judge_linear])
@pytest.mark.parametrize("best", ["class", "mean", "class_4"])
def test_the_best_on_held_out_train_images_is_chosen(judge, best, capsys):
  """Not what is best on test images; the encoder that crops are seen with gives the same columns."""
  scored, frozen = planted(best)
  decide = lambda train: judge(train, frozen, CONFIG)
  cut, encoder, told = chosen_tokens.choose("trained", scored, frozen, decide)
  assert told["tokens"] == best
  tried = {row["tokens"]: row["held-out"] for row in told["tokens tried"]}
  assert list(tried) == list(tokens.FORMS) and tried[best] == max(tried.values())
  there = frozen.forms[best]
  assert np.array_equal(cut.train, scored.train[:, there])
  assert np.array_equal(cut.test, scored.test[:, there])
  assert np.array_equal(encoder.forward(scored.test, 0), cut.test)
  assert f"scored: {best}" in capsys.readouterr().out
  for name, chooser in (
    ("pixels", frozen),
    ("projected", frozen),
    ("trained", frozen._replace(forms={})),
  ):
    same, encoder, told = chosen_tokens.choose(name, scored, chooser, decide)
    assert same is scored and encoder is chooser and told == {}


def test_the_judge_is_the_score_of_images_it_has_not_seen():
  """Labels of held-out images permuted: a judge that learnt from them would not mind."""
  scored, frozen = planted("class")
  part = scored.train[:, frozen.forms["class"]]
  _, left = chosen_tokens.held_out(frozen, CONFIG)
  for judge in (chosen_tokens.judge_knn, chosen_tokens.judge_linear):
    assert judge(part, frozen, CONFIG) > 0.9
    frozen.train.targets[left] = (frozen.train.targets[left] + 1) % 3
    assert judge(part, frozen, CONFIG) < 0.1
    frozen.train.targets[left] = (frozen.train.targets[left] - 1) % 3


# The tasks.

VIT = dict(
  model__arch="vit_tiny", model__width=1 / 6, model__vit__depth=4, model__vit__patch=4, model__vit__heads=2, bn__group_size=0,
  data__num_examples=64, data__source="npz", eval__crop_fraction=1.0,
)  # fmt: skip
F = 32


def save_set(path, seed=0, labels_by=0):
  """60 train and 24 test images of three shades; `seed`, `labels_by`: of the test images alone."""
  rng, arrays = np.random.RandomState(0), {}
  for split, count in (("train", 60), ("test", 24)):
    labels = np.arange(count) % 3
    rng = np.random.RandomState(seed) if split == "test" else rng
    shades = rng.normal(60 + 50 * labels, 35)[:, None, None, None]
    images = np.uint8(np.clip(rng.normal(shades, 40, (count, 8, 8, 3)), 0, 255))
    labels = (labels + labels_by) % 3 if split == "test" else labels
    arrays |= {f"{split}_images": images, f"{split}_labels": labels}
  np.savez(path, **arrays)
  return f"--config.data.dir={path}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir of a ViT, flags of a set)."""
  folder = tmp_path_factory.mktemp("tokens")
  data = save_set(folder / "set.npz")
  settings.save_run(
    str(folder / "run"), settings.tiny_config(**VIT, data__dir=data.split("=")[1]), 1, wide=True
  )
  return folder / "run", ["--config.data.source=npz", data, "--config.data.test_split=test"]


def score(run, task, form, *flags):
  """The newest result of a task with this form."""
  workdir, data = run
  command = [f"--config=configs/{task}.py", f"--config.pretrained={workdir}", *data]
  quick = ["--config.neighbours=0", "--config.map=0"] if task == "knn" else []
  few = (
    []
    if task == "embed"
    else [
      "--config.labels_per_class=()",
      "--config.baselines=False",
    ]
  )
  command += [f"--config.features.tokens={form}", *quick, *few, *flags]
  before = set(os.listdir(workdir / "eval")) if (workdir / "eval").exists() else set()
  assert main.main(command) == 0
  new = [n for n in set(os.listdir(workdir / "eval")) - before if n.endswith(".json")]
  return json.loads((workdir / "eval" / new[0]).read_text()) if new else None


def test_a_form_is_encoded_kept_scored_and_told(run, capsys):
  """Kept features of one form are not another's; forms agree with each other and with the library."""
  workdir, data = run
  pooled, token, mean = (score(run, "knn", form) for form in ("pooled", "class", "mean"))
  assert token["results"] == pooled["results"] != mean["results"]  # this ViT pools its class token
  assert "features" not in pooled["identity"]["protocol"]  # results of before are found again
  assert token["identity"]["protocol"]["features"] == {"tokens": "class"}
  assert "features.tokens class" in results.caption(
    token
  ) and "features.tokens" not in results.caption(pooled)
  kept = sorted((workdir / "features").glob("trained-*.npy"))
  assert len(kept) == 6
  capsys.readouterr()
  assert score(run, "knn", "mean", "--config.seed=1")["task"] == "knn"
  assert capsys.readouterr().out.count("as kept in") == 2
  encoder, images = encoders.load_encoder(workdir), np.load(data[1].split("=")[1])["test_images"]
  by = {form: encoder.embed(images, form=form) for form in ("class", "mean", "class_4")}
  np.testing.assert_allclose(by["class_4"][:, -by["class"].shape[1] :], by["class"], atol=1e-6)
  tests = [np.load(path) for path in kept if len(np.load(path)) == 24]
  assert any(np.allclose(x, by["mean"], atol=1e-5) for x in tests)
  score((workdir, data[:2]), "embed", "class_4", "--config.data.split=test")
  (file,) = workdir.glob("embeddings-class_4-set-test-1.npz")
  np.testing.assert_allclose(np.load(file)["features"], by["class_4"], atol=1e-5)


def test_the_choice_never_sees_test_images(run, tmp_path, capsys):
  """Other test images under other labels: the same form, the same values."""
  workdir, data = run
  before = score(run, "knn", "chosen")
  changed = save_set(tmp_path / "set.npz", seed=5, labels_by=1)
  after = score((workdir, [data[0], changed, data[2]]), "knn", "chosen")
  assert before["results"]["trained"] != after["results"]["trained"]
  assert before["chosen"] == after["chosen"]
  chosen = before["chosen"]["trained"]
  assert {row["tokens"] for row in chosen["tokens tried"]} == set(tokens.FORMS)
  assert f"tokens {chosen['tokens']}" in results.caption(before)
  assert capsys.readouterr().out.count("on held-out train images:") == 2
  best = {row["tokens"]: row["held-out"] for row in chosen["tokens tried"]}
  assert best[chosen["tokens"]] == max(best.values())
  fixed = score(run, "knn", chosen["tokens"], "--config.seed=0", "--config.recall=()")
  assert fixed["results"]["trained"]["all"] == before["results"]["trained"]["all"]
  assert fixed["chosen"]["trained"].items() <= chosen.items()


@pytest.mark.slow
def test_probes_and_svms_of_a_chosen_form(run, capsys):
  """Crops are seen in the chosen form."""
  workdir, _ = run
  result = score(
    run,
    "linear",
    "chosen",
    "--config.sgd.epochs=1",
    "--config.batch_size=20",
    "--config.baselines=True",
  )
  (file,) = (workdir / "eval").glob("linear-*.npz")
  probe, form = np.load(file), result["chosen"]["trained"]["tokens"]
  assert str(probe["tokens"]) == form
  width = {"class": F, "mean": F, "class_mean": 2 * F, "class_4": 4 * F}[form]
  assert probe["kernel"].shape == (width, 3)
  costs = "--config.costs=(0.1,1.0)"
  svm = score(run, "svm", "chosen", costs)["chosen"]["trained"]
  assert svm["tokens"] in tokens.FORMS and len(svm["tokens tried"]) == 4
  assert all(0.2 < row["held-out"] <= 1 for row in svm["tokens tried"])


def test_files_carry_no_probe_of_another_form():
  config, probe = (
    ConfigDict({"linear": "probe.npz"}),
    {"kernel": np.ones((4, 3)), "tokens": np.array("mean")},
  )
  line = "config.linear='probe.npz': was learnt on the form mean of the tokens, and files carry a classifier of the pooled one"
  with pytest.raises(ConfigError, match=line):
    export.check_probe(probe, config, None)


def test_letters_of_class_names_are_drawn(tmp_path):
  """Another picture for another letter: one without a letter draws a box for both."""
  images = [[np.zeros((4, 4, 3), np.uint8)]]
  seen = set()
  for name in (
    "a \N{EN DASH} b",
    "a \N{EM DASH} b",
    "\N{CYRILLIC SMALL LETTER ZHE}",
    "\N{GREEK SMALL LETTER OMEGA}",
  ):
    pictures.save_sheet(str(tmp_path / "a.png"), images, 32, [name])
    seen.add((tmp_path / "a.png").read_bytes())
  assert len(seen) == 4


@pytest.mark.slow
def test_attention_is_drawn_once_and_shown(run, capsys):
  workdir, _ = run
  result = score(run, "knn", "pooled", "--config.seed=2")
  picture = results.picture_of(
    max((str(p) for p in (workdir / "eval").glob("knn-*.json")), key=os.path.getmtime), "attention"
  )
  assert json.loads(feature_map.note_of(picture)) == {"images": 8} and result
  assert picture in capsys.readouterr().out and "Attention: kNN" in sheets.attention(str(workdir))
  size = Image.open(picture).size
  score(run, "knn", "pooled", "--config.seed=2")
  assert picture not in capsys.readouterr().out
  score(run, "knn", "pooled", "--config.seed=2", "--config.attention=3")
  assert Image.open(picture).size[1] < size[1] and picture in capsys.readouterr().out


def test_maps_are_scaled_to_their_own_maximum():
  shares = np.zeros((8, 2, 3))
  shares[:, 0, 1], shares[:, 1, 2] = 0.5, 0.1
  shares[3] = 0.05
  drawn = attention.maps(shares)
  assert drawn.shape == (7, 2, 3) and np.allclose(drawn[0], shares.mean(0))
  dark, bright = attention.colour(drawn[1])[0, 0], attention.colour(drawn[1])[0, 1]
  light = lambda rgb: rgb @ [0.2126, 0.7152, 0.0722]
  assert light(dark) < 60 and light(bright) > 200 and np.ptp(attention.colour(shares[3])) > 0
  assert (attention.colour(shares[3]) == bright).all() and (
    attention.colour(0 * shares[3]) == dark
  ).all()
  assert attention.maps(shares[:1]).shape == (1, 2, 3)
  flat = np.full((2, 4, 4), 0.9 / 16)
  assert attention.describe("x" * 40, flat) == f"{'x' * 17}...\npeak 1.0 x even\n90% on patches"


@pytest.mark.parametrize(
  "wanted, arch, depth, line",
  [
    ("class", "resnet18", 0, "config.features.tokens='class': resnet18 has no tokens; use pooled"),
    ("mean", "my.module:Net", 4, "config.features.tokens='mean': my.module:Net has no tokens; use pooled"),
    ("class_4", "vit_tiny", 3, "config.features.tokens='class_4': this vit_tiny has 3 blocks; use class"),
    ("cls", "vit_tiny", 0, "config.features.tokens='cls': use one of pooled, class, mean, class_mean, class_4"),
  ],
)  # fmt: skip
def test_forms_that_an_encoder_lacks_are_refused(wanted, arch, depth, line):
  with pytest.raises(ConfigError) as error:
    tokens.check("features.tokens", wanted, arch, depth)
  assert str(error.value) == line
  tokens.check("features.tokens", "pooled", arch, depth)
  if arch == "vit_tiny":
    tokens.check("features.tokens", "chosen", arch, depth, tokens.OR_CHOSEN)
    tokens.check("features.tokens", "class_4", arch, 0)


@pytest.mark.parametrize("flag, text", [
  ("knn --config.features.tokens=cls", "use one of pooled, class"), ("embed --config.features.tokens=chosen", "use one of pooled"),
  ("knn --config.attention=-1", "use 0 or more"), ("knn --config.size=10", "patches of 4 pixels"),
])  # fmt: skip
def test_values_are_refused(run, capsys, flag, text):
  task, option = flag.split()
  command = [
    f"--config=configs/{task}.py",
    f"--config.pretrained={run[0]}",
    *run[1][: 3 if task == "knn" else 2],
  ]
  assert main.main([*command, option]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert text in line and option.split("=")[0].removeprefix("--") in line


def test_a_resnet_has_no_tokens_and_no_picture(run, tmp_path, capsys):
  settings.save_run(str(tmp_path / "run"), settings.tiny_config(data__num_examples=64), 1)
  resnet = (tmp_path / "run", run[1])
  quick = [
    "--config.neighbours=0",
    "--config.map=0",
    "--config.labels_per_class=()",
    "--config.baselines=False",
  ]
  command = ["--config=configs/knn.py", f"--config.pretrained={resnet[0]}", *run[1], *quick]
  for wanted in ("class", "chosen"):
    assert main.main([*command, f"--config.features.tokens={wanted}"]) == 2
    line = f"error: config.features.tokens={wanted!r}: tiny has no tokens; use pooled\n"
    assert capsys.readouterr().err == line
  assert main.main(command) == 0 and not [*(resnet[0] / "eval").glob("attention-*")]
  assert capsys.readouterr().out.count("attention") == 0
