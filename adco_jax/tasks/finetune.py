"""The task `finetune`: a config of configs/finetune.py as the pre-training config that it means.

Flow: main asks `resolve`, and from there on it is a pre-training with labels: same loop, workdir, --extend, --plan.
Holds: what is not given is the pre-training's, in a run that goes on its own; what cannot be fine-tuned is refused before
  anything else is read.
Not here: training (pretrain), scores (classified).
"""

import os

from ml_collections import ConfigDict

from adco_jax.config import config_files, keys
from adco_jax.config.method import find
from adco_jax.config.plan import get
from adco_jax.encoders import run_config, with_data
from adco_jax.errors import require
from adco_jax.models import vit
from adco_jax.models.resnet import ARCHITECTURES
from adco_jax.objectives.base import Classifying
from adco_jax.runtime import remote
from adco_jax.training.restore import ENCODER
from adco_jax.views.augment import POLICIES
from adco_jax.workdir.checkpoint import saved_steps
from adco_jax.workdir.files import holds_run, read_stored

SCALE = (0.08, 1.0)  # shares of the image that a random resized crop takes


def resolve(config: ConfigDict, workdir: str) -> ConfigDict:
  """The complete pre-training config of a fine-tuning in `workdir`. Raises ConfigError."""
  random = config.init == "random"
  remedy = "name the workdir of a pre-training or an exported file, or train from scratch with --config.init=random"
  require(config.pretrained or random, "pretrained", config.pretrained, remedy)
  remedy = "labels are what it learns from; use True, or a pre-training config"
  require(config.data.labels, "data.labels", config.data.labels, remedy)
  remedy = "trains no classifier; use supervised, or one of your own that has one"
  require(issubclass(find(config.objective), Classifying), "objective", config.objective, remedy)
  below = inherited(config, workdir)
  if not random:
    check_encoder(config, below, workdir)
  made = config_files.base_of("pretrain")
  assert made is not None  # configs/adco_r50.py
  given = {*keys.walk(config)}
  with made.unlocked(), made.ignore_type():
    for name in [name for name in keys.walk(made) if not name.startswith("method.")]:
      value = get(config, name) if name in given else None
      *groups, last = name.split(".")
      branch = get(made, ".".join(groups)) if groups else made
      branch[last] = _tuples(get(below, name) if value is None else value)
    made.task, made.method = "pretrain", ConfigDict(config.method.to_dict())
    made.init_from = "" if random else config.pretrained
    made.data.labels = True
    if made.model.arch in vit.ARCHITECTURES:  # positions of the former crops, not of the new ones
      made.model.vit.grid = vit.grid_of(made.model.vit, below.views.crops)
    if config.augment.policy is None:
      mirrors = any(policy.flip_probability for policy in POLICIES[below.augment.policy])
      made.augment.policy = "flip" if mirrors else "none"
    if config.views.crops is None:
      made.views.crops = (crop(made.eval.size, config.views.pad),)
  check_size(made)
  return made


def inherited(config: ConfigDict, workdir: str) -> ConfigDict:
  """The complete config whose values stand where this one has None. Raises ConfigError."""
  folder = remote.local(workdir)
  if holds_run(folder) and saved_steps(folder):  # it goes on, whatever became of the pre-training
    stored = read_stored(folder, f"--workdir={workdir}")["config"]
    below = with_data(ConfigDict(stored), config.data)
  elif config.pretrained:
    below = run_config(config.pretrained, config.data)
  else:
    below = with_data(config_files.load("adco_r50"), config.data)
  return below


def check_encoder(config: ConfigDict, below: ConfigDict, workdir: str) -> None:
  """Refuses another network than the pre-training's, and a pre-training that has nothing yet. Raises ConfigError."""
  name = config.pretrained
  for key in ENCODER:
    value, there = get(config, key), get(below, key)
    remedy = f"{name} has {there!r}; leave it out, or train from scratch with --config.init=random"
    require(value in (None, there), key, value, remedy)
  folder = remote.local(workdir)
  if os.path.isfile(name):
    return
  itself = os.path.realpath(remote.local(name)) == os.path.realpath(folder)
  require(not itself, "pretrained", name, "is this run's own workdir; name another --workdir")
  if saved_steps(folder):
    return
  require(saved_steps(name), "pretrained", name, "no checkpoint there yet; pre-train first")


def crop(size: int, pad: int) -> tuple[int, float, float]:
  """The row of views.crops of a side: a share of `SCALE`, or with `pad` a window of the padded picture, as it is."""
  window = round((size / (size + 2 * pad)) ** 2, 12)
  return (size, window, window) if pad else (size, *SCALE)


def check_size(config: ConfigDict) -> None:
  """Refuses views that the network leaves nothing of. Raises ConfigError."""
  arch, side = config.model.arch, min(config.views.crops[0][0], config.eval.size)
  if arch not in ARCHITECTURES:
    return  # an outside one knows its sizes
  least = 2 ** (len(ARCHITECTURES[arch][1]) - 1) * (4 if config.model.stem == "imagenet" else 1)
  remedy = f"{arch} with the {config.model.stem} stem halves a side until {least} pixels are one; use {least} or more for it and for the side of views.crops"
  require(side >= least, "eval.size", config.eval.size, remedy)


def _tuples(value):
  """Lists, as JSON has them, as tuples."""
  return tuple(map(_tuples, value)) if isinstance(value, tuple | list) else value
