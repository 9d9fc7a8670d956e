"""Files that are there whole or not at all, whatever happens while they are written.

Flow: everything that writes a file a user keeps; nothing comes before.
Holds: who opens a path finds what stood there before or all of what was written, also after a power failure.
Not here: what is in them; folders in Google Cloud Storage (remote).
"""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Json = Any  # what JSON can hold: dictionaries, lists, texts, numbers, None


@contextlib.contextmanager
def whole(path: str, new: bool = False) -> Iterator[str]:
  """The name of a file to write. It then replaces `path`; where writing it fails nothing is left of it.

  `new`: raises FileExistsError where `path` is there by then, also if another process just made it.
  """
  part = f"{path}.{os.getpid()}-{secrets.token_hex(3)}.part"  # containers have the same numbers of processes
  try:
    yield part
    _to_disk(part)
    if new:
      _place(part, path)
    else:
      os.replace(part, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      os.unlink(part)
    if isinstance(error, OSError):
      error.filename = error.filename or path
    raise
  try:
    _to_disk(os.path.dirname(os.path.abspath(path)))
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
      raise


def write_text(path: str, text: str, new: bool = False) -> None:
  """A text file in UTF-8; what names of files hold beside it is escaped."""
  with (
    whole(path, new) as part,
    open(part, "w", encoding="utf-8", errors="backslashreplace") as file,
  ):
    file.write(text)


def write_npz(path: str, arrays: Mapping[str, np.ndarray], new: bool = False) -> None:
  """Arrays under their names."""
  with whole(path, new) as part, open(part, "wb") as file:
    np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle


def write_json(path: str, value: Json, new: bool = False) -> None:
  """A value as indented JSON."""
  write_text(path, json.dumps(value, indent=2) + "\n", new)


def read_json(path: str) -> Json:
  """The value in a JSON file."""
  with open(path) as file:
    return json.load(file)


def _place(part, path):
  """Gives a file a name that must be free; a link cannot replace anything."""
  try:
    os.link(part, path)
  except FileExistsError:
    raise
  except OSError as error:  # a file system without links
    if os.path.lexists(path):
      raise FileExistsError(errno.EEXIST, "exists", path) from error
    os.replace(part, path)
  else:
    os.unlink(part)


def _to_disk(path):
  place = os.open(path, os.O_RDONLY)
  try:
    os.fsync(place)
  finally:
    os.close(place)
