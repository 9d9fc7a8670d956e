"""Config files: where the one that was named lies, what it makes, and the complete file that it is held against.

Flow: command_line and manual `find` a file and `load` it.
Holds: an existing path wins over a name of ours; what fails inside of a file is one line with its number.
Not here: keys (keys), flags (command_line).
"""

import difflib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback

from ml_collections import ConfigDict

from adco_jax.plan import ConfigError

ROOT = pathlib.Path(__file__).parent.parent  # of the checkout
CONFIGS = ROOT / "configs"
# The files of every key of a task, the complete one last; other tasks have a file of their own name.
BASES = {"pretrain": ("adco_r50",), "import": ("adco_r50", "import"), "inspect_data": ("adco_r50",)}


def names():
  """Of the configs that come with the project."""
  return sorted(path.stem for path in CONFIGS.glob("*.py"))


def split(given):
  """(path as it was given, preset or '') of FILE or FILE:PRESET."""
  path, _, preset = given.partition(":")
  return os.path.expanduser(path), preset


def find(given, told=""):
  """The file that PATH, NAME or either with :PRESET means; `told`: how it was given. Raises ConfigError."""
  path, _ = split(given)
  name = path if path.endswith(".py") else f"{path}.py"
  for candidate in (name, ROOT / name, CONFIGS / name):
    if os.path.isfile(candidate):
      return os.path.abspath(candidate)
  stem = os.path.splitext(os.path.basename(path))[0]
  near = difflib.get_close_matches(stem, names(), 1, 0.6)
  remedy = f"did you mean {near[0]}?" if near else f"ours are {', '.join(names())}"
  raise ConfigError(f"{told or f'--config={given}'}: no such file; {remedy}")


def load(given):
  """The ConfigDict of a file and preset. Raises ConfigError with the line that fails."""
  path, preset = find(given), split(given)[1]
  if str(ROOT) not in sys.path:  # a config elsewhere begins with one of ours
    sys.path.append(str(ROOT))
  try:
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([preset] if preset else []))
  except ValueError as error:  # of a config that takes what follows the colon
    what = str(error) if preset else _reason(error, path)
    raise ConfigError(f"--config={given}: {what}") from error
  except TypeError as error:
    lacks = preset and not inspect.signature(module.get_config).parameters
    what = f"takes no preset; leave :{preset} out" if lacks else _reason(error, path)
    raise ConfigError(f"--config={given}: {what}") from error
  except Exception as error:
    raise ConfigError(f"--config={given}: {_reason(error, path)}") from error
  if not isinstance(config, ConfigDict) or not config.get("task"):
    raise ConfigError(f"--config={given}: get_config() returns no ConfigDict with a task")
  return config


def base_of(task):
  """The complete config of a task, None if there is none."""
  stem = BASES.get(task, (task,))[-1]
  return load(str(CONFIGS / f"{stem}.py")) if stem in names() else None


def _reason(error, path):
  """What failed, and in which line of the file."""
  if isinstance(error, AttributeError) and "get_config" in str(error):
    return "has no get_config(); see configs/adco_digits.py"
  frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
  line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else 0
  text = error.args[0] if isinstance(error, KeyError) else error
  what = " ".join(f"{type(error).__name__}: {text}".split())
  return f"{what} (line {line})" if line else what
