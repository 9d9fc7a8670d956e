"""From the command to the first step: a run is started several times, each in a new workdir, the first with nothing compiled.

Command: python -m benchmarks.start --config=configs/adco_digits.py
Every further option is the run's own. The cache of compiled programs is a folder of this benchmark's own; what is told is when the first
step begins, when it is done, and the processor time (user and system, of all threads) until each.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from benchmarks import record

BEGINS, DONE = "the first step of ", "its first step is done"


def start(argv, folder, number):
  """{'begins' | 'done': {'seconds', 'processor_seconds'}} of the first step of one start. Exits where it fails."""
  command = [sys.executable, "-m", "adco_jax.main", *argv, f"--workdir={folder}/run{number}"]
  around = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
  began, found = time.monotonic(), {}
  with subprocess.Popen(command, env=around, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      name = {BEGINS: "begins", DONE: "done"}.get(
        next((x for x in (BEGINS, DONE) if x in line), "")
      )
      if name and name not in found:
        seconds = {"seconds": time.monotonic() - began, "processor_seconds": used(process.pid)}
        found[name] = {key: round(value, 2) for key, value in seconds.items()}
      if len(found) == 2:
        process.kill()
  if len(found) < 2:
    sys.exit(f"error: the run ended with status {process.returncode} before its first step")
  return found


def used(pid):
  """Seconds of processor time that a process has taken so far."""
  with open(f"/proc/{pid}/stat") as file:
    fields = file.read().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--starts", type=int, default=3)
  parser.add_argument("--name", default="start")
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options, rest = parser.parse_known_args(argv)
  starts = []
  with tempfile.TemporaryDirectory() as folder:
    for number in range(options.starts):
      starts.append(start(rest, folder, number))
      told = ", ".join(
        f"{name} after {x['seconds']:.1f} s ({x['processor_seconds']:.1f} s of processors)"
        for name, x in starts[-1].items()
      )
      print(f"start {number + 1}: its first step {told}", flush=True)
  found = {"load": os.getloadavg()[0], "starts": starts}
  print(
    record.write(options.out, options.name, "python -m benchmarks.start " + " ".join(argv), found)
  )
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
