"""Which images of a labelled set are trained on, and which are only looked at: few labels, and images held out.

Flow: build opens a set and asks `part`; pretrain trains on `Parts.trained` and scores a classifier on `Parts.held_out`.
Shapes: labels int [N]; draws are sorted numbers of examples.
Holds: no image is in both parts; the few labels of a seed are the first draw of the few labels that knn and linear
  score with; both draws take their share of every class, and follow from the seed alone.
Not here: test images (another split), the order of training (order).
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from adco_jax.data.sources.base import Files, Source
from adco_jax.errors import require
from adco_jax.runtime import rng

Count = Callable[[int], int]  # images of a class -> how many are drawn


class Parts(NamedTuple):
  """A source and what is made of it."""

  whole: Source
  trained: Source  # the whole one where nothing was asked for
  held_out: Source | None = None


class Chosen:
  """Some of the images of other files: number i here is `rows[i]` there."""

  def __init__(self, files: Files, rows: np.ndarray) -> None:
    self._files, self._rows = files, rows

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, i: int) -> str:
    """As there."""
    return self._files.name(int(self._rows[i]))

  def where(self, i: int) -> str:
    """As there."""
    return self._files.where(int(self._rows[i]))

  def read(self, i: int) -> bytes:
    """As there."""
    return self._files.read(int(self._rows[i]))

  def checksum(self) -> str:
    """Of all files and of which they are."""
    return f"{zlib.crc32(self._rows.tobytes(), int(self._files.checksum(), 16)):08x}"


def part(
  source: Source, seed: int, *, labels_per_class: int, label_share: float, hold_out: float
) -> Parts:
  """The `Parts` of a source.

  labels_per_class: images of every class that are trained on, 0 for all; label_share: or so large a share of them;
  hold_out: share of every class that is held out, of the images that the few labels leave where there are few. Raises
  ConfigError.
  """
  few = bool(labels_per_class) or label_share < 1
  if not few and not hold_out:
    return Parts(source, source)
  labels = source.targets
  wanted: Count = lambda there: labels_per_class or max(1, round(label_share * there))
  check_counts(source, labels_per_class)
  trained = draw(labels, wanted, seed) if few else np.arange(len(labels))
  if not hold_out:
    return Parts(source, take(source, trained))
  others = np.setdiff1d(np.arange(len(labels)), trained) if few else trained
  held_out = _hold_out(labels, others, hold_out, seed)
  remedy = "leaves no image to train on, or none to hold out; use another share, or more images"
  trained = np.setdiff1d(trained, held_out)
  require(len(held_out) and len(trained), "hold_out", hold_out, remedy)
  return Parts(source, take(source, trained), take(source, held_out))


def check_counts(source: Source, labels_per_class: int) -> None:
  """Refuses more labels per class than the smallest class has. Raises ConfigError."""
  present, counts = np.unique(source.targets, return_counts=True)
  least, name = int(counts.min()), source.classes[present[counts.argmin()]]
  remedy = f"class {name} has only {least} images in {source.split}; use {least} or less"
  require(labels_per_class <= least, "labels_per_class", labels_per_class, remedy)


def draw(labels: np.ndarray, count: Count, seed: int, number: int = 0) -> np.ndarray:
  """Numbers of examples of draw `number`: of every class as many as `count` says, class after class."""
  picks = rng.host_rng_for(seed, rng.FEW_SHOT, number)
  members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
  return np.concatenate([picks.permutation(m)[: count(len(m))] for m in members])


def take(source: Source, rows: np.ndarray) -> Source:
  """The source of these examples alone, in their order; its classes are those of all."""
  rows = np.sort(rows)
  labels = None if source.labels is None else source.labels[rows]
  if source.images is not None:
    return dataclasses.replace(source, images=source.images[rows], labels=labels)
  return dataclasses.replace(source, files=Chosen(source.on_disk, rows), labels=labels)


def _hold_out(labels, others, share, seed):
  """Of every class `share` of all its images, taken from `others`."""
  picks = rng.host_rng_for(seed, rng.HOLD_OUT, 1)
  parts = []
  for c in np.unique(labels):
    members = others[labels[others] == c]
    parts.append(picks.permutation(members)[: round(share * np.count_nonzero(labels == c))])
  return np.concatenate(parts)
