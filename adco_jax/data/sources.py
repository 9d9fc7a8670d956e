"""Who is in a data set and how many: digits, npz files, folders, shards and TFDS, without decoding anything.

Flow: a task calls `load_source(...)`; the plan takes its size, a loader takes its images or files.
Shapes: images uint8 [N, H, W, 3] or files (see files) of N images; labels int32 [N] or None.
Holds: what cannot be read is refused here with one line; the order of examples is fixed (sorted names,
  or order in sorted shards).
Not here: order of a run (order), decoding (pipeline, resident).
"""

import dataclasses
import os
import zipfile
import zlib
from typing import Any

import numpy as np

from adco_jax.data import shards
from adco_jax.data.files import Paths
from adco_jax.data.listing import EXTENSIONS, list_tree
from adco_jax.plan import ConfigError, NoSplit, require

DIGITS_SIZE = 16  # the 8x8 digits are doubled, so that a crop still has something to enlarge
DIGITS_TEST = 500


@dataclasses.dataclass(frozen=True)
class Source:
  """N examples: `images` in memory or `files` on disk; `labels` None where there are none."""

  name: str
  images: np.ndarray | None
  files: Any
  labels: np.ndarray | None
  classes: tuple

  @property
  def num_examples(self):
    """N."""
    return len(self.images if self.images is not None else self.files)

  def identity(self):
    """{'number', 'checksum'} of pixels, or of names and places: what a resumed run must find again."""
    pixels = self.images is not None
    checksum = f"{zlib.crc32(self.images):08x}" if pixels else self.files.checksum()
    return {"number": self.num_examples, "checksum": checksum}

  def where(self, i):
    """What a person needs to find image i, in one line."""
    place = self.name_of(i) if self.files is None else self.files.where(i)
    return place.replace("\n", "\\n")

  def names(self):
    """Of all images: paths below the split's folder, members of shards, or numbers."""
    return [self.name_of(i) for i in range(self.num_examples)]

  def name_of(self, i):
    """One of them."""
    return f"{self.name}/{i}" if self.files is None else self.files.name(i)


def load_source(
  kind, directory, split, num_classes=0, *, name="", image_key="", label_key="", labels=True
):
  """The `Source` that config.data describes; labels=False forgets its labels. Raises ConfigError."""
  kinds = {
    "digits": load_digits,
    "npz": load_npz,
    "folder": load_folder,
    "packed": load_packed,
    "webdataset": load_tar,
    "tfrecord": lambda d, s: load_tfrecord(d, s, image_key, label_key),
    "tfds": lambda d, s: load_tfds(name, d, s, image_key, label_key),
  }
  require(kind in kinds, "data.source", kind, f"use one of {', '.join(kinds)}")
  if kind not in ("digits", "tfds"):
    require(directory, "data.dir", directory, f"name the {kind} with --config.data.dir=PATH")
  source = kinds[kind](directory, split)
  if not labels:
    return dataclasses.replace(source, labels=None, classes=())
  return _with_classes(source, num_classes, directory)


def load_digits(_, split):
  """scikit-learn's 1,797 handwritten digits, 16x16 RGB, split once and for all (1,297 / 500)."""
  from PIL import Image
  from sklearn.datasets import load_digits as load

  require(split in ("train", "test"), "data.split", split, "digits has the splits train and test")
  bunch = load()
  order = np.random.RandomState(0).permutation(len(bunch.images))
  order = order[DIGITS_TEST:] if split == "train" else order[:DIGITS_TEST]
  shades = np.round(bunch.images[order] * (255 / 16)).astype(np.uint8)
  size = (DIGITS_SIZE, DIGITS_SIZE)
  large = [np.asarray(Image.fromarray(s).resize(size, Image.Resampling.BICUBIC)) for s in shades]
  images = np.repeat(np.stack(large)[..., None], 3, -1)
  labels = bunch.target[order].astype(np.int32)
  return Source("digits", images, None, labels, tuple(str(c) for c in range(10)))


def load_npz(path, split):
  """One file with `<split>_images` uint8 [N, H, W, 3] and, if known, `<split>_labels` [N]."""
  require(os.path.isfile(path), "data.dir", path, "no such file; name an .npz file")
  try:
    with np.lib.npyio.NpzFile(path) as archive:
      names = archive.files
      key = f"{split}_images"
      if key not in names:
        remedy = f"{path} has no {key}, only {', '.join(names)}"
        raise NoSplit(f"config.data.split={split!r}: {remedy}")
      images = archive[key]
      labels = archive[f"{split}_labels"] if f"{split}_labels" in names else None
      classes = tuple(str(c) for c in archive["classes"]) if "classes" in names else ()
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ConfigError(f"config.data.dir={path!r}: not a readable .npz file ({error})") from error
  ok = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
  found = f"{images.dtype}{list(images.shape)}"
  require(ok, "data.dir", path, f"{key} is {found}; store uint8 [N, H, W, 3]")
  require(images.size, "data.dir", path, f"{key} is {found}: no pixels")
  if labels is not None:
    labels = _check_labels(labels, len(images), path)
  return Source(os.path.basename(path), images, None, labels, classes)


def load_folder(directory, split):
  """Image files of any depth under DIR/<split>/, or under DIR where there is no such folder.

  If every image lies in some folder below the root, the first folder names its class; images that lie
  in the root itself mean that there are no labels.
  """
  require(os.path.isdir(directory), "data.dir", directory, "no such folder; name one that exists")
  root = os.path.join(directory, split)
  if not os.path.isdir(root):
    if split != "train":
      hint = f"{directory} has no folder {split}; evaluation needs one, or another data.test_split"
      raise NoSplit(f"config.data.split={split!r}: {hint}")
    root = directory
  names = list_tree(root)
  kinds = " ".join(EXTENSIONS)
  require(names, "data.dir", directory, f"no images ({kinds}) under {root}; name another folder")
  first = [names[i].partition(os.sep) for i in range(len(names))]
  labels, classes = None, ()
  if all(rest for _, rest, _ in first):
    classes = tuple(sorted({name for name, *_ in first}))
    number = {c: i for i, c in enumerate(classes)}
    labels = np.array([number[name] for name, *_ in first], np.int32)
  return Source(_base(directory), None, Paths(root, names), labels, classes)


def load_packed(directory, split):
  """What `configs/pack.py` wrote: DIR/<split>/ with its manifest, shards and their indices."""
  folder = os.path.join(directory, split)
  if not os.path.isdir(folder):
    hint = f"no folder {split} there; name what configs/pack.py wrote"
    raise NoSplit(f"config.data.dir={directory!r}: {hint}")
  files, labels, classes = shards.open_packed(folder)
  return Source(_base(directory), None, files, labels, classes if labels is not None else ())


def load_tar(directory, split):
  """Tar shards as webdataset has them: `key.jpg` (or another image) and, for labels, `key.cls`."""
  files, labels = shards.open_tar(shards.find_shards(directory, split, "webdataset"))
  return Source(_base(directory), None, files, labels, ())


def load_tfrecord(directory, split, image_key="", label_key=""):
  """TFRecord shards of tf.train.Examples that hold an encoded image and, for labels, an integer."""
  found = shards.find_shards(directory, split, "tfrecord")
  files, labels = shards.open_examples(found, image_key, label_key)
  return Source(_base(directory), None, files, labels, ())


def load_tfds(name, directory, split, image_key="", label_key=""):
  """A prepared TFDS data set, in TFRecord or ArrayRecord files, read in place and at random."""
  from adco_jax.data.tfds import find_prepared

  found = find_prepared(name, directory, split)
  files, labels = shards.open_examples(
    found.shards, image_key or found.image_key, label_key or found.label_key, found.array_record
  )
  classes = found.classes if labels is not None else ()
  return Source(name.partition(":")[0], None, files, labels, classes)


def _base(directory):
  return os.path.basename(os.path.abspath(directory))


def align_classes(source, classes):
  """`source` with its labels renumbered to `classes` (those of train). Raises ConfigError."""
  if source.labels is None or not classes or source.classes == classes:
    return source
  unknown = [c for c in source.classes if c not in classes]
  require(not unknown, "data.test_split", source.name, f"classes that train lacks: {unknown[:5]}")
  number = np.array([classes.index(c) for c in source.classes], np.int32)
  return dataclasses.replace(source, labels=number[source.labels], classes=classes)


def _check_labels(labels, count, path):
  ok = labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer)
  found = f"{labels.dtype}{list(labels.shape)}"
  require(ok, "data.dir", path, f"labels are {found}; store integers [{count}], one per image")
  return labels.astype(np.int64)


def _with_classes(source, num_classes, directory):
  """Fills in names of classes and holds the labels against data.num_classes."""
  if source.labels is None:
    return source
  low, top = int(source.labels.min()), int(source.labels.max())
  require(low >= 0, "data.dir", directory, f"a label is {low}; number the classes from 0")
  require(
    top < 2**24, "data.dir", directory, f"a label is {top}; number the classes from 0, without gaps"
  )
  count = num_classes or len(source.classes) or top + 1
  remedy = (
    f"a label of {directory} is {top}, outside 0..{count - 1}; use {top + 1} or more, or mend it"
  )
  require(top < count, "data.num_classes", count, remedy)
  names = source.classes + tuple(str(c) for c in range(len(source.classes), count))
  return dataclasses.replace(source, labels=source.labels.astype(np.int32), classes=names)
