"""A workdir as a run finds it: none yet, this very run's, another's that it extends, or one to be begun anew.

Flow: pretrain opens it before anything compiles and records where it goes on once that is known; import_weights opens
  a new one.
Holds: a directory that holds another run is refused with the keys that differ, unless the run is extended, which is
  recorded with its step; a run of which no step was saved is kept beside. Ended at any moment, each of these is finished by
  the next start.
Not here: the files themselves (workdir), states (checkpoint).
"""

import itertools
import json
import os
from collections.abc import Collection

from adco_jax.config.plan import is_fixed
from adco_jax.errors import ConfigError
from adco_jax.runtime import remote
from adco_jax.runtime.console import tell
from adco_jax.runtime.dtypes import at_least_float32
from adco_jax.runtime.files import Json, read_json, write_json
from adco_jax.workdir.checkpoint import DAMAGED, saved_steps
from adco_jax.workdir.files import (
  FORMAT,
  Change,
  canonical,
  differences,
  holds_run,
  read_plan,
  read_stored,
)
from adco_jax.workdir.metrics import read_metrics

# Of a run, besides what it was asked.
FILES = (
  "checkpoints", "capsules", "plan.json", "metrics.jsonl", "tensorboard", "views.png", "classes.json", "neighbours.png", "adversary.png", "adversary.npz", "eval", "features",
  "report.html",
)  # fmt: skip


def open_workdir(
  workdir: str,
  config: dict[str, Json],
  plan: dict[str, Json],
  may_change: Collection[str],
  data: dict[str, Json] | None = None,
  extend: bool = False,
) -> list[Change]:
  """Creates the workdir or recognises it as this very run's; returns [] then. Raises ConfigError otherwise.

  `config`, `plan`: plain dictionaries; keys listed in `may_change` (dotted) may differ from the stored.
  `data`: what identifies the images, stored with the plan; on resume it must be the same.
  `extend`: a run that was asked something else is to go on with this: returns the rows of `differences`, for
  `record_extension`, and changes nothing yet. A run of which no step was saved is set aside, with or without `extend`.
  """
  config, plan, data = canonical([config, plan, data])
  stored = read_stored(workdir, f"--workdir={workdir}") if holds_run(workdir) else None
  if stored and "aside" not in stored:
    there = read_plan(workdir, f"--workdir={workdir}")
    rows = differences(stored["config"], config, may_change)
    rows += _other_images(there["data"], data)
    newest = _newest_step(workdir, "imported" in there)
    before, now = (x.get("fill_steps", 0) for x in (there, plan))
    if newest and before > now and _fill_epochs(stored["config"]) == _fill_epochs(config) > 0:
      raise ConfigError(
        f"--workdir={workdir}: its bank was filled for {before} steps before the run's epochs, which are now among "
        "them (method.bank.init_epochs); end it with the version that began it, or use a new --workdir"
      )
    if rows and (newest or "imported" in there):
      fixed = [key for key, *_ in rows if is_fixed(key, stored["config"].get("objective", ""))]
      _check_extension(workdir, rows, fixed, extend, newest, there, plan)
      return rows
    if not rows:
      _renew_plan(workdir, there, config, plan, data)
      return []
  if stored:
    _set_aside(workdir, stored)
  _create(workdir, config, plan | {"data": data})
  return []


def record_extension(
  workdir: str,
  rows: list[Change],
  config: dict[str, Json],
  plan: dict[str, Json],
  step: int,
  data: dict[str, Json] | None = None,
) -> None:
  """From `step` on the run is that of `config` and `plan`; `rows`: what changed. Raises OSError.

  `data`: as in `open_workdir`, of weights that were imported and are trained here for the first time.
  """
  path = os.path.join(workdir, "config.json")
  there, history = read_json(os.path.join(workdir, "plan.json")), read_json(path).get("history", [])
  history = _as_of(step, [*history, {"step": step, "changes": rows}])
  write_json(path, {"format": FORMAT, "config": canonical(config), "history": history})
  # Where only the first is written, the same run is found at the next start, and `_renew_plan` writes the second.
  write_json(
    os.path.join(workdir, "plan.json"),
    canonical(there | plan | {"data": there.get("data") or data}),
  )


def record_return(workdir: str, step: int) -> None:
  """The run goes on from checkpoint `step`; what was to change later, at one that is damaged, changes here."""
  stored = read_json(os.path.join(workdir, "config.json"))
  history = _as_of(step, stored.get("history", []))
  if history != stored.get("history", []):
    write_json(os.path.join(workdir, "config.json"), stored | {"history": history})


def _as_of(step, history):
  """A history of which nothing lies behind `step`: what was changed there or later is one change at `step`."""
  first: dict[str, Json] = {}
  last: dict[str, Json] = {}
  for change in history:
    if change["step"] >= step:
      for key, before, now in change["changes"]:
        first.setdefault(key, before)
        last[key] = now
  rows = [[key, first[key], last[key]] for key in first if first[key] != last[key]]
  earlier = [change for change in history if change["step"] < step]
  return canonical(earlier + ([{"step": step, "changes": rows}] if rows else []))


def _fill_epochs(config):
  return config.get("method", {}).get("bank", {}).get("init_epochs", 0)


def has_begun(stored: dict[str, Json]) -> bool:
  """Whether the run of a stored plan was trained here; imported weights begin their own at their first training."""
  return bool(stored["data"]) or "imported" not in stored


def _other_images(stored, data):
  """Rows of `differences` where both say which images and these are not the same."""
  if not stored or not data:
    return []
  if "labels" in data and "labels" not in stored:  # begun before they were looked at
    data = {name: value for name, value in data.items() if name != "labels"}
  return differences({"images": stored}, {"images": data}, ())


def _newest_step(workdir, imported):
  """The highest step that was saved whole, though it may be damaged now; 0 without. Raises ConfigError for half an import."""
  names = remote.names(remote.home(workdir) / "checkpoints")
  damaged = [int(name.partition(".")[0]) for name in names if DAMAGED in name]
  steps = [*saved_steps(workdir), *damaged]
  if imported and not steps:
    raise ConfigError(
      f"--workdir={workdir}: the import into it was not finished; remove it and import again"
    )
  return max(steps, default=0)


def _renew_plan(workdir, stored, config, plan, data):
  """plan.json of a run that goes on: of these devices, but with the images and the dtype that it began with."""
  kept = {"imported": stored["imported"]} if "imported" in stored else {}
  if "compute_dtype" in stored and has_begun(stored) and config.get("compute_dtype") == "auto":
    kept["compute_dtype"] = stored["compute_dtype"]
  renewed = plan | kept | {"data": stored["data"] or data}
  if renewed != stored:
    write_json(os.path.join(workdir, "plan.json"), renewed)


def _check_extension(workdir, rows, fixed, extend, newest, stored, plan):
  """Raises ConfigError unless the run may go on with what differs; `fixed`: keys of it that may not."""
  dtypes = [at_least_float32(x.get("compute_dtype", "float32")) for x in (stored, plan)]
  if "compute_dtype" in [key for key, *_ in rows] and dtypes[0] != dtypes[1]:
    fixed.append("compute_dtype")  # the state's arrays are of it
  if fixed or not extend:
    raise ConfigError(_refusal(workdir, rows, fixed))
  if plan["total_steps"] <= newest:
    raise ConfigError(
      f"--extend: the run in {workdir} is at step {newest}, this config ends at {plan['total_steps']}; give more config.epochs"
    )


def _refusal(workdir, rows, fixed):
  width = max(len(key) for key, *_ in rows)
  table = "\n".join(
    f"  {k:{width}}  there: {json.dumps(a)}  here: {json.dumps(b)}" for k, a, b in rows
  )
  ways = (
    f"{', '.join(fixed)} cannot change in a run that goes on:"
    if fixed
    else "add --extend to go on in it with this one, or"
  )
  return (
    f"--workdir={workdir}: holds a run with another config ({len(rows)} keys differ, below); {ways} use a new "
    f"--workdir, with --config.init_from={workdir} to go on from its encoders\n{table}"
  )


def _set_aside(workdir, stored):
  """Moves a run of which no step was saved to `workdir`/before-N; one that was left halfway is moved on."""
  home, path = remote.home(workdir), os.path.join(workdir, "config.json")
  if "aside" not in stored:  # from here on it is no run, even if the program is ended
    logged = max((line["step"] for line in read_metrics(workdir)), default=0)
    there = remote.names(home)
    number = next(n for n in itertools.count(1) if f"before-{n}" not in there)
    stored |= {"aside": number, "logged": logged}
    write_json(path, stored)
    remote.push(workdir)
  name = f"before-{stored['aside']}"
  remote.move_into(workdir, FILES, name)
  kept = {key: value for key, value in stored.items() if key not in ("aside", "logged")}
  (home / name).mkdir(parents=True, exist_ok=True)
  (home / name / "config.json").write_text(json.dumps(kept, indent=2) + "\n")
  remote.remove(path)
  logged = f" (the last one in metrics.jsonl is {stored['logged']})" if stored["logged"] else ""
  tell(
    f"{workdir}: no step was saved there{logged}; begun anew, what was there is in {os.path.join(workdir, name)}"
  )


def _is_begun(workdir, name):
  """Whether it is the plan of a start that was ended before its config was written."""
  try:
    return name == "plan.json" and "total_steps" in read_json(os.path.join(workdir, name))
  except (OSError, ValueError):
    return False


def _create(workdir, config, plan):
  """Writes what a new run is known by, where no file of another is. Raises ConfigError."""
  there = {*remote.names(remote.home(workdir))}
  if strange := [name for name in FILES if name in there and not _is_begun(workdir, name)]:
    raise ConfigError(
      f"--workdir={workdir}: holds {strange[0]} without the config.json that goes with it; name another"
    )
  try:
    os.makedirs(workdir, exist_ok=True)
    write_json(os.path.join(workdir, "plan.json"), plan)
    # Last: it says that all is there.
    write_json(os.path.join(workdir, "config.json"), {"format": FORMAT, "config": config})
  except OSError as error:
    raise ConfigError(
      f"--workdir={workdir}: not writable ({error.strerror}); name another"
    ) from error
