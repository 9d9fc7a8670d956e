"""What `--help` says: tasks and configs, or every key of one config with its value and the comment beside it.

Flow: main -> `show`; docstrings and comments are read from the files in configs/, nothing is written twice.
Holds: no JAX, so that it answers at once; but for an objective that is not the file's, whose settings its class tells.
Not here: the README.
"""

import ast
import io
import os
import shlex
import tokenize
from collections.abc import Iterator

from adco_jax.config import config_files, keys, method
from adco_jax.config.command_line import complete, last_given, parse_flags
from adco_jax.config.plan import get
from adco_jax.runtime.console import tell

WORDS = {"-h", "--help", "-help", "--helpfull", "--helpshort"}
USAGE = """\
python -m adco_jax.main --config=NAME [--workdir=DIR] [--config.KEY=VALUE ...]

  --config=NAME         one of those below, NAME:PRESET, or the path of a file of your own
  --config.KEY=VALUE    instead of the file's value; tuples as --config.views.crops='((96,.2,1.),(96,.2,1.))'
  --workdir=DIR         of a pre-training, an import, an inspection; empty: runs/NAME
  --extend              the run in --workdir goes on with a changed config, which is recorded with its step
  --plan                what this pre-training would take; trains nothing
  --plan_topology=NAME  ... on other devices: cpu:8, v5e:2x4, gpu:FILE
  --config=NAME --help  every key of that config (with --config.objective=OTHER: of that objective)"""


def is_asked(argv: list[str]) -> bool:
  """Whether a command line asks for help."""
  return bool(WORDS & set(argv))


def show(argv: list[str]) -> None:
  """Prints help on the config that is named, or the overview. Raises ConfigError."""
  values, rest = parse_flags([word for word in argv if word not in WORDS])
  asked = last_given("objective", rest)
  for line in describe(values.config, asked) if values.config else overview():
    tell(line)


def overview() -> Iterator[str]:
  """Lines: usage, then all configs under the tasks they are for."""
  yield USAGE
  heads = {name: first_line(config_files.CONFIGS / f"{name}.py") for name in config_files.names()}
  tasks = {name: config_files.load(name).task for name in heads}
  width = max(map(len, heads))
  yield "\npre-training (the complete list of keys: --config=adco_r50 --help)"
  yield from (f"  {name:{width}}  {heads[name]}" for name in heads if tasks[name] == "pretrain")
  yield "\nother tasks"
  yield from (f"  {name:{width}}  {heads[name]}" for name in heads if tasks[name] != "pretrain")


def describe(given: str, objective: str = "") -> Iterator[str]:
  """Lines: the header of a config, then every key as one would write it, with its comment.

  objective: instead of the file's, whose settings are listed then. Raises ConfigError.
  """
  path, config = config_files.find(given), config_files.load(given)
  own: dict[str, str] = {}
  if objective and objective != config.get("objective", objective):
    config = complete(config, given, objective)
    fields = method.fields(method.find(objective))
    own = {f"method.{name}": field.metadata.get("words", "") for name, field in fields}
  yield f"{path}\n"
  yield docstring(path)
  base = [config_files.CONFIGS / f"{stem}.py" for stem in config_files.BASES.get(config.task, ())]
  comments: dict[str, str] = {}  # in the order of the files
  for file in (*base, *ancestors(path)):
    comments |= {k: v or comments.get(k, "") for k, v in comments_of(file).items()}
  place = {name: float(number) for number, name in enumerate(comments)}
  for name in own.keys() - place.keys():  # behind what its group has of the file's objective
    place[name] = max(n for key, n in place.items() if key.startswith("method.")) + 0.5
  yield "\nkeys, with the values that they have here:"
  group = None
  for name in sorted(keys.walk(config), key=lambda name: place.get(name, len(place))):
    if name.rpartition(".")[0] != group:
      group = name.rpartition(".")[0]
      yield ""
    value, note = get(config, name), own.get(name) or comments.get(name, "")
    text = value_text(value)
    flag = f"  --config.{name}={shlex.quote(text) if text else ''}"
    note = f"[as in the pre-training] {note}" if value is None else note
    yield f"{flag:<46}  {note}" if note and len(flag) <= 46 else flag
    if note and len(flag) > 46:
      yield f"{'':48}{note}"


def value_text(value: object) -> str:
  """A value as a flag reads it, exactly; for a shell it may need quotes."""
  if isinstance(value, tuple | list):
    return f"({','.join(map(value_text, value))}{',' * (len(value) == 1)})"
  return "" if value is None else str(value)


def ancestors(path: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
  """The configs of ours that a file begins with, farthest first, then the file itself."""
  files = []
  for node in ast.walk(ast.parse(_read(path))):
    if isinstance(node, ast.ImportFrom) and node.module == "configs":
      ours = {alias.name for alias in node.names} & set(config_files.names())
      for name in sorted(ours):
        files += ancestors(config_files.CONFIGS / f"{name}.py")
  return [*files, path]


def comments_of(path: str | os.PathLike[str]) -> dict[str, str]:
  """{dotted key: comment beside its assignment, or on the lines above it; '' if there is none}."""
  text = _read(path)
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  notes = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
  alone = {n for n, t in notes.items() if not t.line[: t.start[1]].strip()}
  said = lambda numbers: " ".join(notes[n].string.lstrip("#").strip() for n in numbers)
  comments = {}
  functions = [f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)]
  for function, node in ((f, node) for f in functions for node in ast.walk(f)):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      beside = [n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in notes]
      above = node.lineno
      while above - 1 in alone:
        above -= 1
      key = ast.unparse(node.targets[0])
      if function.name == "get_config":  # others make a group, which their variable is called after
        key = key.partition(".")[2]
      comments[key] = said(beside or range(above, node.lineno))
  return comments


def docstring(path: str | os.PathLike[str]) -> str:
  """The header of a config file."""
  return ast.get_docstring(ast.parse(_read(path))) or ""


def first_line(path: str | os.PathLike[str]) -> str:
  """Its first line."""
  return docstring(path).partition("\n")[0]


def _read(path):
  with open(os.fspath(path), encoding="utf-8") as file:
    return file.read()
