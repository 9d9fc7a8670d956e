"""Where the images of a tar file lie, without unpacking it.

Flow: shards walks over each tar once and keeps the result.
Holds: a tar that ends early, or is damaged between two members, is refused; so are members that cannot be
  read in one piece.
Not here: reading images (files), writing tars (pack).
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator

from adco_jax.data.sources.listing import HIDDEN, NO_ENDING, image_endings

UNLABELLED = -(2**63)
NO_NUMBER = "labels that are no whole number"
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}  # before rarer kinds


def walk_tar(path: str, unread: Counter[str]) -> Iterator[tuple[int, int, int, str]]:
  """(offset, length, label, name) of every image: `key.jpg` (or another kind), label from `key.cls`.

  A key is a member's name up to its first full stop; `key.seg.png` is no image of it, nor is `key.pfm` beside
  `key.jpg`. Hidden members are left out, hard links stand for what they point to. `unread`: a Counter
  of endings that gains what is neither image nor label, and `NO_NUMBER`. Raises ValueError, TarError.
  """
  labels: dict[str, int] = {}
  places: dict[str, tuple[int, int]] = {}  # of members' contents: byte, length
  images: dict[str, tuple[tuple[int, int], str]] = {}
  with tarfile.open(path, "r:") as archive:
    for member in archive:
      name, base = member.name, os.path.basename(member.name)
      if member.islnk() and member.linkname in places:
        place = places[member.linkname]
      elif member.isreg() and not member.issparse():
        place = member.offset_data, member.size
      elif member.issparse():
        raise ValueError(f"{name} is stored with holes; write the tar without --sparse")
      else:
        continue
      places[name] = place
      key, extension = _key(name)
      if base.startswith("."):
        unread[HIDDEN] += 1
      elif f".{extension}" in image_endings():
        images[key] = _preferred(images.get(key), (place, name), unread)
      elif extension != "cls":
        unread[f".{extension}" if extension else NO_ENDING] += 1
      else:
        archive.fileobj.seek(place[0])
        try:
          labels[key] = _whole_number(archive.fileobj.read(place[1]))
        except ValueError:
          unread[NO_NUMBER] += 1
    _check_end(archive.fileobj, archive.offset)
  for key, (place, name) in images.items():
    yield *place, labels.get(key, UNLABELLED), name


def _preferred(one, other, unread):
  """Of two (place, name) of one key the usual kind of picture; two of these are refused."""
  if one is None:
    return other
  usual = [x for x in (one, other) if f".{_key(x[1])[1]}" in PICTURES]
  if len(usual) != 1:
    raise ValueError(f"{one[1]} and {other[1]} are two images of one key")
  (rare,) = (x for x in (one, other) if x not in usual)
  unread[f".{_key(rare[1])[1]}"] += 1
  return usual[0]


def _whole_number(text):
  """Raises ValueError unless it is one that an index can hold."""
  number = int(text)
  if abs(number) >= 2**62:
    raise ValueError(text)
  return number


def _key(name):
  folder, base = os.path.split(name)
  key, _, extension = base.partition(".")
  return os.path.join(folder, key), extension.lower()


def _check_end(file, offset):
  """After the last member a tar holds zeros, a block of them at least."""
  file.seek(offset)
  count = 0
  while rest := file.read(1 << 20):
    if rest.count(0) < len(rest):
      raise ValueError(f"no member, and not the end, at byte {offset + count}")
    count += len(rest)
  if count < tarfile.BLOCKSIZE:
    raise ValueError(f"ends early, at byte {offset + count}")
