"""Where encoded images lie: single files of a tree, byte ranges of shards, records of ArrayRecord files.

Flow: sources and shards make one of these classes; a `Reader` (images) asks `read(i)` for the content.
Shapes: N images; `read` -> bytes, `name` -> str, `checksum` -> hexadecimal digits over what was listed.
Holds: reading is random access from any thread; only what is asked for is read, so every process reads
  its own slots' images and no others.
Not here: what the bytes mean (images), finding them (listing, shards).
"""

import errno
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import numpy as np

from adco_jax.errors import RunError

NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
UNREADABLE = (errno.EACCES, errno.EISDIR, errno.ELOOP)
DISK_TRIES, DISK_PAUSE_SECONDS = 5, 2.0
OPEN_SHARDS = 256  # kept open; the others are opened for each image


class BadImage(Exception):
  """This file holds no image that can be used; the message says why."""


class Strings:
  """N strings in one block: a million names cost their letters and eight bytes each."""

  def __init__(self, block: np.ndarray, ends: np.ndarray) -> None:
    self.block, self.ends = np.asarray(block, np.uint8), np.asarray(ends, np.int64)

  @classmethod
  def of(cls, strings: Iterable[str]) -> Self:
    """From any iterable of str."""
    parts = [os.fsencode(s) for s in strings]
    ends = np.cumsum([len(p) for p in parts], dtype=np.int64)
    return cls(np.frombuffer(b"".join(parts), np.uint8), ends)

  def __len__(self) -> int:
    return len(self.ends)

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))

  def take(self, index: np.ndarray) -> Self:
    """These of them, in this order."""
    return type(self).of(self[int(i)] for i in index)

  def __getitem__(self, i: int) -> str:
    start = self.ends[i - 1] if i else 0
    return os.fsdecode(self.block[start : self.ends[i]].tobytes())


class Paths:
  """One image per file: `names` are paths below `root`."""

  def __init__(self, root: str, names: Strings) -> None:
    self.root, self.names = root, names

  def __len__(self) -> int:
    return len(self.names)

  def name(self, i: int) -> str:
    """Path below the root."""
    return self.names[i]

  def where(self, i: int) -> str:
    """What a person needs to find it."""
    return os.path.join(self.root, self.names[i])

  def read(self, i: int) -> bytes:
    """The file's content, see `read_file`."""
    return read_file(self.where(i))

  def checksum(self) -> str:
    """Of all names and where each ends."""
    return _checksum(self.names.block, self.names.ends)

  def take(self, index: np.ndarray) -> "Paths":
    """These of them."""
    return Paths(self.root, self.names.take(index))


class Ranges:
  """Images inside of shards: image i is `length[i]` bytes from `offset[i]` of `shards[shard[i]]`."""

  def __init__(
    self,
    shards: Sequence[str],
    shard: np.ndarray,
    offset: np.ndarray,
    length: np.ndarray,
    names: Strings | None = None,
  ) -> None:
    self.shards, self.names = shards, names
    self._shard, self._offset, self._length = shard, offset, length
    self._open: dict[str, int] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._shard)

  def name(self, i: int) -> str:
    """The member's name, or shard and byte."""
    shard = os.path.basename(self.shards[self._shard[i]])
    return self.names[i] if self.names else f"{shard}@{self._offset[i]}"

  def where(self, i: int) -> str:
    """What a person needs to find it."""
    return f"{self.shards[self._shard[i]]} ({self.name(i)})"

  def read(self, i: int) -> bytes:
    """The image's bytes. Raises RunError if the disk keeps failing."""
    path, offset, length = self.shards[self._shard[i]], int(self._offset[i]), int(self._length[i])
    return persistently(path, lambda: self._read_range(path, offset, length))

  def checksum(self) -> str:
    """Of the names, or the shards' names, and of all places."""
    names = self.names or Strings.of(os.path.basename(s) for s in self.shards)
    places = (self._shard.astype(np.int64), self._offset, self._length)
    return _checksum(names.block, names.ends, *places)

  def take(self, index: np.ndarray) -> "Ranges":
    """These of them."""
    shard, offset, length = (x[index] for x in (self._shard, self._offset, self._length))
    return Ranges(self.shards, shard, offset, length, self.names and self.names.take(index))

  def _read_range(self, path, offset, length):
    with self._lock:
      file = self._open.get(path)
      if file is None and len(self._open) < OPEN_SHARDS:
        file = self._open[path] = os.open(path, os.O_RDONLY)
    if file is not None:
      content = os.pread(file, length, offset)
    else:
      with open(path, "rb") as once:
        content = os.pread(once.fileno(), length, offset)
    if len(content) < length:
      raise OSError(errno.EIO, "ends before its index says")
    return content


class ArrayRecords:
  """Records of ArrayRecord files, which may be compressed: the library reads, `unpack` finds the image in one."""

  def __init__(
    self,
    shards: Sequence[str],
    shard: np.ndarray,
    position: np.ndarray,
    content: np.ndarray,
    unpack: Callable[[bytes], bytes],
  ) -> None:
    self.shards, self._shard, self._position, self._unpack = shards, shard, position, unpack
    self._content = content  # a sum of each image's bytes
    self._readers = threading.local()

  def __len__(self) -> int:
    return len(self._shard)

  def name(self, i: int) -> str:
    """Shard and position."""
    return f"{os.path.basename(self.shards[self._shard[i]])}@{self._position[i]}"

  def where(self, i: int) -> str:
    """What a person needs to find it."""
    return f"{self.shards[self._shard[i]]} (record {self._position[i]})"

  def read(self, i: int) -> bytes:
    """The image's bytes. Raises RunError if the record cannot be read."""
    number = self._shard[i]
    try:
      return self._unpack(self._reader(number).read([int(self._position[i])])[0])
    except (RuntimeError, ValueError, IndexError) as error:
      raise RunError(
        f"{self.where(i)} cannot be read ({error}); repair it, or check the storage"
      ) from error

  def checksum(self) -> str:
    """Of the shards' names, of all places and images: places alone would be those of any set of as many."""
    names = Strings.of(os.path.basename(s) for s in self.shards)
    return _checksum(names.block, self._shard.astype(np.int64), self._position, self._content)

  def _reader(self, number):
    from array_record.python.array_record_module import ArrayRecordReader

    readers = self._readers.__dict__.setdefault("open", {})
    if number not in readers:
      if len(readers) >= OPEN_SHARDS // 16:  # per thread
        readers.pop(next(iter(readers))).close()
      options = "readahead_buffer_size:0"  # random access
      readers[number] = ArrayRecordReader(self.shards[number], options)
    return readers[number]


def read_file(path: str) -> bytes:
  """The file's content. Raises BadImage if it never had any, RunError if the disk keeps failing.

  A file that was there when the folder was listed and is gone now is the disk's fault, not the image's.
  """

  def read():
    with open(path, "rb") as file:
      return file.read()

  return persistently(path, read)


def persistently(path: str, read: Callable[[], bytes]) -> bytes:
  """read(), tried again while the disk fails. Raises BadImage, RunError."""
  for _ in range(DISK_TRIES):
    try:
      return read()
    except OSError as error:
      failure = error.strerror
      dangling = error.errno in NOWHERE and os.path.islink(path)
      if error.errno in UNREADABLE or dangling:
        raise BadImage(failure) from error
      time.sleep(DISK_PAUSE_SECONDS)
  raise RunError(f"{path} cannot be read ({failure}, tried {DISK_TRIES} times); check the storage")


def _checksum(*arrays):
  number = 0
  for array in arrays:
    number = zlib.crc32(np.ascontiguousarray(array).data, number)
  return f"{number:08x}"
