"""Seconds from a command to its first step, with an empty cache of compiled programs and with what that left there.

  python -m benchmarks.first_step --config=adco_digits
  python -m benchmarks.first_step --config=adco_r50 --config.data.dir=/datasets/imagenet --config.eval.every_epochs=0

Runs `python -m adco_jax.main` twice in new workdirs of its own and watches metrics.jsonl; both are gone afterwards. A JSON file goes to
benchmarks/results/ (--out=DIR for another place).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

from adco_jax import main
from adco_jax import plan as planning
from adco_jax.metrics import read_metrics
from benchmarks import record

FIXED = ("--config.log.every_steps=1", "--config.stop_at_step=3")


def seconds_to_first_step(words, workdir, cache):
  """From the process's begin to the first line of a step. Raises RunError with its last line where none comes."""
  command = [sys.executable, "-m", "adco_jax.main", *words, *FIXED, f"--workdir={workdir}"]
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
  start = time.monotonic()
  with tempfile.TemporaryFile("w+") as said:
    with subprocess.Popen(command, env=environment, stdout=said, stderr=said, text=True) as process:
      found = None
      while found is None and process.poll() is None:
        time.sleep(0.02)
        if any("train/query_loss" in line for line in read_metrics(workdir)):
          found = time.monotonic() - start
    if found is None or process.returncode:
      said.seek(0)
      last = (said.read().strip().splitlines() or ["nothing was said"])[-1]
      raise planning.RunError(f"ended with status {process.returncode}: {last}")
  return found


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options, words = parser.parse_known_args(argv)
  found = {}
  try:
    _, workdir = main.parse(words)
    with tempfile.TemporaryDirectory() as folder:
      for name in ("cold", "warm"):
        run_of = os.path.join(folder, name)
        found[name] = seconds_to_first_step(words, run_of, os.path.join(folder, "compiled"))
        print(f"{name}: {found[name]:.1f} s to the first step", flush=True)
  except (planning.ConfigError, planning.RunError) as error:
    print(f"error: {error}", file=sys.stderr)
    return error.status
  command = "python -m benchmarks.first_step " + " ".join(argv)
  path = record.write(options.out, f"first_step-{os.path.basename(workdir)}", command, {"seconds": found})  # fmt: skip
  print(path)
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
