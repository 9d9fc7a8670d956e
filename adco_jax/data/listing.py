"""Which image files a tree holds, looked up again only if a directory changed since the last time.

Flow: sources calls `list_tree`; shards keeps its indices with `cached`.
Holds: a stored listing counts only if every directory (or shard) still has the time stamp it had then, and
  none was changed within the two seconds before it was listed; losing the cache loses nothing.
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
    table = Strings.of(sorted(names))
    places = Strings.of(folders)
    stamps = np.array(list(folders.values()), np.int64)
    return {"block": table.block, "ends": table.ends, "stamps": stamps,
            "folders": places.block, "folder_ends": places.ends}  # fmt: skip

  def fresh(found):
    folders = Strings(found["folders"], found["folder_ends"])
    stamps = (_stamp(os.path.join(root, folders[i])) for i in range(len(folders)))
    return all(a == b for a, b in zip(found["stamps"].tolist(), stamps, strict=True))

  found = cached(f"tree {os.path.realpath(root)}", build, fresh)
  return Strings(found["block"], found["ends"])


def cached(key, build, fresh):
  """build() -> {name: array}, or what it gave before under this key if fresh(that) still holds."""
  path = os.path.join(cache_folder(), hashlib.sha256(os.fsencode(key)).hexdigest()[:32] + ".npz")
  with contextlib.suppress(Exception):  # not there, damaged, or of another version
    with np.load(path) as archive:
      found = {name: archive[name] for name in archive.files}
    if fresh(found):
      return found
  began = time.time_ns()
  found = build()
  if not np.size(found["stamps"]) or found["stamps"].max() < began - SETTLED_NS:
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


def _stamp(path):
  with contextlib.suppress(OSError):
    return os.stat(path).st_mtime_ns
  return -1


def _walk(root):
  """(paths below root of image files, {directory below root: time stamp})."""
  names, folders, last = [], {}, time.monotonic()
  waiting = [("", (_number(root),))]
  while waiting:
    folder, above = waiting.pop()
    folders[folder] = _stamp(os.path.join(root, folder))
    with os.scandir(os.path.join(root, folder)) as entries:
      for entry in entries:
        if entry.name.startswith("."):
          continue
        name = os.path.join(folder, entry.name)
        if entry.is_dir():
          number = _number(entry.path) if entry.is_symlink() else None
          if number is None or number not in above:
            waiting.append((name, (*above, number or _number(entry.path))))
        elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink()):
          names.append(name)
    if time.monotonic() - last > TELL_SECONDS:
      tell(f"listing {root}: {len(names)} images so far")
      last = time.monotonic()
  return names, folders


def _number(path):
  found = os.stat(path)
  return found.st_dev, found.st_ino
