"""What holds of the repository itself: import rows, configs, commands in the README, skips."""

import ast
import graphlib
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from adco_jax import build, main
from adco_jax.config import config_files, keys, method, ranges
from adco_jax.config.plan import Machine

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "adco_jax").rglob("*.py"))
PRETRAINING = [n for n in config_files.names() if config_files.load(n).task == "pretrain"]

# A package imports only from those after it; the files of one import each other without circles.
ORDER = (
  "main", "tasks", "encoders", "build", "report", "evaluation", "interop", "training", "workdir", "data", "objectives",
  "views", "models", "config", "profile", "runtime", "errors",
)  # fmt: skip
# Beside `config`: what a user asked for is read here, everything else takes keyword arguments.
READ_CONFIGS = (
  "main", "tasks", "encoders", "build", "report", "config", "evaluation.online", "training.restore", "training.saver", "training.log",
  "training.capsule", "workdir.opening",
)  # fmt: skip

# What stands for Any, by a name that says what it is: neither trees nor values of JSON and of configs have a type of their own.
NAMES_OF_ANY = {"runtime.dtypes.Tree", "runtime.files.Json", "config.ranges.Value"}


def package(module):
  """'x' of 'adco_jax.x.y'."""
  return module.split(".")[1]


def imports_of(path):
  """Absolute names of all modules that a file imports, wherever in the file."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      for alias in node.names:
        deeper = (ROOT / (node.module.replace(".", "/") + f"/{alias.name}.py")).exists()
        yield f"{node.module}.{alias.name}" if deeper else node.module


def module_of(path):
  return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_imports_point_down(path):
  module = module_of(path)
  if path.name == "__init__.py":
    assert set(imports_of(path)) <= {"importlib"}
    return
  for other in imports_of(path):
    if other.startswith("adco_jax."):
      here, there = (ORDER.index(package(name)) for name in (module, other))
      assert here <= there, f"{module} imports {other}"
    assert not other.startswith("configs"), f"{module} imports a config"
    if other.split(".")[0] == "tensorflow":
      assert module == "adco_jax.data.pipeline"


def test_imports_make_no_circle():
  graph = {
    module_of(path): {name for name in imports_of(path) if name.startswith("adco_jax.")}
    for path in PACKAGE
  }
  try:
    found = list(graphlib.TopologicalSorter(graph).static_order())
  except graphlib.CycleError as error:
    found = error.args[1]
  place = {module: number for number, module in enumerate(found)}
  up = [
    (m, other)
    for m, others in graph.items()
    for other in others
    if place.get(other, -1) >= place.get(m, -1)
  ]
  assert not up and set(graph) <= set(found)


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_modules_are_short_and_say_what_they_are(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 300
  docstring = ast.get_docstring(ast.parse(text))
  assert docstring and (
    path.name == "__init__.py" or "Flow:" in docstring or module_of(path) == "adco_jax.main"
  )


def test_there_is_one_way_to_print():
  """console.tell, which outlives a terminal that has gone and a full disk."""
  said = [module_of(path) for path in PACKAGE if re.search(r"(?<![\w.])print\(", path.read_text())]
  assert said == ["adco_jax.runtime.console"]


def test_only_few_read_a_config():
  """The others do not know its type, without which no public function could take one, nor look into what is called so."""
  for path in PACKAGE:
    name = module_of(path).removeprefix("adco_jax.")
    if path.name == "__init__.py" or {name, package(f"adco_jax.{name}")} & set(READ_CONFIGS):
      continue
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
    read = [f"{name}: {ast.unparse(n)}" for n in nodes if ast.unparse(n.value) == "config"]
    assert not read and "ml_collections" not in imports_of(path), name


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_pretraining_config_plans(name):
  """With the number of images it states, on the largest machine its BatchNorm groups allow."""
  config = importlib.import_module(f"configs.{name}").get_config()
  ranges.check(config)
  devices = min(8, config.data.batch_size // (config.bn.group_size or 1))
  plan = build.plan_for(
    config, config.data.num_examples, 10, Machine(backend="cpu", devices=devices)
  )
  assert plan.total_steps > plan.fill_steps >= 0
  base = importlib.import_module("configs.adco_r50").get_config()
  both = [{key for key in keys.walk(x) if not key.startswith("method.")} for x in (config, base)]
  assert both[0] == both[1]
  assert config.method.to_dict().keys() == method.table(method.find(config.objective)).keys()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_*.py")) + sorted((ROOT / "configs").glob("[kl]*.py")) + [ROOT / "configs" / "svm.py"],
                         ids=lambda p: p.stem)  # fmt: skip
def test_config_headers_hold_a_command_that_parses(path):
  if path.stem.startswith("__"):
    return
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  commands = re.findall(r"python -m adco_jax\.main (.*)", docstring)
  assert commands, path
  for command in commands:
    main.parse(command.split())


def commands_of(path):
  """Lines of fenced blocks that start our programs, continued lines joined."""
  blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", path.read_text(), flags=re.S)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  return [line.split("#")[0].strip() for line in lines]


@pytest.mark.parametrize(
  "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_commands_in_the_documents_parse(path):
  found = 0
  for command in commands_of(path):
    if "adco_jax.main" in command:
      main.parse(command.split("adco_jax.main")[1].split())
      found += 1
    for script in re.findall(r"bash (launch/\S+)", command):
      assert (ROOT / script).exists(), script
      found += 1
    for script in re.findall(r"python -m (benchmarks\.\w+)", command):
      assert (ROOT / (script.replace(".", "/") + ".py")).exists(), script
      found += 1
  assert found or path.name != "README.md"


@pytest.mark.parametrize(
  "script", sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("benchmarks/*.sh")]), ids=lambda p: p.name
)
def test_scripts_parse(script):
  assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_main_does_not_import_tensorflow():
  """Nor do digits and npz: TensorFlow costs seconds and is absent on some machines."""
  code = (
    "import sys; from adco_jax import build, main; from adco_jax.tasks import evaluate, pretrain; from adco_jax.report import report; "
    "sys.exit('tensorflow' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_test_is_skipped():
  """A skip would need a reason that this list holds; there is none."""
  for path in (ROOT / "tests").rglob("test_*.py"):
    calls = re.findall(r"pytest\.(?:skip|importorskip|mark\.(?:skip|xfail)\w*)\(", path.read_text())
    assert not calls, path


def test_the_api_page_is_that_of_the_docstrings():
  path = ROOT / "docs" / "make_api.py"
  spec = importlib.util.spec_from_file_location("make_api", path)
  made = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(made)
  assert made.PAGE.read_text() == made.page(), "run python docs/make_api.py"


def test_the_package_lists_all_that_it_holds():
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
  held = {
    ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "adco_jax").rglob("__init__.py")
  }
  assert set(settings["tool"]["setuptools"]["packages"]) == held | {"adco_jax.configs"}
  named = lambda lines: {re.match(r"[\w-]+", line)[0].lower() for line in lines}
  project = settings["project"]
  ranged = named([*project["dependencies"], *sum(project["optional-dependencies"].values(), [])])
  locked = named(
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.match(r"\w", line)
  )
  assert locked <= ranged and ranged - locked <= {"torch", "gcsfs"}


def signatures_of(body, prefix=""):
  """(name, its annotations, None where one lacks) of every public function, method and field of a module."""
  for node in body:
    name = prefix + getattr(node, "name", "")
    if isinstance(node, ast.AnnAssign) and prefix:
      yield prefix + ast.unparse(node.target), [node.annotation]
    elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      yield from signatures_of(node.body, f"{name}.")
    elif isinstance(node, ast.FunctionDef) and (
      not node.name.startswith("_") or node.name.endswith("__")
    ):
      given = node.args
      arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
      told = [a.annotation for a in arguments if a and a.arg not in ("self", "cls")]
      yield name, [*told, node.returns]


def test_every_public_signature_has_types():
  """Also inside quotes no Any; mypy, in launch/test.sh, sees whether they are right."""
  aliases = set()
  for path in PACKAGE:
    module, tree = module_of(path).removeprefix("adco_jax."), ast.parse(path.read_text())
    assigned = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.value) == "Any"]
    aliases |= {f"{module}.{ast.unparse(node.targets[0])}" for node in assigned}
    for name, told in signatures_of(tree.body):
      assert None not in told, f"{module}.{name} lacks a type"
      words = re.findall(r"\w+", " ".join(map(ast.unparse, told)))
      assert "Any" not in words, f"{module}.{name} says Any; name what it is"
  assert aliases == NAMES_OF_ANY
