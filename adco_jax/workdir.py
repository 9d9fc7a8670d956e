"""A run's directory: what the run was asked, in JSON, whether it is still the same run, and what was changed on the way.

Flow: pretrain opens it before anything compiles; every task that takes a finished run reads what it was asked.
Holds: a directory that holds another run is refused with the keys that differ, unless the run is extended,
  which is recorded with its step; files are written whole or not at all.
Not here: states (checkpoint), metrics.
"""

import json
import os
import zlib

from adco_jax import remote
from adco_jax.console import tell
from adco_jax.plan import ConfigError, is_fixed

FORMAT = 3  # of the workdir; raise it when a restored state would mean something else

# Keys that came after the first workdir of this format, with the value that says what was done before.
LATER = {"save.keep_every_epochs": 0}

# Of a run, besides its config and checkpoints.
FILES = ("plan.json", "metrics.jsonl", "tensorboard", "views.png", "neighbours.png", "eval", "report.html")  # fmt: skip


def open_workdir(workdir, config, plan, may_change, data=None, extend=False):
  """Creates the workdir or recognises it as this very run's; returns [] then. Raises ConfigError otherwise.

  `config`, `plan`: plain dictionaries; keys listed in `may_change` (dotted) may differ from the stored.
  `data`: what identifies the images, stored with the plan; on resume it must be the same.
  `extend`: a run that was asked something else is to go on with this: returns the rows of `differences`, for
  `record_extension`, and changes nothing yet. A run that took no step is set aside, with or without `extend`.
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
    newest, imported = _newest_step(workdir), "imported" in facts
    if rows and (newest or imported):
      _check_extension(workdir, rows, extend, newest, plan)
      return rows
    if not rows:
      if data and not began and imported:  # weights of another program: their plan begins now
        plan = plan | {"data": data, "imported": facts["imported"]}
        write_json(os.path.join(workdir, "plan.json"), canonical(plan))
      return []
    _set_aside(workdir)
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
  return []


def record_extension(workdir, rows, config, plan, step):
  """From `step` on the run is that of `config` and `plan`; `rows`: what changed. Raises OSError."""
  paths = [os.path.join(workdir, name) for name in ("plan.json", "config.json")]
  began, stored = map(read_json, paths)
  change = {"step": step, "changes": rows}
  write_json(paths[0], canonical(began | plan))
  history = [*stored.get("history", []), change]
  write_json(paths[1], {"format": FORMAT, "config": canonical(config), "history": history})


def read_history(workdir):
  """[{'step': from which on, 'changes': [[key, before, now], ...]}] of a run that was extended, oldest first."""
  return read_json(os.path.join(remote.local(workdir), "config.json")).get("history", [])


def undone(workdir, step):
  """{key: value} that were in force up to checkpoint `step` (a step, not 0) and were changed from there on."""
  later = [change for change in read_history(workdir) if change["step"] >= step]
  return {key: before for change in reversed(later) for key, before, _ in change["changes"]}


def describe_changes(rows):
  """Rows (key, before, now) in words."""
  return ", ".join(f"{key} {json.dumps(before)} -> {json.dumps(now)}" for key, before, now in rows)


def _check_extension(workdir, rows, extend, newest, plan):
  """Raises ConfigError unless the run may go on with what differs."""
  if not extend or any(is_fixed(key) for key, *_ in rows):
    raise ConfigError(_refusal(workdir, rows))
  if plan["total_steps"] <= newest:
    raise ConfigError(
      f"--extend: the run in {workdir} is at step {newest}, this config ends at {plan['total_steps']}; give more config.epochs"
    )


def _newest_step(workdir):
  """The highest step of which there is a checkpoint, a damaged one included; 0 without."""
  found = (name.split(".") for name in remote.names(remote.home(workdir) / "checkpoints"))
  return max(
    (int(step) for step, *rest in found if step.isdigit() and rest in ([], ["damaged"])), default=0
  )


def _set_aside(workdir):
  """Moves a run that took no step to `workdir`/before-N."""
  number = 1
  while os.path.exists(os.path.join(workdir, f"before-{number}", "config.json")):
    number += 1
  aside, home = os.path.join(workdir, f"before-{number}"), remote.home(workdir)
  os.makedirs(aside, exist_ok=True)
  if remote.names(home / "checkpoints"):  # what another run's encoders were copied to
    remote.move(home / "checkpoints", home / f"before-{number}" / "checkpoints")
  for name in (*FILES, "config.json"):  # its config last: until then it is the run of before
    if os.path.exists(os.path.join(workdir, name)):
      os.rename(os.path.join(workdir, name), os.path.join(aside, name))
  tell(f"{workdir}: no step was taken there yet; begun anew, what was there is in {aside}")


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
  fixed = ", ".join(key for key, *_ in rows if is_fixed(key))
  ways = (
    f"{fixed} cannot change in a run that goes on:"
    if fixed
    else "add --extend to go on in it with this one, or"
  )
  return (
    f"--workdir={workdir}: holds a run with another config ({len(rows)} keys differ, below); {ways} use a new "
    f"--workdir, with --config.init_from={workdir} to go on from its encoders\n{table}"
  )
