"""The images that a task on a finished run reads: opened, told to the user, and known again by their facts.

Flow: evaluate calls `open_train_and_test`, embed `open_one`; results are filed under what `describe` says.
Holds: what will be read is printed before any work; other images, labels, classes or sizes give other facts.
Not here: which set is meant (frozen.run_config), reading it (data).
"""

import contextlib
import json
import os
import re
import zlib

import numpy as np
from ml_collections import ConfigDict

from adco_jax import build
from adco_jax.data.sources import loading
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.files import Paths
from adco_jax.errors import require
from adco_jax.models import vit
from adco_jax.runtime import remote, sharding
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json, read_json

PIXELS = ("loader", "resident_size", "cut", "max_megapixels")  # keys of data that change pixels
LETTERS = 150  # of 255 that a file's name may have
SIZED = 100_000  # files of a folder whose sizes count as facts


def open_train_and_test(data: ConfigDict) -> tuple[Source, Source]:
  """(train, test) `Source`s of a config.data, labelled with the same classes. Raises ConfigError."""
  train = _open_labelled(data, data.split)
  resolved = data.copy_and_resolve_references()
  resolved.source = train.kind  # what was taken for what is said once
  test = _open_labelled(resolved, data.test_split)
  remedy = "reads images that labels are learnt from; name another split"
  require(not share_images(train, test), "data.test_split", data.test_split, remedy)
  test = loading.align_classes(test, train.classes)
  _say_missing(train, test)
  return train, test


def _say_missing(train, test):
  """Classes that one split alone has images of: what is learnt there, or asked there, counts for nothing."""
  for this, other in ((train, test), (test, train)):
    lost = np.setdiff1d(_classes_in(this), _classes_in(other))
    if len(lost):
      names = ", ".join(train.classes[i] for i in lost[:3]) + (", ..." if len(lost) > 3 else "")
      tell(
        f"split {other.split} has no image of {len(lost)} of the classes of {this.split}: {names}"
      )


def _classes_in(source):
  """The numbers of the classes that an image has."""
  several = source.has_several
  return np.flatnonzero((source.labels == 1).any(0)) if several else np.unique(source.targets)


def _open_labelled(data, split):
  source = build.open_source(data, split)
  remedy = (
    "labels are forgotten, so there is nothing to score against; add --config.data.labels=True"
  )
  require(data.labels or source.labels is not None, "data.labels", False, remedy)
  remedy = f"split {source.split} has no labels to score against; name a data set that has, such as DIR/train/<class>/ and DIR/val/<class>/"
  require(source.labels is not None, "data.dir", data.dir, remedy)
  return source


def share_images(train: Source, test: Source) -> bool:
  """Whether two sources have an image in common by its place, or are the same by names, shards or pixels."""
  one, other = train.files, test.files
  if isinstance(one, Paths) and isinstance(other, Paths):
    few, many = sorted((one, other), key=len)
    return not set(_places(few)).isdisjoint(_places(many))
  shards = [{os.path.realpath(s) for s in getattr(f, "shards", ())} for f in (one, other)]
  return not set.isdisjoint(*shards) or train.identity() == test.identity()


def _places(files):
  """Yields where each image really lies: links to folders and to single files are followed."""
  real: dict[str, tuple[str, set[str]]] = {}  # {folder: (its place, the links in it)}
  for i in range(len(files)):
    folder, name = os.path.split(files.where(i))
    if folder not in real:
      with contextlib.suppress(OSError), os.scandir(folder) as entries:
        real[folder] = os.path.realpath(folder), {e.name for e in entries if e.is_symlink()}
    place, links = real.setdefault(folder, (folder, set()))
    path = os.path.join(place, name)
    yield os.path.realpath(path) if name in links else path


def view(config: ConfigDict, stored: ConfigDict) -> dict[str, Json]:
  """How an image is cut for scoring: {'size': pixels, 'fraction': of the short side, 'batch_size'}. Raises ConfigError for a size
  that a ViT cannot cut into patches."""
  usual = stored.eval
  size = usual.size if config.size is None else config.size
  fraction = usual.crop_fraction if config.crop_fraction is None else config.crop_fraction
  if stored.model.arch in vit.ARCHITECTURES:
    vit.check(stored.model.arch, stored.model.vit, [("size", size)])
  return {
    "size": size,
    "fraction": fraction,
    "batch_size": sharding.round_up(config.batch_size),
  }


def announce(data: ConfigDict, source: Source, size: int) -> None:
  """Prints what will be read: kind, place, split, images, classes, side of the view."""
  classes = f"{len(source.classes)} classes" if source.labels is not None else "no labels"
  tell(
    f"reads {place(data, source)}, split {source.split}: {source.num_examples} images, {classes}, "
    f"seen at {size} px"
  )


def place(data: ConfigDict, source: Source) -> str:
  """Kind, name and folder of the images, as far as they have them."""
  root = source.files.root if isinstance(source.files, Paths) else data.dir
  return " ".join(filter(None, (source.kind, data.name, root)))


def file_name(*names: str) -> str:
  """Names of a data set and of splits as part of a file's name, which has room for LETTERS."""
  name = "-".join(name.removesuffix(".npz") for name in names)
  plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "data"
  return (
    plain if len(plain) <= LETTERS else f"{plain[: LETTERS - 9]}-{zlib.crc32(plain.encode()):08x}"
  )


def describe(source: Source) -> dict[str, Json]:
  """What identifies these images with their labels, wherever they lie; a plain dictionary.

  Arrays count by their pixels, files by names, places and sizes (of up to SIZED files): a file of a
  folder that is replaced by another of the same size is not noticed.
  """
  facts: dict[str, Json] = {
    "source": source.kind,
    "name": source.name.removesuffix(".npz"),
    "split": source.split,
  }
  facts |= {"images": source.num_examples, "checksum": source.identity()["checksum"]}
  if isinstance(source.files, Paths):
    looks = np.unique(np.linspace(0, len(source.files) - 1, SIZED).astype(int))
    facts["sizes"] = _checksum(np.array([_bytes(source.files.where(int(i))) for i in looks]))
  if source.labels is not None:
    facts["labels"] = _checksum(source.labels.astype(np.int64))
    facts["classes"] = len(source.classes)
    facts["class_names"] = f"{zlib.crc32(json.dumps(source.classes).encode()):08x}"
  return facts


def is_own(workdir: str, config: ConfigDict, train: Source) -> bool:
  """Whether the train images are those of the pre-training, here or at another place."""
  plan = os.path.join(remote.local(workdir), "plan.json")
  if os.path.exists(plan) and (own := read_json(plan).get("data")):
    own.pop("labels", None)  # may be others
    return own in (train.identity(), train.whole)
  return all(config.data[name] is None for name in ("source", "dir", "name", "split"))


def _bytes(path):
  try:
    return os.stat(path).st_size
  except OSError:
    return -1


def _checksum(array):
  return f"{zlib.crc32(np.ascontiguousarray(array).data):08x}"
