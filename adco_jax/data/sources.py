"""Who is in a data set and how many: digits, npz files and folders, without decoding folders.

Flow: a task calls `load_source(...)`; the plan takes its size, a loader takes its images or paths.
Shapes: images uint8 [N, H, W, 3] or paths [N]; labels int32 [N] or None.
Holds: what cannot be read is refused here with one line; the order of examples is fixed (sorted paths).
Not here: order of a run (order), decoding (pipeline, resident).
"""

import dataclasses
import os
import zlib

import numpy as np

from adco_jax.plan import ConfigError, require

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
DIGITS_SIZE = 16  # the 8x8 digits are doubled, so that a crop still has something to enlarge
DIGITS_TEST = 500


@dataclasses.dataclass(frozen=True)
class Source:
  """N examples: `images` in memory or `paths` on disk; `labels` None where there are none."""

  name: str
  images: np.ndarray | None
  paths: np.ndarray | None
  labels: np.ndarray | None
  classes: tuple
  root: str = ""  # of the paths

  @property
  def num_examples(self):
    """N."""
    return len(self.images if self.images is not None else self.paths)

  def identity(self):
    """{'number', 'checksum'} of pixels, or of file names: what a resumed run must find again."""
    content = self.images if self.images is not None else os.fsencode("\0".join(self.names()))
    return {"number": self.num_examples, "checksum": f"{zlib.crc32(content):08x}"}

  def names(self):
    """Paths below the split's folder, or numbers where images have no files."""
    if self.paths is None:
      return [f"{self.name}/{i}" for i in range(self.num_examples)]
    return [path.removeprefix(self.root).lstrip(os.sep) for path in self.paths]

  def take(self, index):
    """The source with only these examples, in this order."""
    pick = lambda x: None if x is None else x[index]
    return dataclasses.replace(
      self, images=pick(self.images), paths=pick(self.paths), labels=pick(self.labels)
    )


def load_source(kind, directory, split, num_classes=0):
  """The `Source` of config.data.{source,dir,split,num_classes}. Raises ConfigError."""
  kinds = {"digits": load_digits, "npz": load_npz, "folder": load_folder}
  require(kind in kinds, "data.source", kind, f"use one of {', '.join(kinds)}")
  if kind != "digits":
    require(directory, "data.dir", directory, f"name the {kind} with --config.data.dir=PATH")
  source = kinds[kind](directory, split)
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
    with np.load(path) as archive:
      names = archive.files
      key = f"{split}_images"
      require(key in names, "data.split", split, f"{path} has no {key}, only {', '.join(names)}")
      images = archive[key]
      labels = archive[f"{split}_labels"] if f"{split}_labels" in names else None
      classes = tuple(str(c) for c in archive["classes"]) if "classes" in names else ()
  except (OSError, ValueError, EOFError) as error:
    raise ConfigError(f"config.data.dir={path!r}: not a readable .npz file ({error})") from error
  ok = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
  found = f"{images.dtype}{list(images.shape)}"
  require(ok, "data.dir", path, f"{key} is {found}; store uint8 [N, H, W, 3]")
  require(len(images), "data.dir", path, f"{key} holds no images")
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
    hint = f"{directory} has no folder {split}; evaluation needs one, or another data.test_split"
    require(split == "train", "data.split", split, hint)
    root = directory
  paths = list_images(root)
  require(
    paths,
    "data.dir",
    directory,
    f"no images ({' '.join(EXTENSIONS)}) under {root}; name another folder",
  )
  parts = [os.path.relpath(p, root).split(os.sep) for p in paths]
  labels, classes = None, ()
  if all(len(p) > 1 for p in parts):
    classes = tuple(sorted({p[0] for p in parts}))
    number = {c: i for i, c in enumerate(classes)}
    labels = np.array([number[p[0]] for p in parts], np.int32)
  name = os.path.basename(os.path.abspath(directory))
  return Source(name, None, np.array(paths), labels, classes, root)


def list_images(root):
  """Sorted paths of all image files below `root`; links are followed, hidden files are not."""
  found = []
  for folder, folders, files in os.walk(root, followlinks=True):
    folders[:] = sorted(f for f in folders if not f.startswith("."))
    keep = (f for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith("."))
    found.extend(os.path.join(folder, f) for f in keep)
  return sorted(found)


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
  require(
    labels.min() >= 0, "data.dir", path, f"a label is {labels.min()}; number the classes from 0"
  )
  return labels.astype(np.int32)


def _with_classes(source, num_classes, directory):
  """Fills in names of classes and holds the labels against data.num_classes."""
  if source.labels is None:
    return source
  count = num_classes or len(source.classes) or int(source.labels.max()) + 1
  top = int(source.labels.max())
  remedy = (
    f"a label of {directory} is {top}, outside 0..{count - 1}; use {top + 1} or more, or mend it"
  )
  require(top < count, "data.num_classes", count, remedy)
  names = source.classes + tuple(str(c) for c in range(len(source.classes), count))
  return dataclasses.replace(source, classes=names)
