"""The task `verify_resume`: a short job twice, once undisturbed, once killed on its way, then compared.

Flow: main -> `run`: processes of `main` with the job's config -> both newest checkpoints -> difference.
Holds: kills are SIGKILLs of real processes; each job has a cache of compiled programs of its own, so that a program found
  again is held against one that was compiled; what is compared is every number that was saved. Both jobs are
  extended at the same step, if at all.
Not here: how a run resumes (pretrain, checkpoint).
"""

import os
import random
import shlex
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from adco_jax.config import config_files
from adco_jax.errors import ConfigError, RunError, require
from adco_jax.runtime.console import tell
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json
from adco_jax.workdir.fingerprints import fingerprint
from adco_jax.workdir.metrics import read_metrics


def run(config: ConfigDict, workdir: str) -> None:
  """Prints difference and fingerprints. Raises RunError if they differ."""
  config_files.find(config.of, f"config.of={config.of!r}")
  task = config_files.load(config.of).task
  remedy = f"is for the task {task}; name a pre-training's or a fine-tuning's"
  require(task in ("pretrain", "finetune"), "of", config.of, remedy)
  for name in ("flags", "extend_flags"):
    split_flags(config, name)
  require(config.steps > config.kills, "kills", config.kills, "use fewer kills than steps")
  paths = {name: os.path.join(workdir, name) for name in ("straight", "killed")}
  for path in paths.values():
    if os.path.exists(path):
      raise ConfigError(f"--workdir={workdir}: holds a verification already; name a new one")
  require(config.extend_at < config.steps, "extend_at", config.extend_at, "use less than steps")
  draw = random.Random(config.seed)
  cuts = sorted(draw.sample(range(1, config.steps), config.kills))
  parts = [config.extend_at, config.steps] if config.extend_at else [config.steps]
  for last in parts:
    finish(start(config, paths["straight"], last), "straight")
  for last in parts:
    for cut in [cut for cut in cuts if cut < last]:
      tell(f"killed at step {kill_at(config, paths['killed'], cut, last)}")
      cuts.remove(cut)
    finish(start(config, paths["killed"], last), "killed")
  states = {name: load(path, config.steps) for name, path in paths.items()}
  lines = [untimed(path) for path in paths.values()]
  difference = compare(*states.values())
  for name, state in states.items():
    tell(f"{name:9} fingerprint {fingerprint(state)}")
  tell(f"largest difference of {len(jax.tree.leaves(states['straight']))} arrays: {difference}")
  tell(f"lines of metrics.jsonl, but for time: {'equal' if lines[0] == lines[1] else 'different'}")
  if difference or lines[0] != lines[1]:
    raise RunError(
      "the killed run is not the straight one: please report config, hardware and versions"
    )


def split_flags(config: ConfigDict, name: str) -> list[str]:
  """The words of key `name`, as a shell would take them apart. Raises ConfigError."""
  try:
    return shlex.split(config[name])
  except ValueError as error:
    raise ConfigError(f"config.{name}={config[name]!r}: {error}; close it") from error


def start(config: ConfigDict, path: str, last: int) -> subprocess.Popen[str]:
  """The job up to step `last` as a process of its own; extended where that lies behind `extend_at`."""
  flags = [f"--config={config.of}", f"--workdir={path}", *split_flags(config, "flags")]
  if config.extend_at and last > config.extend_at:
    flags += ["--extend", *split_flags(config, "extend_flags")]
  flags += [f"--config.stop_at_step={last}", f"--config.save.every_steps={config.save_steps}"]
  command = [sys.executable, "-m", "adco_jax.main", *flags, "--config.log.every_steps=1"]
  around = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{path}-compiled"}
  return subprocess.Popen(command, env=around, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(process: subprocess.Popen[str], name: str) -> None:
  """Waits for its end. Raises RunError if it failed."""
  _, error = process.communicate()
  if process.returncode:
    last = (error.strip().splitlines() or ["no message"])[-1]
    raise RunError(f"the {name} job ended with status {process.returncode}: {last}")


def kill_at(config: ConfigDict, path: str, step: int, last: int) -> int:
  """Starts the job, kills it once `step` is logged and returns the step that it had logged by then."""
  process = start(config, path, last)
  reached = lambda: max((line["step"] for line in read_metrics(path)), default=0)
  while reached() < step and process.poll() is None:
    time.sleep(0.02)
  process.kill()
  process.communicate()
  return reached()


def load(path: str, step: int) -> Tree:
  """Every array of a checkpoint, as NumPy."""
  folder = os.path.join(os.path.abspath(path), "checkpoints", str(step), "state")
  return jax.tree.map(np.asarray, ocp.StandardCheckpointer().restore(folder))


def compare(one: Tree, other: Tree) -> float:
  """The largest absolute difference over two trees of the same structure."""
  gaps = jax.tree.map(
    lambda a, b: float(np.abs(a.astype(np.float64) - b).max(initial=0)), one, other
  )
  return max(jax.tree.leaves(gaps))


def untimed(path: str) -> list[dict[str, Json]]:
  """Lines of metrics.jsonl without those figures that may differ between a run and its repetition."""
  lines = read_metrics(path)
  return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
