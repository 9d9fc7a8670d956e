"""A run's directory: what the run was asked, in JSON, and whether it is still the same run.

Flow: pretrain opens it before anything compiles; every task that takes a finished run reads what it was asked.
Holds: a directory that holds another run is refused with the keys that differ; files are written whole or
  not at all.
Not here: states (checkpoint), metrics.
"""

import json
import os
import zlib

from adco_jax import remote
from adco_jax.plan import ConfigError

FORMAT = 3  # of the workdir; raise it when a restored state would mean something else

# Keys that came after the first workdir of this format, with the value that says what was done before.
LATER = {"save.keep_every_epochs": 0}


def open_workdir(workdir, config, plan, may_change, data=None):
  """Creates the workdir or recognises it as this very run's. Raises ConfigError otherwise.

  `config`, `plan`: plain dictionaries; keys listed in `may_change` (dotted) may differ from the stored.
  `data`: what identifies the images, stored with the plan; on resume it must be the same.
  """
  path = os.path.join(workdir, "config.json")
  if os.path.exists(path):
    stored = _read_stored(path, f"--workdir={workdir}")
    rows = differences(stored, canonical(config), may_change)
    facts = read_json(os.path.join(workdir, "plan.json"))
    began = facts.get("data")
    rows += (
      differences({"images": began}, {"images": canonical(data)}, ()) if data and began else []
    )
    if rows:
      raise ConfigError(_refusal(workdir, rows))
    if (
      data and not began and "imported" in facts
    ):  # weights of another program: their plan begins now
      plan = plan | {"data": data, "imported": facts["imported"]}
      write_json(os.path.join(workdir, "plan.json"), canonical(plan))
    return
  try:
    os.makedirs(workdir, exist_ok=True)
    write_json(os.path.join(workdir, "plan.json"), canonical(plan | {"data": data}))
    write_json(
      path, {"format": FORMAT, "config": canonical(config)}
    )  # last: it says that all is there
  except OSError as error:
    raise ConfigError(
      f"--workdir={workdir}: not writable ({error.strerror}); name another"
    ) from error


def check_writable(path, option="--workdir"):
  """Raises ConfigError unless files can be made in the folder `path` (which need not exist yet)."""
  folder = os.path.abspath(path)
  while not os.path.exists(folder):
    folder = os.path.dirname(folder)
  if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
    raise ConfigError(f"{option}={path}: {folder} is not writable; name another")


def read_opened(workdir):
  """(plan.json, checksum of what the run was asked) after the first process opened it. Raises ConfigError."""
  remote.refresh(workdir)
  try:
    texts = [_read(os.path.join(workdir, name)) for name in ("plan.json", "config.json")]
  except OSError as error:
    raise ConfigError(
      f"--workdir={workdir}: not every process sees what the first wrote there; name a folder that all of them share"
    ) from error
  return json.loads(texts[0]), zlib.crc32(texts[0] + texts[1])


def _read(path):
  with open(path, "rb") as file:
    return file.read()


def holds_run(workdir):
  """Whether a run has begun there."""
  return os.path.isfile(os.path.join(workdir, "config.json"))


def read_config(workdir, option="pretrained"):
  """The stored configuration of a pre-training workdir. Raises ConfigError."""
  folder = remote.local(workdir)
  path = os.path.join(folder, "config.json")
  if not workdir or not holds_run(folder):
    raise ConfigError(
      f"config.{option}={workdir!r}: no run there; name the workdir of a pre-training"
    )
  return _read_stored(path, f"config.{option}={workdir!r}")


def _read_stored(path, option):
  stored = read_json(path)
  if stored["format"] != FORMAT:
    remedy = "use a new workdir"
    if not option.startswith("--workdir"):
      remedy = "export it as npz with the version that made it, and import that"
    raise ConfigError(f"{option}: of format {stored['format']}, this is {FORMAT}; {remedy}")
  return with_later_keys(stored["config"])


def with_later_keys(config):
  """A stored config (nested dictionary), given the keys of its branches that came after it was written."""
  for name, value in LATER.items():
    branch, _, key = name.rpartition(".")
    if not branch or branch in config:
      (config[branch] if branch else config).setdefault(key, value)
  return config


def canonical(tree):
  """What JSON makes of it: tuples become lists, so that a config equals its stored self."""
  return json.loads(json.dumps(tree, sort_keys=True))


def differences(there, here, may_change):
  """[(dotted key, stored value, new value)] where two nested dictionaries differ."""
  there, here = flatten(there), flatten(here)
  keys = sorted(k for k in {**there, **here} if k not in may_change)
  return [(k, there.get(k), here.get(k)) for k in keys if there.get(k) != here.get(k)]


def flatten(tree, prefix=""):
  """Nested dictionary -> {dotted key: value}."""
  flat = {}
  for key, value in tree.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


def read_json(path):
  """The value in a JSON file."""
  with open(path) as file:
    return json.load(file)


def write_json(path, value):
  """Writes whole or not at all."""
  write_whole(path, json.dumps(value, indent=2) + "\n")


def write_whole(path, text):
  """Replaces a file by one with this content, or leaves it as it was, even if the power goes."""
  part = f"{path}.{os.getpid()}.part"
  with open(part, "w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(part, path)
  folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def _refusal(workdir, rows):
  width = max(len(key) for key, *_ in rows)
  table = "\n".join(
    f"  {k:{width}}  there: {json.dumps(a)}  here: {json.dumps(b)}" for k, a, b in rows
  )
  return (
    f"--workdir={workdir}: holds a run with another config ({len(rows)} keys differ, below); use a new "
    f"--workdir, with --config.init_from={workdir} to go on from its encoders\n{table}"
  )
