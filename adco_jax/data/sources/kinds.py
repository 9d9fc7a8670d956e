"""What kind of source lies at data.dir, where the configured kind cannot read it.

Flow: sources asks `understand` before it opens anything; who only says what was read asks `read_as`.
Holds: a configured kind that fits what lies there is never overruled; only names are looked at, no content.
Not here: opening (sources), splits (splits).
"""

import contextlib
import itertools
import os
import re

from adco_jax.config.outside import is_outside
from adco_jax.data.sources import splits
from adco_jax.data.sources.cifar import find_batches
from adco_jax.data.sources.listing import holds_true, image_endings
from adco_jax.data.sources.shards import KINDS
from adco_jax.errors import ConfigError

ORDER = ("packed", "webdataset", "tfrecord", "folder")
SAID = (
  "tfds",
  "csv",
  "list",
  "voc",
)  # never told from what lies there: a folder with lists looks like any other


def understand(kind: str, directory: str, split: str) -> tuple[str, str]:
  """(kind, place) to open: as given, or what `directory` turns out to hold. Raises ConfigError."""
  if (
    not directory
    or kind in SAID
    or is_outside(kind)
    or (kind == "npz" and os.path.isfile(directory))
  ):
    return kind, directory
  if os.path.isfile(directory) and directory.lower().endswith(".npz"):
    return "npz", directory
  kinds = kinds_in(directory, split) if os.path.isdir(directory) else {}
  if not kinds:
    return ("folder" if kind == "digits" else kind), directory
  return (kind, kinds[kind]) if kind in kinds else next(iter(kinds.items()))


def read_as(kind: str, directory: str, split: str) -> str:
  """The kind alone; as it was given where `directory` can no longer be told."""
  with contextlib.suppress(ConfigError, OSError):
    return understand(kind, directory, split)[0]
  return kind


def kinds_in(directory: str, split: str) -> dict[str, str]:
  """{kind: place to open} of a folder, the likeliest first; empty if nothing there is known."""
  batches = {"cifar10_binary": directory} if find_batches(directory) else {}
  own, inside = _kinds_of(directory), splits.folder_of(directory, split)
  below = _kinds_of(os.path.join(directory, inside)) if inside else set()
  if below and "folder" not in below:  # then images beside that folder are of no split
    own -= {"folder", "images"}
  kinds = own | below
  if kinds:
    order = sorted(ORDER, key=lambda kind: kind != "folder") if "images" in kinds else ORDER
    return batches | {kind: directory for kind in order if kind in kinds}
  arrays = [n for n in os.listdir(directory) if n.endswith(".npz")]
  return batches | ({"npz": os.path.join(directory, arrays[0])} if len(arrays) == 1 else {})


def _kinds_of(folder):
  """What a few looks at a folder's own entries find; 'images' are a 'folder' for certain."""
  with os.scandir(folder) as entries:
    seen = [e for e in itertools.islice(entries, splits.LOOKS) if e.name[0] != "."]
  names = [e.name for e in seen]
  kinds = {kind for kind, pattern in KINDS.items() if any(re.search(pattern, n) for n in names)}
  if kinds and {"manifest.json", "settings.json"} & set(names):
    kinds.add("packed")
  if any(os.path.splitext(n)[1].lower() in image_endings() for n in names):
    kinds |= {"folder", "images"}
  return kinds | ({"folder"} if any(holds_true(e.is_dir) for e in seen) else set())
