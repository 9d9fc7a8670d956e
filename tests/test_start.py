"""Where a run begins: what another run's encoders must be, and that nothing is left behind where they are not."""

import json
import shutil

import jax
import pytest

from adco_jax import main
from adco_jax.config import config_files
from adco_jax.errors import ConfigError
from adco_jax.tasks import beginning
from adco_jax.workdir.checkpoint import restore_parts
from adco_jax.workdir.opening import open_workdir
from tests.settings import save_run

FLAGS = [
  "--config=configs/adco_digits.py", "--config.model.arch=resnet8", "--config.model.width=0.125",
  "--config.model.dim=16", "--config.method.bank.size=64", "--config.bn.group_size=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory):
  """A run of `FLAGS` that ended at step 60."""
  folder = str(tmp_path_factory.mktemp("other") / "run")
  save_run(folder, main.parse(FLAGS)[0], step=60)
  return folder


OTHERS = {
  "width": (
    ["--config.model.width=0.25"],
    ["holds another encoder, model.width=0.125 (here 0.25)", "--config.model.width=0.125"],
  ),
  "all": (
    ["--config.model.arch=resnet10", "--config.model.dim=32", "--config.model.stem=imagenet"],
    ["model.arch='resnet8'", "model.dim=16", "model.stem='small'"],
  ),
  "nothing there": (["--config.init_from=NEW/other"], ["no run there"]),
  "itself": (["--config.init_from=NEW/run"], ["run's own workdir"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_init_from_of_another_kind(other, tmp_path, name, capsys):
  """One line that names init_from and the keys; the new workdir is not there, so a corrected retry begins."""
  flags, wanted = OTHERS[name]
  flags = [flag.replace("NEW", str(tmp_path)) for flag in flags]
  command = [*FLAGS, f"--workdir={tmp_path}/run", f"--config.init_from={other}", *flags]
  assert main.main(command) == 2
  error = capsys.readouterr().err.strip()
  assert len(error.splitlines()) == 1 and error.startswith("error: config.init_from="), error
  assert all(word in error for word in wanted) and "damaged" not in error, error
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoiled", ["no checkpoint", "older format"])
def test_init_from_an_unfinished_or_older_run(other, tmp_path, spoiled, capsys):
  folder = shutil.copytree(other, tmp_path / "other")
  if spoiled == "no checkpoint":
    shutil.rmtree(folder / "checkpoints")
  else:
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"format": 2}))
  assert main.main([*FLAGS, f"--workdir={tmp_path}/run", f"--config.init_from={folder}"]) == 2
  wanted = {"no checkpoint": "no checkpoint there yet", "older format": "import that"}[spoiled]
  assert f"config.init_from='{folder}'" in (error := capsys.readouterr().err) and wanted in error
  assert not (tmp_path / "run").exists()


def test_parts_of_other_shapes_are_not_called_damaged(other):
  """Whichever option named the workdir, the line says which array is of which shape."""
  wanted = {"query_params": {"head": {"fc2": {"bias": jax.ShapeDtypeStruct((32,), "float32")}}}}
  for option in ("pretrained", "init_from"):
    with pytest.raises(ConfigError, match=rf"config.{option}.*fc2/bias is float32\[16\], wanted"):
      restore_parts(other, wanted, option)


def test_a_step_past_the_plan_is_said(tmp_path, capsys):
  """A checkpoint behind the end of what would be run: it trained nothing, and said 'stopped' with status 0."""
  config, _ = main.parse(FLAGS)
  save_run(str(tmp_path / "run"), config, step=5000)
  assert main.main([*FLAGS, f"--workdir={tmp_path}/run"]) == 2
  error = capsys.readouterr().err
  assert "step 5000" in error and "would end at step 2001" in error
  assert f"--config.init_from={tmp_path}/run" in error and len(error.splitlines()) == 1


def test_an_extension_leaves_a_vit_s_positions_where_they_are(tmp_path):
  """They are of the first view's patches where the grid is not given, so that another side would have moved them all."""
  config, workdir = config_files.load("adco_vits4_cifar"), str(tmp_path)
  crops = tuple(tuple(crop) for crop in config.views.crops)
  open_workdir(workdir, config.to_dict(), {"total_steps": 9}, [])
  for first, grid, fine in ((32, 0, True), (32, 8, True), (24, 0, False), (24, 8, True)):
    config.views.crops, config.model.vit.grid = ((first, *crops[0][1:]), *crops[1:]), grid
    if fine:
      beginning.check_grid(workdir, config.to_dict())
      continue
    with pytest.raises(
      ConfigError, match=f"of 8 x 8 patches.*init_from={workdir} --config.model.vit.grid=8"
    ):
      beginning.check_grid(workdir, config.to_dict())


@pytest.mark.parametrize("option", ["--workdir", "--config.init_from", "--config.pretrained"])
@pytest.mark.parametrize("spoiled", ["foreign", "cut", "list", "no plan", "cut plan"])
def test_a_folder_that_is_no_whole_run(other, tmp_path, option, spoiled, capsys):
  """One line that names the option, whichever file is not as we write it."""
  for name in ("config.json", "plan.json"):
    shutil.copy(f"{other}/{name}", tmp_path)
  name, text = {
    "foreign": ("config.json", '{"model_type": "resnet"}'), "cut": ("config.json", '{"format": 3, "conf'),
    "list": ("config.json", "[3]"), "no plan": ("plan.json", ""), "cut plan": ("plan.json", "{"),
  }[spoiled]  # fmt: skip
  (tmp_path / name).write_text(text)
  if not text:
    (tmp_path / name).unlink()
  command = (
    ["--config=report"] if option.endswith("pretrained") else [*FLAGS, f"--workdir={tmp_path}/run"]
  )
  before = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
  assert main.main([*command, f"{option}={tmp_path}"]) == 2
  error = capsys.readouterr().err.strip()
  assert len(error.splitlines()) == 1 and option.lstrip("-") in error and name in error, error
  assert {path.name: path.read_text() for path in tmp_path.glob("*.json")} == before


def test_extend_where_no_run_is(tmp_path, capsys):
  assert main.main([*FLAGS, f"--workdir={tmp_path}/typo", "--extend"]) == 2
  assert f"--extend: no run in {tmp_path}/typo" in capsys.readouterr().err
  assert not (tmp_path / "typo").exists()
