"""Several processes of one run: how they find each other, agree on what went wrong, and leave.

Flow: main calls `start` before anything asks for a device and `leave` at the end; what may fail on one
  process alone runs inside `on_all` or `on_first`, so that no process waits for another that has gone.
Holds: with one process nothing here communicates; when one dies or fails alone the others leave too, with one line.
Not here: arrays over processes (sharding), signals (guard).
"""

import collections
import json
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from adco_jax.errors import ConfigError, RunError
from adco_jax.runtime import clusters, rollcall
from adco_jax.runtime.console import shown, tell
from adco_jax.runtime.files import Json

CONNECT = "ADCO_JAX_CONNECT_SECONDS"
CONNECT_SECONDS = "300"  # until all processes are there, unless CONNECT says otherwise
HEARTBEAT_SECONDS = 60  # a process that was not heard of for so long has died, and its run with it
STUCK = 43  # exit status beside those of plan's exceptions: hung, or another process is gone
LOST_WORDS = "gloo|nccl|coordination|heartbeat|connection (reset|closed)"  # in what JAX then says
LINE_SECONDS = 1  # until a line that ends is heard of
COMPILING = "compiling"  # name of threads whose work is of no use once the run ends
GOODBYE_SECONDS = 20  # how long a leaving process waits for the others

T = TypeVar("T")

_lines: dict[int, socket.socket] = {}
_leaving = threading.Event()
_telling, _told = threading.Lock(), threading.Event()
_gone = threading.Event()  # a line has ended, or process 0 says that one has


def start() -> None:
  """Joins the run that the environment describes (clusters); a lone process needs none. Raises ConfigError."""
  seconds, place = _seconds(), clusters.find()
  if place is None or (place != "tpu" and place.processes == 1):
    return
  join: dict[str, Any]
  if place == "tpu":
    where, join = f"{clusters.CLUSTER}='tpu'", {}
  else:
    _lines.update(rollcall.meet(place.address, place.processes, place.number, seconds))
    threading.Thread(target=_watch, daemon=True).start()
    where = f"{clusters.ADDRESS}={place.address!r}"
    join = dict(
      coordinator_address=place.address,
      num_processes=place.processes,
      process_id=place.number,
      local_device_ids=place.devices,
      cluster_detection_method="deactivate",
    )
  try:
    jax.distributed.initialize(
      **join, initialization_timeout=seconds, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    what = " ".join(str(error).split())[:200]
    raise ConfigError(
      f"{where}: no run within {seconds} s ({what}); start all processes together, each with its own number"
    ) from error
  _check_devices()


def _check_devices():
  devices = collections.Counter((d.process_index, d.device_kind) for d in jax.devices())
  if len({(kind, n) for (_, kind), n in devices.items()}) > 1:
    what = ", ".join(f"process {i}: {n} x {kind}" for (i, kind), n in sorted(devices.items()))
    raise ConfigError(
      f"the processes of this run have different devices ({what}); give each the same"
    )


def _seconds():
  value = os.environ.get(CONNECT, CONNECT_SECONDS)
  if not (value.isascii() and value.isdecimal() and int(value)):
    raise ConfigError(f"{CONNECT}={value!r}: use a whole number from 1 on")
  return int(value)


def several() -> bool:
  """Whether this run has more than one process."""
  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this is the process that writes and speaks."""
  return jax.process_index() == 0


def say(text: object) -> None:
  """Prints on the first process. A terminal that has gone, or a log on a full disk, ends no run."""
  if is_first():
    tell(text)


def ignore_peer_exits() -> None:
  """This process is about to end: others that end before it are not missed."""
  _leaving.set()


def leave(status: int) -> NoReturn:
  """Ends this process, after the others are ready to end too if they are within GOODBYE_SECONDS; else they must."""
  ignore_peer_exits()
  try:
    sys.stdout.flush()
    sys.stderr.flush()
  except (
    OSError
  ):  # nobody listens any more; an ordinary exit would turn that into a status of its own
    os._exit(status)
  joined = jax.distributed.is_initialized()
  if joined and status != STUCK:
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(GOODBYE_SECONDS)
  rollcall.say(_lines, status)
  if not joined and not any(t.name.startswith(COMPILING) for t in threading.enumerate()):
    sys.exit(status)
  os._exit(status)  # an ordinary exit would wait for processes that have died, or for the compiler


def _watch():
  number, status = rollcall.watch(_lines)
  dead = status in (None, STUCK)
  if dead:
    _gone.set()
  if _leaving.is_set():
    return
  if dead:
    tell_lost(f"the connection to process {number} has ended")
  else:
    tell(
      f"error: another process of this run has left with status {status}, and says why", sys.stderr
    )
  own = STUCK if status is None else status
  rollcall.say(_lines, own)
  os._exit(own)


def tell_lost(how: str) -> None:
  """Says, once, that another process of this run has died."""
  with _telling:
    if not _told.is_set():
      tell(f"error: another process of this run is gone ({how}); start all again", sys.stderr)
    _told.set()


def is_lost(error: BaseException) -> bool:
  """Whether `error` was raised because another process of this run has died: its line has ended, or JAX says so."""
  if not several():
    return False
  told = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
  return _gone.wait(LINE_SECONDS) or (
    told and bool(re.search(LOST_WORDS, str(error), re.IGNORECASE))
  )


def on_all(work: Callable[[], T]) -> T:
  """work() on every process; what fails on any of them is raised on all, as ConfigError or RunError."""
  if not several():
    return work()
  result: T | None = None
  error: Exception | None = None
  try:
    result = work()
  except (ConfigError, RunError) as problem:
    error = problem
  except Exception as problem:
    traceback.print_exc()
    error = RunError(f"{type(problem).__name__}: {problem}")
  kind = "2" if isinstance(error, ConfigError) else "3"
  texts = gather_texts(f"{kind}{shown(error)}" if error else "")
  if said := [text for text in texts if text]:
    raise (ConfigError if said[0][0] == "2" else RunError)(said[0][1:]) from error
  return cast(T, result)


def on_first(work: Callable[[], T]) -> T | None:
  """work() on the first process alone; all wait for it, and share its errors as in `on_all`."""
  return on_all(work if is_first() else lambda: None)


def first_gives(work: Callable[[], Json]) -> Json:
  """What work() returns on the first process, on all of them as JSON makes it; errors as in `on_all`."""
  given = on_first(work)
  return json.loads(gather_texts(json.dumps(given))[0])


def anyone(flag: object) -> bool:
  """Whether `flag` is true on any process; all must ask."""
  return bool(gather(np.array(flag)).any())


def first_says(flag: object) -> bool:
  """What `flag` is on the first process; all must ask."""
  return bool(gather(np.array(flag))[0])


def gather(x: np.ndarray) -> np.ndarray:
  """NumPy [...] of every process -> [processes, ...]."""
  return multihost_utils.process_allgather(x) if several() else x[None]


def gather_texts(text: str) -> list[str]:
  """The texts of all processes, in order; all must ask."""
  encoded = np.frombuffer(text.encode(), np.uint8)
  lengths = gather(np.array(len(encoded)))
  if not lengths.any():
    return [""] * len(lengths)
  padded = np.pad(encoded, (0, lengths.max() - len(encoded)))
  rows = zip(gather(padded), lengths, strict=True)
  return [bytes(row[:length]).decode() for row, length in rows]
