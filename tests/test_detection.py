"""Weights and configs for detectron2's R50-C4: names, shapes and pixels, without detectron2."""

import ast
import pathlib
import pickle

import jax
import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict

from adco_jax.encoders import LoadedEncoder
from adco_jax.interop import builders
from adco_jax.models.heads import Encoder
from adco_jax.tasks.export import write_weights
from configs import adco_r50

FOLDER = pathlib.Path(__file__).parent.parent / "launch" / "detection"
STAGES = {
  "res2": (3, 64, 64, 256),
  "res3": (4, 256, 128, 512),
  "res4": (6, 512, 256, 1024),
  "res5": (3, 1024, 512, 2048),
}


def read(name):
  """A config of launch/detection over the one that it is based on, as {dotted key: value}."""
  here = yaml.safe_load((FOLDER / name).read_text())
  base = read(here.pop("_BASE_")) if "_BASE_" in here else {}
  return base | dict(leaves(here))


def leaves(tree, before=""):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, f"{before}{key}.")
    else:
      yield before + key, value


def convolution(name, outputs, inputs, side):
  """Arrays of a convolution without bias and of its norm: scale, offset and two statistics, no counter."""
  arrays = {f"{name}.weight": (outputs, inputs, side, side)}
  norms = ("weight", "bias", "running_mean", "running_var")
  return arrays | {f"{name}.norm.{x}": (outputs,) for x in norms}


def model_arrays():
  """{name: shape} of what detectron2's R50-C4 has of a ResNet-50: the stem and res2..res4 under backbone, res5 under the head."""
  arrays = convolution("backbone.stem.conv1", 64, 3, 7)
  for stage, (blocks, inputs, inner, outputs) in STAGES.items():
    place = "roi_heads" if stage == "res5" else "backbone"
    for i in range(blocks):
      name, before = f"{place}.{stage}.{i}", outputs if i else inputs
      arrays |= convolution(f"{name}.conv1", inner, before, 1)
      arrays |= convolution(f"{name}.conv2", inner, inner, 3)
      arrays |= convolution(f"{name}.conv3", outputs, inner, 1)
      arrays |= {} if i else convolution(f"{name}.shortcut", outputs, inputs, 1)
  return arrays


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The model in the file that an export of a ResNet-50 at full width writes."""
  encoder = Encoder("resnet50", 1.0, "imagenet", 8, 2)
  images = np.zeros((1, 64, 64, 3), np.float32)
  shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  path = str(tmp_path_factory.mktemp("detection") / "r50.pkl")
  run = LoadedEncoder(None, variables, None, 60, None, None)
  write_weights(path, ConfigDict({"format": "detectron2"}), run, None)
  with open(path, "rb") as file:
    return pickle.load(file)


def test_every_array_of_r50_c4_has_one_of_the_export(model):
  """By detectron2's rule: the longest name in the file that a name of the model ends in, whole between dots."""
  assert (
    model["matching_heuristics"] and model["__author__"] != "Caffe2"
  )  # whose names it would change
  there, used = model["model"], []
  for name, shape in model_arrays().items():
    found = max((x for x in there if name.endswith(f".{x}")), key=len, default=None)
    assert found and there[found].shape == shape, name
    used.append(found)
  assert sorted(used) == sorted(there) and len(there) == 53 * 5
  new = ("roi_heads.res5.norm.weight", "proposal_generator.rpn_head.conv.weight")
  assert not any(name.endswith(f".{x}") for name in new for x in there)


@pytest.mark.parametrize("name", ["voc.yaml", "coco.yaml"])
def test_configs_describe_the_exported_network(name):
  """Pixels and network as the card of an export of configs/adco_r50.py says them."""
  config, ours = read(name), adco_r50.get_config()
  lines = builders.lines(
    "detectron2", "r50.pkl", arch=ours.model.arch, width=ours.model.width, stem=ours.model.stem, classes=0,
    size=224, mean=ours.data.mean, std=ours.data.std,
  )  # fmt: skip
  card = dict(leaves(yaml.safe_load("\n".join(lines[1:-1]))))
  card |= {"MODEL.WEIGHTS": ""}
  defaults = {"MODEL.RESNETS.STEM_OUT_CHANNELS": 64, "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
              "MODEL.RESNETS.WIDTH_PER_GROUP": 64}  # fmt: skip
  assert {key: (defaults | config).get(key) for key in card} == card
  assert config["INPUT.FORMAT"] == "RGB" and config["MODEL.PIXEL_MEAN"][0] == pytest.approx(
    255 * 0.485
  )
  iterations = [*config["SOLVER.STEPS"], config["SOLVER.MAX_ITER"]]
  assert iterations == sorted(iterations)
  script = ast.parse((FOLDER / "train.py").read_text())
  classes = [node.name for node in script.body if isinstance(node, ast.ClassDef)]
  assert config["MODEL.ROI_HEADS.NAME"] in classes
