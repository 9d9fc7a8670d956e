"""The settings of an objective as keys of a config: the fields of its dataclass lie under `config.method`.

Flow: command_line lays out the keys of the objective that was asked for, ranges holds their values against the fields'
  rules, build makes the objective.
Holds: a key of another objective is unknown; a field that is a dataclass itself is a group of keys.
Not here: what an objective does (objectives.base).
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from adco_jax.config import outside
from adco_jax.errors import ConfigError

Rule = Callable[[Any], str]  # value of a key -> what to do about it, '' if it is right
Settings = dict[str, Any]  # {key: value}, groups as dictionaries
Default = TypeVar("Default")

# Ours, as any other is named; imported when asked for.
OBJECTIVES = {
  "adco": "adco_jax.objectives.adco:AdCo",
  "moco": "adco_jax.objectives.moco:MoCo",
  "mochi": "adco_jax.objectives.mochi:MoCHi",
  "simclr": "adco_jax.objectives.simclr:SimCLR",
  "byol": "adco_jax.objectives.byol:BYOL",
  "swav": "adco_jax.objectives.swav:SwAV",
  "mocov3": "adco_jax.objectives.mocov3:MoCoV3",
  "caco": "adco_jax.objectives.caco:CaCo",
  "still": "adco_jax.objectives.still:Still",
  "random": "adco_jax.objectives.still:Random",
  "query_softmax": "adco_jax.objectives.query_softmax:QuerySoftmax",
  "supervised": "adco_jax.objectives.supervised:Supervised",
}


def setting(
  default: Default, rule: Rule | None = None, words: str = "", *, fixed: bool = False
) -> Default:
  """A field of an objective: its rule (see ranges) and the words that --help has for it.

  fixed: what the arrays are or how they began, so that not even --extend changes it.
  """
  return dataclasses.field(default=default, metadata={"rule": rule, "words": words, "fixed": fixed})


def check_name(name: object) -> str:
  """What to do about a `config.objective`, '' if it may name one: a rule as those of ranges."""
  if name in OBJECTIVES or outside.is_outside(name):
    return ""
  near = difflib.get_close_matches(str(name), OBJECTIVES, 1, 0.5)
  meant = f"did you mean {near[0]}? " if near else ""
  return f"{meant}use one of {', '.join(OBJECTIVES)}, or package.module:name of your own"


def find(name: str) -> type:
  """The dataclass of the objective of this name. Raises ConfigError."""
  if remedy := check_name(name):
    raise ConfigError(f"config.objective={name!r}: {remedy}")
  return outside.load_objective(OBJECTIVES.get(name, name))


def modes(name: str) -> Sequence[str]:
  """Those of the views that it takes. Raises ConfigError."""
  cls: Any = find(name)
  return cls.modes


def describe(objective: object) -> tuple[str, Settings]:
  """(config.objective, settings of config.method) of an objective as `train` takes it: a name, a class or an instance."""
  if isinstance(objective, str):
    return objective, {}
  ours = {there: here for here, there in OBJECTIVES.items()}
  name = outside.name_of(objective if isinstance(objective, type) else type(objective), "objective")
  if isinstance(objective, type) or not dataclasses.is_dataclass(objective):
    return ours.get(name, name), {}
  made: Any = objective  # mypy takes it for a class as well
  return ours.get(name, name), dataclasses.asdict(made)


def fields(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
  """(dotted name, field) of every setting, those of groups among them."""
  made = cls()
  for field in dataclasses.fields(cls):
    value = getattr(made, field.name)
    if dataclasses.is_dataclass(value):
      yield from fields(type(value), f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, field


def table(cls: type) -> Settings:
  """Its defaults."""
  return dataclasses.asdict(cls())


def create(cls: type[Default], values: Settings) -> Default:
  """The objective with these settings, a whole `table`."""
  made = cls()
  groups = {
    name: create(type(getattr(made, name)), value)
    for name, value in values.items()
    if dataclasses.is_dataclass(getattr(made, name))
  }
  return cls(**values | groups)


def is_fixed(key: str, objective: str) -> bool:
  """Whether --extend may not change config.method.KEY; of a plain field nobody knows, so it may not."""
  known = dict(fields(find(objective)))
  return key not in known or known[key].metadata.get("fixed", True)


def shared(there: Settings, wanted: Settings) -> Settings:
  """`wanted` with the values of `there` for the keys that both have."""
  return {
    key: shared(there[key], value) if isinstance(value, dict) else there[key]
    for key, value in wanted.items()
    if key in there and isinstance(value, dict) == isinstance(there[key], dict)
  }


def laid_over(below: Settings, above: Settings) -> Settings:
  """`below` with all that `above` says."""
  groups = {
    key: laid_over(below[key], value)
    for key, value in above.items()
    if isinstance(value, dict) and isinstance(below.get(key), dict)
  }
  return below | above | groups
