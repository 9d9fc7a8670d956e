"""The published settings: resolved configs against the table of docs/published.md."""

import importlib
import pathlib
import re

import pytest

from adco_jax import build
from adco_jax.config import plan as planning
from adco_jax.config.plan import Machine

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
