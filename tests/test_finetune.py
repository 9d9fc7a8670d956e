"""Fine-tuning: rates by hand, held-out images and few labels, the classifier's own score, how a run begins, what is refused."""

import json
import os
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from PIL import Image
from sklearn.metrics import top_k_accuracy_score

from adco_jax import build, encoders, main
from adco_jax.config.plan import Machine
from adco_jax.data import labelled
from adco_jax.data.batch import Constants
from adco_jax.data.images import Reader
from adco_jax.data.resident import ResidentLoader
from adco_jax.data.sources import loading
from adco_jax.data.sources.base import Source
from adco_jax.evaluation import few_labels
from adco_jax.evaluation.classifier import Best, accuracies, scored
from adco_jax.models import resnet
from adco_jax.objectives.base import Variables
from adco_jax.objectives.supervised import Supervised
from adco_jax.runtime import rng, sharding
from adco_jax.training import optimizers, train_step
from adco_jax.training.prepare import make_prepare
from adco_jax.views import mix
from adco_jax.workdir.checkpoint import saved_steps
from tests import (
  settings,
  torch_packages,  # noqa: F401  (torchvision and timm can be imported)
)
from tests.test_end_to_end import fingerprint, untimed

pytestmark = pytest.mark.kills  # the slow ones' group

DECAY, HEAD = 0.5, 7.0
# name: (its way through the tree, what its rate is multiplied with) in a ResNet of four stages
PLACES = {
  "stem": (("encoder", "backbone", "conv1", "kernel"), DECAY**5),
  "stem's norm": (("encoder", "backbone", "bn1", "scale"), DECAY**5),
  "first stage": (("encoder", "backbone", "layer1_1", "conv2", "kernel"), DECAY**4),
  "third stage": (("encoder", "backbone", "layer3_0", "downsample_conv", "kernel"), DECAY**2),
  "last stage": (("encoder", "backbone", "layer4_0", "bn1", "bias"), DECAY),
  "projection": (("encoder", "head", "fc0", "kernel"), 1.0),
  "classifier": (("objective", "classifier", "kernel"), HEAD),
}


def nested(leaves):
  tree = {}
  for name, (path, _) in PLACES.items():
    branch = tree
    for key in path[:-1]:
      branch = branch.setdefault(key, {})
    branch[path[-1]] = leaves[name]
  return tree


def leaf(tree, path):
  for key in path:
    tree = tree[key]
  return np.asarray(tree)


@pytest.mark.parametrize("name, shape", [("sgd", (3, 2)), ("adamw", (5,))])
def test_every_array_has_its_own_rate(float64, name, shape):
  """Five steps with decay and momentum, against torch's parameter groups: stem, stages, projection, classifier."""
  random = np.random.RandomState(0)
  start = {place: random.standard_normal(shape) for place in PLACES}
  gradients = {place: random.standard_normal((5, *shape)) for place in PLACES}
  multiplier = optimizers.make_multiplier(HEAD, DECAY, resnet.layer_of, 4)
  transform = optimizers.make_optimizer(name, 0.9, 0.01, multiplier=multiplier)
  found = jax.tree.map(jnp.asarray, nested(start))
  state, step = transform.init(found), jax.jit(transform.update)
  for i in range(5):
    given = nested({place: jnp.asarray(g[i]) for place, g in gradients.items()})
    updates, state = step(given, state, found, learning_rate=jnp.asarray(0.1))
    found = optax.apply_updates(found, updates)
  theirs = {place: torch.nn.Parameter(torch.from_numpy(x.copy())) for place, x in start.items()}
  groups = [{"params": [theirs[place]], "lr": 0.1 * PLACES[place][1]} for place in PLACES]
  make = {
    "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01),
    "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.01),
  }
  descent = make[name]()
  for i in range(5):
    for place, parameter in theirs.items():
      parameter.grad = torch.from_numpy(gradients[place][i].copy())
    descent.step()
  for place, (path, _) in PLACES.items():
    assert np.abs(leaf(found, path) - theirs[place].detach().numpy()).max() < 1e-12, place


def step_of(**overrides):
  """(state before, after, metrics, batch, encoder's spec) of one supervised step of the tiny network, float64."""
  config = settings.tiny_config(
    "one", objective="supervised", compute_dtype="float64", bn__group_size=8, optim__weight_decay=0.0, **overrides
  )  # fmt: skip
  spec, plan, state = settings.create_players(config)
  labels = np.arange(16, dtype=np.int32) % 10
  batch = settings.random_batch(plan, plan.train_pairing, 0, np.float64)._replace(labels=labels)
  before = jax.device_get(state)
  after, metrics = jax.jit(train_step.make_update(spec, plan.phases[0]))(
    state, batch.put(spec.mesh)
  )
  return before, jax.device_get(after), jax.device_get(metrics), batch, config


def test_a_whole_step_moves_every_part_at_its_rate(float64):
  """Of one stage: stem by a quarter, stage by half, classifier seven times as far as with one rate for all."""
  old, plain, *_ = step_of()
  _, own, *_ = step_of(optim__head_rate=HEAD, optim__layer_decay=DECAY)
  moved = lambda new: (
    jax.tree.map(np.subtract, new.query_params["backbone"], old.query_params["backbone"]),
    jax.tree.map(np.subtract, new.objective.params, old.objective.params),
  )
  (backbone, head), (of_own, of_head) = moved(plain), moved(own)
  for part, factor in (("conv1", DECAY**2), ("bn1", DECAY**2), ("layer1_0", DECAY)):
    for one, other in zip(
      jax.tree.leaves(backbone[part]), jax.tree.leaves(of_own[part]), strict=True
    ):
      assert np.abs(one).max() > 1e-9 and np.abs(factor * one - other).max() < 1e-15, part
  for one, other in zip(jax.tree.leaves(head), jax.tree.leaves(of_head), strict=True):
    assert np.abs(one).max() > 1e-4 and np.abs(HEAD * one - other).max() < 1e-15


@pytest.mark.slow
def test_no_rate_below_the_head_leaves_the_backbone_as_it_was(float64):
  old, new, *_ = step_of(optim__layer_decay=0.0)
  same = jax.tree.map(np.array_equal, old.query_params["backbone"], new.query_params["backbone"])
  assert all(jax.tree.leaves(same)) and not np.array_equal(*(
    s.objective.params["classifier"]["kernel"] for s in (old, new)
  ))  # fmt: skip


def test_frozen_statistics_normalise_and_stand_still(float64):
  """The loss is that of features with running statistics, which are the same bits afterwards; else they move."""
  old, new, metrics, batch, config = step_of(bn__frozen=True)
  encoder = build.create_encoder(config, "float64")
  variables = {"params": old.query_params, **old.query_stats}
  features = np.asarray(encoder.apply(variables, batch.queries[0], method="features"))
  classifier = old.objective.params["classifier"]
  logits = features @ classifier["kernel"] + classifier["bias"]
  wanted = torch.nn.functional.cross_entropy(
    torch.from_numpy(logits), torch.from_numpy(batch.labels.astype(np.int64))
  )
  assert abs(metrics["train/loss"] - wanted.item()) < 1e-12
  same = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a.query_stats, b.query_stats)))  # fmt: skip
  assert same(old, new)
  assert not np.array_equal(
    *(s.query_params["backbone"]["bn1"]["scale"] for s in (old, new))
  )  # they are learnt
  moving = step_of()
  assert not same(*moving[:2]) and abs(moving[2]["train/loss"] - wanted.item()) > 1e-6


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_average_of_all_weights(float64, devices):
  """Encoder, statistics and classifier, three steps by hand: each moves towards what was there before the update; what trains
  does not notice."""
  make = lambda average: settings.create_players(
    settings.tiny_config("one", objective="supervised", compute_dtype="float64", bn__group_size=4, method__average=average,
                         ema__decay=0.75, optim__learning_rate=0.5), devices)  # fmt: skip
  ends = []
  for average in (False, True):
    spec, plan, state = make(average)
    update, states = jax.jit(train_step.make_update(spec, plan.phases[0])), [jax.device_get(state)]
    for step in range(3):
      labels = np.arange(step, step + 16, dtype=np.int32) % 10
      batch = settings.random_batch(plan, plan.train_pairing, step, np.float64)
      state, _ = update(state, batch._replace(labels=labels).put(spec.mesh))
      states.append(jax.device_get(state))
    ends.append(states[-1])
  parts = lambda s: (s.query_params, s.query_stats, s.objective.params)
  wanted = parts(states[0])
  for state in states[:3]:
    wanted = jax.tree.map(lambda a, x: 0.75 * a + 0.25 * x, wanted, parts(state))
  last = states[-1]
  assert settings.difference((last.key_params, last.key_stats, last.objective.memory), wanted) < 1e-14  # fmt: skip
  assert settings.difference(wanted, parts(last)) > 1e-3
  assert settings.difference(*map(parts, ends)) < 1e-14 and not jax.tree.leaves(ends[0].key_params)


@pytest.mark.slow
@pytest.mark.parametrize("devices, parts", [(4, 1), (2, 2)])
def test_mixed_pairs_are_the_same_on_any_number_of_devices(float64, devices, parts):
  """A step from pixels to the update: as on one device in one part; each view is a mixture of two neighbours, and so is its
  label, by hand."""

  def step(devices, parts, mixup=0.4):
    config = settings.tiny_config("one", objective="supervised", compute_dtype="float64", bn__group_size=2, method__mixup=mixup,
                                  accumulate=parts, augment__policy="none", method__label_smoothing=0.1)  # fmt: skip
    spec, plan, state = settings.create_players(config, devices)
    source = loading.load_source("digits", "", "train")
    loader = ResidentLoader(Reader(labelled.take(source, np.arange(64))), spec.mesh)
    loaded = next(loader.train(0, 1, seed=0, plan=plan, ratio=(1, 1)))
    constants = Constants.put(spec.mesh, 0, loader.images)
    prepare = make_prepare(plan.train_pairing, plan, **build.view_settings(config))
    before = jax.device_get(state)
    update = jax.jit(train_step.make_update(spec, plan.phases[0], prepare))
    after, metrics = update(state, loaded.batch.put(spec.mesh), constants)
    crops = np.asarray(loaded.batch.queries[0].crops(8, loader.images))
    return before, jax.device_get(after), float(metrics["train/loss"]), crops, loaded.batch.labels, config, spec  # fmt: skip

  (old, one, loss, crops, labels, config, spec), (_, other, again, *_) = step(1, 1), step(devices, parts)  # fmt: skip
  assert abs(loss - again) < 1e-12 and abs(loss - step(1, 1, 0.0)[2]) > 1e-3
  assert settings.difference(one.query_params, other.query_params) < 1e-9
  kept = np.asarray(mix.shares(rng.rng_for(0, rng.OBJECTIVE, 0), 16, 0.4), np.float64)
  assert np.array_equal(kept[::2], kept[1::2]) and len(np.unique(kept)) == 8
  mixed = lambda x: kept.reshape(-1, *(1,) * (x.ndim - 1)) * x + (1 - kept).reshape(-1, *(1,) * (x.ndim - 1)) * x.reshape(8, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)  # fmt: skip
  views = mixed((crops / np.float32(255) - np.float32(config.data.mean)) / np.float32(config.data.std))  # fmt: skip
  features, _ = spec.embed(old.query_params, old.query_stats, jnp.asarray(views))
  classifier = old.objective.params["classifier"]
  logits = torch.from_numpy(np.asarray(features) @ classifier["kernel"] + classifier["bias"])
  wanted = 0.9 * mixed(np.eye(10)[labels]) + 0.01
  by_hand = -(torch.from_numpy(wanted) * torch.log_softmax(logits, 1)).sum(1).mean().item()
  assert abs(loss - by_hand) < 1e-5


# Who is trained on.


def numbered(count=120, classes=4):
  """An array source whose image i is of the colour i, of as many images in class c as 3 c + 1 parts of it."""
  share = np.array([3 * c + 1 for c in range(classes)])
  labels = np.repeat(np.arange(classes), count * share // share.sum()).astype(np.int32)
  labels = np.random.RandomState(0).permutation(np.pad(labels, (0, count - len(labels)), mode="edge"))  # fmt: skip
  images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))
  return Source(
    "numbered", np.ascontiguousarray(images), None, labels, tuple("abcd"[:classes]), "train"
  )


def numbers(source):
  return source.images[:, 0, 0, 0].astype(int)


def per_class(source):
  return np.bincount(source.labels, minlength=len(source.classes))


PART = {"labels_per_class": 0, "label_share": 1.0, "hold_out": 0.0}


@pytest.mark.parametrize("seed", [0, 5])
def test_the_few_labels_are_the_first_draw_of_knn_and_linear(seed):
  source = numbered()
  for count in (1, 5):
    parts = labelled.part(source, seed, **PART | {"labels_per_class": count})
    wanted = few_labels.draw(source.labels, count, seed, 0)
    assert np.array_equal(numbers(parts.trained), np.sort(wanted)) and parts.held_out is None
    assert np.array_equal(per_class(parts.trained), [count] * 4)
    assert np.array_equal(parts.trained.labels, source.labels[numbers(parts.trained)])
  other = labelled.part(source, seed + 1, **PART | {"labels_per_class": 5})
  assert not np.array_equal(numbers(other.trained), numbers(parts.trained))


@pytest.mark.parametrize("few", [{}, {"labels_per_class": 3}, {"label_share": 0.25}])
def test_held_out_images_are_of_every_class_and_none_is_trained_on(few):
  source = numbered()
  parts = labelled.part(source, 0, **PART | few | {"hold_out": 0.2})
  one, other = numbers(parts.trained), numbers(parts.held_out)
  assert not set(one) & set(other) and len(set(other)) == len(other)
  assert np.array_equal(per_class(parts.held_out), np.round(0.2 * per_class(source)))
  if few:  # they are as without any held out
    alone = labelled.part(source, 0, **PART | few)
    assert np.array_equal(one, numbers(alone.trained))
    wanted = 3 if "labels_per_class" in few else np.round(0.25 * per_class(source))
    assert np.array_equal(per_class(parts.trained), np.broadcast_to(wanted, 4))
  else:
    assert len(one) + len(other) == source.num_examples
  again = labelled.part(numbered(), 0, **PART | few | {"hold_out": 0.2})
  assert np.array_equal(numbers(again.held_out), other)
  assert labelled.part(source, 0, **PART).trained is source


def test_no_batch_has_a_held_out_image(tmp_path):
  """Four epochs of a folder with broken files, whose places others take: files are read of those that are trained on alone."""
  source = numbered(40, 2)
  for i, label in enumerate(source.labels):
    place = tmp_path / "train" / source.classes[label] / f"{i:03d}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (i,) * 3).save(place)
    if i % 8 == 0:
      place.write_bytes(b"no image")
  whole = loading.load_source("folder", str(tmp_path), "train")
  parts = labelled.part(whole, 3, **PART | {"hold_out": 0.3})
  named = lambda source: {int(re.search(r"(\d+)\.png", name)[1]) for name in source.names()}
  trained, held_out = named(parts.trained), named(parts.held_out)
  assert not trained & held_out and len(trained | held_out) == 40 and len(held_out) == 12
  assert len({s.identity()["checksum"] for s in (whole, parts.trained, parts.held_out)}) == 3
  config = settings.tiny_config("one", objective="supervised", data__batch_size=8, views__crops=((8, 1.0, 1.0),))  # fmt: skip
  plan = build.plan_for(config, len(trained), 2, Machine("cpu", 1))
  loader = ResidentLoader(Reader(parts.trained, 0.5), sharding.create_mesh(jax.devices()[:1]))
  seen, labels = set(), {int(x[-7:-4]): label for x, label in zip(whole.names(), whole.labels, strict=True)}  # fmt: skip
  for loaded in loader.train(0, 4 * plan.steps_per_epoch, seed=3, plan=plan, ratio=(1, 1)):
    pixels = np.asarray(loaded.batch.queries[0].crops(8, loader.images))[:, 4, 4, 0].tolist()
    assert [labels[i] for i in pixels] == loaded.batch.labels.tolist()
    seen |= set(pixels)
  assert seen == {i for i in trained if i % 8}


# The score.


@pytest.mark.parametrize("classes", [2, 5, 6, 40])
def test_accuracies(classes):
  """Against scikit-learn where no two logits are equal, and as argmax and a sort have it where some are."""
  random = np.random.RandomState(classes)
  logits = random.standard_normal((300, classes)).astype(np.float32) * 9
  labels = np.concatenate([np.arange(classes), random.randint(classes, size=300 - classes)])
  found = accuracies(logits, labels)
  assert ("top5" in found) == (classes > 5)
  assert found["top1"] == (logits.argmax(1) == labels).mean()
  if classes > 5:
    assert found["top5"] == top_k_accuracy_score(labels, logits, k=5)
  loss = torch.nn.functional.cross_entropy(
    torch.from_numpy(logits.astype(np.float64)), torch.from_numpy(labels)
  )
  assert abs(found["loss"] - loss.item()) < 1e-12
  tied = logits.round(-1)
  found, order = accuracies(tied, labels), np.argsort(-tied, 1, kind="stable")
  assert found["top1"] == (tied.argmax(1) == labels).mean() < 1
  assert found.get("top5", 1) == (order[:, :5] == labels[:, None]).any(1).mean()
  assert accuracies(np.float32([[1e4, 0, -1e4]]), np.array([2]))["loss"] == 2e4


def test_the_best_step():
  """The first of equals, never the one before training; a run that goes on knows it from its lines."""
  best = Best()
  for step, top1 in ((0, 0.9), (10, 0.5), (20, 0.7), (30, 0.7), (40, 0.6)):
    best.see(step, top1)
  assert (best.step, best.top1) == (20, 0.7)
  again = Best()
  again.recall(Best.lines_of([{"step": 5}, {"step": 20, "classifier/top1": 0.7}, {"step": 30, "classifier/top1": 0.7}]))  # fmt: skip
  assert (again.step, again.top1) == (20, 0.7) and Best().step is None


def test_what_is_scored_is_the_average_where_one_is_kept():
  arrays = Variables(params={"classifier": "moving"}, memory={"classifier": "average"})
  state = types.SimpleNamespace(
    query_params=1, query_stats={"s": 2}, key_params=3, key_stats={"s": 4}, objective=arrays
  )
  assert scored(Supervised(), state) == ({"params": 1, "s": 2}, "moving")
  assert scored(Supervised(average=True), state) == ({"params": 3, "s": 4}, "average")


# Runs.

PRE = [
  "--config=configs/adco_digits.py", f"--config.model.arch={settings.TINY}", "--config.model.width=0.125", "--config.model.dim=16",
  "--config.method.bank.size=64", "--config.bn.group_size=8", "--config.data.mean=(.2,.3,.4)", "--config.eval.crop_fraction=.9",
]  # fmt: skip
FINE = [
  "--config=configs/finetune.py", "--config.data.batch_size=64", "--config.epochs=3", "--config.log.every_steps=6",
  "--config.save.every_steps=7", "--config.save.keep=1", "--config.optim.learning_rate=.02", "--config.optim.head_rate=50",
]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """The workdir of a pre-training, at step 60."""
  folder = str(tmp_path_factory.mktemp("pre") / "run")
  settings.save_run(folder, main.parse(PRE)[0], step=60)
  return folder


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
  """(workdir, fingerprint) of a fine-tuning in one go."""
  folder = tmp_path_factory.mktemp("tuned") / "run"
  return folder, tune(folder, pretrained)


def tune(folder, pretrained, *flags):
  """Runs it and returns the fingerprint that it prints."""
  from contextlib import redirect_stdout
  from io import StringIO

  with redirect_stdout(StringIO()) as said:
    assert (
      main.main([*FINE, f"--workdir={folder}", f"--config.pretrained={pretrained}", *flags]) == 0
    )
  return fingerprint(said.getvalue())


def test_it_takes_model_data_and_normalisation_of_the_pretraining(pretrained, tuned):
  there, here = (json.loads(open(f"{x}/config.json").read())["config"] for x in (pretrained, tuned[0]))  # fmt: skip
  for name in ("arch", "width", "stem", "dim", "head"):
    assert here["model"][name] == there["model"][name]
  for name in ("source", "dir", "mean", "std", "split", "test_split"):
    assert here["data"][name] == there["data"][name]
  assert here["eval"]["crop_fraction"] == 0.9 and here["bn"]["group_size"] == 8
  assert here["task"] == "pretrain" and here["objective"] == "supervised"
  assert here["init_from"] == pretrained and here["views"]["crops"] == [[16, 0.08, 1.0]]
  assert here["augment"]["policy"] == "none"  # that of digits mirrors nothing


def test_the_exported_classifier_is_the_one_that_was_scored(tuned, tmp_path, monkeypatch):
  """In torch, from the file and the card's lines alone: as many test images right as eval/ says, under the names of the classes."""
  workdir, _ = tuned
  results = {int(p.stem.split("-")[-1]): json.loads(p.read_text()) for p in (workdir / "eval").glob("finetune-digits-test-*.json")}  # fmt: skip
  last = max(results)
  assert last == 54 and set(results) <= {18, 36, 54}
  path = tmp_path / "whole.pth"
  command = [
    "--config=configs/export.py",
    f"--config.pretrained={workdir}",
    f"--config.out={path}",
  ]
  assert main.main(command) == 0
  lines = re.search(r"\*\*Use\*\*:\n\n```\w+\n(.*?)```", (tmp_path / "whole.pth.md").read_text(), re.S)[1]  # fmt: skip
  monkeypatch.chdir(tmp_path)
  made = {}
  exec(lines, made)
  test = loading.load_source("digits", "", "test")
  encoder = encoders.load_encoder(workdir)
  view = {"size": 16, "fraction": 0.9, "batch_size": 500}
  loader = ResidentLoader(Reader(test), sharding.create_mesh(jax.devices()[:1]))
  (images, count), *_ = loader.evaluation(np.arange(500), **view)
  data = encoder.config.data
  x = (np.asarray(images, np.float32) / 255 - np.float32(data.mean)) / np.float32(data.std)
  with torch.no_grad():
    logits = made["model"](torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()).numpy()
  assert count == 500 and logits.shape == (500, 10)
  scores = accuracies(logits, test.labels)
  assert results[last]["results"]["trained"] == {"all": scores["top1"], "top5": scores["top5"]}
  assert abs(results[last]["loss"] - scores["loss"]) < 1e-4
  assert 0 < scores["top1"] < 1 and scores["loss"] < np.log(10)
  assert json.loads((tmp_path / "whole.pth.classes.json").read_text()) == [*map(str, range(10))]
  report = (workdir / "report.html").read_text()
  assert "Classifier on digits, split test" in report and "Held-out loss" in report
  off = tmp_path / "features.pth"
  assert main.main([*command[:2], f"--config.out={off}", "--config.classifier=False"]) == 0
  assert "fc.weight" in torch.load(path) and "fc.weight" not in torch.load(off)


@pytest.mark.slow
def test_the_average_is_scored_and_exported(pretrained, tmp_path):
  """With decay 0 it is the state of one step before: the scores are those of that, and so is what encoder=key exports."""
  flags = "--config.method.average=True", "--config.ema.decay=0.0"
  tune(tmp_path / "run", pretrained, "--config.stop_at_step=17", "--config.save.every_steps=17")
  tune(tmp_path / "average", pretrained, *flags, "--config.stop_at_step=18")
  before, after = (encoders.load_encoder(str(tmp_path / "run")), encoders.load_encoder(str(tmp_path / "average"), "key"))  # fmt: skip
  assert (before.step, after.step) == (17, 18)
  assert settings.difference(before.variables, after.variables) < 1e-6
  one = encoders.open_classifier(str(tmp_path / "run"), before)
  other, raw = (encoders.open_classifier(str(tmp_path / "average"), after, player) for player in ("key", "query"))  # fmt: skip
  assert np.abs(one["kernel"] - other["kernel"]).max() < 1e-6 < np.abs(one["kernel"] - raw["kernel"]).max()  # fmt: skip
  path = tmp_path / "key.npz"
  command = ["--config=configs/export.py", f"--config.pretrained={tmp_path}/average", "--config.encoder=key"]  # fmt: skip
  assert main.main([*command, "--config.format=npz", f"--config.out={path}"]) == 0
  assert np.array_equal(np.load(path)["fc.weight"], other["kernel"].T)


def test_the_best_on_held_out_images_is_kept(tuned):
  workdir, _ = tuned
  scored = {x["step"]: x["classifier/top1"] for x in untimed(workdir) if "classifier/top1" in x}
  assert [*scored] == [0, 18, 36, 54]
  best = max((step for step in scored if step), key=lambda step: (scored[step], -step))
  assert set(saved_steps(str(workdir))) == {best, 54}
  plan = json.loads((workdir / "plan.json").read_text())
  assert plan["num_examples"] == 1297 - 131 and plan["data"]["number"] == 1297


def test_stopped_and_resumed_to_the_same_bits(pretrained, tuned, tmp_path):
  """Twice: within an epoch, and where it is evaluated; the pre-training is gone by then. A score that is lost is made again."""
  there = shutil.copytree(pretrained, tmp_path / "pre")
  workdir, number = tuned
  of = [f"--config.stop_at_step={step}" for step in (20, 36)]
  tune(tmp_path / "run", there, of[0])
  shutil.rmtree(there)
  tune(tmp_path / "run", there, of[1])
  assert not (tmp_path / "run" / "eval").exists()
  assert tune(tmp_path / "run", there) == number
  assert untimed(tmp_path / "run") == untimed(workdir)
  names = sorted(os.listdir(workdir / "eval"))
  assert saved_steps(str(tmp_path / "run")) == saved_steps(str(workdir))
  assert sorted(os.listdir(tmp_path / "run" / "eval")) == names
  (tmp_path / "run" / "eval" / names[0]).unlink()
  assert tune(tmp_path / "run", there) == number
  assert sorted(os.listdir(tmp_path / "run" / "eval")) == names


def begun(folder, pretrained, *flags):
  """(encoder, classifier) of a fine-tuning that has not moved: all rates are 0."""
  tune(folder, pretrained, "--config.stop_at_step=1", "--config.optim.learning_rate=0", "--config.bn.frozen=True",
       "--config.eval.every_epochs=0", *flags)  # fmt: skip
  encoder = encoders.load_encoder(str(folder))
  return encoder.variables, encoders.open_classifier(str(folder), encoder)


def alike(one, other):
  backbones = [[x["params"]["backbone"], x["batch_stats"]["backbone"]] for x in (one, other)]
  return settings.difference(*backbones) == 0


@pytest.mark.slow
def test_how_a_run_begins(pretrained, tuned, tmp_path):
  """A workdir and what was exported of it begin alike, and random weights otherwise; a classifier is new unless it is kept."""
  source = encoders.load_encoder(pretrained).variables
  files = [str(tmp_path / name) for name in ("pre.safetensors", "pre.npz")]
  for path in files:
    kind = "torchvision" if path.endswith("safetensors") else "npz"
    command = [
      "--config=configs/export.py",
      f"--config.pretrained={pretrained}",
      f"--config.out={path}",
    ]
    assert main.main([*command, f"--config.format={kind}"]) == 0
  started = [begun(tmp_path / f"run{i}", place) for i, place in enumerate((pretrained, *files))]
  assert all(alike(variables, source) for variables, _ in started)
  random, _ = begun(tmp_path / "random", pretrained, "--config.init=random")
  assert not alike(random, source)
  workdir, _ = tuned
  ours = encoders.open_classifier(str(workdir), encoders.load_encoder(str(workdir)))
  for keep, same in (("kept", True), ("new", False)):
    _, classifier = begun(tmp_path / keep, workdir, f"--config.init_head={keep}")
    assert np.array_equal(classifier["kernel"], ours["kernel"]) == same
    assert not np.array_equal(classifier["kernel"], 0 * ours["kernel"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Folders of images: of no class, of one class, of three."""
  root = tmp_path_factory.mktemp("folders")
  for name, places in {"none": [""], "one": ["a"], "three": ["a", "b", "c"]}.items():
    for place in places:
      (root / name / "train" / place).mkdir(parents=True)
      for i in range(24):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(root / name / "train" / place / f"{i}.png")
  return root


FOLDER = ["--config.data.source=folder", "--config.data.batch_size=8", "--config.bn.group_size=0"]
REFUSED = {
  "no pretraining": (["--config.pretrained="], "config.pretrained='': name the workdir", "--config.init=random"),
  "nothing there": (["--config.pretrained=NEW/none"], "no run there", "pretrained"),
  "both kinds of few": (["--config.labels_per_class=2", "--config.label_share=.5"], "config.label_share=0.5", "give one of the two"),
  "more than there are": (["--config.labels_per_class=120"], "config.labels_per_class=120: class 8 has only 118 images in train; use 118 or less",),
  "fewer than a batch": (["--config.labels_per_class=3"], "the data has 30 images, fewer than one batch; use a batch of 24 or less"),
  "no labels": ([*FOLDER, "--config.data.dir=DATA/none"], "config.objective='supervised': needs one label per image"),
  "forgotten labels": (["--config.data.labels=False"], "config.data.labels=False"),
  "one class": ([*FOLDER, "--config.data.dir=DATA/one"], "DATA/one': all 24 images of split train are of one class, a;"),
  "head of other classes": ([*FOLDER, "--config.data.dir=DATA/three", "--config.pretrained=TUNED", "--config.init_head=kept"], "the head of TUNED is of 10 classes, the data has 3; use new"),
  "head of no classifier": (["--config.init_head=kept"], "config.init_head='kept': PRE is a run of adco"),
  "too small": (["--config.eval.size=8", "--config.model.stem=imagenet", "--config.model.arch=resnet18", "--config.init=random"], "config.eval.size=8: resnet18 with the imagenet stem", "use 32 or more"),
  "another network": (["--config.model.width=.5"], "config.model.width=0.5: PRE has 0.125; leave it out"),
  "another objective": (["--config.objective=moco"], "config.objective='moco': trains no classifier"),
  "all held out": (["--config.hold_out=1"], "config.hold_out=1.0: use 0, or a share between 0 and 1"),
  "no share": (["--config.label_share=0"], "config.label_share=0.0"),
  "itself": (["--workdir=PRE"], "config.pretrained='PRE': is this run's own workdir", "config"),
  "test is train": ([*FOLDER, "--config.data.dir=DATA/three", "--config.data.test_split=train"], "config.data.test_split='train': reads images that are trained on"),
  "stages of another's network": (["--config.model.arch=flax.linen:Dense", "--config.init=random", "--config.optim.layer_decay=.5"], "config.optim.layer_decay=0.5", "use 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, pretrained, tuned, folders, tmp_path, capsys):
  """One line, status 2, and no workdir is left."""
  flags, *wanted = REFUSED[case]
  places = {"NEW": tmp_path, "DATA": folders, "TUNED": tuned[0], "PRE": pretrained}

  def put(text):
    for name, place in places.items():
      text = text.replace(name, str(place))
    return text

  command = [*FINE, f"--workdir={tmp_path}/run", f"--config.pretrained={pretrained}"]
  assert main.main([*command, *map(put, flags)]) == 2
  error = capsys.readouterr().err.strip()
  assert len(error.splitlines()) == 1 and error.startswith("error: "), error
  assert all(put(text) in error for text in wanted), error
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["labels_per_class=5", "label_share=.5", "hold_out=.2"])
def test_who_learns_without_labels_leaves_none_out(key, tmp_path, capsys):
  assert main.main([*PRE, f"--workdir={tmp_path}/run", f"--config.{key}"]) == 2
  error = capsys.readouterr().err
  assert f"config.{key.partition('=')[0]}=" in error and "adco trains without labels" in error
