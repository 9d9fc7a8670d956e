"""The small files of a run's directory: what the run was asked, its plan, and what was changed on the way.

Flow: opening writes them; every task that takes a run reads what it was asked.
Holds: files are written whole or not at all; what is no run of ours, or damaged, is one line.
Not here: whose a directory is (opening), states (checkpoint), metrics.
"""

import json
import os
import zlib
from collections.abc import Collection, Iterable

from adco_jax.errors import ConfigError
from adco_jax.runtime import remote
from adco_jax.runtime.files import Json, read_json

FORMAT = 5  # of the workdir; raise it when a restored state or a key of the config would mean something else
# What is scored, exported and continued by init_from; checkpoint and `moved` know how.
READ = (3, 4, FORMAT)

Change = tuple[str, Json, Json] | list[Json]  # dotted key, before, now; a list once it was stored

# Keys that came after the first workdir of this format, with the value that says what was done before.
LATER = {
  "data.subset": "",
  "save.keep_every_epochs": 0,
  "optim.no_decay": "",
  "optim.beta2": 0.999,
  "optim.trust": 0.001,
  "views.reduction": "directions",
  "views.pad": 0,
  "model.head.layers": 2,
  "model.head.width": 0,
  "model.head.norm": "none",
  "init_head": "auto",
  "labels_per_class": 0,
  "label_share": 1.0,
  "hold_out": 0.0,
  "bn.frozen": False,
  "model.vit.patch": 16,
  "model.vit.grid": 0,
  "model.vit.pool": "token",
  "model.vit.positions": "learned",
  "model.vit.registers": 0,
  "model.vit.layer_scale": 0.0,
  "model.vit.drop_path": 0.0,
  "model.vit.depth": 0,
  "model.vit.heads": 0,
  "model.vit.start": "timm",
  "model.vit.attention": "xla",
  "model.vit.remat": False,
  "optim.head_rate": 1.0,
  "optim.layer_decay": 1.0,
  "optim.weight_decay_final": -1.0,
  "optim.clip_norm": 0.0,
  "optim.freeze": "",
}
# ... and of an objective's own.
LATER_OF: dict[str, dict[str, Json]] = {
  "adco": {"method.bank.init_epochs": 0.0},
  "byol": {"method.momentum_init": "independent"},
  "mocov3": {"method.predictor_norm": "hidden"},
  "supervised": {"method.average": False, "method.mixup": 0.0},
}

# Where the keys of formats 3 and 4 are now, by objective; those that an objective does not have are gone.
BANK = [
  "size",
  "temperature",
  "learning_rate",
  "weight_decay",
  "momentum",
  "init",
  "init_views",
  "order",
]
OF_BOTH = {"temperature": "method.temperature", "in_batch": "method.in_batch"}
MOVED = {
  "adco": OF_BOTH | {f"bank.{key}": f"method.bank.{key}" for key in BANK},
  "moco": OF_BOTH | {"bank.size": "method.queue_size"},
}


def read_history(workdir: str) -> list[dict[str, Json]]:
  """[{'step': from which on, 'changes': [[key, before, now], ...]}] of a run that was extended, oldest first."""
  stored = read_json(os.path.join(remote.local(workdir), "config.json"))
  if stored["format"] == FORMAT:
    return stored.get("history", [])
  names = MOVED.get(stored["config"]["objective"], {})
  now = lambda rows: [[names.get(key, key), *values] for key, *values in rows]
  return [change | {"changes": now(change["changes"])} for change in stored.get("history", [])]


def undone(workdir: str, step: int) -> dict[str, Json]:
  """{key: value} that were in force up to checkpoint `step` (a step, not 0) and were changed from there on."""
  later = [change for change in read_history(workdir) if change["step"] >= step]
  return {key: before for change in reversed(later) for key, before, _ in change["changes"]}


def describe_changes(rows: Iterable[Change]) -> str:
  """Rows (key, before, now) in words."""
  return ", ".join(f"{key} {json.dumps(before)} -> {json.dumps(now)}" for key, before, now in rows)


def check_writable(path: str, option: str = "--workdir") -> None:
  """Raises ConfigError unless files can be made in the folder `path` (which need not exist yet)."""
  folder = os.path.abspath(path)
  while not os.path.exists(folder):
    if os.path.islink(folder):
      raise ConfigError(f"{option}={path}: {folder} is a link that leads nowhere; name another")
    folder = os.path.dirname(folder)
  if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
    raise ConfigError(f"{option}={path}: {folder} is not writable; name another")


def read_opened(workdir: str) -> tuple[dict[str, Json], int]:
  """(plan.json, checksum of what the run was asked) after the first process opened it. Raises ConfigError."""
  remote.refresh(workdir)
  try:
    texts = [_read(os.path.join(workdir, name)) for name in ("plan.json", "config.json")]
  except OSError as error:
    raise ConfigError(
      f"--workdir={workdir}: not every process sees what the first wrote there; name a folder that all of them share"
    ) from error
  return json.loads(texts[0]), zlib.crc32(texts[0] + texts[1])


def filled_at(plan: dict[str, Json]) -> int:
  """Plan.filled_at of a plan.json: updates before its last phase."""
  phases = plan.get("phases") or [{"start": plan.get("fill_steps", 0)}]
  return phases[-1]["start"]


def _read(path):
  with open(path, "rb") as file:
    return file.read()


def holds_run(workdir: str) -> bool:
  """Whether a run has begun there."""
  return os.path.isfile(os.path.join(workdir, "config.json"))


def read_config(workdir: str, option: str = "pretrained") -> dict[str, Json]:
  """The stored configuration of a pre-training workdir whose plan.json can be read as well. Raises ConfigError."""
  folder, told = remote.local(workdir), f"config.{option}={workdir!r}"
  if not workdir or not holds_run(folder):
    raise ConfigError(f"{told}: no run there; name the workdir of a pre-training")
  config = read_stored(folder, told)["config"]
  read_plan(folder, told)
  return config


def read_stored(folder: str, told: str) -> dict[str, Json]:
  """What config.json says, its config with later keys; `told`: the option that named the folder. Raises ConfigError."""
  stored = read_facts(folder, "config.json", told)
  if "format" not in stored or not isinstance(stored.get("config"), dict):
    raise ConfigError(f"{told}: its config.json is not of a pre-training; name another folder")
  resumes = told.startswith("--workdir")
  if stored["format"] not in ((FORMAT,) if resumes else READ):
    remedy = f"go on from it in a new workdir, with --config.init_from={folder}"
    if not resumes or stored["format"] not in READ:
      remedy = "export it as npz with the version that made it, and import that"
    raise ConfigError(f"{told}: of format {stored['format']}, this is {FORMAT}; {remedy}")
  config = stored["config"] if stored["format"] == FORMAT else moved(stored["config"])
  return stored | {"config": with_later_keys(config)}


def read_plan(folder: str, told: str) -> dict[str, Json]:
  """What plan.json says, 'data' (which images) always, None where it is not known. Raises ConfigError."""
  return {"data": None} | read_facts(folder, "plan.json", told)


def read_facts(folder: str, name: str, told: str) -> dict[str, Json]:
  """The dictionary in a file of a run; `told`: the option that named its folder. Raises ConfigError."""
  remedy = "put it back from a copy, or name another folder"
  try:
    facts = read_json(os.path.join(folder, name))
  except FileNotFoundError as error:
    raise ConfigError(f"{told}: has no {name}; {remedy}") from error
  except ValueError as error:
    raise ConfigError(f"{told}: its {name} is damaged ({error}); {remedy}") from error
  if not isinstance(facts, dict):
    raise ConfigError(f"{told}: its {name} is not of a pre-training; name another folder")
  return facts


def moved(stored: dict[str, Json]) -> dict[str, Json]:
  """A config of format 3 or 4 with the settings of its objective under `method`, as they are now."""
  flat, old = flatten(stored), ("temperature", "in_batch", *(f"bank.{key}" for key in BANK))
  rest = unflatten({key: value for key, value in flat.items() if key not in old})
  own = unflatten({now: flat[was] for was, now in MOVED.get(stored["objective"], {}).items()})
  return rest | {"method": stored.get("method", {}) | own.get("method", {})}


def with_later_keys(stored: dict[str, Json]) -> dict[str, Json]:
  """A config (nested dictionary), given the keys of its branches that came after it was written."""
  for name, value in (LATER | LATER_OF.get(stored.get("objective", ""), {})).items():
    *groups, key = name.split(".")
    branch = stored
    if (groups or ["init_from"])[
      0
    ] not in stored:  # a config that has not this branch, or is no whole one
      continue
    for group in groups:
      branch = branch.setdefault(group, {})
    branch.setdefault(key, value)
  return stored


def canonical(tree: Json) -> Json:
  """What JSON makes of it: tuples become lists, so that a config equals its stored self."""
  return json.loads(json.dumps(tree, sort_keys=True))


def differences(
  there: dict[str, Json], here: dict[str, Json], may_change: Collection[str]
) -> list[Change]:
  """[(dotted key, stored value, new value)] where two nested dictionaries differ."""
  there, here = flatten(there), flatten(here)
  keys = sorted(k for k in {**there, **here} if k not in may_change)
  return [(k, there.get(k), here.get(k)) for k in keys if there.get(k) != here.get(k)]


def flatten(tree: dict[str, Json], prefix: str = "") -> dict[str, Json]:
  """Nested dictionary -> {dotted key: value}."""
  flat: dict[str, Json] = {}
  for key, value in tree.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


def unflatten(flat: dict[str, Json]) -> dict[str, Json]:
  """{dotted key: value} -> nested dictionary."""
  tree: dict[str, Json] = {}
  for key, value in flat.items():
    *groups, last = key.split(".")
    branch = tree
    for group in groups:
      branch = branch.setdefault(group, {})
    branch[last] = value
  return tree
