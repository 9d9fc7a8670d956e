"""One tiny encoder scored and embedded on made-up folders: what is read, filed, found again, refused and kept."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from adco_jax import encoders, main
from adco_jax.config import config_files
from adco_jax.data import order
from adco_jax.data.sources import files
from adco_jax.data.sources.loading import Source, load_source
from adco_jax.encoders import with_data
from adco_jax.errors import RunError
from adco_jax.evaluation import results
from adco_jax.report import card, report, sheets
from adco_jax.tasks import embed, evaluate, probes, scored_data, scoring
from adco_jax.workdir.opening import open_workdir, record_extension
from tests import settings  # has the network `tiny`

TINY = [
  "--config=configs/adco_digits.py", "--config.model.arch=tiny", "--config.model.width=0.125",
  "--config.data.batch_size=64", "--config.bn.group_size=8", "--config.method.bank.size=64", "--config.epochs=1",
  "--config.eval.every_epochs=0", f"--config.views.crops={settings.CROPS['single']}", "--config.eval.size=8",
  "--config.method.bank.init=random", "--config.stop_at_step=3", "--config.save.every_steps=2",
]  # fmt: skip
QUICK = [
  "--config.baselines=False",
  "--config.labels_per_class=()",
  "--config.neighbours=0",
  "--config.map=0",
]
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
  name, colon, preset = task.partition(":")
  command = [f"--config=configs/{name}.py{colon}{preset}", f"--config.pretrained={workdir}"]
  quick = QUICK if name == "knn" else QUICK[:2]
  return main.main([*command, *quick, *flags])


def stored(workdir, name):
  return json.loads((workdir / "eval" / name).read_text())


def test_the_folder_that_was_asked_for_is_scored(workdir, tmp_path, capsys):
  """kNN, the probe and embed after digits: the folder is read, and said before any work."""
  folder = make_set(tmp_path / "shades")
  flag = f"--config.data.dir={folder}"
  assert score("knn", workdir, flag) == score("linear:small", workdir, flag) == 0  # fmt: skip
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
  read = lambda **given: encoders.run_config(workdir, given).data
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
  return card.origin(workdir, encoders.run_config(workdir), 5)[-1]


def test_the_newest_checkpoint_is_of_the_config_before_an_extension(workdir, tmp_path, capsys):
  """Until the extended run has saved: mean and size are those that it was trained with."""
  path = str(tmp_path / "extended")
  config = settings.tiny_config()
  open_workdir(path, config.to_dict(), {}, ())
  os.makedirs(os.path.join(path, "checkpoints", "22"))
  later = config.to_dict() | {"eval": config.eval.to_dict() | {"size": 32}}
  record_extension(path, [("eval.size", 8, 32)], later, {}, 22)
  assert [encoders.run_config(path, step=step).eval.size for step in (0, 22)] == [8, 8]
  os.makedirs(os.path.join(path, "checkpoints", "23"))
  assert [encoders.run_config(path, step=step).eval.size for step in (0, 22)] == [32, 8]
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
  average = json.loads((workdir / "eval" / "knn-1.json").read_text()) | {
    "step": 3,
    "encoder": "key",
  }
  (workdir / "eval" / "finetune-3.json").write_text(json.dumps(average | {"task": "finetune"}))
  for encoder, other, count in (("query", "key", 1), ("key", "query", 3)):
    lines = "\n".join(card.scores(str(workdir), 3, encoder))
    assert lines.count(f"This is of the {other} encoder") == count and "These are" not in lines


def test_earlier_checkpoints(workdir, capsys):
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


def test_what_is_missing_beside_a_result_is_made_again(tmp_path, monkeypatch):
  """The sheet gains what was computed later, with fewer than five train images too; a probe that was deleted."""
  drawn, computed, labels = [], [], np.array([0, 1, 0, 1])
  loader = SimpleNamespace(reader=SimpleNamespace(broken={}))
  source = SimpleNamespace(labels=labels, targets=labels, classes=("a", "b"), num_examples=4)
  describe = {"name": "few", "split": "val", "images": 4}
  frozen = SimpleNamespace(
    tokens="pooled", forms={}, attend=None, workdir=str(tmp_path), own=False, step=3, place="", train=source, test=source, loaders=SimpleNamespace(of=lambda part: loader, broken=dict),
    identity={"data": {"train": describe, "test": describe}, "view": {"size": 8, "fraction": 1.0}, "checkpoint": {"step": 3, "fingerprint": "f"}},
  )  # fmt: skip

  def represent(frozen, config, there):
    features = np.eye(4, 6, dtype=np.float32)
    for name in ("trained", "untrained")[: 1 + config.baselines]:
      if name not in there:
        computed.append(name)
        yield name, scoring.Scored(features, features)

  monkeypatch.setattr(evaluate, "load", lambda config: frozen)
  monkeypatch.setattr(evaluate, "representations", represent)
  probe = {"kernel": np.ones((6, 2)), "bias": np.zeros(2)}
  monkeypatch.setitem(evaluate.probes.RECIPES, "lbfgs", lambda *_: (probe, {}))
  monkeypatch.setattr(evaluate, "save_neighbours", lambda path, *_: drawn.append(open(path, "w")))
  config = config_files.load("knn")
  config.labels_per_class = ()
  for config.baselines in (False, True, True):
    evaluate.run_knn(config)
  assert len(drawn) == 2 and computed == ["trained", "untrained"]
  config = config_files.load("linear:small")
  config.labels_per_class, computed[:] = (), []
  for _ in range(2):
    evaluate.run_linear(config)
    (file,) = (tmp_path / "eval").glob("*.npz")
    assert np.load(file)["fingerprint"] == "f" and np.load(file)["step"] == 3
    os.remove(file)
  assert computed == ["trained", "untrained", "trained"]


def test_features_are_encoded_once(workdir, capsys):
  """knn's are linear's; others' are not taken; those that are too many for memory score the same."""
  assert score("knn", workdir) == 0
  said = capsys.readouterr().out
  assert said.count("features of") == 2 and "as kept" not in said
  assert score("linear:small", workdir) == 0
  assert capsys.readouterr().out.count("as kept in") == 2
  assert score("linear:small", workdir, "--config.size=12") == 0
  assert "as kept" not in capsys.readouterr().out
  assert score("knn", workdir, "--config.step=2") == 0
  assert "as kept" not in capsys.readouterr().out
  exact = stored(workdir, "knn-digits-test-3.json")["results"]
  for folder in ("eval", "features"):
    shutil.rmtree(workdir / folder)
  large = ["--config.features.memory_gigabytes=1e-6", "--config.features.keep_gigabytes=0"]
  assert score("knn", workdir, *large) == 0 and not os.listdir(workdir / "features")
  assert stored(workdir, "knn-digits-test-3.json")["results"] == exact
  shutil.rmtree(workdir / "eval")
  assert score("knn", workdir) == 0
  kept = sorted((workdir / "features").iterdir())
  kept[0].write_bytes(kept[0].read_bytes()[:100])
  shutil.rmtree(workdir / "eval")
  assert score("knn", workdir) == 0
  assert stored(workdir, "knn-digits-test-3.json")["results"] == exact


def test_what_the_head_makes_of_features(workdir):
  assert (
    score(
      "knn", workdir, "--config.projected=True", "--config.recall=(1, 4)", "--config.neighbours=2"
    )
    == 0
  )
  found = stored(workdir, "knn-digits-test-3.json")["results"]
  assert list(found) == ["trained", "projected"] and found["trained"] != found["projected"]
  assert list(found["projected"]) == ["all", "recall@1", "recall@4"]
  assert found["trained"]["recall@1"] <= found["trained"]["recall@4"]
  assert list(stored(workdir, "knn-digits-test-3.json")["neighbours"]) == ["trained"]


def test_a_head_that_nobody_trained_is_not_scored(workdir, tmp_path, capsys):
  """That of imported weights that had none, and of a run on labels."""
  facts = json.loads((workdir / "plan.json").read_text())
  (workdir / "plan.json").write_text(
    json.dumps(
      facts | {"imported": {"file": "a.pth", "query": "", "key": "", "epoch": 0, "head": False}}
    )
  )
  assert score("knn", workdir, "--config.projected=True") == 0  # trained on from there
  shutil.rmtree(workdir / "checkpoints" / "2")
  (workdir / "checkpoints" / "3").rename(workdir / "checkpoints" / "0")
  config = main.parse(
    [
      *(flag for flag in TINY if "method." not in flag),
      "--config.objective=supervised",
      "--config.views.mode=one",
      "--config.views.crops=((8,.5,1.),)",
    ]
  )[0]
  settings.save_run(tmp_path / "labels", config, step=3)
  export = [
    "--config=export",
    "--config.format=npz",
    f"--config.pretrained={workdir}",
    f"--config.out={tmp_path}/a.npz",
  ]
  assert main.main(export) == 0
  for place in (workdir, tmp_path / "labels", tmp_path / "a.npz"):
    assert score("knn", place, "--config.projected=True") == 2
    assert f"the projection of {place} was never trained; use False" in capsys.readouterr().err


def test_a_list_of_train_images_goes_with_their_split_alone():
  data = config_files.load("adco_digits").data.to_dict()
  data |= {"subset": "list.txt", "source": "folder", "dir": "a"}
  subset = lambda **given: with_data(ConfigDict({"data": data}), given).data.subset
  assert subset() == subset(split="train") == "list.txt" == subset(labels=False)
  assert subset(split="test") == subset(name="b") == "" and subset(split="test", subset="c") == "c"
  assert (
    subset(dir="b") == "list.txt"
  )  # the folder may have moved; one that it does not fit is refused


def test_a_sweep_never_learns_from_held_out_images(workdir, monkeypatch):
  """Weights of the batches are 0 for these images, all of them, and for no other."""
  seen, fit, crop = [], probes.sweep.fit, probes.cropped_features

  def cropped(*given):
    for features, labels, indices in crop(*given):
      seen.append([indices])
      yield features, labels, indices

  def fitted(batches, *given, **more):
    def watched():
      for features, labels, weights in batches:
        seen[-1].append(weights)
        yield features, labels, weights

    return fit(watched(), *given, **more)

  monkeypatch.setattr(probes, "cropped_features", cropped)
  monkeypatch.setattr(probes.sweep, "fit", fitted)
  flags = ["--config.sgd.epochs=1", "--config.sweep.learning_rates=(0.3,)", "--config.sweep.crops=(1.0,)"]  # fmt: skip
  assert score("linear:sweep", workdir, *flags, "--config.batch_size=64") == 0
  indices, weights = (np.concatenate(column) for column in zip(*seen, strict=True))
  held_out = order.hold_out(0, 1297, 0.1)[1]
  assert len(indices) == 1280 and np.array_equal(weights == 0, np.isin(indices, held_out))


def test_the_best_of_a_sweep_is_chosen_on_held_out_images(workdir, capsys):
  """All that was tried is told, and the probe that is stored is the best one's; a rate of 0 learns nothing and is never it."""
  flags = ["--config.sgd.epochs=2", "--config.sweep.learning_rates=(0.0, 0.3, 3.0)", "--config.sweep.crops=(0.6, 1.0)"]  # fmt: skip
  assert score("linear:sweep", workdir, *flags, "--config.batch_size=64") == 0
  facts = stored(workdir, "linear-digits-test-3.json")
  chosen = facts["chosen"]["trained"]
  assert len(chosen["tried"]) == 3 * 2 * 2
  assert chosen["held-out"] == max(x["held-out"] for x in chosen["tried"]) and chosen["rate"] > 0
  still = {x["held-out"] for x in chosen["tried"] if x["rate"] == 0 and x["features"] == "scaled"}
  assert len(still) == 1  # crops do not matter to what does not move
  assert "the best on held-out train images of 12 SGDs" in capsys.readouterr().out
  scores, counts = facts["results"]["trained"], np.array(facts["confusion"]["trained"])
  assert counts.sum() == 500 and np.trace(counts) / 500 == pytest.approx(scores["all"])
  assert scores["top5"] > scores["all"] and "mean" in scores
  assert "<summary>Confusion of classes" in (workdir / "report.html").read_text()


def test_classes_of_one_split_are_said(workdir, tmp_path, capsys):
  folder = make_set(tmp_path / "shades")
  shutil.rmtree(folder / "val" / "light")
  assert score("knn", workdir, f"--config.data.dir={folder}") == 0
  said = capsys.readouterr().out
  assert "split val has no image of 1 of the classes of train: light" in said


def test_one_train_image_is_refused(workdir, tmp_path, capsys):
  folder = make_set(tmp_path / "one", {"dark": 20}, (("train", 1), ("val", 1)))
  assert score("knn", workdir, f"--config.data.dir={folder}") == 2
  assert "has one train image" in capsys.readouterr().err
  for share in (0.1, 0.5, 0.9):
    assert [len(part) for part in order.hold_out(0, 2, share)] == [1, 1]


def test_test_images_among_the_train_images_are_refused(tmp_path):
  """A test folder inside of what is learnt from, shards in two splits; not another folder with the same names."""
  folder = make_set(tmp_path / "all", counts=(("", 1), ("test", 1)))
  both = [load_source("folder", str(folder), split) for split in (".", "test")]
  assert scored_data.share_images(*both) and scored_data.share_images(*reversed(both))
  other = load_source("folder", str(make_set(tmp_path / "other", counts=(("test", 1),))), "test")
  assert other.identity() == both[1].identity() and not scored_data.share_images(both[1], other)
  shards = lambda *names: files.Ranges(names, np.zeros(1, int), np.zeros(1, int), np.ones(1, int))
  source = lambda *names: Source("x", None, shards(*names), None, ())
  assert scored_data.share_images(source("a.tar", "b.tar"), source("b.tar"))
  assert not scored_data.share_images(source("a.tar"), source("b.tar"))


@pytest.mark.parametrize("linked", ["a file", "a class"])
def test_test_images_that_are_links_to_train_images_are_refused(tmp_path, linked):
  root = make_set(tmp_path / "data")
  train, val = root / "train" / "dark", root / "val" / "dark"
  if linked == "a class":
    shutil.rmtree(val)
    val.symlink_to(train)
  else:
    (val / "more.png").symlink_to(next(train.iterdir()))
  both = [load_source("folder", str(root), split) for split in ("train", "val")]
  assert scored_data.share_images(*both) and scored_data.share_images(*reversed(both))
  apart = load_source("folder", str(make_set(tmp_path / "apart")), "val")
  assert not scored_data.share_images(both[0], apart)


def test_own_data_is_what_the_run_was_trained_on(workdir):
  config = config_files.load("knn")
  digits = [load_source("digits", "", split) for split in ("train", "test")]
  assert [scored_data.is_own(str(workdir), config, source) for source in digits] == [True, False]


def stored_result(**more):
  view = {"size": more.pop("size", 16), "fraction": 0.875}
  data = {"train": {"split": "train"}, "test": {"name": "images", "split": "val"}}
  protocol = {"seed": more.get("seed", 0), "place": more.get("place")}
  facts = {"task": "knn", "step": 3, "own": True, "test_images": 6, "train_images": 12, "chosen": {"trained": {"k": 1}},
           "identity": {"data": data, "view": view, "protocol": protocol}, "results": {"trained": {"all": 0.5}}}  # fmt: skip
  return facts | {"config": {"seed": more.pop("seed", 0)}} | more


def test_different_results_look_different(tmp_path):
  """Side, seed, place, and what of the protocol is not as in our configs; each has its sheet on the page."""
  config = config_files.load("linear:small")
  config.hold_out, config.seed, config.data.label_key = 0.5, 3, "fine"
  assert scoring.unusual(config) == {"hold_out": 0.5, "data.label_key": "fine"}
  kinds = [
    {},
    {"size": 32},
    {"seed": 1},
    {"unusual": {"hold_out": 0.5}},
    {"place": "folder /a/images"},
  ]
  kinds.append({"place": "folder /b/images"})
  (tmp_path / "eval").mkdir()
  for number, more in enumerate(kinds):
    path = str(tmp_path / "eval" / f"knn-images-val-3-{number}.json")
    results.write(path, stored_result(**more))
    Image.new("RGB", (9, 9)).save(results.picture_of(path))
  found = results.read_all(str(tmp_path))
  assert len({results.caption(facts) for facts in found}) == len(kinds)
  assert "seen at 32 px (0.875 of the short side), k 1, seed 0" in results.caption(
    stored_result(size=32)
  )
  page = sheets.neighbours(str(tmp_path))
  assert page.count("<img") == 5  # one had the same protocol, and another only an unusual key
  assert page.count("/b/images") == 1


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"results": {"trained": 5}, "step": 1}', '{"results": 7, "step": "x"}'])  # fmt: skip
def test_a_file_that_is_no_result_is_named_and_left(tmp_path, capsys, content):
  (tmp_path / "eval").mkdir()
  path = tmp_path / "eval" / "knn-x-val-3.json"
  path.write_text(content)
  assert results.read_all(str(tmp_path)) == []
  assert f"{path}: holds no result" in capsys.readouterr().out
  assert results.find(str(tmp_path), "knn", "x-val", 3, {})[0].endswith("knn-x-val-3-2.json")
  assert path.read_text() == content


def test_tasks_at_the_same_time_have_a_file_each(tmp_path, capsys):
  """Two that begin before either has a score; the same one again finds its own, and what is empty is shown nowhere."""
  begun = [stored_result(seed=seed) | {"results": {}} for seed in (0, 1)]
  paths = [results.begin(str(tmp_path), "x-val", facts)[0] for facts in begun]
  assert len({*paths}) == 2 and results.begin(str(tmp_path), "x-val", begun[0])[0] == paths[0]
  assert results.read_all(str(tmp_path)) == [] and capsys.readouterr().out == ""
  for path, facts in zip(paths, begun, strict=True):
    results.write(path, facts | {"results": {"trained": {"all": 0.5}}})
  assert {facts["path"] for facts in results.read_all(str(tmp_path))} == {*paths}


def test_features_of_two_at_once_are_both_kept(tmp_path):
  """Both saw the same free name."""
  names = iter(["a.npz", "b.npz"])
  (tmp_path / "a.npz").write_bytes(b"of another task")
  path = embed.save(lambda: str(tmp_path / next(names)), {"features": np.zeros((1, 2))})
  assert path.endswith("b.npz") and (tmp_path / "a.npz").read_bytes() == b"of another task"


def test_names_of_files_have_room():
  long = [scored_data.file_name("x" * 300 + end, "train") for end in "ab"]
  assert len({*long}) == 2 and all(len(name) <= 150 for name in long)
  assert scored_data.file_name("a b", "train") == "a-b-train"


def test_long_recipe_names_the_short_one(workdir, capsys):
  assert score("linear", workdir, "--config.sgd.epochs=1") == 0
  said = capsys.readouterr().out
  assert said.index("linear.py:small") < said.index("features of")
  assert "SGD over 1 epochs of crops" in said


def test_a_map_is_drawn_once_and_hides_no_other(workdir, tmp_path, capsys):
  """Beside its result, again only when it is lost or of another number of images; another data set has its own."""
  folder = make_set(tmp_path / "shades", counts=(("train", 4), ("val", 5)))
  flags = [f"--config.data.dir={folder}", "--config.map=12"]
  path = workdir / "eval" / "map-shades-val-3.png"
  assert score("knn", workdir, *flags) == 0
  assert "map of 12 test images, trained" in capsys.readouterr().out
  first = path.read_bytes()
  written = os.stat(path).st_mtime_ns
  assert score("knn", workdir, *flags) == 0 and os.stat(path).st_mtime_ns == written
  assert "features of" not in capsys.readouterr().out
  result = (workdir / "eval" / "knn-shades-val-3.json").read_bytes()
  path.unlink()
  assert score("knn", workdir, *flags) == 0 and path.read_bytes() == first
  assert (workdir / "eval" / "knn-shades-val-3.json").read_bytes() == result
  other = make_set(
    tmp_path / "more" / "shades",
    classes={"dark": 40, "light": 90},
    counts=(("train", 4), ("val", 9)),
  )
  assert score("knn", workdir, f"--config.data.dir={other}", "--config.map=12") == 0
  assert path.read_bytes() == first and (workdir / "eval" / "map-shades-val-3-2.png").exists()
  assert score("knn", workdir, *flags[:1], "--config.map=9") == 0 and path.read_bytes() != first
  report.write_report(str(workdir))
  page = (workdir / "report.html").read_text()
  assert page.count("<h2>Map: kNN on") == 2 and page.index("<h2>Map") > page.index("<h2>")
