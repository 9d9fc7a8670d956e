"""The library's door: encoders of workdirs and exported files, and features by them, as the tasks have them."""

import importlib
import pkgutil
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import errors
from PIL import Image

import adco_jax
from adco_jax import main
from adco_jax.config import config_files
from adco_jax.errors import ConfigError
from tests.settings import save_run, tiny_config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("runs") / "tiny")
  save_run(path, tiny_config(data__num_examples=1297, eval__crop_fraction=0.875), step=5)
  return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Eleven pictures of other sizes, turned ones and a grey one among them; their paths in the source's order."""
  folder, rng = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
  for i in range(11):
    pixels = rng.randint(0, 256, (20 + 7 * i, 60 - 3 * i, 3), np.uint8)
    image = Image.fromarray(pixels if i != 4 else pixels[..., 0])
    exif = Image.Exif()
    exif[274] = 6 if i == 2 else 1
    image.save(folder / f"{i:02d}.{'png' if i % 3 == 1 else 'jpg'}", exif=exif)
  return sorted(folder.iterdir())


def embedded(workdir, out, *options):
  """Features that the task `embed` writes."""
  argv = ["--config=embed", f"--config.pretrained={workdir}", f"--config.out={out}", *options]
  assert main.main(argv) == 0
  with np.load(out) as archive:
    return archive["features"]


def test_features_of_files_are_those_of_the_task(workdir, photos, tmp_path):
  options = [f"--config.data.dir={photos[0].parent}", "--config.data.source=folder"]
  wanted = embedded(workdir, tmp_path / "a.npz", *options)
  encoder = adco_jax.load_encoder(workdir)
  np.testing.assert_allclose(encoder.embed(photos), wanted, rtol=2e-6, atol=1e-7)
  in_parts = encoder.embed((str(path) for path in photos), batch_size=8)
  np.testing.assert_allclose(in_parts, wanted, rtol=2e-6, atol=1e-7)
  assert encoder.step == 5 and np.ptp(wanted, axis=0).max() > 1e-3  # the pictures differ


def test_features_of_arrays_are_those_of_the_task(workdir, tmp_path):
  from adco_jax.data.sources.loading import load_source

  digits = load_source("digits", "", "test").images
  wanted = embedded(workdir, tmp_path / "a.npz", "--config.data.split=test")
  found = adco_jax.load_encoder(workdir).embed(digits)
  np.testing.assert_allclose(found, wanted, rtol=0.02, atol=1e-3)  # resident cuts are not rounded


@pytest.mark.parametrize("form", ["torchvision", "timm", "npz"])
def test_an_export_is_the_encoder_it_came_from(form, workdir, photos, tmp_path, capsys):
  name = f"key.{'npz' if form == 'npz' else 'safetensors'}"
  argv = [f"--config.pretrained={workdir}", "--config.encoder=key", f"--config.format={form}"]
  status = main.main(["--config=export", *argv, f"--config.out={tmp_path / name}"])
  assert status == 0
  found = adco_jax.load_encoder(tmp_path / name)
  key = adco_jax.load_encoder(workdir, "key")
  assert found.step == 5 and found.config == key.config
  np.testing.assert_array_equal(found.embed(photos), key.embed(photos))
  query = adco_jax.load_encoder(workdir).embed(photos)
  assert np.abs(query - key.embed(photos)).max() > 1e-3
  project = lambda e: e.module.apply(e.variables, np.ones((2, 8, 8, 3), np.float32), train=False)
  if form == "npz":
    np.testing.assert_array_equal(project(found), project(key))
    return
  with pytest.raises(errors.ScopeParamNotFoundError, match="head"):
    project(found)
  assert (
    main.main(["--config=knn", f"--config.pretrained={tmp_path / name}", "--config.projected"]) == 2
  )
  assert (
    "holds no projection; name the workdir of its run, or export it as npz"
    in capsys.readouterr().err
  )


@pytest.mark.parametrize(
  ("images", "line"),
  [
    (np.zeros((2, 8, 8, 3), np.float32), "an image of float32; give uint8"),
    (np.zeros((8, 8, 3), np.uint8), r"an array of shape \(8, 8, 3\)"),
    (np.zeros((2, 3, 8, 8), np.uint8), r"an array of shape \(2, 3, 8, 8\)"),
    ([np.zeros((8, 8), np.uint8)], r"an image of shape \(8, 8\)"),
    ([np.zeros((0, 8, 3), np.uint8)], r"an image of shape \(0, 8, 3\)"),
    ([], "no images"),
    ("cat.jpg", "is one path; give a list"),
    ([__file__], "is no image that can be read"),
  ],
)
def test_what_is_no_image_is_refused(images, line, workdir):
  with pytest.raises(ValueError, match=line):
    adco_jax.load_encoder(workdir).embed(images)


def test_what_is_no_encoder_is_refused(workdir, photos, tmp_path):
  refused = lambda line: pytest.raises(ConfigError, match=line)
  with refused("neither the workdir of a run nor an exported file"):
    adco_jax.load_encoder(tmp_path)
  with refused("neither the workdir"):
    adco_jax.load_encoder(tmp_path / "nothing.npz")
  with refused("no 00.jpg.json beside it; files that configs/export.py writes have one"):
    adco_jax.load_encoder(photos[0])
  (tmp_path / "a.npz").write_bytes(b"")
  (tmp_path / "a.npz.json").write_text("{")
  with refused("a.npz.json: damaged .*; export the run again"):
    adco_jax.load_encoder(tmp_path / "a.npz")
  with refused("encoder='teacher': use 'query' or 'key'"):
    adco_jax.load_encoder(workdir, "teacher")
  with refused("step"):
    adco_jax.load_encoder(workdir, step=4)
  assert (
    main.main(
      [
        "--config=export",
        f"--config.pretrained={workdir}",
        "--config.format=npz",
        f"--config.out={tmp_path / 'b.npz'}",
      ]
    )
    == 0
  )
  with refused("encoder='key': .*b.npz is of the query encoder"):
    adco_jax.load_encoder(tmp_path / "b.npz", "key")
  with refused("step=4: .*b.npz is of step 5"):
    adco_jax.load_encoder(tmp_path / "b.npz", step=4)


def test_train_refuses_what_it_cannot_run(tmp_path):
  with pytest.raises(ConfigError, match="train: config.task='knn'"):
    adco_jax.train("knn", str(tmp_path / "run"))
  config = config_files.load("adco_digits")
  with config.unlocked():
    config.method.bank.rows = 3
  with pytest.raises(
    ConfigError, match="config.method.bank.rows=3: no such key.*in the given config"
  ):
    adco_jax.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
  """Even where it cannot say which arrays it holds: the one before it is opened, its key encoder too."""
  workdir, config = str(tmp_path / "run"), tiny_config(data__num_examples=1297)
  save_run(workdir, config, step=3)
  shutil.copytree(tmp_path / "run" / "checkpoints" / "3", tmp_path / "run" / "checkpoints" / "4")
  (tmp_path / "run" / "checkpoints" / "4" / "state" / "_METADATA").write_text("{")
  assert adco_jax.load_encoder(workdir, "key").step == 3
  assert "checkpoint 4" in capsys.readouterr().out


MODULES = [module.name for module in pkgutil.walk_packages(adco_jax.__path__, "adco_jax.")]
LOOK = """
import logging, os, sys
import cv2, jax, PIL.Image, orbax.checkpoint
from etils import epath
look = lambda: (dict(os.environ), sys.excepthook, sys.unraisablehook, cv2.getNumThreads(), PIL.Image.MAX_IMAGE_PIXELS,
  logging.getLogger('absl').level, jax.config.values)
before = look()
import importlib
for name in sys.argv[1:]:
  importlib.import_module(name)
for a, b in zip(before, look(), strict=True):
  assert a == b, (a, b)
"""


def test_importing_changes_nothing_of_the_process():
  assert len(MODULES) > 60
  subprocess.run([sys.executable, "-c", LOOK, *MODULES], check=True)


def test_importing_the_package_imports_no_library():
  code = (
    "import sys, adco_jax; dir(adco_jax); sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
  for name in ("load_encoder", "LoadedEncoder", "train", "ConfigError", "__version__"):
    assert name in dir(adco_jax) and getattr(adco_jax, name)
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    importlib.import_module("adco_jax").nothing  # noqa: B018
