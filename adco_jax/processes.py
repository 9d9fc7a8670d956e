"""Several processes of one run: how they find each other, agree on what went wrong, and leave.

Flow: main calls `start` before anything asks for a device and `leave` at the end; what may fail on one
  process alone runs inside `on_all` or `on_first`, so that no process waits for another that has gone.
Holds: with one process nothing here communicates.
Not here: arrays over processes (sharding), signals (guard).
"""

import os
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from adco_jax.plan import ConfigError, RunError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HEARTBEAT_SECONDS = 60  # a process that was not heard of for so long has died, and its run with it
GOODBYE_SECONDS = 20  # how long a leaving process waits for the others
MESSAGE_BYTES, KINDS = 2000, (ConfigError, RunError)


def start():
  """Joins the run that the environment describes; a lone process needs none. Raises ConfigError."""
  if not os.environ.get(ADDRESS):
    return
  count, number = _read(COUNT, 1), _read(NUMBER, 0)
  if number >= count:
    raise ConfigError(f"{NUMBER}={number}: must be less than {COUNT}={count}")
  jax.distributed.initialize(
    os.environ[ADDRESS], count, number, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
  )


def several():
  """Whether this run has more than one process."""
  return jax.process_count() > 1


def is_first():
  """Whether this is the process that writes and speaks."""
  return jax.process_index() == 0


def leave(status):
  """Ends this process, after the others are ready to end too if they are within GOODBYE_SECONDS."""
  try:
    sys.stdout.flush()
    sys.stderr.flush()
  except (
    OSError
  ):  # nobody listens any more; an ordinary exit would turn that into a status of its own
    os._exit(status)
  if not jax.distributed.is_initialized():
    sys.exit(status)
  goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  goodbye.start()
  goodbye.join(GOODBYE_SECONDS)
  os._exit(status)  # an ordinary exit would wait for processes that have died


def on_all(work):
  """work() on every process; a ConfigError or RunError on any of them is raised on all."""
  if not several():
    return work()
  result, error = None, None
  try:
    result = work()
  except KINDS as problem:
    error = problem
  text = np.zeros(MESSAGE_BYTES, np.uint8)
  encoded = f"{KINDS.index(type(error))}{error}".encode()[:MESSAGE_BYTES] if error else b""
  text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in gather(text))
  if said := [text for text in texts if text]:
    raise KINDS[int(said[0][0])](said[0][1:]) from error
  return result


def on_first(work):
  """work() on the first process alone; all wait for it, and share its errors as in `on_all`."""
  return on_all(work if is_first() else lambda: None)


def anyone(flag):
  """Whether `flag` is true on any process; all must ask."""
  return bool(gather(np.array(flag)).any())


def first_says(flag):
  """What `flag` is on the first process; all must ask."""
  return bool(gather(np.array(flag))[0])


def gather(x):
  """NumPy [...] of every process -> [processes, ...]."""
  return multihost_utils.process_allgather(x) if several() else x[None]


def _read(name, low):
  value = os.environ.get(name, "")
  if not value.isdigit() or int(value) < low:
    raise ConfigError(f"{name}={value!r}: {ADDRESS} is set, so this must be a number from {low} on")
  return int(value)
