"""What inspect_data says of a folder that holds everything a folder may hold."""

import importlib
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from adco_jax import main
from adco_jax.data import glance
from adco_jax.data.images import Reader
from adco_jax.data.pipeline import PipelineLoader
from adco_jax.data.resident import ResidentLoader
from adco_jax.data.sources import loading
from adco_jax.errors import ConfigError
from adco_jax.runtime import sharding
from adco_jax.tasks import inspect_data, pretrain, view_sheet
from tests import settings
from tests.faults.images import write_broken, write_images

SMALL = [
  "--config=configs/inspect_data.py", "--config.views.crops=((16,.5,1.),(12,.5,1.))", "--config.eval.size=16",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr("adco_jax.tasks.inspect_data.SPEED_SECONDS", 0.2)


def test_a_messy_folder(tmp_path, capsys):
  write_images(tmp_path / "data" / "train" / "ant", 20, sizes=[(40, 50), (12, 70)])
  write_images(tmp_path / "data" / "train" / "bee", 10, sizes=[(64, 30)])
  copy = tmp_path / "data" / "train" / "bee" / "again.jpg"
  copy.write_bytes((tmp_path / "data" / "train" / "ant" / "00.jpg").read_bytes())
  names = write_broken(tmp_path / "data" / "train" / "bee")
  flags = [*SMALL, f"--config.data.dir={tmp_path}/data", f"--workdir={tmp_path}/out", "--config.data.max_bad_fraction=.5"]  # fmt: skip
  assert main.main(flags) == 0
  said = capsys.readouterr().out
  assert all(said.count(name) == 1 for name in names)
  found = json.loads((tmp_path / "out" / "inspect.json").read_text())
  assert found["images"] == found["looked_at"] == 31 + len(names) and found["readable"] == 31
  assert {p.split("/")[-1] for p in found["broken"]} == set(names)
  assert found["classes"] == 2 and found["same_pixels"] == 1 and found["smaller_than_crop"] == 10
  assert found["short_side"] == {"min": 12, "median": 30, "max": 40}
  assert found["loader"] == "PipelineLoader" and found["loader_images_per_second"] > 0
  assert "fewer than one batch" in found["training"]
  page = (tmp_path / "out" / "inspect.html").read_text()
  assert all(name in page for name in names) and "data:image/png;base64," in page
  with Image.open(tmp_path / "out" / "inspect.png") as sheet:
    assert sheet.size[0] > 3 * 64 and np.asarray(sheet).std() > 20


def test_mean_and_deviation_are_the_images_own(tmp_path):
  images = np.random.RandomState(0).randint(0, 200, (30, 8, 9, 3), np.uint8)
  np.savez(tmp_path / "x.npz", train_images=images)
  flags = [*SMALL, "--config.data.source=npz", f"--config.data.dir={tmp_path}/x.npz", f"--workdir={tmp_path}/out"]  # fmt: skip
  assert main.main(flags) == 0
  found = json.loads((tmp_path / "out" / "inspect.json").read_text())
  assert np.allclose(found["mean"], (images / 255).mean((0, 1, 2)), atol=1e-4)
  assert np.allclose(found["std"], (images / 255).std((0, 1, 2)), atol=1e-4)
  assert "classes" not in found and found["loader"] == "ResidentLoader"


def test_large_images_count_like_small_ones(tmp_path):
  """Four million equal pixels: sums in float32 would stop growing on the way."""
  Image.fromarray(np.full((2000, 2000, 3), 200, np.uint8)).save(tmp_path / "large.png")
  reader = Reader(loading.load_source("folder", str(tmp_path), "train"))
  config = importlib.import_module("configs.inspect_data").get_config()
  found = inspect_data.look(reader, config)
  assert np.allclose(found["mean"], 200 / 255, atol=1e-4) and np.allclose(
    found["std"], 0, atol=1e-3
  )


def test_fewer_images_than_devices_and_odd_names(tmp_path, capsys):
  write_images(tmp_path / "data", 2)
  (tmp_path / "data" / os.fsdecode(b"\xff<b>.jpg")).write_bytes(b"x")
  (tmp_path / "data" / "two\nlines.jpg").write_bytes(b"x")
  flags = [*SMALL, f"--config.data.dir={tmp_path}/data", f"--workdir={tmp_path}/out"]
  assert main.main(flags) == 0
  said = capsys.readouterr().out
  assert "fewer images than devices" in said and "two\\nlines.jpg" in said and "\\udcff<b>" in said
  assert "&lt;b&gt;" in (tmp_path / "out" / "inspect.html").read_text()


def test_nothing_but_broken_files(tmp_path, capsys):
  names = write_broken(tmp_path / "data")
  flags = [*SMALL, f"--config.data.dir={tmp_path}/data", f"--workdir={tmp_path}/out"]
  assert main.main(flags) == 0
  assert f"of which {len(names)} are broken" in capsys.readouterr().out


def test_a_pretraining_config_inspects_its_own_data(tmp_path, capsys):
  flags = ["--config=configs/adco_digits.py", "--config.task=inspect_data", "--config.bn.group_size=8", f"--workdir={tmp_path}/out"]  # fmt: skip
  assert main.main(flags) == 0
  assert "yes, with this config\n" in capsys.readouterr().out


# What training refuses or stops at, or a colleague would warn of: how it is asked for, and what inspect_data says.
FIT = ["--config.data.batch_size=16", "--config.bn.group_size=2", "--config.method.bank.size=32", "--config.augment.policy=none"]  # fmt: skip
NOT_READY = {
  "small images": (FIT + ["--config.views.crops=((64,.5,1.),(64,.5,1.))"], "yes, with this config, but", "views of 64 pixels are enlarged from images of 16"),
  "large bank": (FIT + ["--config.method.bank.size=512"], "yes, with this config, but", "method.bank.size=512 for 20 images"),
  "few images": (FIT + ["--config.data.batch_size=32"], "no: config.data.batch_size=32", "20 images, fewer than one batch"),
  "groups": (FIT + ["--config.bn.group_size=3"], "no: config.data.batch_size=16", "groups of 3"),
  "init_from": (FIT + ["--config.init_from=/nowhere"], "no: config.init_from='/nowhere'", "no run there"),
  "fine": (FIT, "yes, with this config", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
  folder = tmp_path_factory.mktemp("twenty")
  write_images(folder, 20, sizes=[(16, 16)])
  return folder


@pytest.mark.parametrize("case", NOT_READY)
def test_ready_to_train_is_what_training_would_say(case, twenty, tmp_path):
  flags, answer, why = NOT_READY[case]
  argv = [SMALL[0], "--config.views.crops=((16,.5,1.),(16,.5,1.))", *flags, f"--config.data.dir={twenty}"]  # fmt: skip
  config, _ = main.parse(argv)
  source = loading.load_source("folder", str(twenty), "train")
  found = inspect_data.look(Reader(source), config)
  blocked, warned = inspect_data.trainable(config, source, str(tmp_path / "out"), found)
  said = dict(inspect_data.summary(found | inspect_data.describe(source) | {"training": blocked, "warnings": warned}, config))  # fmt: skip
  assert said["ready to train"].startswith(answer) and why in " ".join([blocked, *warned])
  if blocked:  # by the very line with which training refuses
    with pytest.raises(ConfigError) as refusal:
      pretrain.prepare(config, str(tmp_path / "run"))
    assert str(refusal.value) == blocked


def test_broken_images_that_training_would_stop_at(twenty, tmp_path, capsys):
  folder = tmp_path / "data"
  shutil.copytree(twenty, folder)
  names = write_broken(folder)
  flags = [*SMALL, *FIT, f"--config.data.dir={folder}", f"--workdir={tmp_path}/out"]
  assert main.main(flags) == 0
  share = len(names) / (20 + len(names))
  said = capsys.readouterr().out
  assert f"no: config.data.max_bad_fraction=0.01: {len(names)} of {20 + len(names)} images" in said
  assert f"({share:.1%}) cannot be read" in said
  assert main.main([*flags, "--config.data.max_bad_fraction=0.9"]) == 0
  assert "ready to train           yes" in capsys.readouterr().out


def test_what_is_not_read_shows_nothing_or_is_broken_is_said(tmp_path, capsys):
  """By ending, by folder, by reason; and a share of broken images that ends a run is not 'ready'."""
  write_images(tmp_path / "data" / "train" / "ant", 20, sizes=[(40, 50)])
  write_images(tmp_path / "data" / "train" / "bee", 10, sizes=[(40, 50)])
  gone = tmp_path / "data" / "train" / "cat"
  gone.mkdir()
  (gone / "x.heic").write_bytes(b"x")
  for name, level in (("night", 3), ("snow", 252), ("wall", 90)):
    Image.fromarray(np.full((40, 50, 3), level, np.uint8)).save(gone.parent / "bee" / f"{name}.png")
  (gone.parent / "ant" / "broken.jpg").write_bytes(b"")
  flags = [*SMALL, f"--config.data.dir={tmp_path}/data", "--config.data.batch_size=16", "--config.bn.group_size=2", "--config.method.bank.size=32"]  # fmt: skip
  assert main.main([*flags, f"--workdir={tmp_path}/out"]) == 0
  said, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "inspect.json").read_text())
  assert found["not_read"] == {".heic": 1} and found["folders_without_images"] == ["cat"]
  assert "1 .heic; no image in cat" in said
  assert sorted(found["almost_no_information"].values()) == ["almost black", "almost white", "of one colour"]  # fmt: skip
  assert (
    "3 of 33 images looked at show almost nothing, or black and white alone" in said
    and "night.png" in said
  )
  assert found["training"].startswith("config.data.max_bad_fraction=0.01: 1 of 34 images")
  assert main.main([*flags, f"--workdir={tmp_path}/more", "--config.data.max_bad_fraction=.1"]) == 0
  assert "yes, with this config" in capsys.readouterr().out


@pytest.mark.parametrize("side, view, says", [
  (40, 224, "views of 224 pixels are enlarged from images of 40"), (400, 32, "views of 32 pixels are cut from images of 400"),
  (400, 224, ""), (32, 32, ""), (160, 224, ""),
])  # fmt: skip
def test_views_that_do_not_suit_the_images_are_said_at_the_start(tmp_path, side, view, says):
  write_images(tmp_path, 20, sizes=[(side, side + 10)])
  config, _ = main.parse([SMALL[0], *FIT, f"--config.views.crops=(({view},.5,1.),(12,.5,1.))", f"--config.data.dir={tmp_path}"])  # fmt: skip
  source, plan = pretrain.prepare(config, str(tmp_path / "run"))[:2]
  lines = [x for x in pretrain.describe(config, plan, source).split("\n") if "views of" in x]
  assert [says in line for line in lines] == ([True] if says else [])


def test_a_glance_at_images_that_show_nothing_or_cannot_be_read(tmp_path):
  Image.fromarray(np.full((40, 50), 255, np.uint8) * (np.arange(50) > 9).astype(np.uint8)).save(tmp_path / "a.png")  # fmt: skip
  Image.fromarray(np.full((40, 50), 3e6, np.float32)).save(tmp_path / "b.tif")
  short, (line,) = glance.glance(loading.load_source("folder", str(tmp_path), "train"), 64.0)
  assert short == 40 and line.startswith("1 of 1 images") and "1 of nothing but 0 and 255 such as" in line  # fmt: skip
  (tmp_path / "a.png").unlink()
  _, (line,) = glance.glance(loading.load_source("folder", str(tmp_path), "train"), 64.0)
  assert line.startswith("none of 1 images looked at can be read") and "b.tif" in line


def test_a_sheet_shows_every_view_of_training(tmp_path, monkeypatch):
  """The bank's initialisation, which comes first, has two views; training has three."""
  config = settings.tiny_config("multicrop")
  source = loading.load_source("digits", "", "train")
  plan = settings.tiny_plan(config, 8, source.num_examples)
  drawn = []
  monkeypatch.setattr(
    view_sheet.pictures, "save_sheet", lambda path, rows, side: drawn.extend(rows)
  )
  for loader in (ResidentLoader, PipelineLoader):
    loader = loader(Reader(source), sharding.create_mesh(), threads=1)
    view_sheet.save_view_sheet(str(tmp_path / "views.png"), config, plan, loader)
  assert len(plan.phases[0].pairing.views) == 2
  assert len(drawn) == 16 and {len(row) for row in drawn} == {1 + 3}
