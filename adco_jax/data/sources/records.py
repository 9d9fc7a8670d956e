"""Where the images of TFRecord and ArrayRecord files lie, whose records are tf.train.Examples; without TensorFlow.

Flow: shards walks over each file once and keeps the result.
Shapes: a record is bytes or a memoryview, of which only the looked-at parts are read from disk.
Paper: protocol buffers' wire format; Example { Features { map<string, Feature> } }, each Feature a list
  of bytes (1), of floats (2) or of integers (3).
Holds: a file that ends early, or is no such file, is refused; of TFRecords only a few bytes each are read.
Not here: reading images (files), tar files (tars).
"""

import mmap
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

from adco_jax.data.sources.tars import NO_NUMBER, UNLABELLED

SEVERAL = "labels of several numbers"

Keys = tuple[Sequence[str], Sequence[str]]  # features that may hold the image, and the label
Row = tuple[int, int, int, str]
Record = bytes | memoryview


class NoImage(Exception):
  """A record has no image: (the key that was asked for, if one was; the features that it has)."""


def walk_tfrecord(path: str, keys: Keys, unread: Counter[str]) -> Iterator[Row]:
  """(offset, length, label, no name) of every record's image; only a few bytes of each are read.

  `unread`: a Counter that gains `NO_NUMBER`, labels of texts and floating numbers, and `SEVERAL`, lists of numbers: which of
  them is meant, or whether they say one of so many classes, nobody knows.
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
          start, end, label = find_image(record, keys, unread)
        yield first + start, end - start, label, ""
        at = first + size + 4


def walk_array_record(path: str, keys: Keys, unread: Counter[str]) -> Iterator[Row]:
  """(position, sum of the image's bytes, label, no name) of every record, all of which are read; `unread`: see `walk_tfrecord`."""
  from array_record.python.array_record_module import ArrayRecordReader

  reader = None
  try:
    reader = ArrayRecordReader(path)
    for position in range(reader.num_records()):
      record = reader.read([position])[0]
      start, end, label = find_image(record, keys, unread)
      yield position, zlib.crc32(record[start:end]), label, ""
  except RuntimeError as error:
    raise ValueError(str(error)) from error
  finally:
    if reader is not None:
      reader.close()


def find_image(record: Record, keys: Keys, unread: Counter[str]) -> tuple[int, int, int]:
  """(start, end, label) of an Example's image. Raises NoImage, or ValueError where it is no Example."""
  features = _features(record)
  places = (_first_bytes(record, features[k]) for k in keys[0] if k in features)
  image = next((p for p in places if p), None)
  if image is None:
    has = ", ".join(sorted(features)) or "nothing"
    raise NoImage(keys[0][0] if len(keys[0]) == 1 else "", has)
  lists: list[list[int]] = [_integers(record, features[k]) for k in keys[1] if k in features]
  values = next((given for given in lists if given), [])
  if len(values) > 1:
    unread[SEVERAL] += 1
  elif lists and not values:
    unread[NO_NUMBER] += 1
  return *image, values[0] if len(values) == 1 else UNLABELLED


def _features(record):
  """{name: (kind, start, end)} with kind 1 (bytes), 2 (floats) or 3 (integers). Raises ValueError.

  start, end: of the encoded list of values inside of `record`.
  """
  places = {}
  for number, start, end in _fields(record, 0, len(record)):
    if number != 1:
      continue
    for _, first, last in _fields(record, start, end):
      entry = {n: (a, b) for n, a, b in _fields(record, first, last)}
      name = bytes(record[slice(*entry[1])]).decode()
      for kind, a, b in _fields(record, *entry.get(2, (0, 0))):
        places[name] = kind, a, b
  return places


def _first_bytes(record, place):
  """(start, end) of the first value of a list of bytes; None if there is none."""
  kind, start, end = place
  values = _fields(record, start, end) if kind == 1 else ()
  return next(((a, b) for n, a, b in values if n == 1), None)


def _integers(record, place):
  """The first two values of a list of integers, all that it takes to tell one from several; [] of other kinds."""
  kind, start, end = place
  values: list[int] = []
  while kind == 3 and start < end and len(values) < 2:
    tag, start = _varint(record, start)
    if tag & 7 == 2:  # packed: the list's length, then its values
      size, start = _varint(record, start)
      last = start + size
    else:
      last = start + 1
    while start < last and len(values) < 2:
      value, start = _varint(record, start)
      values.append(value - (1 << 64) if value >> 63 else value)
  return values


def _fields(record, start, end):
  """(field number, start, end) of every field that has a length; others are passed over."""
  while start < end:
    tag, start = _varint(record, start)
    kind = tag & 7
    if kind == 2:
      size, start = _varint(record, start)
      if start + size > end:
        raise ValueError("a field ends outside of its record")
      yield tag >> 3, start, start + size
      start += size
    elif kind == 0:
      _, start = _varint(record, start)
    elif kind in (1, 5):
      start += 8 if kind == 1 else 4
    else:
      raise ValueError(f"unknown wire type {kind}")


def _varint(record, at):
  value = shift = 0
  while True:
    if at >= len(record) or shift > 63:
      raise ValueError("a number without end")
    byte = record[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at
