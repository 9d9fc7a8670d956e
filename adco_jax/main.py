"""`python -m adco_jax.main --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...] [--extend] [--plan [--plan_topology=v5e:2x4]]`.

Flow: command_line -> config -> ranges -> the task that it names -> the workdir's report. Nothing comes before.
Holds: what a user got wrong ends in one line on stderr and exit status 2, without a traceback.
Not here: anything a task does.
"""

import contextlib
import errno
import os
import sys
import traceback

from adco_jax import manual, ranges
from adco_jax.command_line import read
from adco_jax.console import tell
from adco_jax.plan import ConfigError, Preempted, RunError

# What a traceback would explain no better.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ESTALE)


def main(argv=None):
  """Runs one command line (without the program's name) and returns the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  try:
    if manual.is_asked(argv):
      manual.show(argv)
      return 0
    config, workdir, topology, extend = read(argv)
    if topology:
      estimate_only(config, topology)
      return 0
    prepare(config)
    try:
      run_task(config, workdir, extend)
    except BaseException:
      with contextlib.suppress(OSError):  # what happened first is what is told
        close()
      raise
    close()
  except Preempted as news:
    tell(news, sys.stderr)
    return news.status
  except (ConfigError, RunError) as error:
    tell(f"error: {error}", sys.stderr)
    return error.status
  except Exception as error:
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
      tell(f"error: {error.filename or 'a file'}: {error.strerror}", sys.stderr)
      return RunError.status
    if (status := lost_process(error)) is not None:
      return status
    traceback.print_exc()
    return 1
  except KeyboardInterrupt:  # in a task that has nothing to save
    tell("interrupted", sys.stderr)
    return 130
  return 0


def lost_process(error):
  """The exit status where one of several processes died in the middle of a step, after saying so; else None."""
  from adco_jax import processes

  if not processes.is_lost(error):
    return None
  processes.tell_lost(_one_line(error)[:120])
  return processes.STUCK


def estimate_only(config, topology):
  """What `--plan` does in place of a task."""
  from adco_jax import estimate

  ranges.check(config)
  if config.task != "pretrain":
    raise ConfigError(
      f"--plan: config.task={config.task!r} is not planned; use a pre-training config"
    )
  estimate.run(config, topology)


def prepare(config):
  """What must come before any device: XLA's settings, then the other processes of this run."""
  if config.get("deterministic"):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
  from adco_jax import processes

  processes.start()


def close():
  """Workdirs in gs:// get the last lines, for as long as that takes. Raises OSError."""
  from adco_jax import processes, remote

  processes.let_go()
  remote.close()


def leave(status):
  """Ends the program, together with the other processes of this run."""
  if "jax" in sys.modules:
    from adco_jax import processes

    processes.leave(status)
  sys.exit(status)


def run_task(config, workdir, extend=False):
  """Runs what config.task names; imports come late so that a wrong value answers at once."""
  from adco_jax import processes

  processes.on_all(lambda: ranges.check(config))
  from adco_jax import (
    embed,
    evaluate,
    export,
    import_weights,
    inspect_data,
    pack,
    pretrain,
    remote,
    replay_step,
    report,
    verify_resume,
  )

  tasks = {
    "pretrain": lambda: pretrain.run(config, workdir, extend),
    "knn": lambda: evaluate.run_knn(config),
    "linear": lambda: evaluate.run_linear(config),
    "report": lambda: report.show_scores(config.pretrained),
    "import": lambda: import_weights.run(config, workdir),
    "export": lambda: export.run(config),
    "embed": lambda: embed.run(config),
    "inspect_data": lambda: inspect_data.run(config, workdir),
    "pack": lambda: pack.run(config),
    "replay_step": lambda: replay_step.run(config),
    "verify_resume": lambda: verify_resume.run(config, workdir),
  }

  def place():
    if config.task not in tasks:
      raise ConfigError(f"config.task={config.task!r}: use one of {', '.join(tasks)}")
    if processes.several() and config.task != "pretrain":
      raise ConfigError(f"config.task={config.task!r}: runs in one process; start it alone")
    if extend and config.task != "pretrain":
      raise ConfigError(
        f"--extend: config.task={config.task!r} has no run to go on with; leave it out"
      )
    return remote.local(workdir)

  workdir = processes.on_all(place)
  tasks[config.task]()
  if config.task in ("pretrain", "knn", "linear", "report"):
    folder = workdir if config.task == "pretrain" else config.pretrained
    processes.on_first(lambda: report.write_report(remote.local(folder)))


def parse(argv):
  """(config, workdir) from a command line on which nothing can be planned. Raises ConfigError."""
  config, workdir, topology, _ = read(argv)
  if topology:
    raise ConfigError("--plan: adco_jax.main alone understands it")
  ranges.check(config)
  return config, workdir


def _one_line(error):
  return " ".join(str(error).split())


if __name__ == "__main__":
  leave(main())
