"""Features of a frozen encoder: taken from a file that an earlier task left, else computed, and left for the next.

Flow: scoring asks `features_of` for each representation; knn, linear and their like, run one after the other, encode once.
Shapes: float32 [N, F]; a memory-mapped file where both splits would need more memory than `features.memory_gigabytes`.
Holds: a file's name says of what it is (images, view, checkpoint), so that it is never taken for another's; it is written whole or
  not at all; features of images that could not be read are not left.
Not here: what is computed of them (evaluate).
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from adco_jax.data.loaders import Loader
from adco_jax.evaluation.features import extract
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json, whole
from adco_jax.runtime.progress import Progress

FOLDER = "features"  # of a workdir
VERSION = 1  # raise it when features of the same images and weights change


def size_of(
  forward: Callable[[jax.Array], jax.Array], view: dict[str, Json], images: int
) -> tuple[int, float]:
  """(F, gigabytes of float32) of so many images."""
  batch = jax.ShapeDtypeStruct((view["batch_size"], view["size"], view["size"], 3), np.uint8)
  width = jax.eval_shape(forward, batch).shape[-1]
  return width, 4e-9 * images * width


def features_of(
  forward: Callable[[jax.Array], jax.Array],
  create_loader: Callable[[], Loader],
  images: int,
  view: dict[str, Json],
  folder: str,
  facts: dict[str, Json],
  config: ConfigDict,
  gigabytes: float,
) -> np.ndarray:
  """[N, F] of all images of one split, each encoded once.

  facts: all that they depend on, of which `name` is the representation; config: a task's `features`; gigabytes: of both splits
  in float32, by which it is decided where they lie.
  """
  start, width = time.monotonic(), size_of(forward, view, images)[0]
  large = gigabytes > config.memory_gigabytes
  path, name = path_of(folder, facts), facts["name"]
  if (found := _read(path)) is not None:
    tell(f"features of {images} images, {name}: as kept in {path}")
    return found
  loader = create_loader()
  batches = Progress(f"features, {name}", images).over(
    loader.evaluation(np.arange(images), **view), view["batch_size"]
  )
  features = extract(forward, batches, _open_file(folder, (images, width)) if large else None)
  loader.reader.check()
  tell(f"features of {images} images, {name}: {time.monotonic() - start:.0f}s")
  if gigabytes <= config.keep_gigabytes and not loader.reader.broken:
    _write(path, features)
  return features


def path_of(folder: str, facts: dict[str, Json]) -> str:
  """Where features with these facts lie."""
  of = facts | {"version": VERSION}
  key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
  return os.path.join(folder, f"{facts['name']}-{key}.npy")


def _read(path):
  """None where there is no file, or a damaged one."""
  try:
    return np.load(path, mmap_mode="r")
  except (OSError, ValueError, EOFError):
    return None


def _write(path, features):
  """Whole or not at all; a disk that is full costs the next task its time, not this one its scores."""
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with whole(path) as part, open(part, "wb") as file:
      np.save(file, features)
  except OSError as error:
    tell(f"{path}: {error.strerror}; features are not kept")


def _open_file(folder, shape):
  """A file without a name, gone with the process."""
  os.makedirs(folder, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy") as file:
    return np.lib.format.open_memmap(file.name, "w+", np.float32, shape)
