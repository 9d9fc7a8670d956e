"""Workdirs in Google Cloud Storage (gs://...): checkpoints lie there, small files are worked on in a local copy.

Flow: whoever is given a workdir works in `local(workdir)`; checkpoint asks `home`; saves and the end of a
  program `push`.
Holds: a folder on disk is its own copy and its own home; what lies there is at most one save older than the
  copy; nothing there is deleted or shortened.
Not here: locks and appending, which object stores lack: a second run in the same gs:// workdir is not noticed.
"""

import errno
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Collection

import fsspec
from etils import epath

from adco_jax.errors import ConfigError
from adco_jax.runtime import console

SCHEME = "gs://"
# Copied from there, with eval/.
SMALL = (
  "config.json", "plan.json", "classes.json", "metrics.jsonl", "views.png", "neighbours.png", "adversary.png", "adversary.npz", "capsule.json",
)  # fmt: skip
_copies: dict[str, "_Copy"] = {}  # workdir -> _Copy


class _Copy:
  """A folder on disk that stands for `url`; `pushed`: {path: (time, size)} of what is there already."""

  def __init__(self, url):
    self.url, self.pushed = url, {}
    self.root = tempfile.mkdtemp(prefix="adco_jax-")
    self.folder = os.path.join(self.root, url.rpartition("/")[2])
    os.makedirs(self.folder)

  def pull(self):
    """Fetches what a run is known by."""
    there = epath.Path(self.url)
    names = {path.name for path in _list(there)}
    for name in names.intersection(SMALL):
      self._fetch(there / name, name)
    for path in _list(there / "eval") if "eval" in names else ():
      self._fetch(path, os.path.join("eval", path.name))

  def _fetch(self, source, inside):
    path = os.path.join(self.folder, inside)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
      file.write(source.read_bytes())
    self.pushed[path] = _stamp(path)

  def push(self):
    """Uploads what has changed; each file is there whole or as it was before."""
    walked = os.walk(self.folder)
    paths = [os.path.join(folder, name) for folder, _, names in walked for name in names]
    paths.sort(key=lambda path: path.endswith("config.json"))  # last: it says that all is there
    for path in paths:
      stamp, inside = _stamp(path), os.path.relpath(path, self.folder)
      if inside == ".lock" or path.endswith(".part") or self.pushed.get(path) == stamp:
        continue
      with open(path, "rb") as file:
        (epath.Path(self.url) / inside).write_bytes(file.read())
      self.pushed[path] = stamp


def local(workdir: str | os.PathLike[str]) -> str:
  """The folder on disk that stands for `workdir`: itself, or a copy of what is in gs://. Raises ConfigError."""
  workdir = os.fspath(workdir)
  if "://" not in workdir:
    return workdir
  url = workdir.rstrip("/")
  if url not in _copies:
    if not url.startswith(SCHEME) or not url.removeprefix(SCHEME):
      raise ConfigError(f"{workdir}: use a folder or {SCHEME}BUCKET/NAME")
    if not importlib.util.find_spec("gcsfs"):
      raise ConfigError(f"{workdir}: needs gcsfs; pip install gcsfs")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what fails is told below
    fsspec.config.conf["gcs"] = {"use_listings_cache": False}  # other processes write there too
    copy = _Copy(url)
    _told(copy.pull, lambda text: ConfigError(f"{workdir}: cannot be read ({text})"))
    _copies[url] = copy
    console.SHOWN[copy.folder] = url
  return _copies[url].folder


def names(folder: epath.Path) -> list[str]:
  """Names in a folder (epath.Path), none if it is not there. Raises OSError."""
  return [path.name for path in _list(folder)]


def refuse(path: str, option: str) -> None:
  """Raises ConfigError for a path in gs://, where `option` cannot be."""
  if "://" in path:
    raise ConfigError(
      f"config.{option}={path!r}: only workdirs can be in gs://; name a path on disk"
    )


def refresh(workdir: str) -> None:
  """Fetches again what another process may have written."""
  if copy := _copy_of(workdir):
    _told(copy.pull, lambda text: ConfigError(f"{copy.url}: cannot be read ({text})"))


def home(folder: str) -> epath.Path:
  """Where `folder`, of a workdir or of its copy, lasts: a path on disk or in gs:// (epath.Path)."""
  folder = local(folder)
  if copy := _copy_of(folder):
    return epath.Path(copy.url) / os.path.relpath(folder, copy.folder)
  return epath.Path(os.path.abspath(folder))


def push(workdir: str) -> None:
  """Uploads what has changed in the copy that `workdir` is, if it is one. Raises OSError."""
  if copy := _copy_of(workdir):
    _told(copy.push, lambda text: OSError(errno.EIO, f"not uploaded ({text})", copy.url))


def close() -> None:
  """Uploads what is left in all copies, then removes them; one that fails stays. Raises OSError."""
  while _copies:
    url, copy = _copies.popitem()
    try:
      _told(copy.push, lambda text, url=url: OSError(errno.EIO, f"not uploaded ({text})", url))
    except OSError as error:
      del console.SHOWN[copy.folder]
      error.strerror = f"{error.strerror}; the newest files lie in {copy.folder}"
      raise
    shutil.rmtree(copy.root, ignore_errors=True)


def move(path: epath.Path, target: epath.Path) -> None:
  """Renames a file or folder (epath.Path); in gs://, where nothing can be renamed, copies it and then removes it."""
  if not str(path).startswith(SCHEME):
    path.rename(target)
  elif path.is_dir():
    _copy_tree(path, target)
    path.rmtree()
  else:
    target.write_bytes(path.read_bytes())
    path.unlink()


def move_into(workdir: str, wanted: Collection[str], name: str) -> None:
  """Moves those of `wanted` files and folders that are in a workdir into its folder `name`, where it lasts.

  They leave its copy on disk, if there is one. What was interrupted can be done again.
  """
  there, target = home(workdir), home(workdir) / name
  target.mkdir(parents=True, exist_ok=True)
  for item in set(names(there)) & set(wanted):
    move(there / item, target / item)
  for item in wanted if _copy_of(workdir) else ():
    _forget(os.path.join(workdir, item))


def remove(path: str) -> None:
  """Removes a file of a workdir, where it lasts and from its copy."""
  home(path).unlink(missing_ok=True)
  _forget(path)


def _forget(path):
  """Removes a file or folder on disk if it is there."""
  if os.path.isdir(path):
    shutil.rmtree(path)
  elif os.path.exists(path):
    os.remove(path)


def _copy_tree(path, target):
  for item in path.iterdir():
    if item.is_dir():
      _copy_tree(item, target / item.name)
    else:
      (target / item.name).write_bytes(item.read_bytes())


def _copy_of(folder):
  inside = lambda copy: os.path.abspath(folder).startswith(copy.folder)
  return next((copy for copy in _copies.values() if inside(copy)), None)


def _list(folder):
  """What is in a folder of gs://, now."""
  try:
    return [path for path in folder.iterdir() if path.name]
  except FileNotFoundError:
    return []


def _stamp(path):
  facts = os.stat(path)
  return facts.st_mtime_ns, facts.st_size


def _told(work, error):
  """work(); whatever client, network or credentials raise becomes error(first line)."""
  try:
    return work()
  except Exception as problem:
    text = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    raise error(text) from problem
