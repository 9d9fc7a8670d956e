"""`python -m adco_jax.main --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...] [--extend] [--plan [--plan_topology=v5e:2x4]]`.

Flow: command_line -> config -> ranges -> the task that it names -> the workdir's report. Nothing comes before.
Holds: what a user got wrong ends in one line on stderr and exit status 2, without a traceback.
Not here: anything a task does.
"""

import contextlib
import copy
import errno
import functools
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ml_collections import ConfigDict

from adco_jax.config import config_files, manual, method, outside, ranges
from adco_jax.config.command_line import complete, read
from adco_jax.errors import ConfigError, Preempted, RunError
from adco_jax.runtime import compiled, host
from adco_jax.runtime.console import tell

if TYPE_CHECKING:
  from flax import linen as nn

  from adco_jax.data.sources.base import Source
  from adco_jax.encoders import LoadedEncoder
  from adco_jax.objectives.base import Objective
  from adco_jax.tasks.hooks import Hook

# What a traceback would explain no better.
DISK_ERRORS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EIO,
  errno.EACCES,
  errno.ESTALE,
  errno.EPERM,
  errno.ENOTDIR,
  errno.ENAMETOOLONG,
  errno.EFBIG,
)


TASKS = {
  "pretrain": lambda *given: _module("tasks.pretrain").run(*given),
  "knn": lambda config, *_: _scored(config, _module("tasks.evaluate").run_knn),
  "linear": lambda config, *_: _scored(config, _module("tasks.evaluate").run_linear),
  "svm": lambda config, *_: _scored(config, _module("tasks.svm").run),
  "report": lambda config, *_: _module("report.report").show_scores(config.pretrained),
  "import": lambda config, workdir, *_: _module("tasks.import_checkpoint").run(config, workdir),
  "export": lambda config, *_: _module("tasks.export").run(config),
  "embed": lambda config, *_: _module("tasks.embed").run(config),
  "inspect_data": lambda config, workdir, *_: _module("tasks.inspect_data").run(config, workdir),
  "pack": lambda config, *_: _module("tasks.pack").run(config),
  "replay_step": lambda config, *_: _module("tasks.replay_step").run(config),
  "verify_resume": lambda config, workdir, *_: _module("tasks.verify_resume").run(config, workdir),
}


def _module(name):
  """A module of ours, imported so late that a wrong value answers at once."""
  return importlib.import_module(f"adco_jax.{name}")


def _scored(config, task):
  """Scores one encoder, or each of a list."""
  compare = _module("tasks.compare")
  compare.run(config, task) if len(compare.places(config.pretrained)) > 1 else task(config)


def main(argv: list[str] | None = None) -> int:
  """Runs one command line (without the program's name) and returns the exit status."""
  try:
    run(sys.argv[1:] if argv is None else argv)
  except (Exception, KeyboardInterrupt) as error:
    return status_of(error)
  return 0


def run(argv: list[str]) -> None:
  """Answers, plans or does what a command line says."""
  if manual.is_asked(argv):
    manual.show(argv)
    return
  config, workdir, topology, extend = read(argv)
  if topology:
    estimate_only(as_pretraining(config, workdir), topology)
    return
  prepare(config)
  try:
    run_task(config, workdir, extend)
  except BaseException:
    with contextlib.suppress(OSError):  # what happened first is what is told
      close()
    raise
  close()


def status_of(error: BaseException) -> int:
  """Tells what ended the program, and returns its exit status."""
  if isinstance(error, Preempted):
    tell(error, sys.stderr)
    return error.status
  if isinstance(error, ConfigError | RunError):
    tell(f"error: {error}", sys.stderr)
    return error.status
  if isinstance(error, OSError) and error.errno in DISK_ERRORS:
    tell(f"error: {error.filename or 'a file'}: {error.strerror}", sys.stderr)
    return RunError.status
  if isinstance(error, KeyboardInterrupt):  # in a task that has nothing to save
    tell("interrupted", sys.stderr)
    return 130
  if (status := lost_process(error)) is not None:
    return status
  traceback.print_exception(error)
  return 1


def lost_process(error: BaseException) -> int | None:
  """The exit status where one of several processes died in the middle of a step, after saying so; else None."""
  from adco_jax.runtime import processes

  if not processes.is_lost(error):
    return None
  processes.tell_lost(_one_line(error)[:120])
  return processes.STUCK


def estimate_only(config: ConfigDict, topology: str) -> None:
  """What `--plan` does in place of a task."""
  from adco_jax.tasks import estimate

  ranges.check(config)
  if config.task != "pretrain":
    raise ConfigError(
      f"--plan: config.task={config.task!r} is not planned; use a pre-training config"
    )
  estimate.run(config, topology)


def prepare(config: ConfigDict) -> None:
  """What must come before any device: settings of this process, XLA's and JAX's, then the other processes of this run."""
  settle()
  host.keep_memory()
  if config.get("compile_cache", True):
    compiled.keep()
  else:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
  if config.get("deterministic"):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
  from adco_jax.runtime import processes

  processes.start()


def settle() -> None:
  """Settings of this process that its libraries read; importing a module of ours changes none of them."""
  # epath would import TensorFlow for gs://, and gcsfs ask Google which kind of bucket it is, with every call.
  os.environ.setdefault("EPATH_USE_TF", "false")
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # Orbax reports every file that it writes, and pages of every failure, which is told here in one line.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  cv2: Any = importlib.import_module("cv2")
  image: Any = importlib.import_module("PIL.Image")
  cv2.setNumThreads(1)  # the loader's threads are enough
  image.MAX_IMAGE_PIXELS = None  # the reader's own limit stands instead, and names its option


def train(
  config: ConfigDict | str,
  workdir: str,
  extend: bool = False,
  *,
  source: "Source | Callable[[str, str], Source] | str" = "",
  objective: "type | Objective | str" = "",
  backbone: "Callable[..., nn.Module] | str" = "",
  hooks: "Sequence[Hook]" = (),
) -> "LoadedEncoder":
  """Runs a pre-training, or resumes it, in `workdir`; returns its `LoadedEncoder`.

  config: a ConfigDict (adco_jax.config.config_files.load gives those that come with the project) or what --config takes.
  source, objective, backbone: instead of config.data.source, config.objective and config.model.arch: a name, or the thing
  itself as docs/extending.md has it; an objective may have its settings already. The workdir records a thing by its name,
  package.module:name; one that has none (defined in a script or a notebook) is found again by the same program alone.
  hooks: called at every evaluation (config.eval.every_epochs), on every process, as hook(encoder: LoadedEncoder); the numbers
  {'group/name': x} that one may give are logged with the evaluation's own.
  While it trains, signals end it as they end the command. Raises ConfigError, RunError, Preempted, and OSError
  where a bucket does not take what was made last.
  """
  name = config if isinstance(config, str) else "the given config"
  config = config_files.load(config) if isinstance(config, str) else copy.deepcopy(config)
  if config.task not in ("pretrain", "finetune"):
    raise ConfigError(f"train: config.task={config.task!r}; use a pre-training config")
  _hand_over(config, source, backbone)
  asked, settings = method.describe(objective) if objective else ("", {})
  config = complete(config, name, asked)
  config.method.update(settings)
  run_task(config, workdir, extend, tuple(hooks))
  remote = _module("runtime.remote")
  remote.push(remote.local(workdir))  # scores and report are made behind the last save
  return _module("encoders").load_encoder(workdir)


def _hand_over(config: ConfigDict, source: Any, backbone: Any) -> None:
  """Names in a config what a program has in its hands; '' leaves the config's own."""
  if source and not isinstance(source, str):
    given = source if callable(source) else functools.partial(lambda fixed, *_: fixed, source)
    config.data.source = outside.name_of(given, "data.source")
  elif source:
    config.data.source = source
  if backbone:
    config.model.arch = (
      backbone if isinstance(backbone, str) else outside.name_of(backbone, "model.arch")
    )


def command() -> NoReturn:
  """The program `adco-jax`."""
  leave(main())


def close() -> None:
  """Workdirs in gs:// get the last lines, for as long as that takes. Raises OSError."""
  from adco_jax.runtime import processes, remote

  processes.ignore_peer_exits()
  remote.close()


def leave(status: int) -> NoReturn:
  """Ends the program, together with the other processes of this run."""
  if "jax" in sys.modules:
    from adco_jax.runtime import processes

    processes.leave(status)
  sys.exit(status)


def run_task(
  config: ConfigDict, workdir: str, extend: bool = False, hooks: "tuple[Hook, ...]" = ()
) -> None:
  """Runs what config.task names; `hooks`: of a pre-training, see `train`."""
  from adco_jax.runtime import processes, remote

  config = processes.on_all(lambda: as_pretraining(config, workdir))
  processes.on_all(lambda: ranges.check(config))
  workdir = processes.on_all(lambda: place(config, workdir, extend))
  TASKS[config.task](config, workdir, extend, hooks)
  if config.task in ("pretrain", "knn", "linear", "svm", "report"):
    folders = (
      [workdir] if config.task == "pretrain" else _module("tasks.compare").places(config.pretrained)
    )
    for folder in filter(os.path.isdir, map(remote.local, folders)):  # not of an exported file
      processes.on_first(functools.partial(_module("report.report").write_report, folder))


def as_pretraining(config: ConfigDict, workdir: str) -> ConfigDict:
  """A fine-tuning as the pre-training config that it means, any other config as it is. Raises ConfigError."""
  if config.task != "finetune":
    return config
  ranges.check(config)
  return _module("tasks.finetune").resolve(config, workdir)


def place(config: ConfigDict, workdir: str, extend: bool) -> str:
  """The folder on disk that a task works in. Raises ConfigError for one that cannot run like this."""
  from adco_jax.runtime import processes, remote

  told = f"config.task={config.task!r}"
  if config.task not in TASKS:
    raise ConfigError(f"{told}: use one of {', '.join([*TASKS, 'finetune'])}")
  if processes.several() and config.task != "pretrain":
    raise ConfigError(f"{told}: runs in one process; start it alone")
  if extend and config.task != "pretrain":
    raise ConfigError(f"--extend: {told} has no run to go on with; leave it out")
  return remote.local(workdir)


def parse(argv: list[str]) -> tuple[ConfigDict, str]:
  """(config, workdir) from a command line on which nothing can be planned. Raises ConfigError."""
  config, workdir, topology, _ = read(argv)
  if topology:
    raise ConfigError("--plan: adco_jax.main alone understands it")
  ranges.check(config)
  return config, workdir


def _one_line(error):
  return " ".join(str(error).split())


if __name__ == "__main__":
  command()
