"""Workdirs of the format before: everything reads them but resuming, which says how to go on.

data/workdir_format_3.tar.xz was written at commit 02a2dbb by
python -m adco_jax.main --config=adco_digits --config.model.width=0.0625 --config.model.dim=16 --config.bank.size=64
--config.epochs=1 --config.eval.every_epochs=0
"""

import pathlib
import tarfile

import jax
import numpy as np
import pytest

import adco_jax
from adco_jax import main
from adco_jax.workdir.checkpoint import stored_fields
from adco_jax.workdir.stored import FORMAT_3

pytestmark = pytest.mark.storage  # the slow ones' group

ARCHIVE = pathlib.Path(__file__).parent / "data" / "workdir_format_3.tar.xz"
SAME = [
  "--config=adco_digits", "--config.model.width=0.0625", "--config.model.dim=16", "--config.method.bank.size=64", "--config.epochs=1",
  "--config.eval.every_epochs=0", "--config.bn.group_size=8",
]  # fmt: skip
# What the commit that wrote it printed for its first and last test image.
FEATURES = [
  [0.5376264, 0.4342089, 0.2924592, 0.5124860],
  [0.3625304, 0.4903292, 0.6009206, 0.5652629],
]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
  folder = tmp_path_factory.mktemp("old")
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(folder, filter="data")
  return str(folder / "old")


def test_its_encoders_give_what_they_gave(old):
  from adco_jax.data.sources.loading import load_source

  digits = load_source("digits", "", "test").images[[0, -1]]
  query, key = (adco_jax.load_encoder(old, player).embed(digits) for player in ("query", "key"))
  np.testing.assert_allclose(query[:, :4], FEATURES, rtol=1e-4)
  assert np.abs(query - key).max() > 1e-3


@pytest.mark.parametrize(
  "task", ["knn", pytest.param("linear:small", marks=pytest.mark.slow), "embed", "export", "report"]
)
def test_tasks_read_it(task, old, capsys):
  extra = ["--config.format=npz"] if task == "export" else []
  assert main.main([f"--config={task}", f"--config.pretrained={old}", *extra]) == 0
  assert capsys.readouterr().out


def test_it_is_gone_on_from_but_not_resumed(old, tmp_path, capsys):
  """Bank and encoders are taken over, the bank's initialisation is not repeated."""
  assert main.main([*SAME, f"--workdir={old}"]) == 2
  said = capsys.readouterr().err
  assert "of format 3, this is 5" in said and f"--config.init_from={old}" in said
  new = str(tmp_path / "new")
  more = [
    f"--workdir={new}",
    f"--config.init_from={old}",
    "--config.augment.policy=none",
    "--config.optim.learning_rate=0",
    "--config.method.bank.learning_rate=0",
  ]
  assert main.main([*SAME, *more, "--config.stop_at_step=3", "--config.ema.decay=1"]) == 0
  said = capsys.readouterr().out
  assert "step 21: encoders, objective" in said and "compiling the step of training" in said
  encoders = [adco_jax.load_encoder(path).variables["params"] for path in (old, new)]
  for before, after in zip(*map(jax.tree.leaves, encoders), strict=True):
    np.testing.assert_array_equal(before, after)
  assert not {*FORMAT_3} & {*stored_fields(new, empty=True)}
