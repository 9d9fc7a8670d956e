"""The one way to print: a terminal that has gone, or a log on a full disk, ends no run.

Flow: everything that speaks to the user; nothing comes before.
Not here: what is said, and on which process (processes.say).
"""

import contextlib
import sys
from typing import TextIO

SHOWN: dict[str, str] = {}  # folder on disk -> what the user calls it


def tell(text: object, stream: TextIO | None = None) -> None:
  """One line on `stream` (default: stdout), at once; lost if it cannot be written."""
  stream = stream or sys.stdout
  with contextlib.suppress(OSError, ValueError):
    code = getattr(stream, "encoding", None) or "utf-8"  # file names may hold what it cannot say
    print(shown(text).encode(code, "backslashreplace").decode(code), file=stream, flush=True)


def shown(text: object) -> str:
  """The text with folders under the names that the user gave."""
  text = str(text)
  for folder, name in SHOWN.items():
    text = text.replace(folder, name)
  return text
