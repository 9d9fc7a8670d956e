"""Which process of which run this is: said by variables of JAX, or by those of Slurm, Open MPI, Kubernetes.

Flow: processes.start asks `find` before anything else.
Holds: what is said by hand wins over what a launcher says; a lone process, in a batch script too, is alone.
Not here: TPU pods, which JAX itself knows (processes); meeting the others (rollcall).
"""

import os
import re
from typing import NamedTuple

from adco_jax.plan import ConfigError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CLUSTER = "ADCO_JAX_CLUSTER"
FIRST_PORT, PORTS = 61440, 4096  # where a Slurm job's port is looked for


class Place(NamedTuple):
  """One process of `count`; `devices`: which of the machine's accelerators are its own, None: all that it sees."""

  address: str  # HOST:PORT of process 0
  count: int
  number: int
  devices: list | None = None


class Launcher(NamedTuple):
  """Names of its variables: how many processes, which of them, which on this machine."""

  count: str
  number: str
  local: str


LAUNCHERS = {
  "slurm": Launcher("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
  "ompi": Launcher("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
INDEX = (
  "JOB_COMPLETION_INDEX"  # of a pod of a Kubernetes job, which does not know how many there are
)


def find():
  """The `Place` of this process, 'tpu' where JAX is to ask the pod, None for a lone one. Raises ConfigError."""
  given, address = os.environ.get(CLUSTER, ""), os.environ.get(ADDRESS, "")
  if given not in ("", "none", "tpu", *LAUNCHERS):
    raise ConfigError(f"{CLUSTER}={given!r}: use one of {', '.join((*LAUNCHERS, 'tpu', 'none'))}")
  found = (name for name, x in LAUNCHERS.items() if _number(x.count) > 1)
  launcher = LAUNCHERS.get(given or next(found, ""))
  # Hosts of a TPU pod know each other on GKE; elsewhere launch/tpu_pod.sh says that they are in one.
  pod = given == "tpu" or (not given and "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""))
  if not address and (pod or not launcher):
    return "tpu" if pod else None
  address = address or _address(launcher)
  if not re.fullmatch(r".+:\d+", address):
    raise ConfigError(f"{ADDRESS}={address!r}: use HOST:PORT of the first process")
  count = _read(1, COUNT, launcher and launcher.count)
  number = _read(0, NUMBER, launcher and launcher.number, INDEX)
  if number >= count:
    raise ConfigError(f"{NUMBER}={number}: must be less than {COUNT}={count}")
  return Place(address, count, number, _own_devices(launcher))


def _address(launcher):
  """Where process 0 of a launcher runs. Raises ConfigError."""
  nodes = re.match(r"([^,\[]+)(?:\[(\d+))?", os.environ.get("SLURM_STEP_NODELIST", ""))
  if launcher is LAUNCHERS["slurm"] and nodes:
    port = FIRST_PORT + _number("SLURM_JOB_ID") % PORTS
    return f"{nodes[1]}{nodes[2] or ''}:{port}"
  raise ConfigError(
    f"{launcher.count}={os.environ.get(launcher.count)!r}: set {ADDRESS} to HOST:PORT of the first process as well"
  )


def _own_devices(launcher):
  """Of GPUs that several processes of a machine see, each takes the one of its number there."""
  local = os.environ.get(launcher.local, "") if launcher else ""
  shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
  return [int(local)] if local.isdigit() and "," in shown else None


def _number(name):
  value = os.environ.get(name, "")
  return int(value) if value.isdigit() else 0


def _read(low, name, *instead):
  """A whole number said by hand, else by what started this process. Raises ConfigError."""
  name = next((n for n in (name, *instead) if n and os.environ.get(n)), name)
  value = os.environ.get(name, "")
  if not value.isdigit() or int(value) < low:
    raise ConfigError(f"{name}={value!r}: use a whole number from {low} on")
  return int(value)
