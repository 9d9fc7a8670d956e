"""The task `pack`: any source -> tar shards of moderate JPEGs with indices and a manifest.

Flow: main -> `run`: source -> encode in threads -> shards; sources opens them as `packed`.
Holds: a shard counts only with its index, which is written last; every byte is a function of the settings
  and of what can be read of the source, so an interrupted packing that went on equals one that was not;
  what is there is checked by its hash, never trusted by its name.
Not here: reading shards (data/shards).
"""

import hashlib
import io
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg
from ml_collections import ConfigDict
from PIL import Image

from adco_jax import build
from adco_jax.data.images import Reader
from adco_jax.data.modes import jpeg_orientation
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.files import Strings
from adco_jax.data.sources.loading import align_classes
from adco_jax.data.sources.shards import index_path, read_index
from adco_jax.data.sources.splits import AS_IT_IS
from adco_jax.data.sources.tars import UNLABELLED
from adco_jax.errors import ConfigError, NoSplit, RunError, require
from adco_jax.runtime import host, remote
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import Json, read_json, whole, write_json, write_npz
from adco_jax.runtime.progress import Progress
from adco_jax.tasks import scored_data
from adco_jax.workdir.files import check_writable

SAMPLE = 64  # images that the size is estimated from
STALE_SECONDS = 600.0
DECODER = 3  # counts changes of what a file's pixels are: 2 turns them upright and maps 16 bits and floats, 3 asks XMP too


Encode = Callable[[int], bytes | None]  # see `make_encoder`


def run(config: ConfigDict) -> None:
  """Packs the train split, and the test split where there is one. Raises ConfigError, RunError."""
  check(config)
  data = config.data
  train = build.open_source(data)
  remedy = "packings hold one label per image, and here are several; forget them with --config.data.labels=False"
  require(not train.has_several, "data.source", data.source, remedy)
  test = open_test(data, train)
  pack_split(config, train, "train" if data.split == AS_IT_IS else data.split)
  if test is not None:
    pack_split(config, test, data.test_split)


def open_test(data: ConfigDict, train: Source) -> Source | None:
  """The `Source` of the test split, its classes numbered as those of `train`, what train lacks behind them; None
  where there is none. Raises ConfigError."""
  if not data.test_split:
    return None
  try:
    test = build.open_source(data, data.test_split)
  except NoSplit as error:
    tell(f"no {data.test_split} split is packed ({error})")
    return None
  remedy = f"holds images of data.split={data.split} too; to pack that alone, add --config.data.test_split="
  require(not scored_data.share_images(train, test), "data.test_split", data.test_split, remedy)
  more = tuple(name for name in test.classes if name not in train.classes)
  return align_classes(test, train.classes + more) if train.classes else test


def check(config: ConfigDict) -> None:
  """Refuses options that no source could make right. Raises ConfigError."""
  data = config.data
  require(config.out, "out", config.out, "name a folder with --config.out=PATH")
  remote.refuse(config.out, "out")
  out, source = os.path.realpath(config.out), os.path.realpath(data.dir or os.devnull)
  inside = os.path.commonpath([out, source]) == source
  require(
    not inside,
    "out",
    config.out,
    f"lies in config.data.dir={data.dir}; name a folder outside of it",
  )
  check_writable(config.out, "config.out")


def pack_split(config: ConfigDict, source: Source, split: str) -> None:
  """Writes what is missing of out/<split>/, then its manifest."""
  folder = os.path.join(config.out, split)
  settings = {name: config[name] for name in ("short_side", "format", "quality", "shard_images")}
  settings |= {
    "source": source.identity(labels=True),
    "classes": list(source.classes),
    "decoder": DECODER,
  }
  begin(folder, settings)
  reader = Reader(source, config.data.max_bad_fraction, config.data.max_megapixels)
  encode = make_encoder(reader, config.short_side, config.format, config.quality)
  shards = [
    (os.path.join(folder, f"{number:05d}.tar"), np.arange(start, min(start + config.shard_images, source.num_examples)))
    for number, start in enumerate(range(0, source.num_examples, config.shard_images))
  ]  # fmt: skip
  with ThreadPoolExecutor(config.threads or host.cores()) as pool:
    todo = [(path, index) for path, index in shards if not is_whole(path, encode)]
    left = sum(len(index) for _, index in todo)
    if left < source.num_examples:
      tell(
        f"{split}: {source.num_examples - left} of {source.num_examples} images are there and sound"
      )
    if todo:
      estimate(split, folder, source, left, encode, pool)
    progress = Progress(split, left)
    for path, index in todo:
      write_shard(path, index, progress.over(pool.map(encode, index)), reader, config.format)
  reader.check()
  finish(folder, [path for path, _ in shards], source, settings)


def begin(folder: str, settings: dict[str, Json]) -> None:
  """Makes the folder, or recognises it as of the same packing. Raises ConfigError."""
  path = os.path.join(folder, "settings.json")
  if os.path.exists(path):
    try:
      there = dict(read_json(path))
    except (ValueError, TypeError) as error:
      raise ConfigError(
        f"config.out={os.path.dirname(folder)!r}: {path} is damaged; name another folder"
      ) from error
    if "labels" not in there.get("source", {}):  # of a version that did not look at them
      settings = settings | {"source": {**settings["source"]}}
      settings["source"].pop("labels", None)
    other = ", ".join(k for k in settings if there.get(k) != settings[k])
    other = other.replace("source", "source (images or labels)")
    require(not other, "out", os.path.dirname(folder), f"{folder} holds a packing with another {other}; name another folder")  # fmt: skip
    return
  os.makedirs(folder, exist_ok=True)
  require(not os.listdir(folder), "out", os.path.dirname(folder), f"{folder} holds other files; name another folder")  # fmt: skip
  write_json(path, settings)


def make_encoder(reader: Reader, short_side: int, kind: str, quality: int) -> Encode:
  """number -> bytes of the packed image; None where it is broken."""

  def encode(i):
    image = reader.read(int(i))
    if image is None:
      return None
    small = shrink(image, short_side)
    if kind == "png":
      content = io.BytesIO()
      Image.fromarray(small).save(content, "PNG")
      return content.getvalue()
    try:
      content = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality, "RGB", "420")
    except ValueError as error:  # no JPEG is wider than 65,500 pixels
      return reader.refuse(int(i), error)
    if small is image and reader.source.files is not None:
      original = reader.source.files.read(int(i))
      upright = simplejpeg.is_jpeg(original) and jpeg_orientation(original) == 1
      if upright and len(original) <= len(content):
        return original
    return content

  return encode


def shrink(image: np.ndarray, short_side: int) -> np.ndarray:
  """uint8 [H, W, 3] whose short side is at most `short_side` (0: any), antialiased."""
  height, width = image.shape[:2]
  scale = short_side / min(height, width)
  if not short_side or scale >= 1:
    return image
  size = max(1, round(width * scale)), max(1, round(height * scale))
  return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def estimate(
  split: str, folder: str, source: Source, left: int, encode: Encode, pool: ThreadPoolExecutor
) -> None:
  """Says what will come, from a sample; refuses what has no room. Raises ConfigError."""
  look = np.unique(np.linspace(0, source.num_examples - 1, SAMPLE).astype(int))
  sizes = [len(content) for content in pool.map(encode, look) if content]
  each = np.mean(sizes) + 3 * 512 if sizes else 0.0  # with the tar's headers and padding
  needed, free = each * left, shutil.disk_usage(folder).free
  tell(f"{split}: {left} images to pack, about {each / 1024:.0f} KiB each, {needed / 2**30:.2f} GiB of {free / 2**30:.1f} free")  # fmt: skip
  require(needed < free, "out", os.path.dirname(folder), "has no room for that; name another disk or a smaller short_side")  # fmt: skip


def write_shard(
  path: str, index: np.ndarray, encoded: Iterable[bytes | None], reader: Reader, kind: str
) -> None:
  """Shard and, after it, index; whole or not at all. Raises RunError if too much is broken."""
  extension = "jpg" if kind == "jpeg" else kind
  source, rows, missing = reader.source, [], []
  with whole(path) as part:
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
      for i, content in zip(index, encoded, strict=True):
        if content is None:
          missing.append(i)
          continue
        label = UNLABELLED if source.labels is None else int(source.labels[i])
        offset = add(archive, f"{i:09d}.{extension}", content)
        if label != UNLABELLED:
          add(archive, f"{i:09d}.cls", b"%d" % label)
        rows.append((offset, len(content), label, source.name_of(int(i))))
    reader.check()
  write_index(path, rows, missing)


def write_index(path: str, rows: list[tuple[int, int, int, str]], missing: list[int]) -> None:
  """Beside a shard: (offset, bytes, label, name) of each of its images, numbers of those left out, its SHA-256."""
  offset, length, label, names = zip(*rows, strict=True) if rows else ((), (), (), ())
  table = Strings.of(names)
  numbers = {"offset": offset, "length": length, "label": label, "missing": missing}
  columns: dict[str, np.ndarray] = {
    name: np.array(column, np.int64) for name, column in numbers.items()
  }
  columns |= {"block": table.block, "ends": table.ends, "sha256": np.array(sha256(path))}
  write_npz(index_path(path), columns)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
  """Adds a member that is a function of name and content alone; returns where its content begins."""
  member = tarfile.TarInfo(name)
  member.size = len(content)
  start = archive.offset + tarfile.BLOCKSIZE
  archive.addfile(member, io.BytesIO(content))
  return start


def is_whole(path: str, encode: Encode) -> bool:
  """Whether a shard has the hash that its index states, and what it left out is broken still."""
  index = read_index(path)
  if index is None or not os.path.exists(path):
    return False
  if sha256(path) != str(index["sha256"]):
    tell(f"{path} is not what was written; packing it again")
    return False
  if any(encode(i) is not None for i in index["missing"]):
    tell(f"{path} left out images that can be read now; packing it again")
    return False
  return True


def finish(folder: str, paths: list[str], source: Source, settings: dict[str, Json]) -> None:
  """Counts everything and writes the manifest, the same for the same source and settings."""
  indices = [read_index(path) or {} for path in paths]
  shards: list[dict[str, Json]] = [
    {"name": os.path.basename(path), "examples": len(index["offset"]), "bytes": os.path.getsize(path), "sha256": str(index["sha256"])}
    for path, index in zip(paths, indices, strict=True)
  ]  # fmt: skip
  packed = sum(shard["examples"] for shard in shards)
  broken = [source.name_of(int(i)) for index in indices for i in index["missing"]]
  if packed + len(broken) != source.num_examples or not packed:
    raise RunError(
      f"{folder}: {packed} packed and {len(broken)} broken images of {source.num_examples}; name another source, or remove it and pack again"
    )
  manifest = {"settings": settings, "classes": list(source.classes), "examples": packed, "broken": broken, "shards": shards}  # fmt: skip
  write_json(os.path.join(folder, "manifest.json"), manifest)
  for name in os.listdir(folder):
    path = os.path.join(folder, name)
    if name.endswith(".part") and time.time() - os.path.getmtime(path) > STALE_SECONDS:
      os.remove(path)  # of a packing that was killed
  size = sum(shard["bytes"] for shard in shards)
  left_out = f", {len(broken)} broken ones left out" if broken else ""
  tell(f"{folder}: {packed} images in {len(shards)} shards, {size / 2**30:.2f} GiB, all hashes checked{left_out}")  # fmt: skip


def sha256(path: str) -> str:
  """Of a file's content."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
