"""Images in shards: tar files as webdataset and `pack` write them, TFRecord and ArrayRecord files of Examples.

Flow: sources calls `open_tar`, `open_examples` or `open_packed` -> (files, labels); listing keeps indices.
Holds: a shard is walked through once, its index is kept until the file changes; then every image is read
  from its place alone. A shard that ends early or is of another kind is refused with its name.
Not here: names of data sets (sources, tfds), writing shards (pack).
"""

import collections
import os
import re
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from adco_jax.data.sources import splits
from adco_jax.data.sources.files import ArrayRecords, Ranges, Strings
from adco_jax.data.sources.listing import (
  cached,
  count_endings,
  holds_true,
  image_endings,
  most_common,
  stamp,
)
from adco_jax.data.sources.records import NoImage, find_image, walk_array_record, walk_tfrecord
from adco_jax.data.sources.tars import UNLABELLED, walk_tar
from adco_jax.errors import ConfigError, NoSplit, require
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json, read_json
from adco_jax.runtime.progress import Rhythm

IMAGE_KEYS = ("image", "image/encoded", "jpeg", "jpg", "png", "image_raw", "img")
LABEL_KEYS = ("label", "image/class/label", "class", "cls", "fine_label")
KINDS = {"tfrecord": r"\.tfrec|^[^.]*-\d{5}-of-\d{5}$", "webdataset": r"\.tar$"}


def find_shards(
  directory: str, split: str, kind: str
) -> tuple[list[str], str, collections.Counter[str]]:
  """(sorted paths, the split's name there, {ending: other files}): files of DIR/<split>/, or those of DIR that
  carry the split's name, or no split's name if `split` is train. Raises ConfigError."""
  require(os.path.isdir(directory), "data.dir", directory, "no such folder; name one that exists")
  inside = splits.folder_of(directory, split)
  folder = os.path.join(directory, inside)
  names, others = _shards_in(folder, kind)
  if inside and not names:
    inside, folder = "", directory
    names, others = _shards_in(folder, kind)
  words = {name: splits.word_of(name) for name in names}
  taken = inside or splits.choose(set(words.values()) - {""}, split, directory)
  if taken and not inside:
    names = [n for n in names if words[n] == taken]
  elif not taken and not splits.kind_of(split):
    names = [n for n in names if split in re.split(r"[^A-Za-z0-9]+", n)]
  elif not taken:
    names = [n for n in names if not words[n]] if split == "train" else []
  if not names:
    raise NoSplit(
      f"config.data.dir={directory!r}: no {kind} files of split {split} there; name another folder or split"
    )
  return [os.path.join(folder, name) for name in names], taken or split, count_endings(others)


def missing(paths: list[str]) -> tuple[str, ...]:
  """A note on shards whose names count more of them than are there (name-00001-of-00004), or none."""
  counted: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
  for path in paths:
    if found := re.search(r"^(.*)-(\d{5,})-of-(\d{5,})", os.path.basename(path)):
      counted[found[1], found[3]].add(int(found[2]))
  gone = [
    f"{stem}-{number:0{len(of)}d}-of-{of}"
    for (stem, of), there in counted.items() for number in range(int(of)) if number not in there
  ]  # fmt: skip
  some = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
  note = f"{len(gone)} of the shards that their names count are missing: {some}; it goes on without their images"
  return (note,) if gone else ()


def _shards_in(folder, kind):
  """(sorted names of shards, names of other files)."""
  with os.scandir(folder) as entries:
    files = sorted(e.name for e in entries if not holds_true(e.is_dir))
  names = [n for n in files if re.search(KINDS[kind], n) and n[0] != "."]
  return names, set(files) - set(names)


def open_tar(shards: list[str]) -> tuple[Ranges, np.ndarray | None, dict[str, int]]:
  """(`Ranges`, labels or None, {ending: unread members}): images by extension, labels from `.cls` members of
  the same key."""
  unread: collections.Counter[str] = collections.Counter()
  index = _index(shards, "tar", lambda path: walk_tar(path, unread), unread)
  names = Strings(index["block"], index["ends"])
  return _ranges(shards, index, names), _labels(index), _unread(index)


def open_examples(
  shards: list[str], image_key: str = "", label_key: str = "", compressed: bool = False
) -> tuple[Ranges | ArrayRecords, np.ndarray | None, dict[str, int]]:
  """(`Ranges` or `ArrayRecords`, labels or None, {what was not read: how often}) of tf.train.Examples.

  The keys name features; empty: the usual names. `compressed`: the files are ArrayRecords.
  """
  keys = (image_key,) if image_key else IMAGE_KEYS, (label_key,) if label_key else LABEL_KEYS
  kind, walk = ("array_record", walk_array_record) if compressed else ("tfrecord", walk_tfrecord)
  unread: collections.Counter[str] = collections.Counter()
  index = _index(shards, f"{kind} {keys}", lambda path: walk(path, keys, unread), unread)

  def unpack(record):
    return record[slice(*find_image(record, keys, collections.Counter())[:2])]

  records = lambda: ArrayRecords(shards, index["shard"], index["offset"], index["length"], unpack)
  files = records() if compressed else _ranges(shards, index)
  return files, _labels(index, label_key), _unread(index)


def _unread(index):
  kinds, counts = Strings(index["unread"], index["unread_ends"]), index["unread_counts"].tolist()
  return dict(zip(kinds, counts, strict=True))


def _ranges(shards, index, names=None):
  return Ranges(shards, index["shard"], index["offset"], index["length"], names)


def _labels(index, label_key=""):
  """int64 [N], or None unless every image has one. Raises ConfigError where the key that was named has none."""
  labels = index["label"]
  missing = int((labels == UNLABELLED).sum())
  require(not label_key or missing < len(labels), "data.label_key", label_key, "no record has whole numbers there; name another")  # fmt: skip
  if 0 < missing < len(labels):
    tell(f"{missing} of {len(labels)} images have no label: labels are off")
  return None if missing else labels


def _index(shards, kind, walk, unread):
  """{'shard', 'offset', 'length', 'label'} int [N], names where there are any, of all shards in order.

  `unread`: the Counter that `walk` fills, kept beside them.
  """
  stamps = lambda: np.array([(*stamp(s), os.path.getsize(s)) for s in shards], np.int64)
  fresh = lambda index: np.array_equal(index["stamps"], stamps())

  def build():
    rows, rhythm, before = [], Rhythm(), stamps()
    for number, path in enumerate(shards):
      rows += [(number, *row) for row in _walk_checked(walk, path)]
      if rhythm.is_due():
        tell(f"indexing shard {number + 1} of {len(shards)}: {len(rows)} images so far")
    require(rows, "data.dir", os.path.dirname(shards[0]), "its shards hold no images; name another")
    shard, offset, length, label, names = zip(*rows, strict=True)
    table, counts = Strings.of(names), most_common(unread)
    kinds = Strings.of(counts)
    return {
      "unread": kinds.block, "unread_ends": kinds.ends, "unread_counts": np.array(list(counts.values()), np.int64),
      "shard": np.array(shard, np.int32), "offset": np.array(offset, np.int64), "length": np.array(length, np.int64),
      "label": np.array(label, np.int64), "block": table.block, "ends": table.ends, "stamps": before,
    }  # fmt: skip

  known = ",".join(sorted(image_endings()))  # another Pillow may read others
  key = f"{kind} with unread files, single labels and sums, {known} {[os.path.realpath(s) for s in shards]}"
  return cached(key, build, fresh)


def _walk_checked(walk, path):
  try:
    return list(walk(path))
  except NoImage as error:
    asked, has = error.args
    remedy = f"{path} has no image there; it has {has}; name one of these"
    raise ConfigError(f"config.data.image_key={asked!r}: {remedy}") from error
  except (ValueError, OverflowError, tarfile.TarError, struct.error, OSError, KeyError) as error:
    what = " ".join(str(error).split())
    raise ConfigError(f"config.data.dir: {path} is damaged or of another kind ({what}); repair it or take it away") from error  # fmt: skip


def open_packed(folder: str) -> tuple[Ranges, np.ndarray | None, tuple[str, ...]]:
  """(`Ranges`, labels or None, classes) of what `pack` wrote. Raises ConfigError where it no longer fits."""
  manifest = read_manifest(folder)
  paths, parts = [], []
  for number, (name, examples, size) in enumerate(manifest["shards"]):
    path = os.path.join(folder, name)
    there = os.path.getsize(path) if os.path.exists(path) else None
    remedy = f"{path} is {'missing' if there is None else f'{there} bytes'}, the manifest says {size}; pack again"
    require(there == size, "data.dir", folder, remedy)
    index = read_index(path) or {}
    require(index, "data.dir", folder, f"{path} has no index {index_path(path)}; pack again")  # fmt: skip
    fits = f"{index_path(path)} is of other files than the manifest; pack again"
    require(len(index["offset"]) == examples, "data.dir", folder, fits)
    paths.append(path)
    parts.append(index | {"shard": np.full(examples, number, np.int32)})
  require(
    sum(map(len, (p["shard"] for p in parts))), "data.dir", folder, "holds no images; name another"
  )
  join = lambda name: np.concatenate([part[name] for part in parts])
  tables = [Strings(p["block"], p["ends"]) for p in parts]
  names = Strings.of(table[i] for table in tables for i in range(len(table)))
  files = Ranges(paths, join("shard"), join("offset"), join("length"), names)
  return files, _labels({"label": join("label")}), tuple(manifest["classes"])


def classes_beside(shard: str) -> tuple[str, ...]:
  """Names of classes where `pack` wrote the shard, of others ()."""
  folder = os.path.dirname(shard)
  there = os.path.isfile(os.path.join(folder, "manifest.json"))
  return tuple(read_manifest(folder)["classes"]) if there else ()


def read_manifest(folder: str) -> dict[str, Json]:
  """{'shards': [(name, examples, bytes)], 'classes'} of a packing that has ended. Raises ConfigError."""
  path = os.path.join(folder, "manifest.json")
  there = os.path.isfile(path)
  require(there, "data.dir", folder, "no manifest.json there; pack it (configs/pack.py) or let it finish")  # fmt: skip
  try:
    manifest = read_json(path)
    shards = [(x["name"], x["examples"], x["bytes"]) for x in manifest["shards"]]
    return {"shards": shards, "classes": manifest["classes"]}
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f"config.data.dir={folder!r}: manifest.json is damaged; pack again"
    ) from error


def index_path(shard: str) -> str:
  """The file beside a packed shard that says where its images lie."""
  return os.path.splitext(shard)[0] + ".npz"


def read_index(shard: str) -> dict[str, np.ndarray] | None:
  """{'offset', 'length', 'label', 'block', 'ends'} of a packed shard; None if there is none to read."""
  try:
    with np.load(index_path(shard)) as archive:
      return {name: archive[name] for name in archive.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
    return None
