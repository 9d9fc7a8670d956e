"""Faults that need no second process: damaged checkpoints, memory over many saves, which examples a step takes."""

import contextlib
import ctypes
import gc
import importlib
import io
import os
import random
import shutil
import zlib

import jax
import numpy as np

from adco_jax import build, main
from adco_jax.config.plan import Machine
from adco_jax.data import order
from adco_jax.data.sources.loading import load_source
from adco_jax.runtime import sharding
from adco_jax.workdir.checkpoint import Checkpoints
from adco_jax.workdir.fingerprints import fingerprint

SMALL = [
  "--config=configs/adco_digits.py", "--config.model.width=0.125", "--config.bn.group_size=8",
  "--config.epochs=1", "--config.eval.every_epochs=0", "--config.save.every_steps=5",
]  # fmt: skip


def damage(folder, times, seed):
  """Damages the newest of three checkpoints in every way; which one is restored, and what is said."""
  run = f"{folder}/run"
  status, said = call([*SMALL, f"--workdir={run}", "--config.save.keep=3"])
  if status:
    raise SystemExit(said)
  steps = sorted(int(name) for name in os.listdir(f"{run}/checkpoints"))
  config, _ = main.parse([*SMALL, f"--workdir={run}"])
  abstract, wanted = abstract_state(config), {}
  for step in steps:
    keep_only(run, f"{folder}/one", step)
    wanted[step] = fingerprint(restore(f"{folder}/one", abstract)[0][0])
    shutil.rmtree(f"{folder}/one")
  kinds = [("one flipped bit", flip)] * times + KINDS
  fine, draw = True, random.Random(seed)
  for name, hurt in kinds:
    copy = f"{folder}/copy"
    shutil.copytree(run, copy)
    where = hurt(f"{copy}/checkpoints/{steps[-1]}", draw)
    (state, step), said = restore(copy, abstract)
    kept = sorted(os.listdir(f"{copy}/checkpoints"))
    right = fingerprint(state) == wanted[step] and (
      step == steps[-1] or f"{steps[-1]}.damaged" in kept
    )
    fine &= right
    print(
      f"{name} ({where}): restored {step}, {'intact' if right else 'WRONG'}; {said or 'nothing said'}"
    )
    shutil.rmtree(copy)
  for step in steps:
    empty(f"{run}/checkpoints/{step}", draw)
  before = sorted(os.listdir(f"{run}/checkpoints"))
  status, _ = call([*SMALL, f"--workdir={run}", "--config.save.keep=3"])
  again, said = call([*SMALL, f"--workdir={run}", "--config.save.keep=3"])
  fine &= again == 2 and sorted(os.listdir(f"{run}/checkpoints")) == before
  print(
    f"all damaged: status {status}; {said.strip().splitlines()[-1]}; left: {sorted(os.listdir(f'{run}/checkpoints'))}"
  )
  return fine and status == 2


def flip(folder, draw):
  """One bit of one byte, the files weighted by their size."""
  path = draw.choices(files(folder), [os.path.getsize(p) for p in files(folder)])[0]
  with open(path, "r+b") as file:
    at = draw.randrange(os.path.getsize(path))
    file.seek(at)
    byte = file.read(1)[0] ^ 1 << draw.randrange(8)
    file.seek(at)
    file.write(bytes([byte]))
  return f"{os.path.relpath(path, folder)}, byte {at}"


def truncate(folder, draw):
  """The largest file loses its second half."""
  del draw
  path = largest(folder)
  os.truncate(path, os.path.getsize(path) // 2)
  return os.path.relpath(path, folder)


def zero(folder, draw):
  """The largest file keeps its size and loses its content."""
  del draw
  path = largest(folder)
  size = os.path.getsize(path)
  with open(path, "wb") as file:
    file.write(bytes(size))
  return os.path.relpath(path, folder)


def missing(folder, draw):
  """The largest file is gone."""
  del draw
  path = largest(folder)
  os.remove(path)
  return os.path.relpath(path, folder)


def garbage(folder, draw):
  """The facts beside the state are no JSON."""
  del draw
  with open(f"{folder}/meta/metadata", "w") as file:
    file.write("{ no json")
  return "meta/metadata"


def no_facts(folder, draw):
  """The facts beside the state are gone."""
  del draw
  shutil.rmtree(f"{folder}/meta")
  return "meta"


def empty(folder, draw):
  """Nothing is left but the directory."""
  del draw
  shutil.rmtree(folder)
  os.makedirs(folder)
  return "."


KINDS = [
  ("truncated", truncate),
  ("zeroed", zero),
  ("missing file", missing),
  ("garbage JSON", garbage),
  ("no facts", no_facts),
  ("empty directory", empty),
]


def memory(folder, times, seed):
  """Resident memory over `times` saves of a state of about 40 MB, each with other values.

  The C library keeps freed pages, more or fewer of them each time: what counts is what it cannot give back.
  """
  del seed
  checkpoints, mesh = Checkpoints(folder, 2), sharding.create_mesh()
  state = jax.device_put(
    {f"x{i}": np.ones((1024, 1024), np.float32) for i in range(10)}, sharding.replicated(mesh)
  )
  grow, sizes = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.0001, tree)), []
  for step in range(1, times + 1):
    state = grow(state)
    checkpoints.save(step, state)
    if step % max(times // 6, 1) == 0:
      checkpoints.finish()
      gc.collect()
      before = resident()
      ctypes.CDLL(None).malloc_trim(0)
      sizes.append(resident())
      print(f"{step} saves: {before:.0f} MiB resident, {sizes[-1]:.0f} MiB in use", flush=True)
  checkpoints.finish()
  checkpoints.close()
  return sizes[-1] - sizes[0] < 40


def resident():
  """Resident memory of this process in MiB."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def same_examples(path):
  """Whether steps 0..99 take the same examples over 1, 2 and 8 devices and over 1, 2 and 4 processes."""
  config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config()
  config.bn.group_size, config.bn.shuffle_block, config.method.bank.init = 8, 16, "trained"
  numbers = set()
  for devices, processes in ((1, 1), (2, 1), (8, 1), (2, 2), (4, 4)):
    plans = [
      build.plan_for(
        config, 1297, 10, Machine(backend="cpu", devices=devices, processes=processes, process=p)
      )
      for p in range(processes)
    ]
    drawn = [
      np.concatenate(
        [order.request(config.seed, step, plan, config.views.ratio).candidates for plan in plans]
      )
      for step in range(100)
    ]
    numbers.add(zlib.crc32(np.stack(drawn).tobytes()))
  print(f"examples and spares of 100 steps over five arrangements: checksums {numbers}")
  return len(numbers) == 1


def call(flags):
  """(status, everything printed) of one command line, in this process."""
  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    status = main.main(flags)
  return status, said.getvalue()


def abstract_state(config):
  """Shapes and shardings of the state that a digits run saves."""
  source = load_source("digits", "", "train")
  plan = build.plan_for(
    config, source.num_examples, 10, Machine(backend="cpu", devices=jax.device_count())
  )
  mesh = sharding.create_mesh()
  return build.build(config, plan, mesh).abstract_state


def restore(workdir, abstract):
  """((state, step), what was said)."""
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    checkpoints = Checkpoints(workdir, 3)
    found = checkpoints.restore(abstract)
    checkpoints.close()
  return found, said.getvalue().strip()


def keep_only(run, copy, step):
  """A copy of a workdir with one checkpoint."""
  shutil.copytree(f"{run}/checkpoints/{step}", f"{copy}/checkpoints/{step}")


def files(folder):
  """All files below it that hold something."""
  found = (os.path.join(d, name) for d, _, names in os.walk(folder) for name in names)
  return sorted(path for path in found if os.path.getsize(path))


def largest(folder):
  """The largest file below it."""
  return max(files(folder), key=os.path.getsize)
