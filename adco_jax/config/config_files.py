"""Config files: where the one that was named lies, what it makes, and the complete file that it is held against.

Flow: command_line and manual `find` a file and `load` it.
Holds: an existing path wins over a name of ours, and ours are what `from configs import` means, whatever lies in the
  current folder; what fails inside of a file is one line with its number.
Not here: keys (keys), flags (command_line).
"""

import difflib
import importlib.util
import os
import pathlib
import re
import sys
import traceback
import types

from ml_collections import ConfigDict

from adco_jax.config import keys
from adco_jax.errors import ConfigError

PACKAGE = pathlib.Path(__file__).parent.parent
# Of the checkout, or the package's own once it is installed.
ROOT = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent
CONFIGS = ROOT / "configs"
# The files of every key of a task, the complete one last; other tasks have a file of their own name.
BASES = {"pretrain": ("adco_r50",), "import": ("adco_r50", "import"), "inspect_data": ("adco_r50",)}


def names() -> list[str]:
  """Of the configs that come with the project."""
  return sorted(path.stem for path in CONFIGS.glob("*.py"))


def split(given: str) -> tuple[str, str]:
  """(path as it was given, preset or '') of FILE or FILE:PRESET; a folder's name may have a colon as well."""
  path, _, preset = given.rpartition(":")
  if not path or _file(os.path.expanduser(given)):
    path, preset = given, ""
  return os.path.expanduser(path), preset


def find(given: str, told: str = "") -> str:
  """The file that PATH, NAME or either with :PRESET means; `told`: how it was given. Raises ConfigError."""
  path, _ = split(given)
  if file := _file(path):
    return file
  stem = os.path.splitext(os.path.basename(path))[0]
  near = difflib.get_close_matches(stem, names(), 1, 0.6)
  remedy = f"did you mean {near[0]}?" if near else f"ours are {', '.join(names())}"
  raise ConfigError(f"{told or f'--config={given}'}: no such file; {remedy}")


def load(given: str) -> ConfigDict:
  """The ConfigDict of a file and preset. Raises ConfigError with the line that fails."""
  path, preset = find(given), split(given)[1]
  _know_ours()
  try:
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec and spec.loader  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([preset] if preset else []))
  except (Exception, SystemExit) as error:
    raise ConfigError(f"--config={given}: {_reason(error, path, preset)}") from error
  if not isinstance(config, ConfigDict) or not config.get("task"):
    raise ConfigError(f"--config={given}: get_config() returns no ConfigDict with a task")
  return config


def base_of(task: str) -> ConfigDict | None:
  """The complete config of a task, None if there is none."""
  stem = BASES.get(task, (task,))[-1]
  return load(str(CONFIGS / f"{stem}.py")) if stem in names() else None


def _file(path):
  """The file that a path or a name of ours means, '' if there is none."""
  name = path if path.endswith(".py") else f"{path}.py"
  places = filter(os.path.isfile, (name, ROOT / name, CONFIGS / name))
  return next(map(os.path.abspath, places), "")


def _know_ours():
  """Makes `from configs import NAME` mean our file, before one in a folder `configs` where the program was started."""
  ours = types.ModuleType("configs")
  ours.__path__ = [str(CONFIGS), os.path.abspath("configs")]
  known = getattr(sys.modules.get("configs"), "__path__", [])
  if [*known][:1] != ours.__path__[:1]:
    sys.modules["configs"] = ours


def _reason(error, path, preset):
  """What failed, and in which line of the file."""
  frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
  if isinstance(error, AttributeError) and "get_config" in str(error):
    return "has no get_config(); see configs/adco_digits.py"
  if preset and isinstance(error, ValueError):  # of a config that takes what follows the colon
    return str(error)
  if preset and isinstance(error, TypeError) and not frames:  # the call itself
    return f"takes no preset; leave :{preset} out"
  line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else 0
  text = error.args[0] if isinstance(error, KeyError) else error
  what = " ".join(f"{type(error).__name__}: {text}".split())
  return (f"{what} (line {line})" if line else what) + _moved(error)


def _moved(error):
  """Where a group of keys lies that a file looked for in the wrong place."""
  name = re.match(r"\W*(\w+)", str(error))
  if not isinstance(error, AttributeError | KeyError) or not name:
    return ""
  known = list(keys.walk(load(str(CONFIGS / "adco_r50.py"))))
  groups = {part for key in known for part in key.split(".")[:-1]}
  return f"; {keys.suggest(name[1], known)}" if name[1] in groups else ""
