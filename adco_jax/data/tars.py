"""Where the images of a tar file lie, without unpacking it.

Flow: shards walks over each tar once and keeps the result.
Holds: a tar that ends early, or is damaged between two members, is refused; so are members that cannot be
  read in one piece.
Not here: reading images (files), writing tars (pack).
"""

import contextlib
import os
import tarfile

from adco_jax.data.listing import EXTENSIONS

UNLABELLED = -(2**63)


def walk_tar(path):
  """(offset, length, label, name) of every image: `key.jpg` (or another kind), label from `key.cls`.

  A key is a member's name up to its first full stop; `key.seg.png` is no image of it. Hidden members are
  left out, hard links stand for what they point to. Raises ValueError, TarError.
  """
  images, labels, places = {}, {}, {}
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
        continue
      if f".{extension}" in EXTENSIONS:
        if key in images:
          raise ValueError(f"{images[key][1]} and {name} are two images of one key")
        images[key] = place, name
      elif extension == "cls":
        with contextlib.suppress(ValueError):
          archive.fileobj.seek(place[0])
          labels[key] = _whole_number(archive.fileobj.read(place[1]))
    _check_end(archive.fileobj, archive.offset)
  for key, (place, name) in images.items():
    yield *place, labels.get(key, UNLABELLED), name


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
