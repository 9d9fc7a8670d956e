"""Which image files a tree holds, looked up again only if a directory changed since the last time.

Flow: sources calls `list_tree`; shards keeps its indices with `cached`.
Holds: a stored listing counts only if every directory (or shard) is still the same one with the time stamps
  it had then, and none was changed within the two seconds before it was listed; losing the cache loses nothing.
  What is there and is no image is counted by its ending: nothing vanishes without a trace.
Not here: reading (files), splits (splits), classes (sources).
"""

import bisect
import collections
import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from adco_jax.data.sources.files import Strings
from adco_jax.runtime.console import tell
from adco_jax.runtime.files import write_npz
from adco_jax.runtime.progress import Rhythm

# Formats whose files Pillow recognises and cannot decode, or hands to another program (Ghostscript).
UNDECODABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
JUNK = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
HIDDEN, NO_ENDING, OTHER = "hidden", "without ending", "of other endings"
NOWHERE = "links that lead nowhere"
NAMED_ENDINGS = 20  # others are counted together
SETTLED_NS = 2 * 10**9  # time stamps can be that coarse


Arrays = dict[str, np.ndarray]


class Tree(NamedTuple):
  """`names`: sorted `Strings` of image files below the root; `folders`: sorted list of directories below
  it, without the root; `unread`: {ending: how many files are no images}, with `HIDDEN` entries."""

  names: Strings
  folders: list[str]
  unread: dict[str, int]

  def images_below(self, folder: str) -> slice:
    """The slice of `names` that lies in `folder` or deeper."""
    return slice(bisect.bisect_left(self.names, folder + "/"), bisect.bisect_left(self.names, folder + "0"))  # fmt: skip

  def holds_images(self, folder: str) -> bool:
    """Whether that slice has any."""
    inside = self.images_below(folder)
    return inside.start < inside.stop


@functools.cache
def image_endings() -> frozenset[str]:
  """Endings, in small letters, of all formats that the Pillow of this machine decodes."""
  Image.init()
  endings = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in UNDECODABLE}  # fmt: skip
  return frozenset(endings | {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".mpo"})  # fmt: skip


def ending(name: str) -> str:
  """'.jpg' of 'x.JPG'; what follows the last full stop and is no ending in anyone's sense is none."""
  last = os.path.splitext(name)[1].lower()
  return last if 1 < len(last) <= 12 and not last[1:].isdecimal() else NO_ENDING


def count_endings(names: Iterable[str]) -> collections.Counter[str]:
  """{ending or HIDDEN: how many} of names that are no images, the most frequent first."""
  return collections.Counter(HIDDEN if os.path.basename(n).startswith(".") else ending(n) for n in names)  # fmt: skip


def list_tree(root: str) -> Tree:
  """The `Tree` below `root`, directories of any depth.

  Links are followed (not in circles), hidden files and what systems leave behind (`JUNK`) are left out;
  dangling links are listed, as broken.
  """

  def build():
    names, folders, unread, links = _walk(root)
    table, places, lost = Strings.of(sorted(names)), Strings.of(folders), Strings.of(links)
    stamps = np.array(list(folders.values()), np.int64)
    kinds = Strings.of(unread)
    return {"block": table.block, "ends": table.ends, "stamps": stamps,
            "lost": lost.block, "lost_ends": lost.ends, "folders": places.block, "folder_ends": places.ends, "unread": kinds.block,
            "unread_ends": kinds.ends, "unread_counts": np.array(list(unread.values()), np.int64)}  # fmt: skip

  def fresh(arrays):
    folders = Strings(arrays["folders"], arrays["folder_ends"])
    now = [stamp(os.path.join(root, folders[i])) for i in range(len(folders))]
    lost = Strings(arrays["lost"], arrays["lost_ends"])
    found = any(os.path.exists(os.path.join(root, link)) for link in lost)
    return np.array_equal(arrays["stamps"], now) and not found

  known = ",".join(sorted(image_endings()))  # another Pillow may read others
  arrays = cached(
    f"tree with unread files and lost links, {known} {os.path.realpath(root)}", build, fresh
  )
  kinds = Strings(arrays["unread"], arrays["unread_ends"])
  unread = {kind: int(n) for kind, n in zip(kinds, arrays["unread_counts"], strict=True)}
  folders = sorted(f for f in Strings(arrays["folders"], arrays["folder_ends"]) if f)
  return Tree(Strings(arrays["block"], arrays["ends"]), folders, unread)


def cached(key: str, build: Callable[[], Arrays], fresh: Callable[[Arrays], bool]) -> Arrays:
  """build() -> {name: array}, or what it gave before under this key if fresh(that) still holds.

  Its 'stamps' are rows that begin as `stamp` does.
  """
  path = os.path.join(cache_folder(), hashlib.sha256(os.fsencode(key)).hexdigest()[:32] + ".npz")
  with contextlib.suppress(Exception):  # not there, damaged, or of another version
    with np.load(path) as archive:
      arrays = {name: archive[name] for name in archive.files}
    if fresh(arrays):
      return arrays
  began = time.time_ns()
  arrays = build()
  if arrays["stamps"][:, :2].max() < began - SETTLED_NS:
    with contextlib.suppress(OSError):
      os.makedirs(os.path.dirname(path), exist_ok=True)
      write_npz(path, arrays)
  return arrays


def cache_folder() -> str:
  """ADCO_JAX_CACHE, else adco_jax in the user's cache folder."""
  default = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.path.expanduser(os.environ.get("ADCO_JAX_CACHE", "")) or os.path.join(
    default, "adco_jax"
  )


def stamp(path: str) -> tuple[int, int, int]:
  """(time of content, time of change, number); tools that copy set the first back, nobody the second."""
  with contextlib.suppress(OSError):
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino
  return -1, -1, -1


def _walk(root):
  """(paths below root of image files, {directory below root: its stamp}, {ending: unread files}, links that lead nowhere)."""
  names, folders, lost, rhythm = [], {}, [], Rhythm()
  unread: collections.Counter[str] = collections.Counter()
  endings, waiting = image_endings(), [("", [_number(root)])]
  while waiting:
    folder, above = waiting.pop()
    folders[folder] = stamp(os.path.join(root, folder))
    with os.scandir(os.path.join(root, folder)) as entries:
      for entry in entries:
        if entry.name.startswith(".") or entry.name in JUNK:
          unread[HIDDEN] += 1
          continue
        name = os.path.join(folder, entry.name)
        if holds_true(entry.is_dir):
          number = _number(entry.path) if entry.is_symlink() else None
          if number is None or number not in above:
            waiting.append((name, [*above, number or _number(entry.path)]))
        elif name[name.rfind(".") :].lower() in endings and (holds_true(entry.is_file) or _leads_nowhere(entry)):  # fmt: skip
          names.append(name)
        elif _leads_nowhere(entry):
          unread[NOWHERE] += 1
          lost.append(name)  # to be looked at again: a disk that is mounted later
        else:
          unread[ending(entry.name)] += 1
    if rhythm.is_due():
      tell(f"listing {root}: {len(names)} images so far")
  return names, folders, most_common(unread), lost


def most_common(counts: collections.Counter[str]) -> dict[str, int]:
  """A counter of endings with at most NAMED_ENDINGS of them, the most frequent first."""
  first = dict(collections.Counter(counts).most_common(NAMED_ENDINGS))
  rest = sum(counts.values()) - sum(first.values())
  return first | ({OTHER: rest} if rest else {})


def holds_true(kind: Callable[[], bool]) -> bool:
  """kind(), False for links that lead nowhere, to themselves, or below a file."""
  try:
    return kind()
  except OSError:
    return False


def _leads_nowhere(entry):
  """Whether it is a link to nothing; one to a pipe or a socket leads somewhere, where reading would wait for ever."""
  return entry.is_symlink() and not os.path.exists(entry.path)


def _number(path):
  status = os.stat(path)
  return status.st_dev, status.st_ino
