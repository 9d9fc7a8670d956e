"""Where compiled programs are kept from one start to the next: JAX's persistent cache, in a folder of the user's.

Flow: main calls `keep` before JAX is imported; nothing else knows of it.
Holds: machines that share a home folder share no programs unless their processors have the same features and as many
  cores (XLA:CPU compiles for both; of accelerators JAX's own keys tell the kind); the folder is bounded, and an entry
  that was cut short goes at the next start. JAX_COMPILATION_CACHE_DIR, or any other setting of JAX's, is the user's to say.
Not here: which programs there are (programs), the keys (JAX).
"""

import contextlib
import hashlib
import os
import platform
import re
import zlib

from adco_jax.runtime import host
from adco_jax.runtime.console import tell

MOST_BYTES = 2 * 1024**3  # in the folder of one kind of machine
FEATURES = re.compile(r"^(model name|flags|Features|CPU part)\s*:.*$", re.MULTILINE)


def keep() -> str:
  """Has JAX, which is not imported yet, keep what it compiles and find it again; returns the folder, '' if it cannot be used."""
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  _quieten()
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = default_folder()
    try:
      os.makedirs(folder, exist_ok=True)
      tidy(folder)
    except OSError as error:  # JAX would say so for every program
      tell(f"compiled programs are not kept: {folder}: {error.strerror}")
      return ""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  return os.environ["JAX_COMPILATION_CACHE_DIR"]


def _quieten():
  """The hints with which XLA:CPU tunes its own programs count as features that the machine lacks: it would print pages
  of errors about each one that it finds. Where there may be an accelerator errors are to be seen."""
  # "1" is JAX's own, in a process that another one of JAX's has started.
  asked = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") != "1"
  if not asked and host.computes():
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def default_folder() -> str:
  """In the user's cache folder, one for each kind of machine."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.path.join(home, "adco_jax", "compiled", machine())


def machine() -> str:
  """What XLA:CPU compiles for: architecture, cores, and a number of the processor's model and features."""
  text = ""
  with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
    text = "\n".join(sorted({match[0] for match in FEATURES.finditer(file.read())}))
  number = hashlib.sha256(f"{platform.processor()}{text}".encode()).hexdigest()[:12]
  return f"{platform.machine()}-{host.cores()}-{number}"


def tidy(folder: str) -> None:
  """Removes entries that are not whole, and the longest unused above MOST_BYTES."""
  stamp = os.path.join(folder, "tidied")
  since = os.path.getmtime(stamp) if os.path.exists(stamp) else 0.0
  with open(stamp, "w"):
    pass
  files = [file for file in os.scandir(folder) if file.name.endswith("-cache")]
  there = []
  for file in files:
    with contextlib.suppress(FileNotFoundError):  # another start tidies as well
      there.append((file.path, file.stat()))
  room = MOST_BYTES
  for path, facts in sorted(there, key=lambda x: max(x[1].st_atime, x[1].st_mtime), reverse=True):
    room -= facts.st_size
    with contextlib.suppress(FileNotFoundError):
      if room < 0 or (facts.st_mtime >= since and not is_whole(path)):
        os.remove(path)


def is_whole(path: str) -> bool:
  """Whether an entry can be unpacked; one that another compressor made is taken to be."""
  with open(path, "rb") as file:
    packed = file.read()
  unpacked = zlib.decompressobj()
  try:
    unpacked.decompress(packed)
  except zlib.error:
    return packed[:1] != b"\x78"
  return unpacked.eof
