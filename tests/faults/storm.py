"""Faults on purpose: real runs that are killed, stopped, damaged and moved, each held against an undisturbed one.

    python -m tests.faults.storm kill --folder=/tmp/storm --times=30      SIGKILL in every phase of a run
    python -m tests.faults.storm term --folder=/tmp/storm --times=6       SIGTERM or SIGINT to one of two processes
    python -m tests.faults.storm images --folder=/tmp/storm               40 broken images among 400 good ones
    python -m tests.faults.storm damage --folder=/tmp/storm               every kind of damage to checkpoints
    python -m tests.faults.storm disk --folder=/tmp/storm                 a disk that is full (root: mounts a tmpfs)
    python -m tests.faults.storm devices --folder=/tmp/storm              1 -> 2 -> 8 -> 1 devices
    python -m tests.faults.storm memory --folder=/tmp/storm --times=300   resident memory over saves

Prints what it did and saw, and ends with status 1 if a promise was broken.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

from adco_jax.tasks.verify_resume import untimed
from tests.faults import damage
from tests.faults.images import write_broken, write_images
from tests.faults.job import JOB, PHASES, Job, straight, verdict


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
  return verdict(expected, job) and fine and (times < 12 or all(hits[phase] for phase in PHASES))


def term(folder, times, seed):
  """SIGTERM or SIGINT to a random one of two processes at a random time."""
  flags = ["--config.epochs=20", "--config.eval.every_epochs=5"]
  expected = straight(folder, *flags, processes=2)
  draw, fine = random.Random(seed), True
  for number in range(times):
    job = Job(f"{folder}/disturbed", *flags, processes=2)
    goal = 0 if number == 0 else 380 * number // times
    job.wait(lambda j=job, g=goal: "parameters:" in j.said() and j.step() >= g)
    time.sleep(draw.uniform(0, 1))
    sent, which = draw.choice((signal.SIGTERM, signal.SIGINT)), draw.randrange(2)
    phase, start = job.phase(), time.monotonic()
    if not job.running():
      sys.exit(f"it had ended before signal {number}")
    job.processes[which].send_signal(sent)
    ended = job.end()
    fine &= ended == [42, 42]
    saved = [
      line for line in job.said().splitlines() if "saved at step" in line or "nothing" in line
    ]
    print(f"{sent.name} to process {which} while {phase}: statuses {ended} after "
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


def images(folder, times, seed):
  """400 good and 40 broken images: the same replacements in two runs and over two processes."""
  del times, seed
  root = pathlib.Path(folder) / "data"
  write_images(root / "a", 400, sizes=[(40, 50), (36, 36)])
  flags = [
    "--config.epochs=2", "--config.eval.every_epochs=1", "--config.data.source=folder",
    "--config.data.loader=pipeline", f"--config.data.dir={root}",
  ]  # fmt: skip
  job = Job(f"{folder}/good", *flags)
  print(f"400 good images: statuses {job.end()}, peak {children_peak():.0f} MiB", flush=True)
  reasons, found = write_broken(root / "b", copies=4), []
  for name, processes in (("once", 1), ("again", 1), ("pair", 2)):
    job = Job(f"{folder}/{name}", *flags, "--config.data.max_bad_fraction=0.1", processes=processes)
    ended, lines = job.end(), untimed(job.workdir)
    named = [sum(n in line for line in job.all_said().splitlines()) for n in reasons]
    counts = [line["data/replaced"] for line in lines if "data/replaced" in line]
    print(f"{name}: statuses {ended}, {sum(counts):.0f} slots replaced in {len(counts)} steps, {len(named)} broken "
          f"files named {min(named)} to {max(named)} times, peak {children_peak():.0f} MiB", flush=True)  # fmt: skip
    found.append((counts, lines))
  print(next(line for line in job.all_said().splitlines() if "huge_header" in line))
  job = Job(f"{folder}/strict", *flags)
  print(f"max_bad_fraction=.01: statuses {job.end()}; {job.all_said().strip().splitlines()[-1]}")
  print(f"two runs: lines {'equal' if found[0] == found[1] else 'DIFFERENT'}; replaced slots of every step over two "
        f"processes {'equal' if found[0][0] == found[2][0] else 'DIFFERENT'}")  # fmt: skip
  return found[0] == found[1] and found[0][0] == found[2][0] and sum(found[0][0]) >= len(reasons)


def children_peak():
  """The largest resident memory of any ended child so far, in MiB."""
  return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def disk(folder, times, seed):
  """A tmpfs that fills up, then one that becomes read-only, under a run; then all is well again."""
  del times, seed
  flags = ["--config.epochs=10", "--config.eval.every_epochs=0", "--config.save.max_failures=3"]
  expected, small, fine = straight(folder, *flags), f"{folder}/small", True
  os.makedirs(small)
  subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small], check=True)
  try:
    for name, (hurt, heal) in {"full": (fill, empty), "read-only": (freeze, thaw)}.items():
      how = {"logs": f"{folder}/{name}", "cached": False}
      job = Job(f"{small}/{name}", *flags, **how)
      job.wait(lambda j=job: "step 60/" in j.said())
      hurt(small)
      status = job.end()
      print("\n".join(x for x in job.said().splitlines() if "failed" in x or "error" in x))
      again = Job(f"{small}/{name}", *flags, **how)
      print(
        f"disk {name}: status {status}; started again: {again.end()}, {again.said().splitlines()[-1]}"
      )
      heal(small)
      job = Job(f"{small}/{name}", *flags, **how)
      fine &= status == [3] and job.end() == [0]
      print(next(line for line in job.said().splitlines() if "resuming" in line))
      fine &= verdict(expected, job)
  finally:
    subprocess.run(["umount", small], check=True)
  return fine


def fill(folder):
  """Leaves no free byte."""
  with open(f"{folder}/ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
    while file.write(b"\0" * 4096):
      pass


def empty(folder):
  """Makes room again."""
  os.remove(f"{folder}/ballast")


def freeze(folder):
  """Nothing can be written any more."""
  # A file system with files open for writing cannot be remounted: a read-only layer is bound over it.
  subprocess.run(["mount", "--bind", folder, folder], check=True)
  subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def thaw(folder):
  """As before."""
  subprocess.run(["umount", folder], check=True)


def main():
  """Runs one kind of fault in a folder that does not exist yet."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  kinds = {"kill": kill, "term": term, "images": images, "devices": devices, "disk": disk}
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
