"""Are all processes of a run there, each with a number of its own, and are they still there?

Flow: processes calls `meet` with what the environment says, before JAX's own service takes the same port; the
  lines of that meeting stay open, and `watch` returns when somebody leaves alone.
Holds: what is wrong ends every process that came with the same line, in time; JAX itself would abort them with a
  page each, a minute after one has died.
Not here: what the processes do together, and what follows from a loss (processes).
"""

import contextlib
import json
import selectors
import socket
import time

from adco_jax.errors import ConfigError

PAUSE_SECONDS, GRACE_SECONDS = 0.2, 30
BACKLOG = 4096
SILENCE_SECONDS = 2  # of a connection that says nothing, while others wait
# Of a line that is open: a machine that went dark is known after 40 s, before JAX's heartbeat stops.
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}


def meet(address: str, count: int, number: int, seconds: float) -> dict[int, socket.socket]:
  """{number: open line} once all `count` processes have met at `address` (HOST:PORT of process 0).

  Process 0 has a line to every other, they have one to process 0. Raises ConfigError.
  """
  host, _, port = address.rpartition(":")
  if count == 1:
    return {}
  problem, lines = (
    _call(int(port), count, seconds)
    if number == 0
    else _answer(host, int(port), count, number, seconds)
  )
  if problem:
    raise ConfigError(f"JAX_COORDINATOR_ADDRESS={address!r}: {problem}")
  for line in lines.values():
    _keep(line)
  return lines


def watch(lines: dict[int, socket.socket]) -> tuple[int, int | None]:
  """(number, status) of the first process that leaves the others: the status that it said, None if it said none."""
  with selectors.DefaultSelector() as waiting:
    for number, line in lines.items():
      waiting.register(line, selectors.EVENT_READ, number)
    key = waiting.select()[0][0]
  try:
    said = lines[key.data].recv(1)
  except OSError:
    said = b""
  return key.data, said[0] if said else None


def say(lines: dict[int, socket.socket], status: int) -> None:
  """Those who have a line to this process are to leave with its status, unless they are leaving."""
  for line in lines.values():
    with contextlib.suppress(OSError):
      line.sendall(bytes([status]))


def _keep(line):
  line.settimeout(None)
  line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in KEEPALIVE.items():
    if hasattr(socket, name):
      line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _call(port, count, seconds):
  """Process 0: collects the others; ('' or what is wrong, lines), of which all that came are told."""
  there: dict[int, socket.socket] = {}
  problem, end = "", time.monotonic() + seconds
  with socket.socket() as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      server.bind(("", port))
    except OSError as error:
      problem = f"process 0 cannot listen there ({error.strerror}); is another run using the port, or are two processes number 0 (JAX_PROCESS_ID)?"
      return problem, {}
    server.listen(BACKLOG)
    while len(there) < count - 1 and not problem:
      server.settimeout(max(0.01, end - time.monotonic()))
      try:
        visitor, _ = server.accept()
      except TimeoutError:
        gone = [i for i in range(1, count) if i not in there]
        problem = (
          f"processes {_few(gone)} of {count} did not come within {seconds} s; start all together"
        )
        break
      if not (said := _said(visitor)):
        continue
      theirs, number = said
      if theirs != count:
        problem = f"process {number} was started as one of {theirs}, process 0 as one of {count}; give all the same JAX_NUM_PROCESSES"
      elif number in there or number == 0:
        problem = f"two processes have the number {number}; give each its own JAX_PROCESS_ID"
      there[number if not problem else len(there) + count] = visitor
  for visitor in there.values():
    with contextlib.suppress(OSError):
      visitor.sendall(json.dumps(problem).encode() + b"\n")
  return problem, there


def _said(visitor):
  """(count, number) of one that came; None if the connection is somebody else's."""
  visitor.settimeout(SILENCE_SECONDS)
  try:
    message = json.loads(_line(visitor))
    return int(message["count"]), int(message["number"])
  except (OSError, ValueError, TypeError, LookupError):
    visitor.close()
    return None


def _answer(host, port, count, number, seconds):
  """Any other process: ('' or what is wrong, its line)."""
  end, last = time.monotonic() + seconds, ""
  while time.monotonic() < end:
    try:
      with contextlib.ExitStack() as closing:
        line = socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic()))
        closing.callback(line.close)
        line.sendall(json.dumps({"number": number, "count": count}).encode() + b"\n")
        line.settimeout(seconds + GRACE_SECONDS)  # process 0 decides
        problem = json.loads(_line(line))
        closing.pop_all()
        return problem, {0: line}
    except (OSError, ValueError) as error:
      silent = "no answer" if isinstance(error, TimeoutError) else "somebody else answers there"
      last = getattr(error, "strerror", None) or silent
      time.sleep(PAUSE_SECONDS)
  problem = f"process {number} of {count} tried for {seconds} s and reached nobody ({last}); does process 0 run there, still, and is the port open?"
  return problem, {}


def _line(connection):
  line = b""
  while not line.endswith(b"\n"):
    if not (part := connection.recv(1)):  # what follows the line is not for now
      raise ValueError("ended early")
    line += part
  return line


def _few(numbers):
  text = ", ".join(map(str, numbers[:5]))
  return text + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
