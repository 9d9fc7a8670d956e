"""Faults on purpose: real runs that are killed, stopped, damaged and moved, each held against an undisturbed one.

    python -m tests.faults.storm kill --folder=/tmp/storm --times=30      SIGKILL in every phase of a run
    python -m tests.faults.storm term --folder=/tmp/storm --times=6       SIGTERM or SIGINT to one of two processes
    python -m tests.faults.storm damage --folder=/tmp/storm               every kind of damage to checkpoints
    python -m tests.faults.storm disk --folder=/tmp/storm                 a disk that is full (root: mounts a tmpfs)
    python -m tests.faults.storm devices --folder=/tmp/storm              1 -> 2 -> 8 -> 1 devices
    python -m tests.faults.storm memory --folder=/tmp/storm --times=300   resident memory over saves

Prints what it did and saw, and ends with status 1 if a promise was broken.
"""

import argparse
import collections
import glob
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

from adco_jax.metrics import read_metrics
from adco_jax.verify_resume import untimed
from tests.faults import damage

JOB = [
  "--config=configs/adco_digits.py",
  "--config.model.width=0.125",
  "--config.bn.group_size=8",
  "--config.bank.init=trained",
  "--config.bn.shuffle_block=32",
  "--config.log.every_steps=1",
  "--config.save.every_steps=25",
  "--config.save.keep=3",
]
PHASES = ("start-up", "compiling", "initialising the bank", "stepping", "saving", "evaluating")
FILL_STEPS = 8  # 512 rows in batches of 64


class Job:
  """One run of the job in `workdir`, over `processes` processes with `devices` devices each.

  cached: with JAX's compilation cache, so that thirty restarts do not compile for half an hour.
  """

  def __init__(self, workdir, *flags, processes=1, devices=1, cached=True):
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    command = [sys.executable, "-m", "adco_jax.main", *JOB, f"--workdir={workdir}", *flags]
    self.workdir, self.logs, self.processes = workdir, [], []
    for i in range(processes):
      around = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
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
      self.logs.append(f"{workdir}.log{i}")
      with open(self.logs[-1], "w") as log:
        self.processes.append(subprocess.Popen(command, env=around, stdout=log, stderr=log))

  def said(self):
    """What the first process printed so far."""
    with open(self.logs[0]) as log:
      return log.read()

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


EVALUATION_STEPS = 100  # 5 epochs of 20


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


def kill(folder, times, seed):
  """SIGKILLs, as many in each phase; those inside the bank's initialisation first, before a save is due."""
  flags = ["--config.epochs=60", "--config.eval.every_epochs=5"]
  expected = straight(folder, *flags)
  draw, hits = random.Random(seed), collections.Counter()
  share = -(-times // len(PHASES))
  later = [phase for phase in PHASES if phase != "initialising the bank"] * share
  draw.shuffle(later)
  plan = (["initialising the bank"] * share + later)[:times]
  for number, wanted in enumerate(plan):
    job = Job(f"{folder}/disturbed", *flags, cached=wanted != "compiling")
    goal = 1000 * number // times if wanted in ("stepping", "saving", "evaluating") else 0
    job.wait(lambda j=job, w=wanted, g=goal: j.step() >= g and j.phase() == w)
    time.sleep(draw.uniform(0, {"start-up": 3.0, "compiling": 3.0}.get(wanted, 0.02)))
    phase = job.phase()
    for process in job.processes:
      process.kill()
    ended = [status for status in job.end() if status != -signal.SIGKILL]
    if ended:
      print(f"had ended with {ended} before the kill")
      continue
    hits[phase] += 1
    print(f"killed while {phase}, at step {job.step()}", flush=True)
  job = Job(f"{folder}/disturbed", *flags)
  fine = job.end() == [0]
  print("kills by phase: " + ", ".join(f"{phase} {hits[phase]}" for phase in PHASES))
  return verdict(expected, job) and fine


def term(folder, times, seed):
  """SIGTERM or SIGINT to a random one of two processes at a random time."""
  flags = ["--config.epochs=20", "--config.eval.every_epochs=5"]
  expected = straight(folder, *flags, processes=2)
  draw, fine = random.Random(seed), True
  for _i in range(times):
    job = Job(f"{folder}/disturbed", *flags, processes=2)
    job.wait(lambda j=job: "parameters:" in j.said())
    job.wait(seconds=draw.uniform(0, 8))
    number, which = draw.choice((signal.SIGTERM, signal.SIGINT)), draw.randrange(2)
    phase, start = job.phase(), time.monotonic()
    if not job.running():
      break
    job.processes[which].send_signal(number)
    ended = job.end()
    fine &= ended == [42, 42]
    saved = [
      line for line in job.said().splitlines() if "saved at step" in line or "nothing" in line
    ]
    print(f"{number.name} to process {which} while {phase}: statuses {ended} after "
          f"{time.monotonic() - start:.1f} s; {saved[-1] if saved else 'nothing said'}", flush=True)  # fmt: skip
  job = Job(f"{folder}/disturbed", *flags, processes=2)
  fine &= job.end() == [0, 0]
  return verdict(expected, job) and fine


def devices(folder, times, seed):
  """The same run over 1 -> 2 -> 8 -> 1 devices, and 2 processes at last, against one device."""
  del times, seed
  flags = ["--config.epochs=4", "--config.eval.every_epochs=0"]
  _, expected = straight(folder, *flags)
  moves = [(1, 1, 20), (1, 2, 40), (1, 8, 60), (1, 1, 75), (2, 1, 0)]
  for processes, count, stop in moves:
    job = Job(
      f"{folder}/disturbed",
      *flags,
      f"--config.stop_at_step={stop}",
      processes=processes,
      devices=count,
    )
    if any(job.end()):
      sys.exit(job.said())
    print(
      f"{processes} process(es) of {count} device(s): {job.said().strip().splitlines()[-2]}",
      flush=True,
    )
  found = untimed(job.workdir)
  loss = lambda lines: [line["train/query_loss"] for line in lines]
  gaps = [abs(a - b) for a, b in zip(loss(found), loss(expected), strict=True)]
  print(f"largest difference of {len(gaps)} losses: {max(gaps):.2g}")
  return damage.same_examples(JOB[0].split("=")[1]) and max(gaps) < 0.05


def disk(folder, times, seed):
  """A tmpfs that fills up under a run, then room again."""
  del times, seed
  flags = ["--config.epochs=10", "--config.eval.every_epochs=0", "--config.save.max_failures=3"]
  expected = straight(folder, *flags)
  small = f"{folder}/small"
  os.makedirs(small)
  subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small], check=True)
  try:
    job = Job(f"{small}/disturbed", *flags)
    job.wait(lambda: "step 60/" in job.said())
    with open(f"{small}/ballast", "wb") as file, damage.suppress(OSError):
      while file.write(b"\0" * 65536):
        file.flush()
    status = job.end()
    print("\n".join(x for x in job.said().splitlines() if "failed" in x or "error" in x))
    print(f"disk full: status {status}")
    os.remove(f"{small}/ballast")
    job = Job(f"{small}/disturbed", *flags)
    fine = status == [3] and job.end() == [0]
    return verdict(expected, job) and fine
  finally:
    shutil.copytree(small, f"{folder}/kept")
    subprocess.run(["umount", small], check=True)


def main():
  """Runs one kind of fault in a folder that does not exist yet."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  kinds = {"kill": kill, "term": term, "devices": devices, "disk": disk}
  kinds |= {"damage": damage.damage, "memory": damage.memory}
  parser.add_argument("kind", choices=kinds)
  parser.add_argument("--folder", required=True)
  parser.add_argument("--times", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  given = parser.parse_args()
  os.makedirs(given.folder)
  fine = kinds[given.kind](os.path.abspath(given.folder), given.times, given.seed)
  print("promise kept" if fine else "PROMISE BROKEN")
  return 0 if fine else 1


if __name__ == "__main__":
  sys.exit(main())
