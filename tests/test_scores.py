"""One tiny encoder scored and embedded on made-up folders: what is read, filed, found again, refused and kept."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from adco_jax import card, embed, frozen, main, report, scored_data
from adco_jax.evaluation import results
from adco_jax.plan import RunError
from adco_jax.workdir import open_workdir, record_extension
from tests import settings  # has the network `tiny`

TINY = [
  "--config=configs/adco_digits.py", "--config.model.arch=tiny", "--config.model.width=0.125",
  "--config.data.batch_size=64", "--config.bn.group_size=8", "--config.bank.size=64", "--config.epochs=1",
  "--config.eval.every_epochs=0", f"--config.views.crops={settings.CROPS['single']}", "--config.eval.size=8",
  "--config.bank.init=random", "--config.stop_at_step=3", "--config.save.every_steps=2",
]  # fmt: skip
QUICK = ["--config.baselines=False", "--config.labels_per_class=()", "--config.neighbours=0"]
SHADES = {"dark": 20, "light": 220, "middle": 120}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir with checkpoints 2 and 3, pre-trained on digits."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  assert main.main([*TINY, f"--workdir={workdir}"]) == 0
  return workdir


@pytest.fixture
def workdir(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / "run")


def make_set(root, classes=SHADES, counts=(("train", 4), ("val", 2))):
  """ROOT/<split>/<class>/<number>.png: squares of a class's shade that differ a little."""
  rng = np.random.RandomState(0)
  for split, count in counts:
    for name, shade in classes.items():
      folder = os.path.join(os.fsencode(root), os.fsencode(split), os.fsencode(name))
      os.makedirs(folder, exist_ok=True)
      for i in range(count):
        pixels = np.uint8(np.clip(rng.normal(shade, 4, (12, 12, 3)), 0, 255))
        Image.fromarray(pixels).save(os.fsdecode(os.path.join(folder, b"%d.png" % i)))
  return root


def score(task, workdir, *flags):
  """Runs a scoring task without baselines and few labels, returns its status."""
  command = [f"--config=configs/{task}.py", f"--config.pretrained={workdir}"]
  quick = QUICK if task == "knn" else QUICK[:2]
  return main.main([*command, *quick, *flags])


def stored(workdir, name):
  return json.loads((workdir / "eval" / name).read_text())


def test_the_folder_that_was_asked_for_is_scored(workdir, tmp_path, capsys):
  """kNN, the probe and embed after digits: the folder is read, and said before any work."""
  folder = make_set(tmp_path / "shades")
  flag = f"--config.data.dir={folder}"
  assert score("knn", workdir, flag) == score("linear:small".replace(":small", ""), workdir, flag,
    "--config.recipe=lbfgs") == 0  # fmt: skip
  said = capsys.readouterr().out
  assert f"reads folder {folder}/train, split train: 12 images, 3 classes, seen at 8 px" in said
  assert f"reads folder {folder}/val, split val: 6 images, 3 classes, seen at 8 px" in said
  facts = stored(workdir, "knn-shades-val-3.json")
  assert (facts["train_images"], facts["test_images"], facts["own"]) == (12, 6, False)
  assert facts["results"]["trained"]["all"] == 1.0
  probe = np.load(workdir / "eval" / "linear-shades-val-3.npz")
  assert list(probe["classes"]) == ["dark", "light", "middle"] and probe["kernel"].shape[1] == 3
  assert main.main(["--config=configs/embed.py", f"--config.pretrained={workdir}", flag]) == 0
  found = np.load(workdir / "embeddings-shades-train-3.npz")
  assert len(found["features"]) == 12 and found["names"][0] == "dark/0.png"
  assert [found["classes"][i] for i in found["labels"][[0, 4, 8]]] == ["dark", "light", "middle"]


def test_nothing_of_one_source_is_applied_to_another(workdir, tmp_path, capsys):
  """A pre-training on arrays with ten classes and a split named test; the other set has neither."""
  folder = make_set(tmp_path / "shades")
  data = json.loads((workdir / "config.json").read_text())
  data["config"]["data"] |= {"num_classes": 2, "labels": False, "max_bad_fraction": 0.5}
  (workdir / "config.json").write_text(json.dumps(data))
  flags = ["--config.data.source=folder", f"--config.data.dir={folder}"]
  assert score("knn", workdir, *flags, "--config.data.max_bad_fraction=0") == 0
  assert stored(workdir, "knn-shades-val-3.json")["identity"]["data"]["test"]["classes"] == 3
  assert score("knn", workdir) == 2  # its own digits, whose labels were to be forgotten
  assert "config.data.labels=False" in capsys.readouterr().err
  assert score("knn", workdir, "--config.data.labels=True", "--config.data.num_classes=0") == 0
  (folder / "val" / "dark" / "0.png").write_bytes(b"no image")
  assert score("knn", workdir, *flags, "--config.data.max_bad_fraction=0") == 3


def test_a_run_whose_source_gave_way_keeps_its_own_data(tmp_path):
  """Asked for digits, read as a folder: only another kind than that folder's makes it another data set."""
  folder, workdir = str(make_set(tmp_path / "shades")), str(tmp_path / "run")
  own = {"data__dir": folder, "data__test_split": "mine", "data__num_classes": 3}
  config = settings.tiny_config(**own)
  open_workdir(workdir, config.to_dict(), {}, ())
  read = lambda **given: frozen.run_config(workdir, given).data
  for given in (
    {},
    {"loader": "pipeline"},
    {"labels": True},
    {"source": "folder"},
    {"source": "digits"},
  ):
    assert (read(**given).dir, read(**given).test_split) == (folder, "mine"), given
  assert "folder, 9 images" in card_of(
    workdir, {"num_examples": 9, "fill_steps": 0, "steps_per_epoch": 1}
  )
  moved = read(dir=f"{folder}/train")
  assert (moved.test_split, moved.num_classes) == ("mine", 0)
  np.savez(tmp_path / "x.npz", train_images=np.zeros((2, 8, 8, 3), np.uint8))
  for given in ({"source": "npz"}, {"dir": str(tmp_path / "x.npz")}):
    data = read(**given)
    assert (data.dir, data.test_split, data.num_classes) == (given.get("dir", ""), "val", 0)


def card_of(workdir, plan):
  with open(os.path.join(workdir, "plan.json"), "w") as file:
    json.dump(plan, file)
  return card.origin(workdir, frozen.run_config(workdir), 5)[-1]


def test_the_newest_checkpoint_is_of_the_config_before_an_extension(workdir, tmp_path, capsys):
  """Until the extended run has saved: mean and size are those that it was trained with."""
  path = str(tmp_path / "extended")
  config = settings.tiny_config()
  open_workdir(path, config.to_dict(), {}, ())
  os.makedirs(os.path.join(path, "checkpoints", "22"))
  later = config.to_dict() | {"eval": config.eval.to_dict() | {"size": 32}}
  record_extension(path, [("eval.size", 8, 32)], later, {}, 22)
  assert [frozen.run_config(path, step=step).eval.size for step in (0, 22)] == [8, 8]
  os.makedirs(os.path.join(path, "checkpoints", "23"))
  assert [frozen.run_config(path, step=step).eval.size for step in (0, 22)] == [32, 8]
  facts = json.loads((workdir / "config.json").read_text())
  facts["history"] = [{"step": 2, "changes": [["eval.size", 16, 8]]}]
  (workdir / "config.json").write_text(json.dumps(facts))
  shutil.rmtree(workdir / "checkpoints" / "3" / "state")
  assert score("knn", workdir) == 2
  assert "config.step=0: the newest intact checkpoint, 2, is of before" in capsys.readouterr().err


def test_scores_follow_labels_and_files(workdir, tmp_path, capsys):
  """Two label folders swapped, images deleted: another result each time, none shown for another."""
  folder = make_set(tmp_path / "shades")
  flags = [f"--config.data.dir={folder}"]
  assert score("knn", workdir, *flags) == 0
  before = capsys.readouterr().out
  assert score("knn", workdir, *flags) == 0
  again = capsys.readouterr().out
  assert "features of" in before and "features of" not in again and "1.000" in again
  for a, b in (("dark", "x"), ("light", "dark"), ("x", "light")):
    os.rename(folder / "val" / a, folder / "val" / b)
  os.rename(folder / "val" / "middle" / "0.png", folder / "val" / "middle" / "9.png")
  assert score("knn", workdir, *flags) == 0
  assert stored(workdir, "knn-shades-val-3-2.json")["results"]["trained"]["all"] == pytest.approx(
    1 / 3
  )
  shutil.rmtree(folder / "val" / "dark")
  assert score("knn", workdir, *flags) == 0
  assert stored(workdir, "knn-shades-val-3-3.json")["test_images"] == 4
  os.rename(folder / "val" / "light", folder / "val" / "bright")
  assert score("knn", workdir, *flags) == 2
  error = capsys.readouterr().err
  assert "test_split='val': shades has classes that train lacks: ['bright']" in error
  assert stored(workdir, "knn-shades-val-3.json")["results"]["trained"]["all"] == 1.0


def test_identity_has_labels_class_names_and_sizes_of_files(tmp_path):

  from adco_jax.data.sources import load_source

  folder = make_set(tmp_path / "shades")
  facts = lambda: scored_data.describe(load_source("folder", str(folder), "val"))
  first = facts()
  assert first == facts() and {"labels", "class_names", "sizes", "checksum"} <= set(first)
  (folder / "val" / "dark" / "0.png").write_bytes(b"longer than it was" * 99)
  assert {k for k, v in facts().items() if v != first[k]} == {"sizes"}


def test_no_score_hides_another(workdir, tmp_path, capsys):
  """Own and foreign data, two steps, two protocols: console, page and card show all, apart."""
  folder = make_set(tmp_path / "shades")
  assert score("knn", workdir) == score("knn", workdir, "--config.step=2") == 0
  few = ["--config.labels_per_class=(1,)", "--config.draws=2"]
  assert score("knn", workdir, *few) == score("knn", workdir, f"--config.data.dir={folder}") == 0
  old = {"task": "knn", "step": 1, "config": {"draws": 10, "labels_per_class": [1]}, "train_images": 9,
         "test_images": 7, "results": {"trained": {"all": 0.123}}, "chosen": {"trained": {"k": 5}}}  # fmt: skip
  (workdir / "eval" / "knn-1.json").write_text(json.dumps(old))
  (workdir / "eval" / "notes.json").write_text("[1]")  # a user's own
  capsys.readouterr()
  report.show_scores(str(workdir))
  said = capsys.readouterr().out
  own, other, unknown = (said.index(text) for text in results.SECTIONS.values())
  foreign, digits = said.index("kNN on shades, split val"), said.index("kNN on digits, split test")
  assert own < digits < other < foreign < unknown < said.index("0.123")
  assert said.index("step 3, 500 test") < said.index("step 2, 500 test")
  assert said.count("kNN on digits, split test") == 3 and "2 draws of few labels" in said
  report.write_report(str(workdir))
  page = (workdir / "report.html").read_text()
  assert page.count("kNN on digits, split test") == 3 and "kNN on shades, split val" in page
  lines = "\n".join(card.scores(str(workdir), 3, "query"))
  assert lines.count("kNN on digits") == 2 and "On other data" in lines and "0.123" not in lines
  assert "query encoder" in card.scores(str(workdir), 3, "key")[0]


def test_earlier_checkpoints(workdir, tmp_path, capsys):
  assert score("knn", workdir, "--config.step=2") == 0
  assert stored(workdir, "knn-digits-test-2.json")["step"] == 2
  for task in ("knn", "linear", "embed", "export"):
    flags = [f"--config=configs/{task}.py", f"--config.pretrained={workdir}", "--config.step=7"]
    assert main.main(flags) == 2
    error = capsys.readouterr().err
    assert "config.step=7: no such checkpoint" in error and "there are 2, 3" in error


@pytest.mark.parametrize("task, flags, text", [
  ("knn", ["--config.labels_per_class=(1,5)"], "labels_per_class=(1, 5): class dark has only 4 train images; use (1,)"),
  ("embed", ["--config.out=/nodir/x.npz"], "config.out='/nodir/x.npz': no folder /nodir"),
  ("embed", ["--config.out=x.txt"], "ends in .npz or .parquet"),
])  # fmt: skip
def test_what_can_be_known_is_refused_before_work(workdir, tmp_path, capsys, task, flags, text):
  command = [f"--config=configs/{task}.py", f"--config.pretrained={workdir}"]
  data = f"--config.data.dir={make_set(tmp_path / 'shades')}"
  assert main.main([*command, data, *flags]) == 2
  said = capsys.readouterr()
  assert text in said.err and "features of" not in said.out


def test_names_that_are_not_utf8(workdir, tmp_path, capsys):
  """Parquet refuses them before any work, .npz keeps them."""
  folder = make_set(tmp_path / "odd", {os.fsdecode(b"caf\xe9"): 20, "tea": 200})
  flags = [
    "--config=configs/embed.py",
    f"--config.pretrained={workdir}",
    f"--config.data.dir={folder}",
  ]
  assert main.main([*flags, f"--config.out={tmp_path}/x.parquet"]) == 2
  assert "not; rename it, or write .npz" in capsys.readouterr().err
  assert main.main(flags) == main.main(flags) == 0  # the second beside the first
  found = np.load(workdir / "embeddings-odd-train-3-2.npz")
  assert os.fsencode(found["names"][0]) == b"caf\xe9/0.png"
  assert score("knn", workdir, flags[-1]) == 0


def test_features_that_cannot_be_written_are_kept_elsewhere(tmp_path):
  columns = {"features": np.ones((2, 3), np.float32), "names": np.array(["a", "b"])}
  with pytest.raises(RunError, match="the features are in") as error:
    embed.save(str(tmp_path / "gone" / "x.npz"), columns)
  spare = str(error.value).split(" are in ")[1]
  assert np.load(spare)["features"].sum() == 6


def test_what_was_scored_stays_when_the_rest_fails(workdir, monkeypatch, capsys):
  """The trained encoder's score is on file when raw pixels fail; the next call goes on from there."""
  from adco_jax.evaluation import features

  def fail(mesh):
    raise MemoryError("pixels")

  command = ["--config=configs/knn.py", f"--config.pretrained={workdir}", *QUICK[1:]]
  with monkeypatch.context() as patch:
    patch.setattr(features, "make_pixels", lambda mesh: lambda images: fail(mesh))
    assert main.main(command) == 1
  facts = stored(workdir, "knn-digits-test-3.json")
  assert list(facts["results"]) == ["trained", "untrained"]
  capsys.readouterr()
  assert main.main(command) == 0
  said = capsys.readouterr().out
  assert "pixels: " in said and "images, trained: " not in said
  assert list(stored(workdir, "knn-digits-test-3.json")["results"]) == [
    "trained",
    "untrained",
    "pixels",
  ]


def test_long_recipe_names_the_short_one(workdir, capsys):
  assert score("linear", workdir, "--config.sgd.epochs=1") == 0
  said = capsys.readouterr().out
  assert said.index("linear.py:small") < said.index("features of")
  assert "SGD over 1 epochs of crops" in said
