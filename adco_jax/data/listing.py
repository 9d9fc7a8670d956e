"""Which image files a tree holds, looked up again only if a directory changed since the last time.

Flow: sources calls `list_tree`; shards keeps its indices with `cached`.
Holds: a stored listing counts only if every directory (or shard) is still the same one with the time stamps
  it had then, and none was changed within the two seconds before it was listed; losing the cache loses nothing.
Not here: reading (files), classes (sources).
"""

import contextlib
import hashlib
import os
import time

import numpy as np

from adco_jax.console import tell
from adco_jax.data.files import Strings

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TELL_SECONDS = 5.0
SETTLED_NS = 2 * 10**9  # time stamps can be that coarse


def list_tree(root):
  """Sorted `Strings`: paths below `root` of all image files, in directories of any depth.

  Links are followed (not in circles), hidden files are left out; dangling links are listed, as broken.
  """

  def build():
    names, folders = _walk(root)
    table, places = Strings.of(sorted(names)), Strings.of(folders)
    stamps = np.array(list(folders.values()), np.int64)
    return {"block": table.block, "ends": table.ends, "stamps": stamps,
            "folders": places.block, "folder_ends": places.ends}  # fmt: skip

  def fresh(found):
    folders = Strings(found["folders"], found["folder_ends"])
    now = [stamp(os.path.join(root, folders[i])) for i in range(len(folders))]
    return np.array_equal(found["stamps"], now)

  found = cached(f"tree {os.path.realpath(root)}", build, fresh)
  return Strings(found["block"], found["ends"])


def cached(key, build, fresh):
  """build() -> {name: array}, or what it gave before under this key if fresh(that) still holds.

  Its 'stamps' are rows that begin as `stamp` does.
  """
  path = os.path.join(cache_folder(), hashlib.sha256(os.fsencode(key)).hexdigest()[:32] + ".npz")
  with contextlib.suppress(Exception):  # not there, damaged, or of another version
    with np.load(path) as archive:
      found = {name: archive[name] for name in archive.files}
    if fresh(found):
      return found
  began = time.time_ns()
  found = build()
  if found["stamps"][:, :2].max() < began - SETTLED_NS:
    with contextlib.suppress(OSError):
      os.makedirs(os.path.dirname(path), exist_ok=True)
      part = f"{path}.{os.getpid()}.npz"
      np.savez(part, **found)
      os.replace(part, path)
  return found


def cache_folder():
  """ADCO_JAX_CACHE, else adco_jax in the user's cache folder."""
  default = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.environ.get("ADCO_JAX_CACHE") or os.path.join(default, "adco_jax")


def stamp(path):
  """(time of content, time of change, number); tools that copy set the first back, nobody the second."""
  with contextlib.suppress(OSError):
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino
  return -1, -1, -1


def _walk(root):
  """(paths below root of image files, {directory below root: its stamp})."""
  names, folders, last = [], {}, time.monotonic()
  waiting = [("", (_number(root),))]
  while waiting:
    folder, above = waiting.pop()
    folders[folder] = stamp(os.path.join(root, folder))
    with os.scandir(os.path.join(root, folder)) as entries:
      for entry in entries:
        if entry.name.startswith("."):
          continue
        name = os.path.join(folder, entry.name)
        if _is(entry.is_dir):
          number = _number(entry.path) if entry.is_symlink() else None
          if number is None or number not in above:
            waiting.append((name, (*above, number or _number(entry.path))))
        elif entry.name.lower().endswith(EXTENSIONS) and (_is(entry.is_file) or entry.is_symlink()):
          names.append(name)
    if time.monotonic() - last > TELL_SECONDS:
      tell(f"listing {root}: {len(names)} images so far")
      last = time.monotonic()
  return names, folders


def _is(kind):
  """kind(), False for links that lead nowhere, to themselves, or below a file."""
  try:
    return kind()
  except OSError:
    return False


def _number(path):
  found = os.stat(path)
  return found.st_dev, found.st_ino
