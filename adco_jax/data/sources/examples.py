"""tf.train.Example without TensorFlow: where in a record each feature's values lie.

Flow: shards walks over records of TFRecord and ArrayRecord files with `features`.
Shapes: a record is bytes or a memoryview, of which only the looked-at parts are read from disk.
Paper: protocol buffers' wire format; Example { Features { map<string, Feature> } }, each Feature a list
  of bytes (1), of floats (2) or of integers (3).
Not here: framing of records in files (shards).
"""

Record = bytes | memoryview
Place = tuple[int, int, int]  # kind, start, end


def features(record: Record) -> dict[str, Place]:
  """{name: (kind, start, end)} with kind 1 (bytes), 2 (floats) or 3 (integers). Raises ValueError.

  start, end: of the encoded list of values inside of `record`.
  """
  found = {}
  for number, start, end in _fields(record, 0, len(record)):
    if number != 1:
      continue
    for _, first, last in _fields(record, start, end):
      entry = {n: (a, b) for n, a, b in _fields(record, first, last)}
      name = bytes(record[slice(*entry[1])]).decode()
      for kind, a, b in _fields(record, *entry.get(2, (0, 0))):
        found[name] = kind, a, b
  return found


def first_bytes(record: Record, place: Place) -> tuple[int, int] | None:
  """(start, end) of the first value of a list of bytes; None if there is none."""
  kind, start, end = place
  values = _fields(record, start, end) if kind == 1 else ()
  return next(((a, b) for n, a, b in values if n == 1), None)


def first_integer(record: Record, place: Place) -> int | None:
  """The first value of a list of integers; None if there is none."""
  kind, start, end = place
  if kind != 3 or start == end:
    return None
  tag, start = _varint(record, start)
  if tag & 7 == 2:  # packed
    _, start = _varint(record, start)
  value, _ = _varint(record, start)
  return value - (1 << 64) if value >> 63 else value


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
