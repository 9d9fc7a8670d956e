"""Which process of which run this is: said by variables of JAX, or by those of Slurm, Open MPI, Kubernetes.

Flow: processes.start asks `find` before anything else.
Holds: what is said by hand wins over what a launcher says; a lone process, in a batch script too, is alone.
  JAX (0.10 and 0.12) detects Slurm and Open MPI too, but counts the tasks of a Slurm job and not of its step, so that a lone
  process waits for the others, gives each process one GPU, and reads no node names like n[1-2]-ib; of Open MPI 5 it
  knows nothing without mpi4py, of Kubernetes without its client and rights, of JAX's own two numbers nothing.
Not here: TPU pods, which JAX itself knows (processes); meeting the others (rollcall).
"""

import glob
import os
import re
from typing import Literal, NamedTuple

from adco_jax.errors import ConfigError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CLUSTER = "ADCO_JAX_CLUSTER"
FIRST_PORT, PORTS = 61440, 4096  # where a Slurm job's port is looked for


class Place(NamedTuple):
  """One of so many `processes`; `devices`: which of the machine's accelerators are its own, None: all that it sees."""

  address: str  # HOST:PORT of process 0
  processes: int
  number: int
  devices: list[int] | None = None


class Launcher(NamedTuple):
  """Names of its variables: how many processes, which of them; how many on this machine, which of those."""

  processes: str
  number: str
  neighbours: str
  local: str


LAUNCHERS = {  # Open MPI first: it may itself be started by Slurm
  "ompi": Launcher("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
  "slurm": Launcher("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
}  # fmt: skip
# Of a pod of a Kubernetes job, which does not know how many there are.
INDEX = "JOB_COMPLETION_INDEX"


def find() -> Place | Literal["tpu"] | None:
  """The `Place` of this process, 'tpu' where JAX is to ask the pod, None for a lone one. Raises ConfigError."""
  given, address = os.environ.get(CLUSTER, ""), os.environ.get(ADDRESS, "")
  if given not in ("", "none", "tpu", *LAUNCHERS):
    raise ConfigError(f"{CLUSTER}={given!r}: use one of {', '.join((*LAUNCHERS, 'tpu', 'none'))}")
  present = (name for name, x in LAUNCHERS.items() if _number(x.processes) > 1)
  launcher = LAUNCHERS.get(given or next(present, ""))
  # Hosts of a TPU pod know each other on GKE; elsewhere launch/tpu_pod.sh says that they are in one.
  pod = given == "tpu" or (not given and "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""))
  if given == "none" or (not address and not pod and not launcher):
    if not given and (os.environ.get(COUNT, "1"), os.environ.get(NUMBER, "0")) != ("1", "0"):
      raise ConfigError(f"{COUNT} or {NUMBER} is set: set {ADDRESS} to HOST:PORT of the first process as well")  # fmt: skip
    return None
  if pod and not address:
    return "tpu"
  address = address or _address(launcher)
  port = re.fullmatch(r".+:([0-9]+)", address)
  if not port or not 0 < int(port[1]) < 65536:
    raise ConfigError(f"{ADDRESS}={address!r}: use HOST:PORT of the first process")
  count = _read(1, COUNT, launcher and launcher.processes)
  number = _read(0, NUMBER, launcher and launcher.number, INDEX)
  if number >= count:
    raise ConfigError(f"{NUMBER}={number}: must be less than {COUNT}={count}")
  return Place(address, count, number, launcher and _own_devices(launcher))


def _address(launcher):
  """Where process 0 of a launcher runs. Raises ConfigError."""
  nodes = os.environ.get("SLURM_STEP_NODELIST", "")
  first = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?", nodes)
  if launcher is LAUNCHERS["slurm"] and first:
    port = FIRST_PORT + (_number("SLURM_JOB_ID") + _number("SLURM_STEP_ID")) % PORTS
    return f"{''.join(part or '' for part in first.groups())}:{port}"
  raise ConfigError(
    f"{launcher.processes}={os.environ.get(launcher.processes)!r}: set {ADDRESS} to HOST:PORT of the first process as well"
  )


def _own_devices(launcher):
  """Numbers of the GPUs that this process takes where several of a machine see all of them. Raises ConfigError."""
  neighbours = int((re.match("[0-9]+", os.environ.get(launcher.neighbours, "")) or "1")[0])
  shown = os.environ.get("CUDA_VISIBLE_DEVICES")
  gpus = len(glob.glob("/dev/nvidia[0-9]*")) if shown is None else len(shown.split(","))
  if neighbours == 1 or gpus < 2:
    return None
  if gpus % neighbours:
    raise ConfigError(
      f"{launcher.neighbours}={os.environ[launcher.neighbours]!r}: {neighbours} processes cannot share {gpus} GPUs; start one per GPU"
    )
  each, local = gpus // neighbours, _number(launcher.local)
  return list(range(each * local, each * (local + 1)))


def _number(name):
  value = os.environ.get(name, "")
  return int(value) if _is_number(value) else 0


def _read(low, name, *instead):
  """A whole number said by hand, else by what started this process. Raises ConfigError."""
  name = next((n for n in (name, *instead) if n and os.environ.get(n)), name)
  value = os.environ.get(name, "")
  if not _is_number(value) or int(value) < low:
    raise ConfigError(f"{name}={value!r}: use a whole number from {low} on")
  return int(value)


def _is_number(text):
  return text.isascii() and text.isdecimal()
