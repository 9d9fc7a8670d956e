"""A frozen encoder with the train and test images that it is scored on, and all that its scores depend on.

Flow: evaluate calls `load`, looks for a stored result of `Frozen.identity`, takes `representations` of what lacks.
Holds: every image is encoded exactly once; whatever would change a score changes the identity; what can be
  refused is refused before the encoder is opened.
Not here: scores (evaluate), which images (scored_data), whose encoder (frozen).
"""

import functools
import os
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.config import config_files
from adco_jax.data.loaders import Loader
from adco_jax.data.sources.base import Source
from adco_jax.encoders import LoadedEncoder, open_run, results_folder, run_config
from adco_jax.errors import RunError, require
from adco_jax.evaluation import features, few_labels
from adco_jax.interop import exported
from adco_jax.models import tokens, vit
from adco_jax.runtime import remote
from adco_jax.runtime.console import tell
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json
from adco_jax.tasks import scored_data
from adco_jax.tasks.kept_features import FOLDER, features_of, size_of
from adco_jax.workdir.files import canonical, check_writable, flatten, read_plan
from adco_jax.workdir.fingerprints import fingerprint

# Raise it when the arithmetic of a score changes: stored results of the one before are then not its own.
PROTOCOLS = {"knn": 2, "linear": 3, "svm": 1}
BLOCK = 2**16  # rows of features that are looked at at once
FEW_IMAGES = 10_000  # of train, for which the authors' recipe takes long and is not made
VIEW = ("loader", "resident_size", "cut", "max_megapixels")  # keys of data that change pixels
# Keys that every caption shows by itself, and keys of data that change no score.
TOLD = {
  "version",
  "seed",
  "recipe",
  "sgd.epochs",
  "draws",
  "labels_per_class",
  "label_shares",
  "recall",
  "neighbours",
  "map",
  "attention",
}
SILENT = {"source", "dir", "name", "split", "test_split", "threads", "max_bad_fraction"}


OF_TOKENS = ("trained", "untrained")  # representations that have a form; the others have one alone

Check = Callable[
  [ConfigDict, Source, Source], None
]  # (a task's config, train, test): raises ConfigError


class Frozen(NamedTuple):
  """A pre-trained encoder with the data that it is scored on."""

  workdir: str
  own: bool  # whether it was trained on `train`
  identity: dict[str, Json]  # all that a score is computed from
  place: str  # where the test images lie
  step: int
  mesh: Mesh
  train: Source
  test: Source
  loaders: "Loaders"
  view: dict[str, Json]  # how an image is cut for scoring: size, fraction, batch_size
  forward: Callable[[Tree, jax.Array], jax.Array]  # (variables, images) -> features
  tokens: (
    str  # of a ViT, that its features are, see models.tokens; `every`: one form is to be chosen
  )
  forms: dict[str, slice]  # {form that can be chosen: its columns of `every`}
  attend: Callable[[Tree, jax.Array], jax.Array] | None  # of a ViT, see features.make_attention
  project: Callable[
    [Tree, jax.Array], jax.Array
  ]  # (variables, images) -> what the head makes of them
  trained: dict[str, Tree]  # variables
  create_untrained: Callable[[], Tree]  # () -> variables


class Loaders:
  """Of 'train' and 'test' images; each is made when it is first asked for, as it may hold all of them."""

  def __init__(self, create: Callable[[Source], Loader], sources: dict[str, Source]) -> None:
    self._create, self._sources = create, sources
    self._made: dict[str, Loader] = {}

  def of(self, part: str) -> Loader:
    """The one of a part."""
    if part not in self._made:
      self._made[part] = self._create(self._sources[part])
    return self._made[part]

  def broken(self) -> dict[str, int]:
    """{part: images that could not be read so far}."""
    return {part: len(loader.reader.broken) for part, loader in sorted(self._made.items())}


class Scored(NamedTuple):
  """Train and test features of one representation."""

  train: np.ndarray
  test: np.ndarray


def load(config: ConfigDict, check: Check | None = None) -> Frozen:
  """The `Frozen` of a task's config, after saying what it reads; `check`: refuses labels that the task cannot use, which
  without are any but one per image. Raises ConfigError."""
  stored = run_config(config.pretrained, config.data, config.step)
  workdir, asked = results_folder(config.pretrained), config.features.tokens
  check_writable(workdir)
  model = stored.model
  tokens.check("features.tokens", asked, model.arch, model.vit.depth, tokens.OR_CHOSEN)
  data = stored.data
  both = train, test = scored_data.open_train_and_test(data)
  remedy = "has one train image, and one is left out to choose on; score with two or more"
  require(train.num_examples > 1, "data.split", data.split, remedy)
  (check or check_single)(config, train, test)
  view = scored_data.view(config, stored)
  for source in both:
    scored_data.announce(data, source, view["size"])
  warn_of_long_recipe(config, train)
  pixels = {key: view[key] for key in ("size", "fraction")} | {key: data[key] for key in VIEW}
  run = open_run(config.pretrained, stored, step=config.step)
  check_projected(config, run)
  normal = data.mean, data.std, run.mesh
  form = tokens.EVERY if asked == tokens.CHOSEN else asked
  is_vit = model.arch in vit.ARCHITECTURES
  return Frozen(
    workdir=workdir,
    own=scored_data.is_own(config.pretrained, config, train),
    identity=identify(config, run, both, pixels),
    place=scored_data.place(data, test),
    step=run.step,
    mesh=run.mesh,
    train=train,
    test=test,
    loaders=Loaders(
      lambda source: build.create_loader(stored, source, run.mesh), {"train": train, "test": test}
    ),
    view=view,
    forward=features.make_features(run.module, *normal, tokens=form),
    tokens=form,
    forms=run.module.forms() if form == tokens.EVERY else {},
    attend=features.make_attention(run.module, *normal) if is_vit else None,
    project=features.make_features(run.module, *normal, projected=True),
    trained=run.variables,
    create_untrained=run.create_untrained,
  )


def check_projected(config: ConfigDict, run: LoadedEncoder) -> None:
  """Refuses to score projections that are not there, or that nobody trained. Raises ConfigError."""
  if not config.get("projected"):
    return
  place = config.pretrained
  remedy = f"{place} holds no projection; name the workdir of its run, or export it as npz again"
  require("head" in run.variables["params"], "projected", True, remedy)
  remedy = f"the projection of {place} was never trained; use False"
  require(has_trained_head(place, run), "projected", True, remedy)


def has_trained_head(place: str, run: LoadedEncoder) -> bool:
  """Whether anything trained the projection of an encoder: not of a run on labels, nor where weights without one were imported."""
  if build.create_objective(run.config).sees == "features":
    return False
  if os.path.isfile(place):
    return exported.read_facts(place).get("head", True)
  imported = read_plan(remote.local(place), place).get("imported", {})
  return bool(run.step) or imported.get("head", True)


def check_single(config: ConfigDict, train: Source, test: Source) -> None:
  """Refuses labels that are not one per image, of two classes or more. Raises ConfigError."""
  several = train if train.has_several else test
  remedy = f"{several.name} has several labels per image; score it with --config=configs/svm.py"
  require(not several.has_several, "data.split", several.split, remedy)
  present = np.unique(train.targets)
  remedy = f"all train images are of one class, {train.classes[present[0]]}: there is nothing to tell apart"
  require(len(present) > 1, "data.split", train.split, remedy)
  few_labels.check(train.targets, train.classes, config.labels_per_class)


def identify(
  config: ConfigDict, run: LoadedEncoder, both: tuple[Source, Source], view: dict[str, Json]
) -> dict[str, Json]:
  """All that scores of an opened run on (train, test) depend on, as a plain dictionary."""
  train, test = map(scored_data.describe, both)
  return {
    "protocol": protocol(config),
    "checkpoint": {"step": run.step, "fingerprint": fingerprint(run.variables)},
    "data": {"train": train, "test": test},
    "view": view,
  }


def protocol(config: ConfigDict) -> dict[str, Json]:
  """What of a task's config a score depends on, beside data and view."""
  left_out = {
    "pretrained",
    "step",
    "data",
    "size",
    "crop_fraction",
    "baselines",
    "map",
    "attention",
    "projected",
    "features",
  }
  recipe = config.get("recipe", "")
  if recipe not in ("sgd", "sweep"):
    left_out |= {"batch_size", "sgd"}  # there, images are only encoded so many at a time
  if recipe != "sweep":
    left_out |= {"sweep"}
  keys = {key: value for key, value in config.to_dict().items() if key not in left_out}
  if (form := config.features.tokens) != tokens.POOLED:  # which results before had no key for
    keys["features"] = {"tokens": form}
  return keys | {"version": PROTOCOLS[config.task]}


def unusual(config: ConfigDict) -> dict[str, Json]:
  """{dotted key: value} of what a score depends on and our config of this task has otherwise."""
  usual, here = (
    flatten(canonical(protocol(c))) for c in (config_files.base_of(config.task), config)
  )
  keys = {k: v for k, v in here.items() if k not in TOLD and v != usual.get(k)}
  data = config.data.to_dict().items()
  return keys | {f"data.{k}": v for k, v in data if v is not None and k not in SILENT}


def warn_of_long_recipe(config: ConfigDict, train: Source) -> None:
  """Names the preset for small sets where the authors' recipe does not suit."""
  if config.task == "linear" and config.recipe == "sgd" and train.num_examples < FEW_IMAGES:
    tell(
      f"train has {train.num_examples} images: this recipe ({config.sgd.epochs} epochs of SGD on crops, rate "
      f"{config.sgd.learning_rate:g}) is made for ImageNet; --config=configs/linear.py:small takes seconds"
    )


def representations(
  frozen: Frozen, config: ConfigDict, there: Collection[str]
) -> Iterator[tuple[str, Scored]]:
  """Yields (name, `Scored`) of those that are not `there`: 'trained', 'projected' if asked for, and with config.baselines
  'untrained' and 'pixels'."""
  makers: dict[str, Callable[[], Callable[[jax.Array], jax.Array]]]
  makers = {"trained": lambda: functools.partial(frozen.forward, frozen.trained)}
  if config.get("projected"):
    makers["projected"] = lambda: functools.partial(frozen.project, frozen.trained)
  if config.baselines:
    makers["untrained"] = lambda: functools.partial(frozen.forward, frozen.create_untrained())
    makers["pixels"] = lambda: features.make_pixels(frozen.mesh)
  for name, make in makers.items():
    if name not in there:
      scored = Scored(*_encode(frozen, config.features, name, make()))
      if not all(map(is_finite, scored)):
        remedy = "nothing can be told of them; score another checkpoint"
        raise RunError(f"the {name} features are not all finite: {remedy}")
      yield name, scored


def is_finite(features: np.ndarray) -> bool:
  """Whether all numbers are, a block of rows at a time: features may lie on a disk because memory does not hold them."""
  return all(np.isfinite(features[i : i + BLOCK]).all() for i in range(0, len(features), BLOCK))


def _encode(frozen, config, name, forward):
  """Features of both splits."""
  both, folder = (frozen.train, frozen.test), os.path.join(frozen.workdir, FOLDER)
  images = sum(source.num_examples for source in both)
  _, gigabytes = size_of(forward, frozen.view, images)
  for part, source in zip(("train", "test"), both, strict=True):
    facts = {"name": name, "view": frozen.identity["view"], "data": frozen.identity["data"][part]}
    if name != "pixels":
      facts["checkpoint"] = frozen.identity["checkpoint"]
    if name in OF_TOKENS and frozen.tokens != tokens.POOLED:
      facts["tokens"] = frozen.tokens
    create = functools.partial(frozen.loaders.of, part)
    yield features_of(
      forward, create, source.num_examples, frozen.view, folder, facts, config, gigabytes
    )
