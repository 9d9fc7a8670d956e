"""Results with what it takes to repeat them: command, commit, date, hardware, versions."""

import datetime
import os
import platform
import subprocess

import jax

from adco_jax.runtime.files import write_json

RESULTS = os.path.join(os.path.dirname(__file__), "results")


def write(folder, stem, command, result):
  """Writes `result` (a dictionary) to folder/stem.json, numbered if that exists; returns the path."""
  os.makedirs(folder, exist_ok=True)
  number, path = 1, os.path.join(folder, f"{stem}.json")
  while os.path.exists(path):
    number += 1
    path = os.path.join(folder, f"{stem}-{number}.json")
  write_json(path, {"command": command, **provenance(), **result})
  return os.path.relpath(path)


def stem(kind, workdir, result):
  """Name of what was measured of a step: config, device, batch and type of `result`."""
  device = jax.devices()[0].device_kind.replace(" ", "_").lower()
  return (
    f"{kind}-{os.path.basename(workdir)}-{device}-b{result['batch_size']}-{result['compute_dtype']}"
  )


def provenance():
  """`origin`, and the device."""
  return {**origin(), "device": device()}


def device():
  """Of JAX, which begins by being asked."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def origin():
  """Commit (and whether the tree differs from it), date, processor, versions: all that is known before JAX begins."""
  here = os.path.dirname(os.path.abspath(__file__))  # wherever it is run from
  git = lambda *args: subprocess.run(
    ["git", "-C", here, *args], capture_output=True, text=True
  ).stdout.strip()
  changed = "+changes" if git("status", "--porcelain", "-uno") else ""
  return {
    "commit": git("rev-parse", "HEAD") + changed,
    "date": datetime.date.today().isoformat(),
    "processor": f"{len(os.sched_getaffinity(0))} cores, {_processor()}",
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def _processor():
  try:
    with open("/proc/cpuinfo") as file:
      return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
