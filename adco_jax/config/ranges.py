"""Which values every key of every task may have: one table, applied before anything runs.

Flow: main calls `check` on the config of whatever task comes next; it knows keys, not data or devices.
Holds: a key that two tasks share has one rule; None means `as in the pre-training` and is always allowed;
  what is refused is one line that names key, value and remedy.
Not here: unknown keys and types (keys), what depends on data, devices or files (plan, and each task).
"""

import importlib
import math
import numbers
from typing import Any

from ml_collections import ConfigDict

from adco_jax.config import method
from adco_jax.config.method import Rule
from adco_jax.config.outside import is_outside, load
from adco_jax.config.pairing import MODES, REDUCTIONS
from adco_jax.errors import ConfigError, require

Value = Any  # of a key of a config: a number, a text, a tuple


def check(config: ConfigDict) -> None:
  """Holds every key that the config has against its rule, then keys against each other. Raises ConfigError."""
  rules = RULES | TASK_RULES.get(config.task, {})
  if "objective" in config:
    rules |= rules_of(config.objective)
  for name, rule in rules.items():
    value = _find(config, name)
    if value is not None and (remedy := rule(value)):
      raise ConfigError(f"config.{name}={value!r}: {remedy}")
  if "views" in config and config.views.crops is not None:
    _check_mode(config)


def rules_of(objective: str) -> dict[str, Rule]:
  """Those of an objective's own keys. Raises ConfigError where there is no such objective."""
  declared = {
    name: field.metadata.get("rule") for name, field in method.fields(method.find(objective))
  }
  return {f"method.{name}": rule for name, rule in declared.items() if rule}


# Rules: value -> what to do about it, '' if it is right.


def within(low: float, high: float = math.inf) -> Rule:
  """A finite number from `low` to `high`, both allowed."""

  def rule(value):
    if not _is_number(value):
      return "use a finite number"
    if value < low:
      return f"use {low:.12g} or more"
    return f"use {high:.12g} or less" if value > high else ""

  return rule


def temperature(value: Value) -> str:
  """A finite number above 0."""
  return "" if _is_number(value) and value > 0 else "use a temperature above 0, such as 0.12"


def choice(*names: str) -> Rule:
  """One of these names."""
  told = [name for name in names if name]
  remedy = f"use one of {', '.join(told)}" if len(told) > 2 else f"use {' or '.join(told)}"
  return lambda value: "" if value in names else remedy


def dtype(value: Value) -> str:
  """What a run computes in; JAX makes float32 of float64 unless it was told otherwise, without a word."""
  if value == "float64" and not importlib.import_module("jax").config.jax_enable_x64:
    return "JAX would make float32 of it; set JAX_ENABLE_X64=1 in the environment"
  return choice("auto", "float32", "bfloat16", "float64")(value)


def resolve_dtype(name: str, backend: str) -> str:
  """'auto' means bfloat16 where it is fast (GPU, TPU) and float32 on the CPU."""
  if name != "auto":
    return name
  return "float32" if backend == "cpu" else "bfloat16"


def choice_in(module: str, table: str, *more: str) -> Rule:
  """One of the keys of a module's dictionary, or of `more`; the module is imported when a value is looked at."""
  known = lambda: getattr(importlib.import_module(f"adco_jax.{module}"), table)
  return lambda value: choice(*more, *known())(value)


def or_outside(option: str, rule: Rule) -> Rule:
  """A rule for names of ours; what `package.module:name` names is imported at once, and refused if it cannot be."""

  def check_name(value):
    if not is_outside(value):
      remedy = rule(value)
      return remedy and f"{remedy}, or package.module:name of your own"
    load(value, option)
    return ""

  return check_name


def each(rule: Rule, shape: str, *, count: int | None = None, empty: bool = False) -> Rule:
  """A tuple whose every member obeys `rule`; `count` members exactly, or one and more, or none too if `empty`."""

  def check_members(value):
    if not isinstance(value, tuple | list) or (count is not None and len(value) != count):
      return f"use {shape}"
    if not (value or empty):
      return f"is empty; use {shape}"
    return f"use {shape}" if any(rule(member) for member in value) else ""

  return check_members


def ascending(rule: Rule) -> Rule:
  """A rule of tuples, whose members must grow as well."""

  def check_order(value):
    falls = lambda: any(a >= b for a, b in zip(value, value[1:], strict=False))
    return rule(value) or ("use numbers that increase" if falls() else "")

  return check_order


def shares(value: Value) -> str:
  """(smallest, largest) share of an image's area."""
  if each(_number, "", count=2)(value) or not 0 < value[0] <= value[1] <= 1:
    return "use shares 0 < smallest <= largest <= 1"
  return ""


def crops(value: Value) -> str:
  """Rows of (side in pixels, smallest share, largest share)."""
  if (
    not isinstance(value, tuple | list) or not value or any(map(each(_number, "", count=3), value))
  ):
    return (
      "each crop is (side, smallest share, largest share), such as ((224, .2, 1.), (224, .2, 1.))"
    )
  if any(_whole(side) or side < 8 for side, *_ in value):
    return "use sides of 8 pixels or more, whole numbers"
  return next(filter(None, (shares(row[1:]) for row in value)), "")


def inner_share(value: Value) -> str:
  """A share of the images that leaves some on either side."""
  return "" if _is_number(value) and 0 < value < 1 else "use a share between 0 and 1"


def held_out_share(value: Value) -> str:
  """A share that leaves some images, or 0."""
  return "" if value == 0 else inner_share(value) and "use 0, or a share between 0 and 1"


def amount_or_constant(value: Value) -> str:
  """0 or more, or -1."""
  return "" if value == -1 else within(0)(value) and "use 0 or more, or -1 for a constant one"


def part_or_whole(value: Value) -> str:
  """A share above 0."""
  return "" if value == 1 else inner_share(value)


def ratio(value: Value) -> str:
  """(lowest, highest) width over height."""
  ok = not each(_number, "", count=2)(value) and 0 < value[0] <= value[1]
  return "" if ok else "use two numbers 0 < lowest <= highest"


def _number(value):
  return "" if _is_number(value) else "use a number"


def _whole(value):
  whole = isinstance(value, int) and not isinstance(value, bool)
  return "" if whole and value > 0 else "use a positive integer"


def _free(value):
  """Text, of which only the task that uses it can say more."""
  del value
  return ""


def _split(value):
  """The name of a split."""
  return "" if value else "name a split, such as train"


def _path(value):
  """A file or folder; command_line puts the home folder in the place of `~`."""
  return _free(value)


AMOUNT, COUNT, SHARE, SIDE = within(0), within(1), within(0, 1), within(8)
SCALE = "three numbers of red, green and blue on the scale 0..1, not 0..255"
LABELS = "positive integers such as (1, 5, 10), or () for none"

RULES = {
  # Pre-training; import and inspect_data have the same keys.
  "seed": within(0, 2**32 - 1), "epochs": AMOUNT, "stop_at_step": AMOUNT, "max_bad_steps": COUNT, "watchdog_minutes": AMOUNT, "accumulate": COUNT,
  "labels_per_class": AMOUNT, "label_share": part_or_whole, "hold_out": held_out_share,
  "compute_dtype": dtype, "init_from": _path, "init_head": choice("auto", "new", "kept"), "init": choice("pretrained", "random"), "file": _path, "prefix": _free, "base": _free,
  "model.arch": or_outside("model.arch", choice_in("models.heads", "ARCHITECTURES")), "model.stem": choice_in("models.resnet", "STEMS"),
  "model.width": within(0.01), "model.dim": COUNT,
  "model.vit.patch": COUNT, "model.vit.grid": AMOUNT, "model.vit.pool": choice_in("models.vit", "POOLS"), "model.vit.positions": choice_in("models.vit", "POSITIONS"),
  "model.vit.registers": AMOUNT, "model.vit.layer_scale": AMOUNT, "model.vit.drop_path": within(0, 0.9), "model.vit.depth": AMOUNT, "model.vit.heads": AMOUNT,
  "model.vit.start": choice_in("models.vit", "STARTS"), "model.vit.attention": choice_in("models.attention", "ATTENTIONS"),
  "model.head.layers": COUNT, "model.head.width": AMOUNT, "model.head.norm": choice_in("models.heads", "NORMS"),
  "views.mode": choice(*MODES), "views.reduction": choice(*REDUCTIONS), "views.crops": crops, "views.ratio": ratio, "views.pad": AMOUNT,
  "bn.group_size": AMOUNT, "bn.shuffle_block": AMOUNT, "bn.running_from": choice("mean", "first"),
  "objective": method.check_name,  # config.method: the rules of its fields
  "ema.decay": SHARE, "ema.schedule": choice("constant", "cosine"),
  "optim.name": choice_in("training.optimizers", "NAMES"), "optim.no_decay": choice("", "vectors"), "optim.head_rate": AMOUNT, "optim.layer_decay": SHARE, "optim.beta2": inner_share, "optim.trust": AMOUNT, "optim.schedule": choice_in("training.optimizers", "SCHEDULES"), "optim.learning_rate": AMOUNT, "optim.lr_final": AMOUNT,
  "optim.scale_from_batch": AMOUNT, "optim.warmup_epochs": AMOUNT, "optim.momentum": SHARE, "optim.weight_decay": AMOUNT,
  "optim.weight_decay_final": amount_or_constant, "optim.clip_norm": AMOUNT, "optim.freeze": choice_in("training.optimizers", "FREEZES", ""),
  "optim.step_epochs": ascending(each(AMOUNT, "epochs such as (120, 160)", empty=True)),
  "augment.policy": choice_in("views.augment", "POLICIES"), "augment.blur_kernel": choice_in("views.augment", "BLUR_KERNELS", ""),
  "save.every_steps": COUNT, "save.every_minutes": AMOUNT, "save.keep": COUNT, "save.keep_every_epochs": AMOUNT, "save.max_failures": COUNT,
  "log.every_steps": COUNT,
  "eval.every_epochs": AMOUNT, "eval.hold_out": inner_share, "eval.max_images": within(2), "eval.size": SIDE, "eval.batch_size": COUNT,
  "eval.crop_fraction": part_or_whole, "eval.knn_k": COUNT, "eval.knn_temperature": temperature,
  # Images, of every task that reads any.
  "data.source": or_outside("data.source", choice_in("data.sources.loading", "KINDS")), "data.dir": _path, "data.name": _free, "data.image_key": _free, "data.label_key": _free, "data.subset": _path,
  "data.split": _split, "data.test_split": _free, "data.num_examples": AMOUNT, "data.num_classes": AMOUNT, "data.batch_size": COUNT,
  "data.loader": choice("auto", "pipeline", "resident"), "data.cut": choice_in("data.cuts", "CUTS"), "data.threads": AMOUNT,
  "data.resident_share": SHARE, "data.resident_size": AMOUNT, "data.max_bad_fraction": SHARE, "data.max_megapixels": within(0.001),
  "data.inspect_images": AMOUNT, "data.mean": each(SHARE, SCALE, count=3),
  "data.std": each(lambda v: SHARE(v) or ("" if v else "use more"), f"{SCALE}, above 0", count=3),
  # Tasks that take a workdir.
  "pretrained": _path, "encoder": choice("query", "key"), "step": AMOUNT, "out": _path, "linear": _path, "license": _free, "capsule": _path,
  "size": SIDE, "crop_fraction": SHARE, "batch_size": COUNT,
  "knn.k": each(_whole, "positive integers such as (1, 5, 20)"), "knn.temperature": each(temperature, "temperatures above 0 such as (0.07, 0.2)"),
  "label_shares": each(inner_share, "shares such as (0.01, 0.1)", empty=True), "draws": COUNT, "neighbours": AMOUNT,
  "map": AMOUNT, "attention": AMOUNT, "features.tokens": choice_in("models.tokens", "OR_CHOSEN"),
  "costs": each(lambda v: within(0)(v) or ("" if v else "use more"), "numbers above 0 such as (0.1, 1., 10.)"), "folds": within(2), "positive_weight": within(0.001),
  "recall": each(_whole, "positive integers such as (1, 5)", empty=True), "features.keep_gigabytes": AMOUNT, "features.memory_gigabytes": AMOUNT,
  "recipe": choice("sgd", "lbfgs", "sweep"), "sweep.learning_rates": each(AMOUNT, "rates such as (0.1, 1.0)"), "sweep.crops": each(part_or_whole, "shares such as (0.08, 0.5)"),
  "penalties": each(AMOUNT, "numbers of 0 or more such as (0.01, 0.1)"),
  "sgd.epochs": COUNT, "sgd.schedule": choice_in("training.optimizers", "SCHEDULES"), "sgd.step_epochs": ascending(each(AMOUNT, "epochs such as (60, 80)", empty=True)), "sgd.learning_rate": AMOUNT, "sgd.lr_final": AMOUNT, "sgd.momentum": SHARE, "sgd.weight_decay": AMOUNT, "sgd.scale": shares,
  # verify_resume.
  "of": _path, "flags": _free, "extend_at": AMOUNT, "extend_flags": _free, "steps": COUNT, "save_steps": COUNT, "kills": AMOUNT,
}  # fmt: skip

# Of a task that scores features.
SCORES = {"labels_per_class": each(_whole, LABELS, empty=True), "hold_out": inner_share}

# Keys whose meaning is one task's own.
TASK_RULES = {
  "knn": SCORES, "linear": SCORES, "svm": SCORES,
  "embed": {"features.tokens": choice_in("models.tokens", "NAMES")},
  "pack": {
    "format": choice("jpeg", "png"), "quality": within(1, 100), "short_side": AMOUNT, "shard_images": COUNT, "threads": AMOUNT,
  },
}  # fmt: skip

PATHS = frozenset(name for name, rule in RULES.items() if rule is _path)


def _check_mode(config):
  """Objective, views mode and crops together."""
  mode, count = config.views.mode, len(config.views.crops)
  *most, last = method.modes(config.objective)
  remedy = f"for {config.objective} use {', '.join(most)}{' or ' if most else ''}{last}"
  require(mode in (*most, last), "views.mode", mode, remedy)
  exact = {"one": 1, "single": 2, "symmetric": 2}.get(mode, 0)
  want = {0: "two crops or more", 1: "exactly one crop", 2: "exactly two crops"}[exact]
  ok = count == exact if exact else count >= 2
  require(ok, "views.mode", mode, f"needs {want}, views.crops has {count}")


def _is_number(value):
  return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _find(config, name):
  """The value of a dotted key, None where the config has no such key."""
  for part in name.split("."):
    if part not in config:
      return None
    config = config[part]
  return config
