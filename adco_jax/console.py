"""The one way to print: a terminal that has gone, or a log on a full disk, ends no run.

Flow: everything that speaks to the user; nothing comes before.
Not here: what is said, and on which process (metrics.say).
"""

import contextlib
import sys


def tell(text, stream=None):
  """One line on `stream` (default: stdout), at once; lost if it cannot be written."""
  with contextlib.suppress(OSError, ValueError):
    print(text, file=stream or sys.stdout, flush=True)
