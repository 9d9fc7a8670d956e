"""Objectives, backbones and sources that are not ours: a config names them as `package.module:name`.

Flow: ranges checks such a name, build and the modules that hold our own ones load it; docs/extending.md has one of each.
Holds: what cannot be imported, or lacks what is asked of it, is refused in one line before anything runs.
Not here: what they must do (objectives.base, models.heads, data.sources.loading).
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable

from adco_jax.errors import ConfigError

# What an objective must have: objectives.base.Objective.
OBJECTIVE = (
  "keys_from",
  "momentum_update",
  "momentum_init",
  "sees",
  "needs_labels",
  "modes",
  "check",
  "phases",
  "init",
  "specs",
  "ascent",
  "trains",
  "project",
  "loss",
  "summary",
  "rows",
  "chance",
  "warnings",
)


def is_outside(name: object) -> bool:
  """Whether a name is `package.module:name`."""
  return isinstance(name, str) and ":" in name


# What a program handed to `adco_jax.train` that has no name of its own: known as long as the program runs.
HANDED = "handed"
_handed: dict[str, Callable] = {}


def name_of(thing: Callable, option: str) -> str:
  """The name by which config.OPTION finds a class or function again: its own, or one that this program alone knows."""
  module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
  if module != "__main__" and getattr(sys.modules.get(module), name, None) is thing:
    return f"{module}:{name}"
  handed = f"{HANDED}:{option} {name.rpartition('.')[2]}".rstrip()  # no two options share one
  _handed[handed] = thing
  return handed


def load(name: str, option: str) -> Callable:
  """What `package.module:name` names; the folder where the program was started is looked at too. Raises ConfigError."""
  module, _, attribute = name.partition(":")
  told = f"config.{option}={name!r}"
  if module == HANDED:
    if name not in _handed:
      remedy = "run the program that has it, or name what Python can import, as package.module:name"
      raise ConfigError(f"{told}: was handed to adco_jax.train by a program; {remedy}")
    return _handed[name]
  here = os.getcwd()
  if here not in sys.path:
    sys.path.append(here)
  try:
    named = getattr(importlib.import_module(module), attribute, None)
  except Exception as error:  # a user's module may raise anything
    what = " ".join(f"{type(error).__name__}: {error}".split())
    remedy = "name a module that Python can import from here, as package.module:name"
    raise ConfigError(f"{told}: {what}; {remedy}") from error
  if not callable(named):
    raise ConfigError(
      f"{told}: {module} has no class or function {attribute!r} (docs/extending.md)"
    )
  return named


def load_objective(name: str) -> type:
  """The dataclass of an objective, all of whose fields have defaults. Raises ConfigError."""
  objective, told = load(name, "objective"), f"config.objective={name!r}"
  if not dataclasses.is_dataclass(objective):
    raise ConfigError(
      f"{told}: is no dataclass; write @dataclasses.dataclass(frozen=True) above it"
    )
  if missing := [method for method in OBJECTIVE if not hasattr(objective, method)]:
    raise ConfigError(f"{told}: lacks {', '.join(missing)} (docs/extending.md)")
  nothing = dataclasses.MISSING
  bare = [
    f.name
    for f in dataclasses.fields(objective)
    if f.default is nothing and f.default_factory is nothing
  ]
  if bare:
    raise ConfigError(
      f"{told}: its fields {', '.join(bare)} have no default; they are the keys of config.method"
    )
  return objective
