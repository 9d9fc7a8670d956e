"""What holds of the repository itself: import rows, configs, commands in the README, skips."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from adco_jax import keys, main, ranges
from adco_jax import plan as planning

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "adco_jax").rglob("*.py"))
PRETRAINING = sorted(
  p.stem for name in ("adco", "moco") for p in (ROOT / "configs").glob(f"{name}_*.py")
)

# A module imports only from rows below its own; siblings of one folder may import each other.
ROWS = {
  "main": 7,
  "pretrain": 6, "evaluate": 6, "report": 6, "import_weights": 6, "export": 6, "embed": 6, "pack": 6, "inspect_data": 6, "estimate": 6, "replay_step": 6, "verify_resume": 6, "interop.replay": 6,
  "frozen": 5.5, "scored_data": 5.5, "scoring": 5.6, "card": 5.5, "start": 5.5, "capsule": 5.5, "view_sheet": 5.5, "programs": 5.5, "saver": 5.5, "log": 5.5, "online": 5.5,
  "build": 5, "opening": 5, "ranges": 4.5, "keys": 4.5, "config_files": 4.5, "command_line": 4.6, "manual": 4.7,
  "train_step": 4, "flat": 3, "accumulate": 3, "evaluation": 4, "interop": 4,
  "state": 3, "objectives": 3, "data.pipeline": 3, "data.resident": 3,
  "losses": 2, "augment": 2, "blur": 1, "models": 2, "optimizers": 2, "checkpoint": 2, "workdir": 1.5, "metrics": 2, "data.sources": 2, "data.shards": 2, "data.tfds": 2, "data.images": 2, "data.cuts": 2, "data.files": 1.5, "data.listing": 1.55, "data.splits": 1.6, "data.kinds": 2, "data.modes": 1.6, "data.glance": 2, "data.examples": 1.5, "data.records": 1.6, "data.tars": 1.6,
  "pictures": 2, "pages": 2, "alarms": 1, "charts": 1,
  "data.order": 1.5, "data.crops": 1.5, "data.ahead": 1.5, "data.tf": 1.5, "processes": 1.5,  # they draw from rng and raise plan's error
  "compiled": 1, "rollcall": 1.2, "clusters": 1.2, "remote": 1.2, "bounds": 1, "pairing": 0, "runs": 0, "collectives": 1, "console": 0, "plan": 1, "guard": 2, "rng": 1, "fingerprints": 1, "sharding": 1, "dtypes": 1,
}  # fmt: skip


def row(module):
  """The row of 'adco_jax.x.y': that of x.y, or of the folder x."""
  name = module.removeprefix("adco_jax.")
  return ROWS[name] if name in ROWS else ROWS[name.split(".")[0]]


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
    assert not list(imports_of(path))
    return
  for other in imports_of(path):
    if other.startswith("adco_jax."):
      siblings = (
        "." in module.removeprefix("adco_jax.")
        and module.rpartition(".")[0] == other.rpartition(".")[0]
      )
      assert row(other) < row(module) or (siblings and row(other) <= row(module)), (
        f"{module} imports {other}"
      )
    assert not other.startswith("configs"), f"{module} imports a config"
    if other.split(".")[0] == "tensorflow":
      assert module == "adco_jax.data.tf"


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_modules_are_short_and_say_what_they_are(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 300
  docstring = ast.get_docstring(ast.parse(text))
  assert docstring and (
    path.name == "__init__.py" or "Flow:" in docstring or module_of(path) == "adco_jax.main"
  )


def test_task_config_free_rows():
  """Rows 1-4 take keyword arguments; only plan, and rows 5 to 7, may read a config."""
  for path in PACKAGE:
    module = module_of(path)
    if path.name != "__init__.py" and row(module) <= 4 and module != "adco_jax.plan":
      assert "config." not in re.sub(
        r'(f?"[^"\n]*"|""".*?"""|\w+\.config\.\S*)', "", path.read_text(), flags=re.S
      ), module


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_pretraining_config_plans(name):
  """With the number of images it states, on the largest machine its BatchNorm groups allow."""
  config = importlib.import_module(f"configs.{name}").get_config()
  ranges.check(config)
  devices = min(8, config.data.batch_size // config.bn.group_size)
  plan = planning.make_plan(config, config.data.num_examples, 10, backend="cpu", devices=devices)
  assert plan.total_steps > plan.fill_steps >= 0
  base = importlib.import_module("configs.adco_r50").get_config()
  assert set(keys.walk(config)) == set(keys.walk(base))


def test_the_promised_configs_are_there():
  wanted = "adco_r50 adco_r50_sym adco_r50_multicrop adco_r50_sym_k8192 adco_cifar10_r18 adco_digits moco_r50"
  assert set(wanted.split()) <= set(PRETRAINING)


@pytest.mark.parametrize("name", ["knn", "linear", "report"])
def test_task_configs_are_small(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  own = [key for key in keys.walk(config) if not key.startswith("data.")]
  assert config.task == name and len(own) <= 25


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_*.py")) + sorted((ROOT / "configs").glob("[kl]*.py")),
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
    "import sys; from adco_jax import build, evaluate, main, pretrain, report; "
    "sys.exit('tensorflow' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_test_is_skipped():
  """A skip would need a reason that this list holds; there is none."""
  for path in (ROOT / "tests").rglob("test_*.py"):
    calls = re.findall(r"pytest\.(?:skip|importorskip|mark\.(?:skip|xfail)\w*)\(", path.read_text())
    assert not calls, path
