"""Labels that travel with a batch: those of the images in its slots, whatever loader, order, process and broken files there are."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from adco_jax import build, main
from adco_jax.config import outside
from adco_jax.config.plan import Machine
from adco_jax.data.images import Reader
from adco_jax.data.pipeline import PipelineLoader
from adco_jax.data.resident import ResidentLoader
from adco_jax.data.sources import loading
from adco_jax.data.sources.base import Source
from adco_jax.runtime import sharding
from tests import settings

RATIO = (3 / 4, 4 / 3)
BROKEN = 9  # of 60 files


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
  """A folder of three classes whose images have one colour each, 60 levels apart; some of every class are broken."""
  folder = tmp_path_factory.mktemp("coloured")
  for number in range(60):
    place = folder / "abc"[number % 3] / f"{number:02d}.png"
    place.parent.mkdir(exist_ok=True)
    Image.new("RGB", (12, 12), (60 * (number % 3) + 40,) * 3).save(place)
    if number % 7 == 0:
      place.write_bytes(b"no image")
  return folder


def shipped(loader, config, step, count=1, process=0):
  machine = Machine("cpu", 2, count, process)
  plan = build.plan_for(config, loader.reader.source.num_examples, 3, machine)
  plan = dataclasses.replace(plan, has_labels=True)
  return next(loader.train(step, step + 1, seed=0, plan=plan, ratio=RATIO))


def classes_of(loader, batch):
  """What the pixels of the first query view say."""
  crops = batch.queries[0].crops(8, loader.images)
  assert np.ptp(crops, axis=(1, 2, 3)).max() == 0
  return (np.asarray(crops)[:, 0, 0, 0] - 40) // 60


@pytest.mark.parametrize("make", [PipelineLoader, ResidentLoader])
@pytest.mark.parametrize("mode, block", [("one", 0), ("symmetric", 0), ("symmetric", 8)])
def test_labels_are_those_of_the_slots_images(coloured, make, mode, block):
  """In modes with keys, whose order is shuffled inside of a process or over both, those of the query views."""
  objective = "supervised" if mode == "one" else "moco"
  config = settings.tiny_config(mode, objective=objective, bn__shuffle_block=block, epochs=2.0)  # fmt: skip
  source = loading.load_source("folder", str(coloured), "train")
  loader = make(Reader(source, 0.5), sharding.create_mesh(jax.devices()[:1]))
  replaced, seen = 0, set()
  for step in range(5):  # over an epoch's end: the order is another
    whole = shipped(loader, config, step)
    assert whole.batch.labels.dtype == np.int32 and whole.batch.labels.shape == (16,)
    assert np.array_equal(whole.batch.labels, classes_of(loader, whole.batch))
    halves = [shipped(loader, config, step, 2, process).batch.labels for process in (0, 1)]
    assert np.array_equal(np.concatenate(halves), whole.batch.labels)
    replaced, seen = replaced + whole.replaced, seen | set(whole.batch.labels.tolist())
  assert replaced >= BROKEN and seen == {0, 1, 2}


def test_no_label_travels_where_none_is_needed(coloured):
  source = loading.load_source("folder", str(coloured), "train")
  loader = ResidentLoader(Reader(source, 0.5), sharding.create_mesh(jax.devices()[:1]))
  plan = settings.tiny_plan(settings.tiny_config(), 1, source.num_examples)
  assert next(loader.train(0, 1, seed=0, plan=plan, ratio=RATIO)).batch.labels is None


def test_classes_without_labels_are_none():
  """A source of one's own that names classes and has no labels: nothing can be learnt of them."""
  images = np.zeros((4, 8, 8, 3), np.uint8)
  given = lambda directory, split: Source("named", images, None, None, ("a", "b"), split)
  source = loading.load_source(outside.name_of(given, "data.source"), "", "train")
  assert source.classes == () and source.labels is None


@pytest.mark.slow
@pytest.mark.kills
def test_a_step_with_labels_is_replayed(tmp_path, capsys):
  flags = ["--config=adco_digits", "--config.objective=supervised", "--config.views.mode=one", "--config.views.crops=((8,.5,1.),)",
           f"--config.model.arch={settings.TINY}", "--config.bn.group_size=8", "--config.eval.every_epochs=0",
           "--config.data.std=(1e-40,1e-40,1e-40)", "--config.max_bad_steps=1"]  # fmt: skip
  assert main.main([*flags, f"--workdir={tmp_path}/run"]) == 3
  folder = capsys.readouterr().err.split("--config.capsule=")[1].strip()
  assert main.main(["--config=replay_step", f"--config.capsule={folder}"]) == 0
  assert "first tensor that is not finite: view 0 of queries" in capsys.readouterr().out


@pytest.mark.parametrize("objective, hold_out, warned", [("supervised", 0.0, True), ("supervised", 0.1, False), ("moco", 0.0, False)])  # fmt: skip
def test_scores_of_labels_that_are_learnt_are_warned_of(objective, hold_out, warned):
  mode = "one" if objective == "supervised" else "single"
  config = settings.tiny_config(mode, objective=objective, hold_out=hold_out)
  lines = build.warnings(config, settings.tiny_plan(config))
  assert any("whose labels are learnt" in line for line in lines) == warned
