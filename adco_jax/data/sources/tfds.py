"""Where a prepared TFDS data set keeps its records; TFDS itself reads no image here.

Flow: sources calls `find_prepared`, and shards indexes the files that it names.
Holds: nothing is downloaded; a set that is not prepared is refused with the command that prepares it.
Not here: records (shards).
"""

import os
from collections.abc import Collection
from typing import NamedTuple

from absl import logging

from adco_jax.data.sources.splits import choose
from adco_jax.errors import ConfigError, NoSplit, require

FORMATS = ("tfrecord", "array_record")


class Prepared(NamedTuple):
  """Files of one split and the features that matter."""

  shards: list[str]
  array_record: bool
  image_key: str
  label_key: str
  classes: tuple[str, ...]
  split: str  # of those that the set has


def find_prepared(
  name: str, directory: str, split: str, image_key: str = "", label_key: str = ""
) -> Prepared:
  """The `Prepared` files of config.data.{name,dir,split,image_key,label_key}; dir empty: TFDS's own folder. Raises ConfigError."""
  require(name, "data.name", name, "name the TFDS set with --config.data.name=NAME, such as imagenet2012")  # fmt: skip
  import tensorflow_datasets as tfds

  os.environ.setdefault("NO_GCE_CHECK", "true")  # else it looks for Google's cloud
  logging.set_verbosity(logging.ERROR)  # what it warns of is said below in one line
  try:
    builder = tfds.builder(name, data_dir=directory or None)
  except Exception as error:  # of many kinds: unknown name, version, config
    what = " ".join(str(error).split())[:160]
    raise ConfigError(f"config.data.name={name!r}: TFDS does not know it ({what}); see tensorflow.org/datasets") from error  # fmt: skip
  where = os.path.dirname(os.path.dirname(str(builder.data_dir)))
  command = f"tfds build {name} --data_dir={where}"
  require(builder.info.splits, "data.name", name, f"not prepared in {builder.data_dir}; prepare it with: {command}")  # fmt: skip
  asked, split = split, choose(list(builder.info.splits), split, name)
  if not split:
    known = ", ".join(builder.info.splits)
    raise NoSplit(f"config.data.split={asked!r}: {name} has the splits {known}")
  features, pair = dict(builder.info.features), builder.info.supervised_keys or ()
  images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
  labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  image = image_key or _meant(name, images, pair, "image")
  label = label_key or _meant(name, labels, pair, "label")
  kind = builder.info.file_format.value
  require(kind in FORMATS, "data.name", name, f"is stored as {kind}; prepare it as array_record")
  paths = [str(p) for p in builder.info.splits[split].filepaths]
  gone = next((p for p in paths if not os.path.exists(p)), None)
  require(not gone, "data.name", name, f"{gone} is missing; prepare it again with: {command}")
  classes = tuple(getattr(features.get(label), "names", None) or ())
  return Prepared(paths, kind == "array_record", image, label, classes, split)


def _meant(name: str, keys: Collection[str], pair: Collection[object], usual: str) -> str:
  """The feature of a kind that is meant: of the pair that TFDS trains on, of the usual name, or the only one; '' where there is
  none. Never the first of several: sets without code have them in another order at every start."""
  found = [k for k in keys if k in pair] or [k for k in keys if k == usual] or sorted(keys)
  remedy = f"{name} has {', '.join(found)}; name the one that is meant"
  require(len(found) < 2, f"data.{usual}_key", "", remedy)
  return found[0] if found else ""
