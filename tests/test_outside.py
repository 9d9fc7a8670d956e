"""What is plugged in from outside of the package: docs/extending.md's own examples, run as its reader would."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import adco_jax
from adco_jax import main
from adco_jax.config import outside
from adco_jax.config.pairing import make_online_pairing
from adco_jax.data.sources.loading import Source, load_source
from adco_jax.errors import ConfigError
from adco_jax.objectives.base import Objective
from adco_jax.training import train_step
from adco_jax.workdir.metrics import read_metrics
from tests import settings

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"
RUN = [
  "--config=adco_digits", "--config.objective=mine:InBatch", "--config.method.temperature=0.3",
  "--config.model.arch=mine:Small", "--config.data.source=mine:stripes", "--config.views.mode=symmetric",
  "--config.bn.group_size=8", "--config.epochs=4", "--config.eval.every_epochs=4", "--config.log.every_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with mine.py, on the path as it is for who starts there."""
  path = tmp_path_factory.mktemp("outside")
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
  (path / "mine.py").write_text("\n\n".join(blocks))
  sys.path.insert(0, str(path))
  yield path
  sys.path.remove(str(path))
  sys.modules.pop("mine", None)


def test_the_three_run_resume_score_and_export(folder, capsys):
  straight, stopped = str(folder / "straight"), str(folder / "stopped")
  assert main.main([*RUN, f"--workdir={straight}"]) == 0
  said = capsys.readouterr().out
  assert "16 steps = 4 epochs of 4" in said and "loss nan" not in said
  assert main.main([*RUN, f"--workdir={stopped}", "--config.stop_at_step=9"]) == 0
  assert main.main([*RUN, f"--workdir={stopped}"]) == 0
  state = re.compile(r"state (\w+); everything")
  assert (
    state.search(capsys.readouterr().out.split("resuming at step 9")[1])[1] == state.search(said)[1]
  )
  losses = [line["train/loss"] for line in read_metrics(straight) if "train/loss" in line]
  assert losses[-1] < losses[0] - 0.05
  assert main.main(["--config=knn", f"--config.pretrained={straight}", "--config.map=0"]) == 0
  assert re.search(r"trained +[01]\.\d+", capsys.readouterr().out)
  out = f"--config.out={folder}/a.stablehlo"
  export = ["--config=export", f"--config.pretrained={straight}"]
  assert main.main([*export, "--config.format=stablehlo", out]) == 0
  assert main.main([*export, "--config.format=npz"]) == 2
  assert "only stablehlo holds mine:Small" in capsys.readouterr().err
  images = np.random.RandomState(0).randint(0, 256, (5, 20, 20, 3), np.uint8)
  encoder = adco_jax.train(main.parse(RUN)[0], straight)  # nothing is left to train
  assert encoder.step == 16 and encoder.embed(images).shape == (5, 64)
  with pytest.raises(adco_jax.ConfigError, match="has no key encoder"):
    adco_jax.load_encoder(straight, "key")
  again = f"--workdir={folder}/again", f"--config.init_from={straight}", "--config.stop_at_step=1"
  assert main.main([*RUN, *again]) == 0


def test_devices_and_parts_make_no_difference(folder, float64):
  """One device, four, and two parts: loss and parameters of two steps, with gradients through the gather."""
  found = []
  for devices, parts in ((1, 1), (4, 1), (2, 2)):
    config = settings.tiny_config(
      "symmetric", objective="mine:InBatch", compute_dtype="float64", accumulate=parts
    )
    players, plan, state = settings.create_players(config, devices)
    assert plan.phases[0].pairing == make_online_pairing("symmetric", 2) and state.key_params == {}
    update = jax.jit(train_step.make_update(players, plan.phases[0]))
    start = jax.device_get(state)
    for step in range(2):
      batch = settings.random_batch(plan, plan.train_pairing, step, np.float64)
      state, metrics = update(state, batch.put(players.mesh))
    found.append((jax.device_get(state.query_params), float(metrics["train/loss"])))
  assert settings.difference(found[0][0], start.query_params) > 1e-3
  for other in found[1:]:
    assert settings.difference(found[0], other) < 1e-12


REFUSED = {
  "nowhere:Objective": "No module named 'nowhere'; name a module that Python can import from here",
  "mine:Nothing": "mine has no class or function 'Nothing'",
  "mine:stripes": "is no dataclass",
  "half:Half": "lacks keys_from, momentum_update, momentum_init, sees, needs_labels, modes, check, phases",
  "half:Bare": "its fields rate have no default",
  "half_broken:Half": "ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_objective_is_refused(name, folder, tmp_path, capsys):
  (folder / "half.py").write_text(
    "import dataclasses\nfrom adco_jax.objectives.base import Base\n\n"
    "@dataclasses.dataclass(frozen=True)\nclass Half:\n  def loss(self, v, e, c, phase):\n    return 0\n\n"
    "@dataclasses.dataclass(frozen=True)\nclass Bare(Base):\n  rate: float\n  def loss(self, v, e, c, phase):\n    return 0\n"
  )
  (folder / "half_broken.py").write_text("1 / 0\n")
  argv = ["--config=adco_digits", f"--config.objective={name}", f"--workdir={tmp_path}/run"]
  assert main.main(argv) == 2
  said = capsys.readouterr().err
  assert said.startswith(f"error: config.objective='{name}': ") and REFUSED[name] in said
  assert said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("flag", "line"),
  [
    (
      "objective=adcp",
      "config.objective='adcp': did you mean adco? use one of adco, moco, mochi, ",
    ),
    ("model.arch=mine:Nothing", "mine has no class or function 'Nothing'"),
    ("data.source=os.path:join", "config.data.source='os.path:join': gave a str, not a Source"),
  ],
)
def test_other_names_are_refused(flag, line, folder, tmp_path, capsys):
  argv = [
    "--config=adco_digits",
    "--config.bn.group_size=8",
    f"--config.{flag}",
    f"--workdir={tmp_path}/run",
  ]
  assert main.main(argv) == 2
  said = capsys.readouterr().err
  assert line in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_setting_of_no_field_is_refused(folder, capsys):
  assert main.main([*RUN[:2], "--config.method.tau=1"]) == 2
  assert (
    "--config.method.tau: no such key; did you mean --config.method.temperature?"
    in capsys.readouterr().err
  )


def test_the_list_of_what_an_objective_has_is_the_protocol_s():
  own = {name for name in vars(Objective) if not name.startswith("_")}
  assert own | set(Objective.__annotations__) == set(outside.OBJECTIVE)


def test_a_module_beside_the_command_is_found(folder):
  """The script's own folder is not where the user is."""
  code = "from adco_jax import main; main.command()"
  argv = [sys.executable, "-c", code, *RUN[:2], "--config.method.tau=1"]
  around = os.environ | {"PYTHONPATH": str(PAGE.parent.parent)}
  found = subprocess.run(argv, cwd=folder, env=around, capture_output=True, text=True)
  assert found.returncode == 2 and "did you mean --config.method.temperature?" in found.stderr


@pytest.mark.parametrize("given, says", [
  ({"images": np.zeros((4, 8, 8, 3), np.float32)}, "images is float32[4, 8, 8, 3]; store uint8 [N, H, W, 3]"),
  ({"images": np.zeros((4, 3, 8, 8), np.uint8)}, "images is uint8[4, 3, 8, 8]; store"),
  ({"labels": np.zeros(3, int)}, "labels are int64[3]; store integers [4]"),
  ({"labels": np.zeros(4)}, "labels are float64[4]; store integers"),
])  # fmt: skip
def test_a_source_of_another_form_is_refused(monkeypatch, given, says):
  """Floats in 0..1 would be nearly black, and nobody would say so."""
  right = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": [0, 1, 0, 1]}
  make = lambda directory, split: Source("x", files=None, classes=["a", "b"], **right | given)
  monkeypatch.setattr(outside, "load", lambda name, option: make)
  with pytest.raises(ConfigError, match="config.data.source='mine:make'") as error:
    load_source("mine:make", "", "train")
  assert says in str(error.value)


def test_a_source_of_lists_and_views_is_taken(monkeypatch):
  pixels = np.arange(8 * 8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 8, 3)
  make = lambda directory, split: Source("x", pixels[::2], None, [0, 1, 0, 1], ["a", "b"])
  monkeypatch.setattr(outside, "load", lambda name, option: make)
  source = load_source("mine:make", "", "train")
  assert source.targets.tolist() == [0, 1, 0, 1] and source.classes == ("a", "b")
  assert np.array_equal(source.images, pixels[::2]) and source.identity()["number"] == 4
