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
  "check",
  "phases",
  "init",
  "specs",
  "ascent",
  "loss",
  "summary",
  "chance",
  "warnings",
)


def is_outside(name: object) -> bool:
  """Whether a name is `package.module:name`."""
  return isinstance(name, str) and ":" in name


def load(name: str, option: str) -> Callable:
  """What `package.module:name` names; the folder where the program was started is looked at too. Raises ConfigError."""
  module, _, attribute = name.partition(":")
  told = f"config.{option}={name!r}"
  here = os.getcwd()
  if here not in sys.path:
    sys.path.append(here)
  try:
    found = getattr(importlib.import_module(module), attribute, None)
  except Exception as error:  # a user's module may raise anything
    what = " ".join(f"{type(error).__name__}: {error}".split())
    remedy = "name a module that Python can import from here, as package.module:name"
    raise ConfigError(f"{told}: {what}; {remedy}") from error
  if not callable(found):
    raise ConfigError(
      f"{told}: {module} has no class or function {attribute!r} (docs/extending.md)"
    )
  return found


def load_objective(name: str) -> type:
  """The dataclass of an objective, all of whose fields have defaults. Raises ConfigError."""
  found, told = load(name, "objective"), f"config.objective={name!r}"
  if not dataclasses.is_dataclass(found):
    raise ConfigError(
      f"{told}: is no dataclass; write @dataclasses.dataclass(frozen=True) above it"
    )
  if missing := [method for method in OBJECTIVE if not hasattr(found, method)]:
    raise ConfigError(f"{told}: lacks {', '.join(missing)} (docs/extending.md)")
  nothing = dataclasses.MISSING
  bare = [
    f.name
    for f in dataclasses.fields(found)
    if f.default is nothing and f.default_factory is nothing
  ]
  if bare:
    raise ConfigError(
      f"{told}: its fields {', '.join(bare)} have no default; they are the keys of config.method"
    )
  return found


def settings(found: type) -> dict[str, object]:
  """{field: default} of a dataclass from outside: the keys under config.method."""
  made = found()
  return {field.name: getattr(made, field.name) for field in dataclasses.fields(found)}
