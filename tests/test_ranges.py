"""Every key of every task has its range and shape; what lies outside is one line, before anything runs."""

import importlib
import pathlib

import pytest

from adco_jax import main
from adco_jax.config import ranges
from adco_jax.errors import ConfigError
from adco_jax.workdir.files import flatten
from tests.settings import tiny_config

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SHARES, SCALE = "0 < smallest <= largest <= 1", "on the scale 0..1, not 0..255"

REFUSED = {
  "temperature 0": (dict(method__temperature=0.0), "config.method.temperature=0.0: use a temperature above 0"),
  "bank temperature": (dict(method__bank__temperature=-1.0), "config.method.bank.temperature=-1.0"),
  "bank size": (dict(method__bank__size=0), "config.method.bank.size=0: use 1 or more"),
  "mode": (dict(views__mode="both"), "use one of one, single, symmetric"),
  "two crops": (dict(views__mode="symmetric", views__crops=((8, 0.2, 1.0),)), "needs exactly two crops"),
  "crop side": (dict(views__crops=((7, 0.2, 1.0), (8, 0.2, 1.0))), "use sides of 8 pixels or more"),
  "crop side of half a pixel": (dict(views__crops=((224.0, 0.2, 1.0), (224, 0.2, 1.0))), "whole numbers"),
  "float64 that is none": (dict(compute_dtype="float64"), "config.compute_dtype='float64': JAX would make float32 of it"),
  "dtype": (dict(compute_dtype="float16"), "use one of auto, float32"),
  "crop share": (dict(views__crops=((8, 0.2, 1.5), (8, 0.2, 1.0))), SHARES),
  "one crop, flat": (dict(views__crops=(32, 0.2, 1.0)), "each crop is (side, smallest share, largest share)"),
  "a number for crops": (dict(views__crops=(32,)), "each crop is (side, smallest share, largest share)"),
  "four crops in a row": (dict(views__crops=((8, 0.2, 1.0, 8), (8, 0.2, 1.0))), "each crop is"),
  "words for crops": (dict(views__crops=("a", "b")), "each crop is"),
  "ratio of three": (dict(views__ratio=(1, 2, 3)), "two numbers 0 < lowest <= highest"),
  "mean of 0..255": (dict(data__mean=(123.7, 116.3, 103.5)), SCALE),
  "std of 0..255": (dict(data__std=(58.4, 57.1, 57.4)), SCALE),
  "std of two": (dict(data__std=(0.5, 0.5)), "three numbers"),
  "std of nothing": (dict(data__std=(0.5, 0.5, 0.0)), "above 0"),
  "falling epochs": (dict(optim__step_epochs=(160, 120)), "increase"),
  "joined epochs": (dict(optim__step_epochs=(120, 160, 30, 60)), "increase"),
  "hold out": (dict(eval__hold_out=0.0), "use a share between 0 and 1"),
  "seed": (dict(seed=2**32), "use 4294967295 or less"),
  "infinity": (dict(epochs=float("inf")), "use a finite number"),
  "not a number": (dict(optim__learning_rate=float("nan")), "use a finite number"),
  "objective": (dict(objective="dino"), "use one of adco, moco"),
  "knn k empty": (dict(name="knn", knn__k=()), "config.knn.k=(): is empty; use positive integers"),
  "knn k zero": (dict(name="knn", knn__k=(0, 5)), "use positive integers"),
  "knn k of truth": (dict(name="knn", knn__k=(True,)), "use positive integers"),
  "knn temperature": (dict(name="knn", knn__temperature=(0.0,)), "use temperatures above 0"),
  "no source": (dict(name="knn", data__source="bogus"), "config.data.source='bogus': use one of digits, npz, folder"),
  "no split": (dict(name="embed", data__split=""), "config.data.split='': name a split, such as train"),
  "draws": (dict(name="knn", draws=0), "config.draws=0: use 1 or more"),
  "neighbours": (dict(name="knn", neighbours=-1), "config.neighbours=-1: use 0 or more"),
  "labels per class": (dict(name="linear", labels_per_class=(5, 0)), "positive integers"),
  "held out share": (dict(name="linear", hold_out=1.0), "use a share between 0 and 1"),
  "batch of a probe": (dict(name="linear", batch_size=0), "use 1 or more"),
  "side": (dict(name="linear", size=4), "8 or more"),
  "penalties": (dict(name="linear", penalties=()), "is empty"),
  "recipe": (dict(name="linear", recipe="adam"), "use one of sgd, lbfgs, sweep"),
  "probe epochs": (dict(name="linear", sgd__epochs=0), "config.sgd.epochs=0"),
  "probe scale": (dict(name="linear", sgd__scale=(0.5,)), SHARES),
  "encoder": (dict(name="embed", encoder="both"), "use query or key"),
  "quality": (dict(name="pack", quality=0), "use 1 or more"),
  "picture format": (dict(name="pack", format="gif"), "use jpeg or png"),
  "kills": (dict(name="verify_resume", kills=-1), "use 0 or more"),
}  # fmt: skip


def changed(name="", **overrides):
  """A tiny pre-training config, or a task's own, with other values."""
  if not name:
    return tiny_config(**overrides)
  config = importlib.import_module(f"configs.{name}").get_config()
  config.unlock()
  for key, value in overrides.items():
    *groups, last = key.split("__")
    branch = config
    for group in groups:
      branch = branch[group]
    with branch.ignore_type():
      branch[last] = value
  return config


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
  overrides, message = REFUSED[case]
  with pytest.raises(ConfigError) as refusal:
    ranges.check(changed(**overrides))
  assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_float64_where_jax_keeps_it(float64):
  """The very value that REFUSED names."""
  overrides, _ = REFUSED["float64 that is none"]
  config = changed(**overrides)
  assert ranges.check(config) is None and config.compute_dtype == "float64"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_key_of_every_config_has_a_rule_and_keeps_it(path):
  config = importlib.import_module(f"configs.{path.stem}").get_config()
  ranges.check(config)
  known = {**ranges.RULES, **ranges.TASK_RULES.get(config.task, {})}
  known |= ranges.rules_of(config.objective) if "objective" in config else {}
  for key, value in flatten(config.to_dict()).items():
    assert key in known or isinstance(value, bool) or key in UNRULED, key


# True or False is all that they can be, or the task refuses them with its own list.
UNRULED = ("task", "format", "data.labels", "baselines")


def test_every_rule_is_of_a_key_that_exists():
  configs = [importlib.import_module(f"configs.{p.stem}") for p in CONFIGS.glob("*.py")]
  keys = {key for config in configs for key in flatten(config.get_config().to_dict())}
  coming = {"step", "save.keep_every_epochs"}
  assert {
    *ranges.RULES,
    *(k for rules in ranges.TASK_RULES.values() for k in rules),
  } - keys <= coming


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--config=configs/knn.py", "--config.knn.k=()"], "config.knn.k=()"),
    (["--config=configs/adco_digits.py", "--config.views.crops=32"], "config.views.crops=(32,)"),
    (["--config=configs/adco_digits.py", "--config.data.std=(.5,.5)"], "config.data.std=(0.5, 0.5)"),
    (["--config=configs/pack.py", "--config.data.dir=/nowhere", "--config.quality=101"], "config.quality=101"),
    (["--config=configs/adco_r50.py", "--plan", "--config.epochs=-1"], "config.epochs=-1"),
  ],
)  # fmt: skip
def test_main_checks_before_any_task(argv, message, capsys):
  assert main.main(argv) == 2
  assert message in capsys.readouterr().err
