"""Images in shards: tar files as webdataset and `pack` write them, TFRecord and ArrayRecord files of Examples.

Flow: sources calls `open_tar`, `open_examples` or `open_packed` -> (files, labels); listing keeps indices.
Holds: a shard is walked through once, its index is kept until the file changes; then every image is read
  from its place alone. A shard that ends early or is of another kind is refused with its name.
Not here: names of data sets (sources, tfds), writing shards (pack).
"""

import mmap
import os
import re
import struct
import tarfile
import time
import zipfile

import numpy as np

from adco_jax.console import tell
from adco_jax.data import examples
from adco_jax.data.files import ArrayRecords, Ranges, Strings
from adco_jax.data.listing import EXTENSIONS, TELL_SECONDS, cached
from adco_jax.plan import ConfigError, require
from adco_jax.workdir import read_json

IMAGE_KEYS = ("image", "image/encoded", "jpeg", "jpg", "png", "image_raw", "img")
LABEL_KEYS = ("label", "image/class/label", "class", "cls", "fine_label")
KINDS = {"tfrecord": r"\.tfrec|^[^.]*-\d{5}-of-\d{5}$", "webdataset": r"\.tar$", "array_record": r"\.array_?record"}  # fmt: skip
UNLABELLED = -1


def find_shards(directory, split, kind):
  """Sorted paths: files of DIR/<split>/, or those of DIR that carry the split's name. Raises ConfigError."""
  require(os.path.isdir(directory), "data.dir", directory, "no such folder; name one that exists")
  folder = os.path.join(directory, split)
  inside = os.path.isdir(folder)
  folder = folder if inside else directory
  names = sorted(n for n in os.listdir(folder) if re.search(KINDS[kind], n) and n[0] != ".")
  named = [n for n in names if split in n]
  if not inside and (named or split != "train"):
    names = named
  require(names, "data.dir", directory, f"no {kind} files of split {split} there; name another folder or split")  # fmt: skip
  return [os.path.join(folder, name) for name in names]


def open_tar(shards):
  """(`Ranges`, labels or None): images by extension, labels from `.cls` members of the same key."""
  index = _index(shards, "tar", _walk_tar)
  names = Strings(index["block"], index["ends"])
  return _ranges(shards, index, names), _labels(index)


def open_examples(shards, image_key="", label_key="", compressed=False):
  """(`Ranges` or `ArrayRecords`, labels or None) of records that are tf.train.Examples.

  The keys name features; empty: the usual names. `compressed`: the files are ArrayRecords.
  """
  keys = (image_key,) if image_key else IMAGE_KEYS, (label_key,) if label_key else LABEL_KEYS
  if compressed:
    index = _index(shards, f"array_record {keys}", lambda path: _walk_array_record(path, keys))

    def unpack(record):
      return record[slice(*_look(record, keys)[:2])]

    files = ArrayRecords(shards, index["shard"], index["offset"], unpack)
    return files, _labels(index)
  index = _index(shards, f"tfrecord {keys}", lambda path: _walk_tfrecord(path, keys))
  return _ranges(shards, index), _labels(index)


def _ranges(shards, index, names=None):
  return Ranges(shards, index["shard"], index["offset"], index["length"], names)


def _labels(index):
  labels = index["label"]
  return None if (labels == UNLABELLED).any() else labels


def _index(shards, kind, walk):
  """{'shard', 'offset', 'length', 'label'} int [N], names where there are any, of all shards in order."""
  stamps = lambda: np.array([[os.stat(s).st_mtime_ns, os.stat(s).st_size] for s in shards])
  fresh = lambda found: np.array_equal(found["sizes"], stamps())

  def build():
    rows, last = [], time.monotonic()
    for number, path in enumerate(shards):
      rows += [(number, *row) for row in _walk_checked(walk, path)]
      if time.monotonic() - last > TELL_SECONDS:
        tell(f"indexing shard {number + 1} of {len(shards)}: {len(rows)} images so far")
        last = time.monotonic()
    require(rows, "data.dir", os.path.dirname(shards[0]), "its shards hold no images; name another")
    shard, offset, length, label, names = zip(*rows, strict=True)
    table, sizes = Strings.of(names), stamps()
    return {"shard": np.array(shard, np.int32), "offset": np.array(offset, np.int64),
            "length": np.array(length, np.int64), "label": np.array(label, np.int32),
            "block": table.block, "ends": table.ends, "sizes": sizes, "stamps": sizes[:, 0]}  # fmt: skip

  return cached(f"{kind} {[os.path.realpath(s) for s in shards]}", build, fresh)


def _walk_checked(walk, path):
  try:
    return list(walk(path))
  except (ValueError, tarfile.TarError, struct.error, OSError, KeyError) as error:
    what = " ".join(str(error).split())
    raise ConfigError(f"config.data.dir: {path} is damaged or of another kind ({what}); mend it or take it away") from error  # fmt: skip


def _walk_tar(path):
  """(offset, length, label, name) of every image."""
  images, labels = [], {}
  with tarfile.open(path, "r:") as archive:
    for member in archive:
      if not member.isfile():
        continue
      folder, base = os.path.split(member.name)
      key, _, extension = base.partition(".")
      key = os.path.join(folder, key)
      if f".{extension.lower()}".endswith(EXTENSIONS):
        images.append((key, member.offset_data, member.size, member.name))
      elif extension == "cls":
        labels[key] = int(archive.extractfile(member).read())
  for key, offset, size, name in images:
    yield offset, size, labels.get(key, UNLABELLED), name


def _walk_tfrecord(path, keys):
  """(offset, length, label, no name) of every record's image; only a few bytes of each are read."""
  if not os.path.getsize(path):
    return
  with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    at = 0
    with memoryview(content) as view:
      while at < len(view):
        if at + 12 > len(view):
          raise ValueError(f"ends inside of a record, at byte {at}")
        (size,) = struct.unpack_from("<Q", view, at)
        first = at + 12  # after the length and its checksum
        if first + size + 4 > len(view):
          raise ValueError(f"no record, or one that was cut short, at byte {at}")
        with view[first : first + size] as record:
          start, end, label = _look(record, keys)
        yield first + start, end - start, label, ""
        at = first + size + 4


def _walk_array_record(path, keys):
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(path)
  try:
    for position in range(reader.num_records()):
      record = reader.read([position])[0]
      yield position, 0, _look(record, keys)[2], ""
  except RuntimeError as error:
    raise ValueError(str(error)) from error
  finally:
    reader.close()


def _look(record, keys):
  """(start, end, label) of an Example's image. Raises ValueError."""
  found = examples.features(record)
  places = (examples.first_bytes(record, found[k]) for k in keys[0] if k in found)
  image = next((p for p in places if p), None)
  if image is None:
    raise ValueError(f"no image under {', '.join(keys[0])}; found {', '.join(sorted(found)) or 'no features'}: set data.image_key")  # fmt: skip
  values = (examples.first_integer(record, found[k]) for k in keys[1] if k in found)
  label = next((v for v in values if v is not None), UNLABELLED)
  return *image, label


def open_packed(folder):
  """(`Ranges`, labels or None, classes) of what `pack` wrote. Raises ConfigError where it no longer fits."""
  manifest = read_manifest(folder)
  paths, parts = [], []
  for number, shard in enumerate(manifest["shards"]):
    path = os.path.join(folder, shard["name"])
    size = os.path.getsize(path) if os.path.exists(path) else None
    remedy = f"{path} is {'missing' if size is None else f'{size} bytes'}, the manifest says {shard['bytes']}; pack again"  # fmt: skip
    require(size == shard["bytes"], "data.dir", folder, remedy)
    index = read_index(path)
    require(index is not None, "data.dir", folder, f"{path} has no index {index_path(path)}; pack again")  # fmt: skip
    fits = f"{index_path(path)} is of other files than the manifest; pack again"
    require(len(index["offset"]) == shard["examples"], "data.dir", folder, fits)
    paths.append(path)
    parts.append(index | {"shard": np.full(len(index["offset"]), number, np.int32)})
  join = lambda name: np.concatenate([part[name] for part in parts])
  names = Strings.of(
    Strings(p["block"], p["ends"])[i] for p in parts for i in range(len(p["ends"]))
  )
  files = Ranges(paths, join("shard"), join("offset"), join("length"), names)
  return files, _labels({"label": join("label")}), tuple(manifest["classes"])


def read_manifest(folder):
  """The manifest that ends a packing. Raises ConfigError."""
  path = os.path.join(folder, "manifest.json")
  there = os.path.isfile(path)
  require(
    there, "data.dir", folder, "no manifest.json there; pack it (configs/pack.py) or let it finish"
  )
  try:
    return read_json(path)
  except ValueError as error:
    raise ConfigError(
      f"config.data.dir={folder!r}: manifest.json is damaged; pack again"
    ) from error


def index_path(shard):
  """The file beside a packed shard that says where its images lie."""
  return os.path.splitext(shard)[0] + ".npz"


def read_index(shard):
  """{'offset', 'length', 'label', 'block', 'ends'} of a packed shard; None if there is none to read."""
  try:
    with np.load(index_path(shard)) as archive:
      return {name: archive[name] for name in archive.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile):
    return None
