"""Exported encoders: the lines on a card make a network that loads the file strictly and computes the same."""

import dataclasses
import json
import pickle
import re

import jax
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from adco_jax import main
from adco_jax.encoders import LoadedEncoder
from adco_jax.errors import ConfigError
from adco_jax.interop import builders, files, torch_weights
from adco_jax.models.heads import Encoder
from adco_jax.models.resnet import ARCHITECTURES
from adco_jax.runtime import sharding
from adco_jax.tasks import export as export_task
from adco_jax.tasks.export import check_probe, refuse_existing, write_weights
from adco_jax.workdir.fingerprints import fingerprint
from tests import torch_packages  # noqa: F401  (torchvision and timm can be imported)
from tests.settings import save_run

KINDS = {
  "by name": ("resnet18", 1.0, "imagenet"),
  "narrow bottlenecks": ("resnet50", 0.125, "imagenet"),
  "three stages": ("resnet8", 0.125, "small"),
  "three stages, wide": ("resnet8", 1.0, "imagenet"),
  "small stem": ("resnet10", 1.0, "small"),
}


def block_of(card):
  """The lines between the fences under Use."""
  return re.search(r"\*\*Use\*\*:\n\n```\w+\n(.*?)```", card, re.S)[1]


def execute(lines, folder, monkeypatch, **given):
  """What the names are after the lines were run in `folder`, where the file lies."""
  with monkeypatch.context() as here:
    here.chdir(folder)
    exec(lines, given)
  return given


def draw_encoder(arch, width, stem):
  """(encoder, variables) with statistics that no mix-up of them leaves unseen."""
  rng, encoder = np.random.RandomState(0), Encoder(arch, width, stem, 8, 2)
  images = np.zeros((1, 32, 32, 3), np.float32)
  shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))

  def draw(x):
    if x.ndim == 1:
      return rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)
    return (rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1]))).astype(x.dtype)

  return encoder, jax.tree.map(draw, shapes)


def forward(model, images):
  with torch.no_grad():
    return model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_lines_of_torchvision_and_timm(kind, tmp_path, monkeypatch):
  """Any stem, width and depth: strictly loaded, features agree; a card said `strict=True` of files that did not load."""
  arch, width, stem = KINDS[kind]
  images = np.random.RandomState(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
  encoder, variables = draw_encoder(arch, width, stem)
  ours = np.asarray(jax.jit(lambda v, x: encoder.apply(v, x, method="features"))(variables, images))
  path = str(tmp_path / "a.pth")
  files.write_state(path, torch_weights.export_encoder(variables, head=False))
  for form in ("torchvision", "timm"):
    lines = builders.lines(
      form, path, arch=arch, width=width, stem=stem, classes=0, size=32, mean=(0,), std=(1,)
    )
    model = execute("\n".join(lines[1:-1]), tmp_path, monkeypatch)["model"]
    assert np.abs(forward(model, images) - ours).max() <= 1e-4 * np.abs(ours).max(), form


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir of a narrow ResNet-8 with the small stem."""
  folder = tmp_path_factory.mktemp("export") / "run"
  flags = ["--config=configs/adco_digits.py", "--config.model.arch=resnet8",
           "--config.model.width=0.125", "--config.bn.group_size=8"]  # fmt: skip
  save_run(str(folder), main.parse(flags)[0], step=60)
  return folder


def export(run, path, *flags):
  command = ["--config=configs/export.py", f"--config.pretrained={run}", f"--config.out={path}"]
  return main.main([*command, *flags])


def test_a_classifier_carries_its_classes(run, tmp_path, monkeypatch):
  """The card's lines give logits; names of the classes are on the card and, all of them, beside the file."""
  rng = np.random.RandomState(0)
  probe = {"kernel": rng.standard_normal((32, 3)), "bias": rng.standard_normal(3)}
  np.savez(tmp_path / "p.npz", **probe, classes=np.array(["cat", "dog", "10"]))
  path = tmp_path / "whole.safetensors"
  assert export(run, path, f"--config.linear={tmp_path}/p.npz") == 0
  card = (tmp_path / "whole.safetensors.md").read_text()
  assert "- **Classes**: 3, in the order of `whole.safetensors.classes.json`: cat, dog, 10." in card
  assert json.loads((tmp_path / "whole.safetensors.classes.json").read_text()) == [
    "cat",
    "dog",
    "10",
  ]
  model = execute(block_of(card), tmp_path, monkeypatch)["model"]
  images = rng.standard_normal((2, 16, 16, 3)).astype(np.float32)
  logits = forward(model, images)
  model.fc = torch.nn.Identity()
  wanted = forward(model, images) @ probe["kernel"] + probe["bias"]
  np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
  np.savez(tmp_path / "q.npz", **probe, classes=np.array(["cat", "dog"]))
  np.savez(tmp_path / "r.npz", kernel=np.zeros((7, 10)), bias=np.zeros(10))
  for other in "qr":
    assert export(run, tmp_path / "q.pth", f"--config.linear={tmp_path}/{other}.npz") == 2


def test_a_probe_of_another_encoder_is_refused(capsys):
  """Of the same width: another step, player or run. An older file does not say; that is told."""
  encoder, variables = draw_encoder("resnet8", 0.125, "small")
  other = jax.tree.map(lambda x: x + 1, variables)
  stored = main.parse(["--config=configs/adco_digits.py"])[0]
  opened = LoadedEncoder(
    encoder, variables, stored, 60, sharding.create_mesh(jax.devices()[:1]), None
  )
  config = ConfigDict({"linear": "p.npz", "encoder": "query"})
  probe = {"kernel": np.zeros((32, 3)), "step": 60, "fingerprint": np.array(fingerprint(variables))}
  check_probe(probe, config, opened)
  with pytest.raises(
    ConfigError, match="p.npz': was learnt on another encoder, a query encoder of step 60"
  ):
    check_probe(probe, config, dataclasses.replace(opened, variables=other))
  assert not capsys.readouterr().out
  check_probe({"kernel": probe["kernel"]}, config, opened)
  assert "p.npz does not say on which encoder" in capsys.readouterr().out


def test_what_would_be_overwritten_is_refused(tmp_path):
  for ending in ("", ".md", ".classes.json", ".wrong"):
    (tmp_path / f"a{ending}").touch()
    with pytest.raises(ConfigError, match="exists; name another file"):
      refuse_existing(str(tmp_path / "a"))
    (tmp_path / f"a{ending}").unlink()
  refuse_existing(str(tmp_path / "a"))


def test_lines_of_our_own_formats(run, tmp_path, monkeypatch):
  assert export(run, tmp_path / "a.npz", "--config.format=npz") == 0
  found = execute(block_of((tmp_path / "a.npz.md").read_text()), tmp_path, monkeypatch)
  assert "fc.2.weight" in found["weights"]
  assert export(run, tmp_path / "a.stablehlo", "--config.format=stablehlo") == 0
  lines = block_of((tmp_path / "a.stablehlo.md").read_text())
  images = np.zeros((3, 16, 16, 3), np.uint8)
  found = execute(lines, tmp_path, monkeypatch, images=images)
  assert found["features"].shape == (3, 32)


def test_detectron2_is_refused_what_it_cannot_make(run, tmp_path, capsys):
  assert export(run, tmp_path / "a.pkl", "--config.format=detectron2") == 2
  error = capsys.readouterr().err
  assert "config.format='detectron2'" in error and "no resnet8" in error and "npz" in error
  assert not list(tmp_path.iterdir())
  able = {
    (arch, width, stem)
    for arch in ARCHITECTURES
    for width in (0.5, 1.0)
    for stem in ("imagenet", "small")
    if not builders.refusal("detectron2", arch, width, stem)
  }
  names = {(arch, 1.0, "imagenet") for arch in ("resnet18", "resnet34", "resnet50", "resnet101")}
  assert able == names | {(arch, 0.5, "imagenet") for arch in ("resnet50", "resnet101")}


def test_detectron2(tmp_path):
  """The file under detectron2's names; channels of stem, first stage and bottlenecks, pixels of 0..255."""
  _, variables = draw_encoder("resnet50", 0.125, "imagenet")
  config = ConfigDict({"format": "detectron2"})
  run = LoadedEncoder(None, variables, None, 60, None, None)
  write_weights(str(tmp_path / "a.pkl"), config, run, None)
  model = pickle.loads((tmp_path / "a.pkl").read_bytes())["model"]
  assert model["res2.0.conv1.weight"].shape == (8, 8, 1, 1)
  assert model["res5.0.shortcut.weight"].shape == (256, 128, 1, 1)
  lines = builders.lines(
    "detectron2", "a/b.pkl", arch="resnet50", width=0.5, stem="imagenet", classes=0, size=224,
    mean=(0.485, 0.456, 0.406), std=(0.5, 0.25, 0.2),
  )  # fmt: skip
  stripped = [line.strip() for line in lines]
  wanted = ["WEIGHTS: b.pkl", "DEPTH: 50", "STEM_OUT_CHANNELS: 32", "RES2_OUT_CHANNELS: 128",
            "WIDTH_PER_GROUP: 32", "PIXEL_MEAN: [123.675, 116.28, 103.53]"]  # fmt: skip
  assert set(wanted) <= set(stripped)


def test_features_that_are_all_0_are_compared():
  zeros, ones = np.zeros((2, 3)), np.ones((2, 3))
  found = [export_task._difference(*pair) for pair in ((zeros, zeros), (zeros, ones), (2 * ones, ones))]  # fmt: skip
  assert found == [0, 1, 0.5]
