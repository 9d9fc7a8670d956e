"""Data sets in the layout of PASCAL VOC: which classes each image shows, of the lists or of the annotations.

Flow: loading asks for one; the labels are for the task svm, an image has several.
Shapes: labels int8 [N, C]: 1 there, 0 not, -1 nothing but difficult objects.
Holds: lists <class>_<split>.txt, where there are any, say 1, 0 (difficult) and -1 (not there); else Annotations/<image>.xml
  do, where a class is there if one of its objects is not difficult. Both say the same of VOC2007.
Not here: boxes.
"""

import os
import xml.etree.ElementTree as xml

import numpy as np

from adco_jax.data.sources import splits
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.files import Paths, Strings
from adco_jax.data.sources.lists import first_three, read_lines, refuse_absent, require_of
from adco_jax.errors import ConfigError, NoSplit, require

SETS = os.path.join("ImageSets", "Main")
SAID = {"1": 1, "-1": 0, "0": -1}  # of a class, in its list


def load_voc(directory: str, split: str) -> Source:
  """DIR/ImageSets/Main/<split>.txt and DIR/JPEGImages, DIR being VOC2007 or the VOCdevkit that holds it. Raises ConfigError."""
  require(os.path.isdir(directory), "data.dir", directory, "no such folder; name VOCdevkit/VOC2007")
  root = _find_root(directory)
  stems = [
    n.removesuffix(".txt")
    for n in sorted(os.listdir(os.path.join(root, SETS)))
    if n.endswith(".txt")
  ]
  own = [s for s in stems if "_" not in s]
  taken = splits.choose(own, split, os.path.join(root, SETS))
  if not taken:
    key = splits.key_of(split)
    raise NoSplit(
      f"config.{key}={split!r}: {root}/{SETS} has no {split}.txt, only {', '.join(own)}"
    )
  images = [line.split()[0] for line in read_lines(os.path.join(root, SETS, f"{taken}.txt"))]
  folder, names = os.path.join(root, "JPEGImages"), [f"{image}.jpg" for image in images]
  refuse_absent(os.path.join(root, SETS, f"{taken}.txt"), folder, names)
  classes = tuple(s.removesuffix(f"_{taken}") for s in stems if s.endswith(f"_{taken}"))
  if classes:
    labels = np.stack([_read_class(root, c, taken, images) for c in classes], 1)
  else:
    labels, classes = _read_annotations(root, images)
  name = os.path.basename(os.path.abspath(root))
  return Source(name, None, Paths(folder, Strings.of(names)), labels, classes, taken)


def _find_root(directory):
  """The folder with ImageSets/Main: the one given, or the only one in it. Raises ConfigError."""
  if os.path.isdir(os.path.join(directory, SETS)):
    return directory
  below = [os.path.join(directory, f) for f in splits.subfolders(directory)]
  found = [f for f in below if os.path.isdir(os.path.join(f, SETS))]
  require(
    found, "data.dir", directory, f"has no {SETS}, nor has a folder in it; name VOCdevkit/VOC2007"
  )
  require(len(found) < 2, "data.dir", directory, f"holds {first_three(found)}; name one of them")
  return found[0]


def _read_class(root, name, split, images):
  """int8 [N] of one class's list. Raises ConfigError."""
  path = os.path.join(root, SETS, f"{name}_{split}.txt")
  rows = [line.split() for line in read_lines(path)]
  wrong = [" ".join(row) for row in rows if len(row) != 2 or row[1] not in SAID]
  remedy = f"has {len(wrong)} lines that are not an image and 1, 0 or -1: {first_three(wrong)}; correct them"
  require_of(path, not wrong, remedy)
  said = dict(rows)
  missing = [image for image in images if image not in said]
  remedy = f"has no label for {len(missing)} of {len(images)} images of {split}.txt: {first_three(missing)}; write them"
  require_of(path, not missing, remedy)
  return np.array([SAID[said[image]] for image in images], np.int8)


def _read_annotations(root, images):
  """(int8 [N, C], classes) of Annotations/<image>.xml. Raises ConfigError."""
  folder = os.path.join(root, "Annotations")
  there = {*os.listdir(folder)} if os.path.isdir(folder) else set()
  missing = [image for image in images if f"{image}.xml" not in there]
  remedy = f"has no labels for {len(missing)} of {len(images)} images, neither lists <class>_<split>.txt nor Annotations/<image>.xml: {first_three(missing)}; put them there"
  require_of(root, not missing, remedy)
  found = [_read_objects(os.path.join(folder, f"{image}.xml")) for image in images]
  classes = tuple(sorted({name for objects in found for name in objects}))
  require_of(folder, classes, f"has no object in {len(images)} annotations; name another set")
  labels = np.zeros((len(images), len(classes)), np.int8)
  for row, objects in zip(labels, found, strict=True):
    for name, counts in objects.items():
      row[classes.index(name)] = 1 if counts else -1
  return labels, classes


def _read_objects(path):
  """{class: whether an object of it is not difficult} of an annotation. Raises ConfigError."""
  objects: dict[str, bool] = {}
  try:
    for one in xml.parse(path).getroot().iter("object"):
      name = (one.findtext("name") or "").strip()
      if not name:
        raise ValueError("an object without a name")
      easy = (one.findtext("difficult") or "0").strip() == "0"
      objects[name] = objects.get(name, False) or easy
  except (xml.ParseError, ValueError, OSError) as error:
    raise ConfigError(
      f"config.data.dir: {path} is damaged ({error}); repair it, or take the image out of the list"
    ) from error
  return objects
