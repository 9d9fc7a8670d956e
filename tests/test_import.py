"""Checkpoints of other programs: how they wrap a ResNet, what is said of them, and that training goes on from them."""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from adco_jax import main
from adco_jax.interop import authors, files
from tests import settings
from tests import torch_reference as reference

D = 16
IMPORT = [
  "--config=configs/import.py:adco_digits", "--config.model.arch=resnet8", "--config.model.width=0.125",
  "--config.model.stem=imagenet", "--config.model.dim=16", "--config.method.bank.size=32",
  "--config.bn.group_size=8",
]  # fmt: skip


def weights(seed=0, arch="resnet8", **fc):
  torch.manual_seed(seed)
  return reference.scramble(reference.ResNet(arch, 8, **fc), seed).state_dict()


def named(prefix, seed=0, **kind):
  return {f"{prefix}{name}": value for name, value in weights(seed, **kind).items()}


def pair(query, key):
  return named(query) | named(key, 1)


OPTIONS = argparse.Namespace(lr=0.1)
LIGHTNING = {"pytorch-lightning_version": "2.5.0", "global_step": 3, "optimizer_states": [{}]}

# What a file holds -> where its query (and key) encoder are found.
WRAPPINGS = {
  "torchvision": (weights(classes=7), ""),
  "timm": ({"state_dict": named(""), "arch": "resnet", "args": OPTIONS}, "state_dict."),
  "model": ({"model": named(""), "epoch": 3}, "model."),
  "compiled": ({"model": named("_orig_mod.")}, "model._orig_mod."),
  "compiled, parallel": ({"model": named("_orig_mod.module.")}, "model._orig_mod.module."),
  "lightning": (LIGHTNING | {"state_dict": named("model.backbone.")}, "state_dict.model.backbone."),
  "encoder": ({"net": named("encoder.") | {"head.0.weight": torch.ones(3)}}, "net.encoder."),
  "teacher alone": ({"teacher": named("backbone.")}, "teacher.backbone."),
  "swav": (
    {"state_dict": named("module.") | {"module.prototypes.weight": torch.ones(3, 2)}},
    "state_dict.module.",
  ),
  "moco": (
    {"state_dict": pair("module.encoder_q.", "module.encoder_k.")},
    "state_dict.module.encoder_q.", "state_dict.module.encoder_k.",
  ),
  "moco, key first": ({"encoder_k": named("", 1), "encoder_q": named("")}, "encoder_q.", "encoder_k."),
  "moco v3": (
    {"state_dict": pair("module.base_encoder.", "module.momentum_encoder.")},
    "state_dict.module.base_encoder.", "state_dict.module.momentum_encoder.",
  ),
}  # fmt: skip


def opened(content, tmp_path, prefix=""):
  torch.save(content, tmp_path / "a.pth")
  return authors.parse_checkpoint(files.read(str(tmp_path / "a.pth")), prefix)


@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrappings(name, tmp_path):
  """Whatever stands before the names, the right arrays are found, the key encoder of known pairs too."""
  content, query, *key = WRAPPINGS[name]
  held = opened(content, tmp_path)
  assert held.taken_from == (query, key[0] if key else None)
  for found, seed in ((held.query, 0), (held.key, 1))[: 1 + len(key)]:
    for array, value in weights(seed).items():
      np.testing.assert_array_equal(found[array], value.numpy())


DINO = {
  "student": named("module.backbone.") | {"module.head.mlp.0.weight": torch.ones(2, 2)},
  "teacher": named("backbone.", 1),
  "args": OPTIONS,
  "epoch": 5,
}  # fmt: skip


def test_several_networks_are_named_and_one_is_chosen(tmp_path):
  """Student and teacher both there: neither is taken before the user says which."""
  with pytest.raises(ValueError) as caught:
    opened(DINO, tmp_path)
  said = str(caught.value)
  count = len(weights())
  assert f"student.module.backbone. ({count} arrays)" in said
  assert (
    f"teacher.backbone. ({count} arrays)" in said and "--config.prefix=teacher.backbone" in said
  )
  for prefix, seed in (("teacher", 1), ("teacher.backbone.", 1), ("student", 0)):
    held = opened(DINO, tmp_path, prefix)
    np.testing.assert_array_equal(held.query["conv1.weight"], weights(seed)["conv1.weight"].numpy())
    assert held.epoch == 5 and not held.key
  with pytest.raises(ValueError, match=r"prefix='teach' is none of .*student"):
    opened(DINO, tmp_path, "teach")
  nested = (
    {"model": named(""), "ema": {"model": named("", 1)}},
    named("encoder.") | named("target.encoder.", 1),
  )
  for content, first, second in zip(nested, ("model", "encoder"), ("ema", "target"), strict=True):
    for prefix in (
      first,
      f"{first}.",
      f"{second}.{first}",
      second,
    ):  # a whole name is no part of a longer one
      of = f"{first}." if prefix.startswith(first) else f"{second}.{first}."
      assert opened(content, tmp_path, prefix).taken_from == (of, None)
  both = {"state_dict": pair("encoder_q.", "encoder_k."), "queue": torch.zeros(D, 8)}
  assert opened(both, tmp_path, "encoder_k").taken_from == ("state_dict.encoder_k.", None)


REFUSED = {
  "a transformer": (
    {"model": {"blocks.0.norm1.weight": torch.ones(2), "blocks.1.norm1.weight": torch.ones(2)}},
    "it holds model.blocks... (2)",
  ),
  "nothing": ({"epoch": 3}, "it holds no arrays"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_resnet_says_what_was_found(name, tmp_path):
  content, wanted = REFUSED[name]
  with pytest.raises(ValueError, match=re.escape(wanted)):
    opened(content, tmp_path)


def test_a_backbone_with_more_in_it_is_another(tmp_path, capsys):
  """Three convolutions in the stem, squeeze and excitation: what is not used would change every feature."""
  for more in ("conv2.weight", "layer1.0.se.fc1.weight"):
    torch.save(weights() | {more: torch.ones(2)}, tmp_path / "a.pth")
    assert main.main([*IMPORT, f"--config.file={tmp_path}/a.pth", f"--workdir={tmp_path}/run"]) == 2
    assert f"the first is {more}" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_all_keys_that_differ_are_named_at_once(tmp_path, capsys):
  torch.save(weights(dim=D), tmp_path / "a.pth")
  flags = ["--config=configs/import.py", f"--config.file={tmp_path}/a.pth"]
  assert main.main([*flags, f"--workdir={tmp_path}/run"]) == 2
  use = "--config.model.arch=resnet8 --config.model.width=0.125 --config.model.dim=16"
  assert use in capsys.readouterr().err


def photographs(folder, count=24):
  rng = np.random.RandomState(0)
  for i in range(count):
    path = folder / "train" / "ab"[i % 2] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.randint(0, 256, (20, 20, 3), np.uint8)).save(path)
  return folder


FOLDER = [
  "--config=configs/import.py:adco_r50", f"--config.model.arch={settings.TINY}", "--config.model.width=0.125",
  "--config.model.dim=16", "--config.method.bank.size=32", "--config.bn.group_size=1", "--config.data.batch_size=8",
  "--config.views.crops=((8,.2,1.),(8,.2,1.))", "--config.epochs=2", "--config.eval.every_epochs=0",
  "--config.data.loader=resident", "--config.data.resident_size=16", "--config.augment.policy=flip",
]  # fmt: skip


@pytest.fixture(scope="module")
def adco(tmp_path_factory):
  """(what the import printed, workdir): AdCo's checkpoint after 16 epochs of ImageNet."""
  folder = tmp_path_factory.mktemp("adco")
  kind = {"arch": settings.TINY, "dim": D}
  state = named("module.encoder_q.", **kind) | named("module.encoder_k.", 1, **kind)
  bank = {"W": torch.randn(D, 32), "v": torch.randn(D, 32)}
  torch.save({"state_dict": state, "epoch": 16, "Memory_Bank": bank}, folder / "a.pth.tar")
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    assert main.main([*FOLDER, f"--config.file={folder}/a.pth.tar", f"--workdir={folder}/run"]) == 0
  return printed.getvalue(), folder / "run"


def test_printed_commands_train(adco, tmp_path, capsys):
  """On a smaller data set than the config's all epochs are trained; it said `resuming at 80072 of 12`, and stopped."""
  said, imported = adco
  score, train = (
    [word.replace("=DIR", f"={photographs(tmp_path / 'images')}") for word in shlex.split(line)[3:]]
    for line in re.findall(r"python -m adco_jax\.main .*", said)
  )
  workdir = str(shutil.copytree(imported, tmp_path / "run"))
  train, score = ([w.replace(str(imported), workdir) for w in words] for words in (train, score))
  assert main.main(train) == 0
  said = capsys.readouterr().out
  assert "resuming at step 4 of 10" in said and "done at step 10 of 10" in said
  plan = json.loads((tmp_path / "run" / "plan.json").read_text())
  assert plan["num_examples"] == 24 and plan["imported"]["epoch"] == 16 and plan["data"]
  assert main.main([w.replace(f"--workdir={workdir}", f"--workdir={tmp_path}/next") for w in train]
                   + [f"--config.init_from={imported}", "--config.stop_at_step=4"]) == 0  # fmt: skip
  said = capsys.readouterr().out
  assert "step 4: encoders, objective" in said and "stopped at step 4 of 10" in said
  assert score[0] == "--config=configs/knn.py" and f"--config.pretrained={workdir}" in score


def test_an_import_that_was_not_trained_yet_is_not_begun_anew(tmp_path, capsys):
  """Another config in its workdir would set the weights aside and train from random ones."""
  torch.save({"model": named("module.base_encoder.", arch=settings.TINY)}, tmp_path / "a.pth")
  workdir = f"--workdir={tmp_path}/run"
  assert main.main([*FOLDER, f"--config.file={tmp_path}/a.pth", workdir]) == 0
  assert "at step 0, before its first step" in capsys.readouterr().out
  assert not json.loads((tmp_path / "run" / "plan.json").read_text())["imported"]["head"]
  flags = ["--config=configs/adco_r50.py", *FOLDER[1:], workdir, "--config.method.temperature=0.2"]
  assert main.main([*flags, f"--config.data.dir={photographs(tmp_path / 'images')}"]) == 2
  assert f"--config.init_from={tmp_path}/run" in capsys.readouterr().err
  assert os.path.isdir(tmp_path / "run" / "checkpoints" / "0")


def test_missing_package(tmp_path, monkeypatch, capsys):
  """Without PyTorch a .pth is refused with what to install; .safetensors needs none."""
  monkeypatch.setitem(sys.modules, "torch", None)
  path = tmp_path / "a.pth"
  path.write_bytes(b"PK")
  assert main.main([*IMPORT, f"--config.file={path}", f"--workdir={tmp_path}/run"]) == 2
  error = capsys.readouterr().err
  assert f"config.file='{path}'" in error and "pip install torch" in error
  save_file({"a": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
  assert files.read(str(tmp_path / "a.safetensors"))["a"].shape == (3,)


@pytest.mark.parametrize(
  "state", [[], {0: None}, {99: {"momentum_buffer": torch.ones(2)}}, {"x": {}}]
)
def test_an_optimiser_that_cannot_be_read_is_left(tmp_path, state):
  """Its encoders are what was asked for."""
  content = {
    "state_dict": pair("module.encoder_q.", "module.encoder_k."),
    "optimizer": {"state": state},
  }
  held = opened(content, tmp_path)
  assert held.momentum == {} and held.query["conv1.weight"].shape == weights()["conv1.weight"].shape
