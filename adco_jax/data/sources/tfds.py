"""Where a prepared TFDS data set keeps its records; TFDS itself reads no image here.

Flow: sources calls `find_prepared`, and shards indexes the files that it names.
Holds: nothing is downloaded; a set that is not prepared is refused with the command that prepares it.
Not here: records (shards).
"""

import os
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


def find_prepared(name: str, directory: str, split: str) -> Prepared:
  """The `Prepared` files of config.data.{name,dir,split}; dir empty: TFDS's own folder. Raises ConfigError."""
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
  features = dict(builder.info.features)
  image = next((k for k, f in features.items() if isinstance(f, tfds.features.Image)), "")
  label = next((k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)), "")
  kind = builder.info.file_format.value
  require(kind in FORMATS, "data.name", name, f"is stored as {kind}; prepare it as array_record")
  paths = [str(p) for p in builder.info.splits[split].filepaths]
  gone = next((p for p in paths if not os.path.exists(p)), None)
  require(not gone, "data.name", name, f"{gone} is missing; prepare it again with: {command}")
  classes = tuple(features[label].names or ()) if label else ()
  return Prepared(paths, kind == "array_record", image, label, classes, split)
