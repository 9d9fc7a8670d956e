"""What a user gets wrong: one line on stderr, exit status 2, no traceback, before anything compiles."""

import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

from adco_jax import main
from adco_jax.config import command_line, config_files, keys, manual
from adco_jax.config.plan import get
from adco_jax.config.ranges import PATHS
from adco_jax.errors import ConfigError
from tests import settings
from tests.faults.images import write_images

DIGITS = "--config=configs/adco_digits.py"
IMAGENET = "--config=configs/adco_r50.py"
CIFAR = "--config=configs/adco_cifar10_r18.py"


@pytest.fixture
def npz(tmp_path):
  """A valid tiny archive and how to spoil it."""

  def write(**changes):
    arrays = {"train_images": np.zeros((40, 8, 8, 3), np.uint8), "train_labels": np.arange(40) % 4}
    path = tmp_path / "data.npz"
    np.savez(path, **(arrays | changes))
    return f"--config.data.dir={path}"

  return write


def refused(capsys, tmp_path, *argv):
  """The one line of a refused command."""
  argv = [a for a in argv if a]
  if not any(a.startswith("--workdir") for a in argv):
    argv.append(f"--workdir={tmp_path}/run")
  assert main.main(argv) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith("error: ") and "Traceback" not in captured.err
  return captured.err


CASES = {
  "unknown key": ([DIGITS, "--config.temprature=.1"], ["--config.temprature", "did you mean --config.method.temperature?"]),
  "unknown nested key": ([DIGITS, "--config.bank.siz=3"], ["--config.bank.siz", "--config.method.bank.size?"]),
  "unknown branch": ([DIGITS, "--config.banks.size=3"], ["--config.banks.size", "--config.method.bank.size?"]),
  "key under its short name": ([DIGITS, "--config.optim.lr=.1"], ["--config.optim.lr", "--config.optim.learning_rate?"]),
  "key without its group": ([DIGITS, "--config.learning_rate=.1"], ["--config.method.bank.learning_rate or --config.optim.learning_rate?"]),
  "key of another group": ([DIGITS, "--config.batch_size=8"], ["--config.data.batch_size or --config.eval.batch_size?"]),
  "key under another name": ([DIGITS, "--config.data.path=x"], ["--config.data.dir?"]),
  "a group": ([DIGITS, "--config.bank=3"], ["--config.bank", "group of keys", "--config.method.bank.init"]),
  "no tuple": ([DIGITS, "--config.views.crops=((1"], ["--config.views.crops=((1", "not a tuple"]),
  "number for a tuple": ([DIGITS, "--config.views.crops=32"], ["config.views.crops=(32,)", "(side, smallest share"]),
  "name of a config, misspelt": (["--config=adco_digts"], ["--config=adco_digts", "did you mean adco_digits?"]),
  "wrong type": ([DIGITS, "--config.method.bank.size=many"], ["--config.method.bank.size=many", "type"]),
  "float for int": ([DIGITS, "--config.method.bank.size=3.5"], ["--config.method.bank.size=3.5", "type"]),
  "unknown flag": ([DIGITS, "--wrkdir=x"], ["wrkdir", "workdir"]),
  "stray word": ([DIGITS, "quick"], ["'quick'", "--config"]),
  "no config": ([], ["--config is missing", "adco_digits.py"]),
  "no such config": (["--config=configs/none.py"], ["configs/none.py", "no such file"]),
  "folder not named": ([IMAGENET], ["config.data.dir=''", "--config.data.dir=PATH"]),
  "folder missing": ([IMAGENET, "--config.data.dir=/nowhere"], ["'/nowhere'", "no such folder"]),
  "npz missing": ([CIFAR, "--config.data.dir=/nowhere.npz"], ["'/nowhere.npz'", "no such file"]),
  "unknown source": ([DIGITS, "--config.data.source=disk"], ["config.data.source='disk'", "digits, npz, folder"]),
  "groups": ([DIGITS, "--config.data.batch_size=264"], ["config.data.batch_size=264", "groups of 32; use 256 or 512"]),
  "devices": ([DIGITS, "--config.data.batch_size=250"], ["data.batch_size=250", "8 devices; use 248 or 256"]),
  "few images": ([DIGITS, "--config.data.batch_size=2048"], ["batch_size=2048", "1297 images"]),
  "bank size": ([DIGITS, "--config.method.bank.size=0"], ["config.method.bank.size=0", "use 1 or more"]),
  "temperature": ([DIGITS, "--config.method.temperature=0"], ["config.method.temperature=0.0", "above 0"]),
  "bank temperature": ([DIGITS, "--config.method.bank.temperature=-1"], ["config.method.bank.temperature=-1.0", "above 0"]),
  "crop size": ([DIGITS, "--config.views.crops=((4,.5,1.),(16,.5,1.))"], ["config.views.crops", "8 pixels"]),
  "architecture": ([DIGITS, "--config.model.arch=vgg"], ["config.model.arch='vgg'", "resnet50"]),
  "objective": ([DIGITS, "--config.objective=dino"], ["config.objective='dino'", "adco, moco"]),
  "policy": ([DIGITS, "--config.augment.policy=x"], ["config.augment.policy='x'", "moco_v2"]),
  "task": ([DIGITS, "--config.task=train"], ["config.task='train'", "pretrain"]),
  "no checkpoint": (["--config=configs/knn.py", "--config.pretrained=/nowhere"], ["config.pretrained='/nowhere'", "no run"]),
  "nothing pretrained": (["--config=configs/linear.py"], ["config.pretrained=''", "name the workdir"]),
  "recipe": (["--config=configs/linear.py", "--config.recipe=x"], ["config.recipe='x'", "sgd, lbfgs, sweep"]),
  "task of other keys": ([DIGITS, "--config.task=knn"], ["config.task='knn'", "use --config=knn"]),
  "no name": ([DIGITS, "--config.=3"], ["--config.: names no key"]),
  "no truth": ([DIGITS, "--config.data.labels=maybe"], ["labels=maybe: Non-boolean argument"]),
  "a plan extends nothing": ([DIGITS, "--plan", "--extend"], ["--extend", "leave one of them out"]),
  "preset": (["--config=configs/linear.py:tiny"], ["tiny", "authors"]),
  "no presets": (["--config=embed:small"], ["takes no preset; leave :small out"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_with_one_line(capsys, tmp_path, case):
  argv, words = CASES[case]
  line = refused(capsys, tmp_path, *argv)
  assert line.count("\n") == 1, line
  assert all(word in line for word in words), line
  assert not (tmp_path / "run" / "config.json").exists()


def test_empty_folder(capsys, tmp_path):
  (tmp_path / "images").mkdir()
  line = refused(capsys, tmp_path, IMAGENET, f"--config.data.dir={tmp_path}/images")
  assert "no images under" in line and ".jpg" in line and line.count("\n") == 1


@pytest.mark.parametrize(
  "case", ["negative", "too large", "float", "count", "images", "split", "garbage"]
)
def test_npz_refusals(capsys, tmp_path, npz, case):
  changes, flags, words = {
    "negative": ({"train_labels": np.arange(40) - 1}, [], "a label is -1"),
    "too large": ({}, ["--config.data.num_classes=3"], "is 3, outside 0..2; use 4"),
    "float": ({"train_labels": np.arange(40.0)}, [], "store integers [40]"),
    "count": ({"train_labels": np.arange(7)}, [], "one per image"),
    "images": ({"train_images": np.zeros((40, 8, 8), np.uint8)}, [], "store uint8 [N, H, W, 3]"),
    "split": ({}, ["--config.data.split=all"], "has no all_images, only train_images"),
    "garbage": ({}, [], "not a readable .npz"),
  }[case]
  where = npz(**changes)
  if case == "garbage":
    with open(where.split("=")[1], "wb") as file:
      file.write(b"PK no archive")
  line = refused(capsys, tmp_path, CIFAR, where, "--config.data.batch_size=32", *flags)
  assert words in line and line.count("\n") == 1, line


def test_workdir_under_a_file(capsys, tmp_path):
  (tmp_path / "file").write_text("")
  line = refused(capsys, tmp_path, DIGITS, f"--workdir={tmp_path}/file/run")
  assert "--workdir=" in line and "not writable" in line and line.count("\n") == 1


def test_pretrained_without_checkpoint(capsys, tmp_path):
  from adco_jax.workdir.opening import open_workdir
  from configs import adco_digits

  open_workdir(
    str(tmp_path / "run"), adco_digits.get_config().to_dict(), {"compute_dtype": "float32"}, []
  )
  line = refused(capsys, tmp_path, "--config=configs/knn.py", f"--config.pretrained={tmp_path}/run")
  assert "no checkpoint there yet; pre-train first" in line and line.count("\n") == 1


@pytest.mark.parametrize("folders", [("train", "val"), ("",)])
def test_unlabelled_test_images(folders, capsys, tmp_path):
  """Linear evaluation of images without labels, in splits or in one heap."""
  from adco_jax.workdir.opening import open_workdir
  from configs import adco_r50

  for folder in folders:
    write_images(tmp_path / "images" / folder, 3)
  config = adco_r50.get_config()
  config.data.dir = str(tmp_path / "images")
  open_workdir(str(tmp_path / "run"), config.to_dict(), {"compute_dtype": "float32"}, [])
  line = refused(capsys, tmp_path, "--config=configs/knn.py", f"--config.pretrained={tmp_path}/run")
  assert "has no labels to score against" in line


@pytest.mark.parametrize(
  "given", ["configs/adco_digits.py", "adco_digits", "adco_digits.py", "~/adco_digits.py:x"]
)
def test_default_workdir(given):
  assert command_line.default_workdir(given) == os.path.join("runs", "adco_digits")


def test_exit_status_of_the_process(tmp_path):
  """The real command, from a shell."""
  command = [
    sys.executable,
    "-m",
    "adco_jax.main",
    DIGITS,
    "--config.bank.siez=3",
    f"--workdir={tmp_path}",
  ]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and done.stdout == ""
  assert (
    done.stderr
    == "error: --config.bank.siez: no such key; did you mean --config.method.bank.size?\n"
  )


def test_other_images_are_refused_on_resume(tmp_path, capsys):
  """The folder may move; another number of images, or others by name, would be another run."""
  write_images(tmp_path / "here", 40, sizes=[(16, 16)])
  flags = [
    "--config=configs/adco_digits.py", f"--workdir={tmp_path}/run", "--config.data.source=folder",
    "--config.data.batch_size=16", "--config.bn.group_size=2", "--config.method.bank.size=32", "--config.epochs=1",
    "--config.model.width=0.125", "--config.eval.every_epochs=0", "--config.data.loader=resident",
    f"--config.model.arch={settings.TINY}", "--config.views.crops=((8,.6,1.),(8,.6,1.))", "--config.augment.policy=none",
  ]  # fmt: skip
  assert main.main([*flags, f"--config.data.dir={tmp_path}/here", "--config.stop_at_step=1"]) == 0
  (tmp_path / "here").rename(tmp_path / "there")
  there = [*flags, f"--config.data.dir={tmp_path}/there"]
  assert main.main([*there, "--config.stop_at_step=2"]) == 0
  (tmp_path / "there" / "07.jpg").rename(tmp_path / "there" / "seven.jpg")
  assert main.main(there) == 2
  said = capsys.readouterr().err
  assert "1 keys differ" in said and "images.checksum" in said
  (tmp_path / "there" / "seven.jpg").unlink()
  assert main.main(there) == 2 and "images.number" in capsys.readouterr().err


# What a file of the user's own may get wrong, and what is said of it.
OWN = {
  "misspelt": ("c.optim.lr = .5", ["config.optim.lr=0.5", "did you mean config.optim.learning_rate?"]),
  "misspelt group": ("c.agument = {'policy': 'simclr'}", ["config.agument.policy", "did you mean config.augment.policy?"]),
  "other word": ("c.augment.polcy = 'simclr'", ["config.augment.polcy='simclr'", "config.augment.policy?"]),
  "wrong type": ("c.method.temperature = 'low'", ["TypeError", "line 5"]),
  "wrong type, forced": ("c.unlock()\n  del c.epochs\n  c.epochs = '3'", ["config.epochs='3'", "is str", "use int"]),
  "True for a number": ("del c.epochs\n  c.epochs = True", ["config.epochs=True", "is bool", "use int"]),
  "missing": ("del c.ema.decay", ["config.ema.decay: missing", "get_config()"]),
  "no longer a group": ("del c.log\n  c.log = 3", ["config.log=3", "group of keys"]),
  "out of range": ("c.method.bank.size = 0", ["config.method.bank.size=0", "use 1 or more"]),
  "fails": ("c.nothing.at.all", ["AttributeError", "line 5"]),
  "grammar": ("c.epochs =", ["SyntaxError", "line 5"]),
}  # fmt: skip


def own_config(tmp_path, line, base="adco_digits"):
  """A file that changes one of ours by one line, outside of the checkout."""
  path = tmp_path / "mine.py"
  path.write_text(
    f"from configs import {base} as base\n\ndef get_config():\n  c = base.get_config()\n  {line}\n  return c\n"
  )
  return f"--config={path}"


@pytest.mark.parametrize("case", OWN)
def test_an_own_config_is_held_against_the_complete_one(capsys, tmp_path, case):
  line, words = OWN[case]
  said = refused(capsys, tmp_path, own_config(tmp_path, line))
  assert said.count("\n") == 1 and all(word in said for word in words), said
  assert not (tmp_path / "run").exists()


def test_an_own_config_of_a_task_is_held_against_that_tasks_file(capsys, tmp_path):
  given = own_config(tmp_path, "c.knn.ks = (1,)", base="knn")
  assert "did you mean config.knn.k?" in refused(capsys, tmp_path, given)


def test_whole_numbers_serve_where_floats_do(tmp_path):
  config, _ = main.parse(
    [
      own_config(tmp_path, "del c.method.temperature\n  c.method.temperature = 1"),
      "--config.method.temperature=.5",
    ]
  )
  assert config.method.temperature == 0.5


@pytest.mark.parametrize(
  "given, preset, word",
  [
    ("def f(): pass", "", "has no get_config()"),
    ("def get_config(): return 3", "", "no ConfigDict"),
    ("1 + ''", ":3", "TypeError: unsupported operand"),
    ("import sys\nsys.exit(3)", "", "SystemExit: 3 (line 2)"),
    (
      "from configs import adco_r50\ndef get_config():\n  c = adco_r50.get_config()\n  c.bank.size = 64",
      "",
      "(line 4); it is a group of keys; use config.method.bank.",
    ),
  ],
)
def test_files_that_are_no_configs(tmp_path, given, preset, word):
  path = tmp_path / "mine.py"
  path.write_text(given)
  with pytest.raises(ConfigError) as refusal:
    config_files.load(f"{path}{preset}")
  assert word in str(refusal.value)


def test_our_configs_are_ours_where_the_current_folder_has_some_too(tmp_path):
  """A package `configs` with an adco_r50 of its own: ours begin with ours, an own file may begin with either."""
  (tmp_path / "configs").mkdir()
  for name in ("__init__", "adco_r50"):
    (tmp_path / "configs" / f"{name}.py").write_text("raise OSError('not ours')")
  (tmp_path / "configs" / "other.py").write_text("from configs.adco_r50 import get_config")
  (tmp_path / "a:b").mkdir()
  (tmp_path / "a:b" / "mine.py").write_text(
    "from configs import *\nfrom configs.other import get_config"
  )
  code = "import sys; from adco_jax import main; sys.exit(any(main.main([f'--config={n}', '--help']) for n in ('adco_r50_sym', 'a:b/mine.py')))"
  run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(config_files.ROOT)})  # fmt: skip
  assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("key, one, other", [
  ("optim.step_epochs", (120, 160), (30, 60)), ("views.crops", ((16, 0.6, 1.0),) * 2, ((32, 0.6, 1.0),) * 2),
  ("data.mean", (0.1, 0.1, 0.1), (0.2, 0.2, 0.2)), ("method.bank.size", 64, 128), ("method.in_batch", True, False),
])  # fmt: skip
def test_a_key_given_twice_counts_as_given_last(key, one, other):
  for first, last in ((one, other), (other, one)):
    config, _ = main.parse(
      [DIGITS, f"--config.{key}={first}", f"--config.{key}", str(last)]
      if key != "method.in_batch"
      else [DIGITS, f"--config.method.in_batch={first}", f"--config.method.in_batch={last}"]
    )
    assert get(config, key) == last


def test_a_single_number_is_a_tuple_of_one():
  config, _ = main.parse(["--config=knn", "--config.knn.k=5", "--config.labels_per_class=()"])
  assert config.knn.k == (5,) and config.labels_per_class == ()


def test_configs_have_names_wherever_one_stands(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for given in ("adco_r50", "adco_r50.py", "configs/adco_r50.py"):
    config, workdir = main.parse([f"--config={given}"])
    assert config.epochs == 200 and workdir == "runs/adco_r50"
  assert main.parse(["--config=linear:small"])[0].recipe == "lbfgs"
  assert main.parse(["--config=import:moco_r50"])[0].objective == "moco"
  own_config(tmp_path, "c.epochs = 7")
  (tmp_path / "mine.py").rename(tmp_path / "adco_r50.py")
  assert main.parse(["--config=adco_r50"])[0].epochs == 7  # a file that is there wins


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
  """In flags and files alike, for each key that is a path in any task."""
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.py").write_text(
    "import configs.adco_digits as b\ndef get_config():\n  c = b.get_config()\n  c.data.dir = '~/d'\n  return c\n"
  )
  config, workdir = main.parse(
    ["--config=~/mine.py", "--workdir=~/runs/a", "--config.init_from=~/b"]
  )
  assert [workdir, config.data.dir, config.init_from] == [
    f"{tmp_path}/{name}" for name in ("runs/a", "d", "b")
  ]
  for name in config_files.names():
    known = set(keys.walk(config_files.load(name)))
    config, _ = main.parse([f"--config={name}", *(f"--config.{key}=~/x" for key in known & PATHS)])
    assert all(get(config, key) == f"{tmp_path}/x" for key in known & PATHS)


def test_help_lists_every_task_and_config(capsys):
  assert main.main(["--help"]) == 0
  said = capsys.readouterr().out
  for name in config_files.names():
    assert f"  {name} " in said and manual.first_line(config_files.CONFIGS / f"{name}.py") in said


@pytest.mark.parametrize("name", config_files.names())
def test_help_on_a_config_shows_every_key_as_it_can_be_given_with_its_meaning(capsys, name):
  assert main.main([f"--config={name}", "--help"]) == 0
  said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
  joined = (
    "\n".join(said).replace("\n" + " " * 48, "  ").splitlines()
  )  # a long value has its meaning below
  flags, _, notes = zip(*(line.strip().partition("  ") for line in joined), strict=True)
  config = config_files.load(name)
  assert sorted(flag.partition("=")[0] for flag in flags) == sorted(
    f"--config.{key}" for key in keys.walk(config)
  )
  unsaid = {
    flag.partition("=")[0] for flag, note in zip(flags, notes, strict=True) if not note.strip()
  }
  assert unsaid <= {"--config.task"}
  given = [shlex.split(flag)[0] for flag in flags if not flag.endswith("=")]
  assert main.parse([f"--config={name}", *given])[0].to_dict() == config.to_dict()


def test_help_follows_a_config_to_what_it_begins_with(capsys, tmp_path):
  """The value is the file's own, the comment of whichever file has one; in the order of the base."""
  given = own_config(tmp_path, "c.method.bank.size = 96")
  assert main.main([given, "--help"]) == 0
  said = capsys.readouterr().out
  (line,) = [line for line in said.splitlines() if "--config.method.bank.size=" in line]
  assert "=96 " in line and "K rows [--cluster]" in line
  assert (
    said.index("config.seed=")
    < said.index("config.method.bank.size=")
    < said.index("config.eval.size=")
  )


def test_help_needs_no_jax():
  code = "import sys; from adco_jax import main; main.main(['--help']); main.main(['--help', '--config=knn']); sys.exit('jax' in sys.modules)"
  assert (
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60).returncode
    == 0
  )
