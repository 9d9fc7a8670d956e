"""A step that gave no finite numbers, packed so that it can be taken again and looked at.

Flow: pretrain calls `write` when max_bad_steps in a row were not finite, then stops; replay_step opens it.
Holds: the state in it is the one that the step met (a bad step changes nothing but the counter); one that is there
  already is named again only if it is the very same.
"""

import json
import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adco_jax.config.plan import Plan
from adco_jax.data import order
from adco_jax.errors import ConfigError
from adco_jax.runtime import processes, remote
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json, write_json
from adco_jax.training.state import TrainState
from adco_jax.workdir.checkpoint import Checkpoints
from adco_jax.workdir.files import FORMAT, canonical, read_facts


def write(workdir: str, config: ConfigDict, plan: Plan, state: TrainState, step: int) -> str:
  """Writes capsules/<step>, or <step>-2 and so on beside another, of update `step` and returns its path.

  `state` is that after the update.
  """
  indices = order.batch_indices(config.seed, plan.batch(step), plan.num_examples, plan.batch_size)
  facts = canonical(
    {
      "format": FORMAT,
      "step": step,
      "seed": config.seed,
      "batch": plan.batch(step),
      "indices": indices.tolist(),
      "norms": norms(
        {
          "query": state.query_params,
          "key": state.key_params,
          "objective": state.objective._asdict(),
        }
      ),
      "compute_dtype": plan.compute_dtype,
      "config": config.to_dict(),
    }
  )
  name, there = processes.first_gives(lambda: place(workdir, facts))
  folder = os.path.join(workdir, "capsules", name)
  if there:  # this run had come here before
    return folder
  checkpoints = Checkpoints(folder)
  checkpoints.save(step, state)
  checkpoints.finish()
  checkpoints.close()
  os.makedirs(folder, exist_ok=True)  # a copy of what lies in gs:// has none yet
  processes.on_first(lambda: write_json(os.path.join(folder, "capsule.json"), facts))
  return folder


def place(workdir: str, facts: dict[str, Json]) -> tuple[str, bool]:
  """(name for a capsule, whether this very one lies there). One that was left half written is left alone."""
  home, number = remote.home(workdir) / "capsules", 1
  name = str(facts["step"])
  while names := remote.names(home / name):
    if "capsule.json" in names and json.loads((home / name / "capsule.json").read_text()) == facts:
      return name, True
    number += 1
    name = f"{facts['step']}-{number}"
  return name, False


def read(folder: str) -> dict[str, Json]:
  """The facts of a capsule. Raises ConfigError."""
  local, told = remote.local(folder), f"config.capsule={folder!r}"
  if not folder or not os.path.isfile(os.path.join(local, "capsule.json")):
    raise ConfigError(f"{told}: no capsule there; name a WORKDIR/capsules/STEP")
  facts = read_facts(local, "capsule.json", told)
  if facts.get("format") != FORMAT:
    raise ConfigError(f"{told}: of another version; replay it with the one that wrote it")
  return facts


def norms(tree: Tree) -> dict[str, float]:
  """{path: Euclidean norm} of every array."""
  lengths = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.linalg.norm(x.ravel()), tree))(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): float(x) for path, x in jax.tree_util.tree_leaves_with_path(lengths)}
