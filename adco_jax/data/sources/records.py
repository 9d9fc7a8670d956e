"""Where the images of TFRecord and ArrayRecord files lie, whose records are tf.train.Examples.

Flow: shards walks over each file once and keeps the result.
Holds: a file that ends early, or is no such file, is refused; of TFRecords only a few bytes each are read.
Not here: the inside of an Example (examples), reading images (files).
"""

import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence

from adco_jax.data.sources import examples
from adco_jax.data.sources.tars import NO_NUMBER, UNLABELLED

Keys = tuple[Sequence[str], Sequence[str]]  # features that may hold the image, and the label
Row = tuple[int, int, int, str]


class NoImage(Exception):
  """A record has no image: (the key that was asked for, if one was; the features that it has)."""


def walk_tfrecord(path: str, keys: Keys, unread: Counter[str]) -> Iterator[Row]:
  """(offset, length, label, no name) of every record's image; only a few bytes of each are read.

  `unread`: a Counter that gains `NO_NUMBER`, labels of texts and floating numbers.
  """
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
          start, end, label = look(record, keys, unread)
        yield first + start, end - start, label, ""
        at = first + size + 4


def walk_array_record(path: str, keys: Keys, unread: Counter[str]) -> Iterator[Row]:
  """(position, 0, label, no name) of every record, all of which are read; `unread`: see `walk_tfrecord`."""
  from array_record.python.array_record_module import ArrayRecordReader

  reader = None
  try:
    reader = ArrayRecordReader(path)
    for position in range(reader.num_records()):
      record = reader.read([position])[0]
      yield position, 0, look(record, keys, unread)[2], ""
  except RuntimeError as error:
    raise ValueError(str(error)) from error
  finally:
    if reader is not None:
      reader.close()


def look(record: examples.Record, keys: Keys, unread: Counter[str]) -> tuple[int, int, int]:
  """(start, end, label) of an Example's image. Raises NoImage, or ValueError where it is no Example."""
  found = examples.features(record)
  places = (examples.first_bytes(record, found[k]) for k in keys[0] if k in found)
  image = next((p for p in places if p), None)
  if image is None:
    raise NoImage(keys[0][0] if len(keys[0]) == 1 else "", ", ".join(sorted(found)) or "nothing")
  values = [examples.first_integer(record, found[k]) for k in keys[1] if k in found]
  label = next((v for v in values if v is not None), UNLABELLED)
  if values and label == UNLABELLED:
    unread[NO_NUMBER] += 1
  return *image, label
