"""Who is in a data set and how many: digits, npz files, CIFAR-10, folders, lists, shards and TFDS, without decoding anything.

Flow: a task calls `load_source(...)`; the plan takes its size, a loader takes its images or files.
Shapes: images uint8 [N, H, W, 3] or files (see files) of N images; labels int32 [N], int8 [N, C] or None.
Holds: what cannot be read is refused here with one line; the order of examples is fixed (sorted names,
  or order in sorted shards).
Not here: order of a run (order), decoding (pipeline, resident).
"""

import collections
import dataclasses
import os
from collections.abc import Callable

import numpy as np

from adco_jax.config import outside
from adco_jax.data.sources import shards, splits
from adco_jax.data.sources.arrays import load_digits, load_npz
from adco_jax.data.sources.base import Source, hold_to_form
from adco_jax.data.sources.cifar import load_cifar10
from adco_jax.data.sources.files import Paths
from adco_jax.data.sources.kinds import understand
from adco_jax.data.sources.listing import image_endings, list_tree
from adco_jax.data.sources.lists import load_csv, load_list
from adco_jax.data.sources.voc import load_voc
from adco_jax.errors import NoSplit, require


def load_source(
  kind: str,
  directory: str,
  split: str,
  num_classes: int = 0,
  *,
  name: str = "",
  image_key: str = "",
  label_key: str = "",
  labels: bool = True,
) -> Source:
  """The `Source` that config.data describes; labels=False forgets its labels. Raises ConfigError."""
  if outside.is_outside(kind):
    source = outside.load(kind, "data.source")(directory, split)
    named = isinstance(source, Source)
    require(
      named,
      "data.source",
      kind,
      f"gave a {type(source).__name__}, not a Source (docs/extending.md)",
    )
    source = hold_to_form(dataclasses.replace(source, kind=kind), "data.source", kind)
    return _as_asked(source, num_classes, labels, directory)
  if kind not in ("digits", "tfds"):
    require(directory, "data.dir", directory, f"name the {kind} with --config.data.dir=PATH")
  actual, place = understand(kind, directory, split)
  source = KINDS[actual](place, split, name=name, image_key=image_key, label_key=label_key)
  notes = source.notes
  if source.split != split:
    notes = (f"split {split} is read from {source.split} of {place}", *notes)
  if actual != kind:
    notes = (f"{place} is read as data.source={actual}, by what lies there, not as {kind}", *notes)
  return _as_asked(
    dataclasses.replace(source, kind=actual, notes=notes), num_classes, labels, directory
  )


def _as_asked(source, num_classes, labels, directory):
  if not labels:
    return dataclasses.replace(source, labels=None, classes=())
  return _with_classes(source, num_classes, directory)


def load_folder(directory: str, split: str) -> Source:
  """Image files of any depth under DIR/<split>/, or under DIR where no folder of it looks like a split.

  If every image lies in some folder below the root, the first folder names its class; images that lie
  in the root itself mean that there are no labels.
  """
  require(os.path.isdir(directory), "data.dir", directory, "no such folder; name one that exists")
  root, taken = splits.find_folder(directory, split)
  tree = list_tree(root)
  if not taken:
    inner = splits.find_nested(root, tree)
    if inner:
      source = load_folder(os.path.join(root, inner), split)
      return dataclasses.replace(source, name=_base(directory), split=f"{inner}/{source.split}")
    if split != "train":
      raise splits.no_split(directory, split)
  unread = ", ".join(f"{count} {kind}" for kind, count in tree.unread.items()) or "nothing else"
  remedy = f"no images under {root}, {unread}; name another folder (endings that are read: {' '.join(sorted(image_endings()))})"
  require(len(tree.names), "data.dir", directory, remedy)
  labels, classes, empty, notes = _folder_classes(tree)
  if taken not in ("", splits.AS_IT_IS):
    splits.refuse_splits_below(
      root, [f for f in tree.folders if os.sep not in f and tree.holds_images(f)]
    )
  return Source(
    _base(directory), None, Paths(root, tree.names), labels, classes, taken or split,
    unread=tree.unread, empty=empty, notes=notes,
  )  # fmt: skip


def _folder_classes(tree):
  """(labels or None, classes, first folders without images, notes); names that are all numbers sort as such."""
  first = [f for f in tree.folders if os.sep not in f]
  slices = {f: tree.images_below(f) for f in first}
  classes = [f for f in first if slices[f].start < slices[f].stop]
  empty = tuple(f for f in first if f not in set(classes))
  labels = np.full(len(tree.names), -1, np.int32)
  if all(c.isdecimal() for c in classes):
    classes.sort(key=lambda c: (int(c), c))
  for number, name in enumerate(classes):
    labels[slices[name]] = number
  outside = int((labels < 0).sum())
  if classes and outside:
    note = f"{outside} images lie in no folder, {len(labels) - outside} in folders such as {classes[0]}: no labels"
    return None, (), empty, (note,)
  if len(classes) == 1 and splits.is_filler(classes[0]):
    note = f"all images lie in the folder {classes[0]}: no labels; name it as data.dir if its folders are classes"
    return None, (), empty, (note,)
  return (labels, tuple(classes), empty, ()) if classes else (None, (), empty, ())


def load_packed(directory: str, split: str) -> Source:
  """What `configs/pack.py` wrote: DIR/<split>/ with its manifest, shards and their indices."""
  require(os.path.isdir(directory), "data.dir", directory, "no such folder; name one that exists")
  taken = splits.folder_of(directory, split)
  if not taken:
    hint = f"no folder {split} there; name what configs/pack.py wrote"
    raise NoSplit(f"config.data.dir={directory!r}: {hint}")
  files, labels, classes = shards.open_packed(os.path.join(directory, taken))
  classes = classes if labels is not None else ()
  return Source(_base(directory), None, files, labels, classes, taken)


def load_tar(directory: str, split: str) -> Source:
  """Tar shards as webdataset has them: `key.jpg` (or another image) and, for labels, `key.cls`."""
  paths, taken, others = shards.find_shards(directory, split, "webdataset")
  files, labels, unread = shards.open_tar(paths)
  classes = shards.classes_beside(paths[0]) if labels is not None else ()
  unread = collections.Counter(unread) + collections.Counter(others)
  notes = shards.missing(paths)
  return Source(_base(directory), None, files, labels, classes, taken, unread=unread, notes=notes)


def load_tfrecord(directory: str, split: str, image_key: str = "", label_key: str = "") -> Source:
  """TFRecord shards of tf.train.Examples that hold an encoded image and, for labels, an integer."""
  paths, taken, others = shards.find_shards(directory, split, "tfrecord")
  files, labels, unread = shards.open_examples(paths, image_key, label_key)
  unread = collections.Counter(unread) + collections.Counter(others)
  notes = shards.missing(paths)
  return Source(_base(directory), None, files, labels, (), taken, unread=unread, notes=notes)


def load_tfds(
  name: str, directory: str, split: str, image_key: str = "", label_key: str = ""
) -> Source:
  """A prepared TFDS data set, in TFRecord or ArrayRecord files, read in place and at random."""
  from adco_jax.data.sources.tfds import find_prepared

  prepared = find_prepared(name, directory, split, image_key, label_key)
  files, labels, unread = shards.open_examples(
    prepared.shards, prepared.image_key, prepared.label_key, prepared.array_record
  )
  classes = prepared.classes if labels is not None else ()
  return Source(name.partition(":")[0], None, files, labels, classes, prepared.split, unread=unread)


KINDS: dict[str, Callable[..., Source]] = {  # of data.source
  "digits": lambda place, split, **_: load_digits(place, split),
  "npz": lambda place, split, **_: load_npz(place, split),
  "folder": lambda place, split, **_: load_folder(place, split),
  "packed": lambda place, split, **_: load_packed(place, split),
  "webdataset": lambda place, split, **_: load_tar(place, split),
  "tfrecord": lambda place, split, name, **keys: load_tfrecord(place, split, **keys),
  "tfds": lambda place, split, name, **keys: load_tfds(name, place, split, **keys),
  "cifar10_binary": lambda place, split, **_: load_cifar10(place, split),
  "csv": lambda place, split, name, **keys: load_csv(place, split, **keys),
  "list": lambda place, split, **_: load_list(place, split),
  "voc": lambda place, split, **_: load_voc(place, split),
}


def _base(directory):
  return os.path.basename(os.path.abspath(directory))


def align_classes(source: Source, classes: tuple[str, ...]) -> Source:
  """`source` with its labels renumbered to `classes` (those of train). Raises ConfigError."""
  if source.labels is None or not classes or source.classes == classes:
    return source
  unknown = [c for c in source.classes if c not in classes]
  remedy = f"{source.name} has classes that train lacks: {unknown[:5]}; move their images elsewhere, or give train some"
  require(not unknown, "data.test_split", source.split, remedy)
  number = np.array([classes.index(c) for c in source.classes], np.int32)
  if source.has_several:
    labels = np.zeros((source.num_examples, len(classes)), np.int8)
    labels[:, number] = source.labels
  else:
    labels = number[source.labels]
  return dataclasses.replace(source, labels=labels, classes=classes)


def _with_classes(source, num_classes, directory):
  """Fills in names of classes and holds the labels against data.num_classes."""
  if source.labels is None:
    return dataclasses.replace(source, classes=())
  if source.has_several:
    return _with_columns(source, num_classes, directory)
  low, top = int(source.labels.min()), int(source.labels.max())
  require(low >= 0, "data.dir", directory, f"a label is {low}; number the classes from 0")
  require(
    top < 2**24, "data.dir", directory, f"a label is {top}; number the classes from 0, without gaps"
  )
  count = num_classes or len(source.classes) or top + 1
  remedy = f"a label of {directory} is {top}, outside 0..{count - 1}; use {top + 1} or more, or correct the labels"
  require(top < count, "data.num_classes", count, remedy)
  names = source.classes + tuple(str(c) for c in range(len(source.classes), count))
  return dataclasses.replace(source, labels=source.labels.astype(np.int32), classes=names)


def _with_columns(source, num_classes, directory):
  """`_with_classes` where an image may have several labels."""
  count = source.labels.shape[1]
  wrong = source.labels[np.abs(source.labels) > 1]
  remedy = f"several labels per image are 1 (there), 0 (not) or -1 (not counted), one is {wrong[:1]}; correct it"
  require(not wrong.size, "data.dir", directory, remedy)
  remedy = f"{directory} has labels of {count} classes per image; leave it 0"
  require(num_classes in (0, count), "data.num_classes", num_classes, remedy)
  names = source.classes + tuple(str(c) for c in range(len(source.classes), count))
  return dataclasses.replace(source, labels=source.labels.astype(np.int8), classes=names)
