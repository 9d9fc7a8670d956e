"""Part of a source, by a text file with the name of an image per line: published subsets, one's own.

Flow: build opens a source and hands it to `restrict` with data.subset, of the split that is learnt from alone.
Holds: the images keep the source's order, whatever the list's; a name that fits no image, or two, is refused.
Not here: drawing subsets (few_labels), TFDS's imagenet2012_subset, which is a set of its own.
"""

import collections
import dataclasses

import numpy as np

from adco_jax.data.sources.base import Source
from adco_jax.data.sources.files import Paths, Ranges
from adco_jax.data.sources.lists import first_three, read_lines, refuse_twice
from adco_jax.errors import require


def restrict(source: Source, path: str) -> Source:
  """The images of `source` that the list at `path` names: by their paths below the split's folder (members of shards,
  numbers in arrays), or by the last part of these. Raises ConfigError."""
  wanted = read_lines(path, "data.subset")
  refuse_twice(path, wanted, "data.subset")
  named = isinstance(source.files, Paths) or getattr(source.files, "names", None) is not None
  can = source.images is not None or (named and isinstance(source.files, Paths | Ranges))
  require(
    can,
    "data.subset",
    path,
    f"{source.kind} has no names of images; leave it empty (TFDS has the lists as data.name=imagenet2012_subset/1pct and /10pct)",
  )
  index = np.sort(_find(source, path, wanted))
  images = None if source.images is None else source.images[index]
  files = source.files.take(index) if isinstance(source.files, Paths | Ranges) else None
  labels = None if source.labels is None else source.labels[index]
  return dataclasses.replace(
    source, images=images, files=files, labels=labels, whole=source.identity()
  )


def _find(source, path, wanted):
  """The number of each image that is named."""
  by_name, by_last, known = (
    collections.defaultdict(list),
    collections.defaultdict(list),
    set(wanted),
  )
  for i, name in enumerate(map(source.name_of, range(source.num_examples))):
    last = name.rpartition("/")[2]
    if name in known:
      by_name[name].append(i)
    if last in known:
      by_last[last].append(i)
  found = [by_name.get(name) or by_last.get(name, []) for name in wanted]
  absent = [name for name, places in zip(wanted, found, strict=True) if not places]
  remedy = f"names {len(absent)} images that {source.name} {source.split} has not: {first_three(absent)}; its first is called {source.name_of(0)}"
  require(not absent, "data.subset", path, remedy)
  vague = [name for name, places in zip(wanted, found, strict=True) if len(places) > 1]
  remedy = f"{first_three(vague)} fit several images of {source.name}; name them by their paths, such as {source.name_of(0)}"
  require(not vague, "data.subset", path, remedy)
  index = np.array([places[0] for places in found])
  numbers, counts = np.unique(index, return_counts=True)
  twice = [source.name_of(int(i)) for i in numbers[counts > 1]]
  require(
    not twice,
    "data.subset",
    path,
    f"names {len(twice)} images twice: {first_three(twice)}; keep one line of each",
  )
  return index
