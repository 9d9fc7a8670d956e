"""Sources that are arrays in memory: scikit-learn's digits, and npz files.

Flow: loading asks for one of them.
Shapes: images uint8 [N, H, W, 3], labels int32 [N], int8 [N, C] or None.
"""

import os
import zipfile
import zlib

import numpy as np

from adco_jax.data.sources import splits
from adco_jax.data.sources.base import Source, hold_to_form
from adco_jax.errors import ConfigError, NoSplit, require

DIGITS_SIZE = 16  # the 8x8 digits are doubled, so that a crop still has something to enlarge
DIGITS_TEST = 500


def load_digits(_: str, split: str) -> Source:
  """scikit-learn's 1,797 handwritten digits, 16x16 RGB, split once and for all (1,297 / 500)."""
  from PIL import Image
  from sklearn.datasets import load_digits as load

  asked, split = split, splits.choose(("train", "test"), split, "digits")
  require(split, "data.split", asked, "digits has the splits train and test")
  bunch = load()
  order = np.random.RandomState(0).permutation(len(bunch.images))
  order = order[DIGITS_TEST:] if split == "train" else order[:DIGITS_TEST]
  shades = np.round(bunch.images[order] * (255 / 16)).astype(np.uint8)
  size = (DIGITS_SIZE, DIGITS_SIZE)
  large = [np.asarray(Image.fromarray(s).resize(size, Image.Resampling.BICUBIC)) for s in shades]
  images = np.repeat(np.stack(large)[..., None], 3, -1)
  labels = bunch.target[order].astype(np.int32)
  return Source("digits", images, None, labels, tuple(str(c) for c in range(10)), split)


def load_npz(path: str, split: str) -> Source:
  """One file with `<split>_images` uint8 [N, H, W, 3] and, if known, `<split>_labels` [N], or [N, C] of 1, 0 and -1."""
  require(os.path.isfile(path), "data.dir", path, "no such file; name an .npz file")
  try:
    with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as archive:
      names = archive.files
      there = [n.removesuffix("_images") for n in names if n.endswith("_images")]
      taken = splits.choose(there, split, path)
      if not taken:
        remedy = f"{path} has no {split}_images, only {', '.join(names)}; name arrays <split>_images and <split>_labels"
        raise NoSplit(f"config.{splits.key_of(split)}={split!r}: {remedy}")
      split, key = taken, f"{taken}_images"
      images = archive[key]
      labels = archive[f"{split}_labels"] if f"{split}_labels" in names else None
      classes = tuple(map(_text, np.atleast_1d(archive["classes"]))) if "classes" in names else ()
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise ConfigError(f"config.data.dir={path!r}: not a readable .npz file ({error})") from error
  source = Source(os.path.basename(path), images, None, labels, classes, split)
  return hold_to_form(source, "data.dir", path, key)


def _text(name):
  return os.fsdecode(name) if isinstance(name, bytes) else str(name)
