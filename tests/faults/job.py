"""A small pre-training as processes of its own, watched from outside.

Flow: storm and test_processes start `Job`s, disturb them and hold them against an undisturbed one.
"""

import glob
import os
import socket
import subprocess
import sys
import time

from adco_jax.tasks.verify_resume import untimed
from adco_jax.workdir.metrics import read_metrics

JOB = [
  "--config=configs/adco_digits.py",
  "--config.model.width=0.125",
  "--config.bn.group_size=8",
  "--config.method.bank.init=trained",
  "--config.log.every_steps=1",
  "--config.save.every_steps=25",
  "--config.save.keep=3",
]
PHASES = ("start-up", "compiling", "initialising the bank", "stepping", "saving", "evaluating")
FILL_STEPS = 8  # 512 rows in batches of 64
EVALUATION_STEPS = 100  # 5 epochs of 20


class Job:
  """One run of the job in `workdir`, over `processes` processes with `devices` devices each.

  `logs`: where its output goes, beside `workdir` otherwise. cached: with JAX's compilation cache, so that thirty restarts do not compile for half an hour.
  `job`: flags that come first.
  """

  def __init__(
    self, workdir, *flags, processes=1, devices=1, cached=True, logs=None, xla="", job=JOB
  ):
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    command = [sys.executable, "-m", "adco_jax.main", *job, f"--workdir={workdir}", *flags]
    self.workdir, self.logs, self.processes = workdir, [], []
    for i in range(processes):
      around = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {xla}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
      }
      if cached:
        around["JAX_COMPILATION_CACHE_DIR"] = f"{os.path.dirname(workdir)}/cache{devices}"
        around["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
      if processes > 1:
        around |= {
          "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
          "JAX_NUM_PROCESSES": str(processes),
        }
        around["JAX_PROCESS_ID"] = str(i)
      self.logs.append(f"{logs or workdir}.log{i}")
      with open(self.logs[-1], "w") as log:
        self.processes.append(subprocess.Popen(command, env=around, stdout=log, stderr=log))

  def said(self):
    """What the first process printed so far."""
    with open(self.logs[0]) as log:
      return log.read()

  def all_said(self):
    """What all processes printed."""
    return "".join(open(log).read() for log in self.logs)

  def running(self):
    """Whether all processes are alive."""
    return all(process.poll() is None for process in self.processes)

  def wait(self, until=lambda: False, seconds=600.0):
    """Returns when `until()` holds or the job has ended."""
    end = time.monotonic() + seconds
    while self.running() and not until() and time.monotonic() < end:
      time.sleep(0.005)

  def end(self):
    """The exit statuses, once all have ended."""
    return [process.wait(300) for process in self.processes]

  def step(self):
    """The last step on file."""
    return max((line["step"] for line in read_metrics(self.workdir)), default=0)

  def phase(self):
    """What the run is doing, seen from outside."""
    if "parameters:" not in self.said():
      return "start-up"
    lines = read_metrics(self.workdir)
    steps = [line["step"] for line in lines if "train/query_loss" in line]
    if not steps or f"step {steps[-1]}/" not in self.said():
      return "compiling"
    if glob.glob(f"{self.workdir}/checkpoints/*tmp*"):
      return "saving"
    since = steps[-1] - FILL_STEPS
    scored = any(line["step"] == steps[-1] and "knn/top1" in line for line in lines)
    if since > 0 and since % EVALUATION_STEPS == 0 and not scored:
      return "evaluating"
    return "initialising the bank" if since < 0 else "stepping"


def state_of(job):
  """The fingerprint in a finished job's output."""
  return job.said().split("; state ")[1].split(";")[0]


def straight(folder, *flags, **how):
  """(fingerprint, lines) of the undisturbed run."""
  job = Job(f"{folder}/straight", *flags, **how)
  if any(job.end()):
    sys.exit(f"the undisturbed run failed:\n{job.said()}")
  return state_of(job), untimed(job.workdir)


def verdict(expected, job):
  """Prints both runs' fingerprints and whether their lines are equal; whether all is."""
  found = state_of(job), untimed(job.workdir)
  same = "equal" if found[1] == expected[1] else "DIFFERENT"
  print(
    f"undisturbed {expected[0]}, disturbed {found[0]}; {len(found[1])} lines of metrics.jsonl: {same}"
  )
  return found == expected
