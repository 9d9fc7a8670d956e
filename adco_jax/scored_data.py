"""The images that a task on a finished run reads: opened, told to the user, and known again by their facts.

Flow: evaluate calls `open_train_and_test`, embed `open_one`; results are filed under what `describe` says.
Holds: what will be read is printed before any work; other images, labels, classes or sizes give other facts.
Not here: which set is meant (frozen.run_config), reading it (data).
"""

import json
import os
import re
import zlib

import numpy as np

from adco_jax import build, remote
from adco_jax.console import tell
from adco_jax.data import sources
from adco_jax.data.files import Paths
from adco_jax.plan import NoSplit, require
from adco_jax.workdir import read_json

TEST_SPLITS = ("val", "test", "validation")
SIZED = 4096  # files of a folder whose sizes count as facts


def open_train_and_test(config, stored):
  """((train, test) `Source`s, (their split names)); `stored`: of `frozen.run_config`. Raises ConfigError.

  Where the data is not the pre-training's and no test split is named, the first of TEST_SPLITS is taken.
  """
  data, given = stored.data, config.data
  train = build.open_source(data)
  own = all(given[name] is None for name in ("source", "dir", "name"))
  wanted = [given.test_split or data.test_split]
  if not own and given.test_split is None:
    wanted += [split for split in TEST_SPLITS if split not in wanted]
  test, split = _first_split(data, wanted)
  for name, source in ((data.split, train), (split, test)):
    remedy = "forgotten as the pre-training did; --config.data.labels=True keeps them"
    require(data.labels or source.labels is not None, "data.labels", False, remedy)
    remedy = f"split {name} of {source.name} has no labels to score against; name one that has"
    require(source.labels is not None, "data.dir", data.dir, remedy)
  return (train, sources.align_classes(test, train.classes)), (data.split, split)


def _first_split(data, wanted):
  for split in wanted[:-1]:
    try:
      return build.open_source(data, split), split
    except NoSplit:
      continue
  return build.open_source(data, wanted[-1]), wanted[-1]


def view(config, stored):
  """(side in pixels, share of the short side) of the centre that the encoder is shown."""
  usual = stored.eval
  size = usual.size if config.size is None else config.size
  fraction = usual.crop_fraction if config.crop_fraction is None else config.crop_fraction
  return size, fraction


def announce(data, source, split, size):
  """Prints what will be read: kind, place, split, images, classes, side of the view."""
  classes = f"{len(source.classes)} classes" if source.labels is not None else "no labels"
  tell(
    f"reads {place(data, source)}, split {split}: {source.num_examples} images, {classes}, "
    f"seen at {size} px"
  )


def place(data, source):
  """Kind, name and folder of the images, as far as they have them."""
  root = source.files.root if isinstance(source.files, Paths) else data.dir
  return " ".join(filter(None, (data.source, data.name, root)))


def file_name(source):
  """The data set's name as part of a file's."""
  name = source.name.removesuffix(".npz")
  return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "data"


def describe(data, source, split):
  """What identifies these images with their labels, wherever they lie; a plain dictionary.

  Arrays count by their pixels, files by names, places and sizes (of up to SIZED files): a file of a
  folder that is replaced by another of the same size is not noticed.
  """
  found = {"source": data.source, "name": file_name(source), "split": split}
  found |= {"images": source.num_examples, "checksum": source.identity()["checksum"]}
  if isinstance(source.files, Paths):
    looks = np.unique(np.linspace(0, len(source.files) - 1, SIZED).astype(int))
    found["sizes"] = _checksum(np.array([_bytes(source.files.where(int(i))) for i in looks]))
  if source.labels is not None:
    found["labels"] = _checksum(source.labels.astype(np.int64))
    found["classes"] = len(source.classes)
    found["class_names"] = f"{zlib.crc32(json.dumps(source.classes).encode()):08x}"
  return found


def is_own(workdir, config, train):
  """Whether the train images are those of the pre-training, here or at another place."""
  moved = any(config.data[name] is not None for name in ("source", "dir", "name"))
  plan = read_json(os.path.join(remote.local(workdir), "plan.json"))
  return not moved or plan.get("data") == train.identity()


def _bytes(path):
  try:
    return os.stat(path).st_size
  except OSError:
    return -1


def _checksum(array):
  return f"{zlib.crc32(np.ascontiguousarray(array)):08x}"
