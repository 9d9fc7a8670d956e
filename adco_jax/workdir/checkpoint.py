"""A run's states on disk (Orbax), each with a fingerprint.

Flow: pretrain restores or creates, then saves; evaluation restores parts by name.
Shapes: any pytree of arrays; nothing here knows what it means.
Holds: a state that restores has the bits that were saved (Orbax itself restores a flipped bit without a
  word); the newest intact one wins; a damaged one is renamed, never deleted.
Not here: what to save (state), when (saver), what the run was asked (workdir).
"""

import contextlib
import errno
import functools
import gc
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, preservation_policy

from adco_jax.errors import ConfigError, RunError, require
from adco_jax.runtime import processes, remote
from adco_jax.runtime.console import tell
from adco_jax.runtime.dtypes import Tree
from adco_jax.runtime.files import Json
from adco_jax.workdir import stored
from adco_jax.workdir.fingerprints import check_fingerprints, fingerprints

DAMAGED = ".damaged"  # ends the name of a checkpoint that was set aside
MACHINE_ERRORS = (
  errno.EIO,
  errno.EACCES,
  errno.EMFILE,
  errno.ENOMEM,
  errno.ESTALE,
  errno.ETIMEDOUT,
)


class SaveError(RunError):
  """A save that did not reach the disk, in one line."""


class Checkpoints:
  """Asynchronous saves of one workdir, and the way back.

  `keep`: newest ones that stay; `keeps(step)`: whether one stays for good.
  """

  def __init__(
    self, workdir: str, keep: int = 1, keeps: Callable[[int], bool] = lambda step: False
  ) -> None:
    self._folder = remote.home(workdir) / "checkpoints"
    newest = preservation_policy.LatestN(keep)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=AnyPreservationPolicy([newest, _ForGood(keeps)]),
      cleanup_tmp_directories=True,
      # Else a folder that cannot be made is found out after a wait of minutes.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def save(self, step: int, state: Tree, notes: dict[str, Json] | None = None) -> None:
    """Starts to save, with `notes` beside the state; the arrays may be donated at once.

    Raises SaveError, also for the save before this one if nobody had asked for it.
    """
    facts = {"fingerprints": fingerprints(state)} | ({"notes": notes} if notes else {})
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(facts))
    with _telling():
      self._manager.save(step, args=items, force=True)

  def check(self) -> None:
    """Raises SaveError, once, if the last save has failed by now."""
    with _telling():
      self._manager.check_for_errors()

  def restore(self, abstract: Tree) -> tuple[Tree, int] | None:
    """(state, step) of the newest intact checkpoint, or None if there never was one.

    `abstract`: ShapeDtypeStructs with shardings. Damaged ones that are newer are renamed once an intact
    one is found. Raises ConfigError if there is none, RunError if the machine is at fault.
    """
    damaged: dict[int, str] = {}
    handler = ocp.StandardCheckpointHandler()
    how = ocp.args.StandardRestore(abstract)
    for step in _newest_first(self._manager.all_steps()):
      state, reason = _read(self._folder / str(step), handler, how)
      if reason is None:
        processes.on_first(lambda: self._set_aside(damaged))
        self._manager.reload()
        return state, step
      damaged[step] = reason
    spoiled = [f"{step} ({reason})" for step, reason in damaged.items()]
    spoiled = spoiled or sorted(name for name in remote.names(self._folder) if DAMAGED in name)
    if spoiled:
      raise ConfigError(
        f"--workdir: no checkpoint under {self._folder} is intact: {', '.join(spoiled)}; nothing was touched"
      )
    return None

  def notes(self, step: int) -> dict[str, Json]:
    """Those beside the intact checkpoint of `step`, {} where there are none."""
    facts = json.loads((self._folder / str(step) / "meta" / "metadata").read_text())
    return facts.get("notes", {})

  def latest_step(self) -> int | None:
    """The newest step on disk, None without checkpoints."""
    return max(_steps(self._folder), default=None)

  def saving(self) -> bool:
    """Whether a save is under way."""
    return self._manager.is_saving_in_progress()

  def finish(self) -> None:
    """Returns when everything is on disk. Raises SaveError if it cannot be."""
    with _telling():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits and frees the manager's threads; whether all is on disk is `finish`'s to say."""
    with contextlib.suppress(Exception):
      self._manager.close()

  def _set_aside(self, damaged):
    for step, reason in damaged.items():
      name = f"{step}{DAMAGED}"
      while (self._folder / name).exists():
        name += "+"
      remote.move(self._folder / str(step), self._folder / name)
      tell(f"checkpoint {step} is damaged ({reason}); set aside as {name}")


class _ForGood(preservation_policy.PreservationPolicy):
  """Preserves the checkpoints of the steps that `keeps` names."""

  def __init__(self, keeps):
    self._keeps = keeps

  def should_preserve(self, checkpoints, *, context):
    del context
    return [self._keeps(checkpoint.step) for checkpoint in checkpoints]


def _newest_first(steps):
  """What the first process sees: on network file systems others may see it later."""
  return sorted(json.loads(processes.gather_texts(json.dumps([*steps]))[0]), reverse=True)


def _read(folder, handler, how):
  """(state, None) of one checkpoint, or (None, why not), the same on all processes. Raises RunError.

  Orbax is told that each process reads alone: it would wait for the others, and one that fails never comes.
  """
  this = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
  reader = ocp.Checkpointer(handler, multiprocessing_options=alone)

  def read():
    facts = json.loads((folder / "meta" / "metadata").read_text())
    return reader.restore(folder / "state", args=how), facts["fingerprints"]

  parts, reason = _attempt(read)
  if reason is None:  # fingerprints are computed by all processes together
    _, reason = _attempt(lambda: check_fingerprints(*parts))
  return (parts[0] if reason is None else None), reason


def _attempt(work):
  """(work(), None), or (None, the reason) if it failed on any process. Raises RunError on all."""

  def attempt():
    try:
      return work(), None
    except Exception as error:  # Orbax raises many types on damaged files
      _silence_leftovers()
      reason = _first_line(error)
      if is_the_machine_s(error):
        raise RunError(f"a checkpoint cannot be read ({reason}); nothing was touched") from error
      return None, reason

  result, reason = processes.on_all(attempt)
  if processes.anyone(reason is not None):
    return None, reason or "another process cannot read it"
  return result, None


def is_the_machine_s(error: BaseException) -> bool:
  """Whether memory, a disk or a permission failed, which says nothing about the files."""
  return (
    isinstance(error, MemoryError)
    or getattr(error, "errno", None) in MACHINE_ERRORS
    or any(name in str(error) for name in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED"))
  )


def restore_parts(
  workdir: str, abstract: dict[str, Tree], option: str = "pretrained", step: int = 0
) -> tuple[dict[str, Tree], int]:
  """(parts, step) of a checkpoint, 0 for the newest intact one: only the named subtrees of its state.

  `abstract`: {field: tree of ShapeDtypeStructs}; `option`: the key that named the workdir. A damaged
  checkpoint is named and left where it is. Raises ConfigError, also for one of other shapes.
  """
  folder, handler = remote.home(workdir) / "checkpoints", ocp.PyTreeCheckpointHandler()
  old = stored.is_old(_folders(workdir))
  abstract = stored.of_format_3(abstract) if old else abstract
  how = ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=True,
  )
  steps = _newest_first(_steps(folder))
  require(steps, option, workdir, "no checkpoint there yet; pre-train first")
  there = f"no such checkpoint in {workdir}; there are {', '.join(map(str, reversed(steps)))}"
  require(not step or step in steps, "step", step, there)
  for number in [step] if step else steps:
    if other := processes.on_all(
      functools.partial(stored.unlike, folder / str(number) / "state", abstract)
    ):
      raise ConfigError(
        f"config.{option}={workdir!r}: step {number} is of another network: {other}"
      )
    parts, reason = _read(folder / str(number), handler, how)
    if reason is None:
      return (stored.upgraded(parts) if old else parts), number
    if processes.is_first():
      tell(f"checkpoint {number} of {workdir} is damaged ({reason})")
  raise ConfigError(f"config.{option}={workdir!r}: no checkpoint is intact ({reason})")


def stored_fields(workdir: str, empty: bool = False) -> tuple[str, ...]:
  """Names of the state's fields in the checkpoints of a workdir, those that hold no array only with `empty`."""
  return stored.fields(_folders(workdir), empty)


def holds(workdir: str, wanted: dict[str, Tree]) -> bool:
  """Whether the newest checkpoint has these fields with all their arrays, of these shapes and dtypes."""
  return stored.holds(_folders(workdir), wanted)


def _folders(workdir):
  folder = remote.home(workdir) / "checkpoints"
  return [folder / str(step) / "state" for step in sorted(_steps(folder), reverse=True)]


def saved_steps(workdir: str) -> list[int]:
  """Steps of the checkpoints of a workdir, in order."""
  return sorted(_steps(remote.home(workdir) / "checkpoints"))


def _steps(folder):
  """Steps that were saved whole; in gs:// a file says so, on disk the name."""
  steps = [int(name) for name in remote.names(folder) if name.isdigit()]
  there = str(folder).startswith(remote.SCHEME)
  return [s for s in steps if not there or "commit_success.txt" in remote.names(folder / str(s))]


@contextlib.contextmanager
def _telling():
  try:
    yield
  except Exception as error:  # whatever the file system raised
    _silence_leftovers()
    raise SaveError(f"a save failed ({_first_line(error)})") from error


def _first_line(error):
  line = str(error).strip().split("\n")[0].split(" See full TensorStore")[0]
  return line[:120] or type(error).__name__


def _silence_leftovers():
  """Hides what Orbax still prints of a failure: all that it had begun fails later, with pages."""

  def is_leftover(error):
    lines = traceback.extract_tb(error.__traceback__)
    return any("orbax" in line.filename or "asyncio" in line.filename for line in lines)

  def report(kind, error, trace):
    if not is_leftover(error):
      sys.__excepthook__(kind, error, trace)

  def report_unraisable(problem):
    if not is_leftover(problem.exc_value):
      sys.__unraisablehook__(problem)

  sys.excepthook, sys.unraisablehook = report, report_unraisable
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  gc.collect()
