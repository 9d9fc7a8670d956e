"""A command line -> config, workdir and what is to be planned, all of it known and of the right type.

Flow: main calls `read`; --config is loaded and held against the complete file, then --config.KEY=VALUE override it.
Holds: a flag that is given twice counts as given last, tuples as well; `~` in a path is the home folder.
Not here: ranges (ranges), what --help says (manual).
"""

import ast
import contextlib
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from adco_jax.config import config_files, keys, method
from adco_jax.config.plan import get
from adco_jax.config.ranges import PATHS
from adco_jax.errors import ConfigError

FLAGS = "--config=FILE --workdir=DIR --config.KEY=VALUE --extend --plan --plan_topology=NAME --help"
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")


class Asked(NamedTuple):
  """What a command line says; `topology` '' where nothing is to be planned; `extend`: a run goes on with a changed config."""

  config: ConfigDict
  workdir: str
  topology: str
  extend: bool


class TupleParser(flags.ArgumentParser):
  """One value for the whole tuple. config_flags' own parser appends what is given again to what was."""

  def parse(self, argument: str | Sequence[object]) -> tuple:
    if isinstance(argument, str):
      try:
        argument = ast.literal_eval(argument)
      except (SyntaxError, ValueError) as error:
        raise ValueError("not a tuple such as (1, 2)") from error
    return tuple(argument) if isinstance(argument, tuple | list) else (argument,)

  def flag_type(self) -> str:
    return "tuple"


config_flags.register_flag_parser_for_type(tuple, TupleParser())


def read(argv: list[str]) -> Asked:
  """The `Asked` of a command line without the program's name. Raises ConfigError."""
  values, rest = parse_flags(argv)
  given = values.config
  if not given:
    raise ConfigError("--config is missing; for a first run use --config=configs/adco_digits.py")
  config = config_files.load(given)
  config = complete(config, given, last_given("objective", rest))
  task, config = config.task, override(config, rest)
  if config.task != task:
    check_task(config, task)
  for name in PATHS & set(keys.walk(config)):
    expand(config, name)
  if values["plan_topology"].present and not values.plan:
    raise ConfigError("--plan_topology: says what --plan is for; give --plan as well")
  if values.plan and not values.plan_topology:
    raise ConfigError("--plan_topology is empty; name one such as here, cpu:8, v5e:2x4")
  if values.plan and values.extend:
    raise ConfigError("--extend: goes on with a run, --plan runs nothing; leave one of them out")
  topology = values.plan_topology if values.plan else ""
  return Asked(
    config, os.path.expanduser(values.workdir or default_workdir(given)), topology, values.extend
  )


def parse_flags(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
  """(values of the program's own flags, all other words). Raises ConfigError."""
  values = flags.FlagValues()
  flags.DEFINE_string("config", "", "Config file.", flag_values=values)
  flags.DEFINE_string("workdir", "", "Directory of the run.", flag_values=values)
  flags.DEFINE_boolean("extend", False, "Goes on with a changed config.", flag_values=values)
  flags.DEFINE_boolean("plan", False, "Says what a run would take.", flag_values=values)
  flags.DEFINE_string("plan_topology", "here", "Devices to plan for.", flag_values=values)
  values.set_gnu_getopt(True)
  with _refusing():
    return values, values(["adco_jax", *argv], known_only=True)[1:]


def last_given(key: str, words: list[str]) -> str:
  """The last value that the command line has for a key, before it is understood as a whole; '' without."""
  given = [word.partition("=")[2] for word in words if re.match(rf"--?config\.{key}=", word)]
  return given[-1] if given else ""


def complete(config: ConfigDict, given: str, objective: str = "") -> ConfigDict:
  """The config of a file with the keys and types that its task has. Raises ConfigError.

  objective: that is asked for instead of the file's; settings that both have keep the file's values.
  """
  base = config_files.base_of(config.task)
  if base is None:  # main knows the tasks
    return config
  if "objective" in base and "objective" in config:
    lay_out(config, base, objective or config.objective)
  keys.check_known(config, base, given)
  return config


def lay_out(config: ConfigDict, base: ConfigDict, objective: str) -> None:
  """Makes config.method, in both, hold all settings of this objective. Raises ConfigError."""
  ours = objective == base.objective  # of the complete file, which lists them
  table = base.method.to_dict() if ours else method.table(method.find(objective))
  said = config.method.to_dict() if "method" in config else {}
  if objective != config.objective:
    said = method.shared(said, table)
  with config.unlocked():
    config.objective = objective
    config.method = ConfigDict(method.laid_over(table, said))
  base.method = ConfigDict(table)


def check_task(config: ConfigDict, before: str) -> None:
  """Refuses a task of which the file, of the task `before`, has not the keys. Raises ConfigError."""
  base = config_files.base_of(config.task)
  if base is not None and {*keys.walk(base)} != {*keys.walk(config)}:
    raise ConfigError(
      f"config.task={config.task!r}: has other keys than {before}, which the file is for; use --config={config.task}"
    )


def override(config: ConfigDict, words: list[str]) -> ConfigDict:
  """The config after --config.KEY=VALUE for every word. Raises ConfigError."""
  known = list(keys.walk(config))
  for name in (match[1] for match in map(OVERRIDE.match, words) if match):
    if not name:
      raise ConfigError(f"--config.: names no key; flags are {FLAGS}")
    if name not in known:
      raise ConfigError(f"--config.{name}: no such key; {keys.suggest(name, known, '--config.')}")
  values = flags.FlagValues()
  argv = ["adco_jax", *words]
  with _refusing():
    handle = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values.set_gnu_getopt(True)
    rest = values(argv)[1:]
  if rest:
    raise ConfigError(f"{rest[0]!r}: not understood; flags are {FLAGS}")
  return handle.value


def expand(config: ConfigDict, name: str) -> None:
  """Puts the home folder in the place of `~` in the path at key `name`."""
  group, _, last = name.rpartition(".")
  branch = get(config, group) if group else config
  if branch[last]:
    several = branch[last].split(",") if name == "pretrained" else [branch[last]]
    branch[last] = ",".join(map(os.path.expanduser, several))


def default_workdir(given: str) -> str:
  """runs/<stem of the config file>."""
  path, _ = config_files.split(given)
  return os.path.join("runs", os.path.splitext(os.path.basename(path))[0])


@contextlib.contextmanager
def _refusing():
  """absl's errors as one line."""
  try:
    yield
  except flags.IllegalFlagValueError as error:
    remedy = "give a value of the type that it has in the file"
    cause = error.__context__  # its text may be a tuple, of words and the value
    words = (
      _one_line(error).replace(str(cause), str(cause.args[0])) if cause and cause.args else error
    )
    raise ConfigError(f"{_one_line(words)}; {remedy}") from error
  except flags.Error as error:
    raise ConfigError(f"{_one_line(error)}; flags are {FLAGS}") from error


def _one_line(error):
  return " ".join(str(error).split())
