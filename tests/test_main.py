"""What a user gets wrong: one line on stderr, exit status 2, no traceback, before anything compiles."""

import os
import subprocess
import sys

import numpy as np
import pytest

from adco_jax import main
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
  "unknown key": ([DIGITS, "--config.temprature=.1"], ["--config.temprature", "did you mean --config.temperature?"]),
  "unknown nested key": ([DIGITS, "--config.bank.siz=3"], ["--config.bank.siz", "--config.bank.size?"]),
  "unknown branch": ([DIGITS, "--config.banks.size=3"], ["--config.banks.size", "--config.bank.size?"]),
  "wrong type": ([DIGITS, "--config.bank.size=many"], ["--config.bank.size=many", "type"]),
  "float for int": ([DIGITS, "--config.bank.size=3.5"], ["--config.bank.size=3.5", "type"]),
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
  "bank size": ([DIGITS, "--config.bank.size=0"], ["config.bank.size=0", "use 1 or more"]),
  "temperature": ([DIGITS, "--config.temperature=0"], ["config.temperature=0.0", "above 0"]),
  "bank temperature": ([DIGITS, "--config.bank.temperature=-1"], ["config.bank.temperature=-1.0", "above 0"]),
  "crop size": ([DIGITS, "--config.views.crops=((4,.5,1.),(16,.5,1.))"], ["config.views.crops", "8 pixels"]),
  "architecture": ([DIGITS, "--config.model.arch=vgg"], ["config.model.arch='vgg'", "resnet50"]),
  "objective": ([DIGITS, "--config.objective=byol"], ["config.objective='byol'", "adco or moco"]),
  "policy": ([DIGITS, "--config.augment.policy=x"], ["config.augment.policy='x'", "moco_v2"]),
  "task": ([DIGITS, "--config.task=train"], ["config.task='train'", "pretrain"]),
  "no checkpoint": (["--config=configs/knn.py", "--config.pretrained=/nowhere"], ["config.pretrained='/nowhere'", "no run"]),
  "nothing pretrained": (["--config=configs/linear.py"], ["config.pretrained=''", "name the workdir"]),
  "recipe": (["--config=configs/linear.py", "--config.recipe=x"], ["config.recipe='x'", "sgd or lbfgs"]),
  "preset": (["--config=configs/linear.py:tiny"], ["tiny", "authors"]),
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
  assert "no images (.jpg" in line and line.count("\n") == 1


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
  from adco_jax.workdir import open_workdir
  from configs import adco_digits

  open_workdir(
    str(tmp_path / "run"), adco_digits.get_config().to_dict(), {"compute_dtype": "float32"}, []
  )
  line = refused(capsys, tmp_path, "--config=configs/knn.py", f"--config.pretrained={tmp_path}/run")
  assert "no checkpoint there yet; pre-train first" in line and line.count("\n") == 1


def test_unlabelled_test_images(capsys, tmp_path):
  """Linear evaluation of images without labels."""
  from adco_jax.workdir import open_workdir
  from configs import adco_r50

  write_images(tmp_path / "images", 3)
  config = adco_r50.get_config()
  config.data.dir = str(tmp_path / "images")
  config.data.test_split = "train"
  open_workdir(str(tmp_path / "run"), config.to_dict(), {"compute_dtype": "float32"}, [])
  line = refused(capsys, tmp_path, "--config=configs/knn.py", f"--config.pretrained={tmp_path}/run")
  assert "has no labels to score against" in line


def test_default_workdir():
  assert main.default_workdir("configs/adco_digits.py") == os.path.join("runs", "adco_digits")


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
  assert done.stderr == "error: --config.bank.siez: no such key; did you mean --config.bank.size?\n"


def test_other_images_are_refused_on_resume(tmp_path, capsys):
  """The folder may move; another number of images, or others by name, would be another run."""
  write_images(tmp_path / "here", 40, sizes=[(16, 16)])
  flags = [
    "--config=configs/adco_digits.py", f"--workdir={tmp_path}/run", "--config.data.source=folder",
    "--config.data.batch_size=16", "--config.bn.group_size=2", "--config.bank.size=32", "--config.epochs=1",
    "--config.model.width=0.125", "--config.eval.every_epochs=0", "--config.data.loader=resident",
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
