"""Where the host's own cores are all that computes: memory that a step took is kept for the next one.

Flow: main calls `keep_memory` before JAX begins, since threads keep the arena in which they began; log calls `give_back`
  where another program's turn comes; compiled asks `computes`, who starts threads `cores`.
Holds: memory is not kept where an accelerator may be, without the GNU C library, or where GLIBC_TUNABLES or a variable MALLOC_...
  says what malloc is to do.
Not here: memory of accelerators (XLA's), of tf.data's buffers (data).
"""

import ctypes
import importlib.util
import os
import sys

# Parameters of mallopt in glibc's malloc.h, and their values here.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
KEEPING = (
  (ARENA_MAX, 1),
  (MMAP_MAX, 0),
  (TRIM_THRESHOLD, -1),
)  # one heap; all of it there; never cut


def cores() -> int:
  """Processors that this process may use; macOS tells of no share, so all of them there."""
  share = getattr(os, "sched_getaffinity", None)
  return len(share(0)) if share else os.cpu_count() or 1


def computes() -> bool:
  """Whether JAX will find no accelerator: none is asked for, or no package for one is installed."""
  there = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
  return os.environ.get("JAX_PLATFORMS") == "cpu" or not there


def keep_memory() -> bool:
  """Has malloc keep what is freed; returns whether it does.

  XLA:CPU takes the memory of a step anew and frees it at its end. By default malloc gives so large a piece back to the system,
  which clears every page of it again at the next step: a tenth of the processor time of a ViT-S/16 (docs/cpu.md).
  """
  said = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
  said = said or any(name.startswith("MALLOC_") for name in os.environ)
  if said or sys.platform != "linux" or not computes():
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  return mallopt is not None and all(mallopt(*setting) for setting in KEEPING)


def give_back() -> None:
  """Returns to the system what malloc holds and nobody uses: a program that comes next needs pieces of other sizes.

  Nothing is done where an accelerator may be: there nothing was kept.
  """
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if computes() else None
  if trim is not None:
    trim(0)
