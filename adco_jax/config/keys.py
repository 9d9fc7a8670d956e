"""The keys of a config: listing them, holding them against the complete ones, finding what a wrong name meant.

Flow: command_line checks a file's config with `check_known` and names overrides that are no keys; manual lists them.
Holds: a config that passed has exactly the keys of its base, each of the base's type.
Not here: which values a key may have (ranges), files (config_files).
"""

import difflib
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from adco_jax.config.plan import get
from adco_jax.errors import ConfigError

# What other programs call them, where no abbreviation says it.
OTHER_NAMES = {"path": "dir", "root": "dir", "workers": "threads", "num_workers": "threads", "tau": "temperature", "arch_name": "arch", "player": "encoder"}  # fmt: skip


def walk(config: ConfigDict, prefix: str = "") -> Iterator[str]:
  """Every dotted key, in the order of the file; groups are none."""
  for key in config:
    value = config.get(key)
    if isinstance(value, ConfigDict):
      yield from walk(value, f"{prefix}{key}.")
    else:
      yield prefix + key


def check_known(config: ConfigDict, base: ConfigDict, path: str) -> None:
  """Holds a config of the file `path` against the complete one; whole numbers become floats where those belong.

  Raises ConfigError that names a key which is too many, missing or of another type.
  """
  known, given = list(walk(base)), list(walk(config))
  for name in given:
    if name not in known:
      value = f"={get(config, name)!r}"
      raise ConfigError(f"config.{name}{value}: no such key; {suggest(name, known)} (in {path})")
    _check_type(config, base, name, path)
  for name in known:
    if name not in given:
      raise ConfigError(
        f"config.{name}: missing in {path}; begin with the get_config() of one of configs/"
      )


def suggest(name: str, known: Sequence[str], prefix: str = "config.") -> str:
  """What to say to someone who wrote `name`, which is no key."""
  if below := [key for key in known if f".{name}." in f".{key}"]:
    return f"it is a group of keys; use {_joined(below[:3], prefix)}"
  own = [key for key in known if key.startswith("method.")]
  meant = OTHER_NAMES.get(name.rpartition(".")[2], "")
  alike = f"method.{meant}" in own or difflib.get_close_matches(name, own, 1, 0.8)
  if name.startswith("method.") and not alike:
    return f"the objective has {', '.join(own)}"
  near = nearest(name, known)
  return f"did you mean {_joined(near, prefix)}?" if near else "see --help beside --config"


def nearest(name: str, known: Sequence[str]) -> list[str]:
  """Up to three keys that may have been meant, by groups, abbreviations, other names and spelling."""
  group, _, last = name.rpartition(".")
  parts = [(key, *key.rpartition(".")[::2]) for key in known]
  means = lambda tail: tail == OTHER_NAMES.get(last) or last in (_initials(tail), tail)
  inside = {tail: key for key, where, tail in parts if where == group}
  if short := [key for tail, key in inside.items() if means(tail)]:
    return short
  if moved := [(key, where) for key, where, tail in parts if tail == last]:
    return _of_nearest_group(moved, group)
  if spelt := difflib.get_close_matches(last, inside, 1, 0.6):
    return [inside[spelt[0]]]
  if elsewhere := [(key, where) for key, where, tail in parts if means(tail)]:
    return _of_nearest_group(elsewhere, group)
  return difflib.get_close_matches(name, known, 1, 0.6)


def _of_nearest_group(places, group):
  names = [where for _, where in places]
  same = [name for name in names if group and name.rpartition(".")[2] == group]
  near = same or difflib.get_close_matches(group, names, 1, 0.6) or names
  return [key for key, where in places if where in near][:3]


def _initials(tail):
  return "".join(word[:1] for word in tail.split("_")) if "_" in tail else ""


def _joined(names, prefix):
  return " or ".join(prefix + name for name in names)


def _check_type(config, base, name, path):
  group, _, last = name.rpartition(".")
  branch = get(config, group) if group else config
  value, wanted = branch.get(last), (get(base, group) if group else base).get_type(last)
  if value is None and get(base, name) is None:
    return
  if wanted is float and type(value) is int:
    with branch.ignore_type(), branch.unlocked():
      branch[last] = float(value)
    return
  same = isinstance(value, tuple | list) if wanted in (tuple, list) else type(value) is wanted
  if not same:
    raise ConfigError(
      f"config.{name}={value!r}: is {type(value).__name__} in {path}; use {wanted.__name__}"
    )
