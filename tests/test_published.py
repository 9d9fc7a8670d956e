"""The published settings: resolved configs against the table of docs/published.md."""

import importlib
import pathlib
import re

import pytest

from adco_jax import build
from adco_jax.config import plan as planning
from adco_jax.config.plan import Machine
from adco_jax.views.augment import Policy, policies_for

TABLE = pathlib.Path(__file__).parent.parent / "docs" / "published.md"


def table():
  """{config: {key: text}}, a dash meaning the cell to its left."""
  rows = [
    line.strip("|\n ").split("|") for line in TABLE.read_text().splitlines() if line.startswith("|")
  ]
  rows = [[cell.strip() for cell in row] for row in rows]
  names = [re.sub("`", "", cell) for cell in rows[0][2:]]
  found = {name: {} for name in names}
  for key, _, *cells in rows[2:]:
    for i, name in enumerate(names):
      cells[i] = cells[i - 1] if cells[i] == "-" else cells[i]
      found[name][key.strip("`")] = cells[i]
  return found


@pytest.mark.parametrize("name", table())
def test_configs_are_the_published_ones(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  wanted = table()[name]
  assert len(wanted) >= 22
  for key, text in wanted.items():
    value = planning.get(config, key)
    assert str(value) == text or float(value) == float(text), f"{key} is {value}, published {text}"


def test_crops_are_the_published_ones():
  """MultiCrop_Transform.py and argparser.py of the authors: sides, and bounds of the area."""
  crops = importlib.import_module("configs.adco_r50_multicrop").get_config().views.crops
  assert crops == (
    (224, 0.2, 1.0), (224, 0.2, 1.0), (192, 0.172, 0.86), (160, 0.143, 0.715), (128, 0.114, 0.571),
    (96, 0.086, 0.429),
  )  # fmt: skip
  single = importlib.import_module("configs.adco_r50").get_config()
  assert single.views.crops == ((224, 0.2, 1.0),) * 2 and single.augment.policy == "moco_v2"


def test_resolved_sizes():
  """256 steps of initialisation and 5,004 per epoch at K = 65,536; 32 at 8,192; rates as given."""
  for name, fill in (("adco_r50", 256), ("adco_r50_sym_k8192", 32)):
    config = importlib.import_module(f"configs.{name}").get_config()
    plan = build.plan_for(config, 1281167, 1000, Machine(backend="cpu", devices=8))
    assert (plan.fill_steps, plan.steps_per_epoch) == (fill, 5004)
    assert plan.learning_rate == config.optim.learning_rate and plan.lr_final == 0.0006


def test_the_demo_of_moco_is_the_published_one():
  """colab/moco_cifar10_demo.ipynb, as its log prints its arguments: 200 epochs of 97 steps."""
  config = importlib.import_module("configs.moco_cifar10_demo").get_config()
  wanted = {
    "objective": "moco", "epochs": 200, "model.arch": "resnet18", "model.stem": "small", "model.width": 1.0, "model.dim": 128,
    "model.head": {"layers": 1, "width": 0, "norm": "none"}, "views.mode": "single", "views.crops": ((32, 0.08, 1.0),) * 2,
    "views.ratio": (3 / 4, 4 / 3), "views.pad": 0, "method": {"temperature": 0.1, "in_batch": False, "queue_size": 4096},
    "ema.decay": 0.99, "ema.schedule": "constant", "bn.group_size": 64, "bn.shuffle_block": 0, "bn.running_from": "mean",
    "optim.name": "sgd", "optim.learning_rate": 0.06, "optim.scale_from_batch": 0, "optim.lr_final": 0.0,
    "optim.schedule": "cosine_epoch", "optim.warmup_epochs": 0.0, "optim.momentum": 0.9, "optim.weight_decay": 5e-4,
    "optim.no_decay": "", "data.batch_size": 512, "data.mean": (0.4914, 0.4822, 0.4465), "data.std": (0.2023, 0.1994, 0.2010),
  }  # fmt: skip
  for key, value in wanted.items():
    found = planning.get(config, key)
    assert (found.to_dict() if isinstance(value, dict) else found) == value, key
  colours = Policy(0.4, 0.4, 0.4, 0.1, 0.8, 0.2, flip_probability=0.5)
  assert policies_for(config.augment.policy, 2) == (colours, colours)
  plan = build.plan_for(config, 50000, 10, Machine(backend="gpu", devices=1))
  assert (plan.steps_per_epoch, plan.total_steps, plan.shuffle_block) == (97, 19400, 512)
  assert plan.compute_dtype == "float32"
