"""Settings of an objective as keys of config.method; a program that hands its own things to `train`."""

import dataclasses

import numpy as np
import pytest

import adco_jax
from adco_jax import main
from adco_jax.config import command_line, config_files, keys, method, outside, ranges
from adco_jax.data.sources.base import Source
from adco_jax.encoders import LoadedEncoder
from adco_jax.models.heads import Encoder
from adco_jax.objectives.adco import AdCo
from adco_jax.objectives.moco import MoCo
from adco_jax.runtime.files import write_json
from adco_jax.runtime.sharding import create_mesh
from adco_jax.workdir.files import FORMAT, canonical, flatten, moved, read_history, undone
from adco_jax.workdir.metrics import read_metrics


def asked(*words):
  return command_line.read(["--config=adco_digits", *words]).config


@pytest.mark.parametrize("name", method.OBJECTIVES)
def test_every_setting_of_ours_has_a_rule_or_two_values(name):
  found = dict(method.fields(method.find(name)))
  assert found
  for key, field in found.items():
    assert field.metadata["rule"] or isinstance(field.default, bool), key


def test_the_complete_file_lists_adco_s_with_its_defaults():
  config = config_files.load("adco_r50")
  assert config.objective == "adco" and config.method.to_dict() == method.table(AdCo)


def test_another_objective_keeps_what_both_have():
  """Temperature .4 is the recipe's, not MoCo's own .2; the bank's keys are gone, the queue's are there."""
  config = asked("--config.objective=moco", "--config.method.queue_size=64")
  assert config.method.to_dict() == {"temperature": 0.4, "in_batch": True, "queue_size": 64}
  assert method.create(MoCo, config.method.to_dict()) == MoCo(0.4, True, 64)


@pytest.mark.parametrize(
  ("words", "line"),
  [
    (
      ["--config.objective=moco", "--config.method.bank.size=64"],
      "--config.method.bank.size: no such key; the objective has method.in_batch, method.queue_size, method.temp",
    ),
    (
      ["--config.method.queue_size=64"],
      "--config.method.queue_size: no such key; the objective has method.bank.init, method.bank",
    ),
    (
      ["--config.objective=mocov2"],
      "config.objective='mocov2': did you mean mocov3? use one of adco",
    ),
    (
      ["--config.bank.size=64"],
      "--config.bank.size: no such key; did you mean --config.method.ban",
    ),
    (["--config.temperature=1"], "or --config.method.temperature?"),
  ],
)
def test_keys_of_others_are_refused(words, line, tmp_path, capsys):
  assert main.main(["--config=adco_digits", *words, f"--workdir={tmp_path}/run"]) == 2
  said = capsys.readouterr().err
  assert line in said and said.count("\n") == 1


def test_rules_and_fixed_keys_are_the_fields():
  config = asked("--config.objective=moco")
  config.method.queue_size = 0
  with pytest.raises(adco_jax.ConfigError, match="config.method.queue_size=0: use 1 or more"):
    ranges.check(config)
  fixed = {key for key, _ in method.fields(AdCo) if method.is_fixed(key, "adco")}
  assert fixed == {"bank.size", "bank.init", "bank.init_views", "bank.init_epochs"}
  assert method.is_fixed("queue_size", "moco") and not method.is_fixed("temperature", "moco")


OLD = {
  "objective": "adco", "temperature": 0.3, "in_batch": False, "method": {}, "optim": {"momentum": 0.9},
  "bank": {
    "size": 64, "temperature": 0.1, "learning_rate": 1.0, "weight_decay": 0.0, "momentum": 0.5, "init": "keys",
    "init_views": "authors", "order": "alternating",
  },
}  # fmt: skip


def test_configs_of_formats_3_and_4_are_read_as_they_are_now(tmp_path):
  here = moved(OLD)
  assert here["method"] == {"temperature": 0.3, "in_batch": False, "bank": OLD["bank"]}
  assert "bank" not in here and "temperature" not in here and here["optim"] == OLD["optim"]
  queue = moved(OLD | {"objective": "moco"})
  assert queue["method"] == {"temperature": 0.3, "in_batch": False, "queue_size": 64}
  mine = moved(OLD | {"objective": "mine:InBatch", "method": {"tau": 0.2}})
  assert mine["method"] == {"tau": 0.2} and "bank" not in mine
  assert moved({k: v for k, v in OLD.items() if k != "method"})["method"] == here["method"]  # 3
  rows = [{"step": 8, "changes": [["bank.temperature", 0.1, 0.2], ["epochs", 1, 2]]}]
  stored = {"format": 4, "config": OLD, "history": rows}
  write_json(tmp_path / "config.json", stored)
  assert read_history(str(tmp_path))[0]["changes"][0] == ["method.bank.temperature", 0.1, 0.2]
  assert undone(str(tmp_path), 8) == {"method.bank.temperature": 0.1, "epochs": 1}
  config = asked()
  assert set(flatten(here)) <= {*keys.walk(config)} and FORMAT == 5
  assert canonical(config.to_dict())["method"].keys() == here["method"].keys()


@dataclasses.dataclass(frozen=True)
class Tilted(MoCo):
  tilt: float = 1.0


SMALL = [
  "--config.method.bank.size=64", "--config.model.width=0.0625", "--config.model.dim=16", "--config.bn.group_size=8",
  "--config.epochs=2", "--config.eval.every_epochs=1", "--config.log.every_steps=1", "--config.data.num_examples=128",
]  # fmt: skip


def test_a_program_hands_over_its_own(tmp_path):
  """Source, objective with settings, backbone and hook reach the run, and are in its records by name."""
  rng = np.random.RandomState(0)
  images, labels = rng.randint(0, 256, (128, 16, 16, 3), np.uint8), np.arange(128) % 4
  source = Source("noise", images, None, labels.astype(np.int32), ("a", "b", "c", "d"), "train")
  seen = []

  def hook(encoder):
    seen.append((encoder.step, encoder.embed(images[:3]).shape))
    return {"mine/steps": encoder.step}

  workdir = str(tmp_path / "run")
  config = asked(*SMALL)
  encoder = adco_jax.train(
    config, workdir, source=source, objective=Tilted(0.3, queue_size=64, tilt=2.0), hooks=[hook]
  )
  assert encoder.config.objective == f"{__name__}:Tilted" and encoder.step == 4
  assert encoder.config.method.to_dict() == {
    "temperature": 0.3, "in_batch": False, "queue_size": 64, "tilt": 2.0,
  }  # fmt: skip
  assert config.objective == "adco"  # the program's own is as it was
  assert encoder.config.data.source == "handed:data.source"
  assert seen == [(0, (3, 16)), (2, (3, 16)), (4, (3, 16))]
  assert [x["mine/steps"] for x in read_metrics(workdir) if "mine/steps" in x] == [0, 2, 4]


def test_what_has_no_name_is_found_by_its_option():
  first, second = lambda directory, split: 1, lambda dtype: 2
  names = outside.name_of(first, "data.source"), outside.name_of(second, "model.arch")
  assert [outside.load(name, "any")(0, 0) for name in names[:1]] == [1]
  assert outside.load(names[1], "any")(0) == 2
  assert outside.name_of(Source, "data.source") == "adco_jax.data.sources.base:Source"


def test_a_hook_compiles_nothing_again():
  """Encoders of one network share one function, whatever their variables and steps."""
  config, mesh = asked(), create_mesh()
  made = lambda dim, step: LoadedEncoder(
    Encoder("resnet8", 0.25, "small", dim, 8), {}, config, step, mesh, dict
  )
  assert made(16, 0).forward is made(16, 1).forward
  assert made(16, 0).forward is not made(8, 0).forward


def test_what_cannot_be_handed_over(tmp_path):
  config = asked(*SMALL)
  config.eval.every_epochs = 0
  with pytest.raises(adco_jax.ConfigError, match="hooks are called at evaluations"):
    adco_jax.train(config, str(tmp_path / "a"), hooks=[lambda encoder: None])
  config.data.source = "handed:gone"
  with pytest.raises(adco_jax.ConfigError, match="was handed to adco_jax.train by a program"):
    adco_jax.train(config, str(tmp_path / "b"))
  assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
