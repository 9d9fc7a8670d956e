"""Average precision by hand, by brute force and as scikit-learn has it; SVMs; and the task on sets in VOC's form and as CSV."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from adco_jax import build, main
from adco_jax.config import config_files
from adco_jax.data.sources.loading import load_source
from adco_jax.evaluation import average_precision, results, svm
from adco_jax.report import report
from adco_jax.views import crops
from tests import settings

# Average precision.

BY_HAND = [  # presence, scores, area, summed, eleven points
  ([1, 0, 1, 0], [4, 3, 2, 1], 5 / 6, 5 / 6, (6 * 1 + 5 * 2 / 3) / 11),
  # Precision 1/2 at the first positive, 2/3 at the second: the area takes the better one for both.
  ([0, 1, 1, 0], [4, 3, 2, 1], 2 / 3, 7 / 12, 2 / 3),
  # The difficult image, which is first, is as if it were not there.
  ([-1, 1, 0, 1], [9, 4, 3, 2], 5 / 6, 5 / 6, (6 + 10 / 3) / 11),
  # All alike: one threshold, whose precision is the share of positives.
  ([1, 0, 0, 1, 0], [7, 7, 7, 7, 7], 2 / 5, 2 / 5, 2 / 5),
  # A tie of both kinds after a positive: thresholds 1/1 and 2/3.
  ([1, 1, 0, 0], [5, 3, 3, 1], 5 / 6, 5 / 6, (6 + 10 / 3) / 11),
  ([1, 1], [2, 1], 1, 1, 1),
  ([0, 0, 1], [3, 2, 1], 1 / 3, 1 / 3, 1 / 3),
  # Ten positives in turn with others: 3 of 10 are found at a recall of .3, which is a point of the eleven.
  ([1, 0] * 10, np.arange(20)[::-1], None, None, None),
]


@pytest.mark.parametrize("presence, scores, area, summed, eleven", BY_HAND[:-1])
def test_average_precision_by_hand(presence, scores, area, summed, eleven):
  presence, scores = np.array(presence, np.int8), np.array(scores, float)
  assert average_precision.area(presence, scores) == pytest.approx(area, abs=1e-15)
  assert average_precision.summed(presence, scores) == pytest.approx(summed, abs=1e-15)
  assert average_precision.eleven_points(presence, scores) == pytest.approx(eleven, abs=1e-15)


def test_points_of_recall_are_whole_tenths():
  """VOC's .3 is 3 of 10, though .1 * 3 > .3 in floating numbers."""
  presence, scores = np.array(BY_HAND[-1][0], np.int8), np.array(BY_HAND[-1][1], float)
  precision = [k / (2 * k - 1) for k in range(1, 11)]  # at each positive
  wanted = np.mean([1, *precision])
  assert average_precision.eleven_points(presence, scores) == pytest.approx(wanted, abs=1e-15)


def test_without_a_positive_there_is_none():
  for presence in ([0, 0], [-1, 0], [-1, -1], []):
    for score in (
      average_precision.area,
      average_precision.summed,
      average_precision.eleven_points,
    ):
      assert np.isnan(score(np.array(presence, np.int8), np.arange(len(presence), dtype=float)))


def vissl_area(targets, scores):
  """As VISSL defines it, image by image in the order that `scores` is given in: precision made falling, times recall won."""
  hits = np.cumsum(targets)
  precision, recall = hits / np.arange(1, len(targets) + 1), hits / hits[-1]
  total, before = 0.0, 0.0
  for i in range(len(targets)):
    total += (recall[i] - before) * max(precision[i:])
    before = recall[i]
  return total


@pytest.mark.parametrize("size", [1, 2, 7, 200])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_average_precision_agrees_with_others(size, levels):
  """scikit-learn's sum; VISSL's area, which with ties depends on the order: ours is the worst order's."""
  from sklearn.metrics import average_precision_score

  for seed in range(20):
    rng = np.random.RandomState(seed)
    targets = (rng.rand(size) < 0.3).astype(np.int8)
    targets[rng.randint(size)] = 1
    scores = rng.randint(0, levels, size).astype(float)
    summed = average_precision.summed(targets, scores)
    assert summed == pytest.approx(average_precision_score(targets, scores), abs=1e-12)
    worst = np.lexsort((targets, -scores))
    area = average_precision.area(targets, scores)
    assert area == pytest.approx(vissl_area(targets[worst], scores[worst]), abs=1e-12)
    assert area >= summed - 1e-12
    hidden = np.append(targets, [-1] * 3).astype(np.int8), np.append(scores, [-1, 2, 1e9])
    assert average_precision.area(*hidden) == area


def test_no_order_of_equal_scores_is_worse():
  targets, scores = np.array([1, 0, 1, 0, 0, 1], np.int8), np.array([2, 2, 2, 1, 1, 1.0])
  orders = [np.array(order) for order in itertools.permutations(range(6))]
  orders = [order for order in orders if (np.diff(scores[order]) <= 0).all()]
  found = [vissl_area(targets[order], scores[order]) for order in orders]
  assert average_precision.area(targets, scores) == pytest.approx(min(found)) and min(found) < max(found)  # fmt: skip


# SVMs.


def problem(images=60, size=12, classes=3, seed=0):
  """(features, presence): noisy, with some images that do not count."""
  rng = np.random.RandomState(seed)
  presence = (rng.rand(images, classes) < 0.4).astype(np.int8)
  features = np.abs(rng.randn(images, size)) + presence @ np.abs(rng.randn(classes, size))
  presence[rng.rand(images, classes) < 0.1] = -1
  return svm.normalise(features), presence


def objective(w, features, wanted, cost, weight):
  """What scikit-learn's LinearSVC minimises, the bias penalised as a weight."""
  signs, weights = np.where(wanted, 1, -1), np.where(wanted, weight, 1)
  margins = np.maximum(0, 1 - signs * (features @ w[:-1] + w[-1]))
  return 0.5 * w @ w + cost * np.sum(weights * margins**2)


@pytest.mark.parametrize("size", [5, 12, 300])  # fewer features than images, and more
def test_an_svm_is_the_minimum_of_its_loss(size):
  from scipy.optimize import minimize

  features, presence = problem(images=40, size=size)
  wanted = presence[:, 0] == 1
  for cost, found in zip((0.1, 10.0), svm.fit(features, wanted, (0.1, 10.0), 2.0).T, strict=True):
    given = features, wanted, cost, 2.0
    best = minimize(objective, np.zeros(size + 1), given, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-9})  # fmt: skip
    assert objective(found, *given) == pytest.approx(best.fun, rel=1e-4)
    assert objective(found, *given) < 0.999 * objective(found * 1.1, *given)  # it does tell


@pytest.mark.parametrize("ignored_are_negatives", [True, False])
def test_costs_are_those_of_scikit_learn_s_cross_validation(ignored_are_negatives):
  """And what does not count is a negative, or is not there."""
  from sklearn.model_selection import cross_val_score
  from sklearn.svm import LinearSVC

  features, presence = problem()
  costs = (0.01, 1.0, 100.0)
  fitted = svm.fit_all(features, presence, svm.Setting(costs, 3, 2.0, ignored_are_negatives))
  for c in range(3):
    rows = np.arange(60) if ignored_are_negatives else np.flatnonzero(presence[:, c] >= 0)
    wanted, means = presence[rows, c] == 1, []
    for cost in costs:
      model = LinearSVC(C=cost, class_weight={True: 2.0, False: 1.0}, dual=False)
      means.append(cross_val_score(model, features[rows], wanted, cv=3, scoring="average_precision").mean())  # fmt: skip
    best = costs[int(np.argmax(means))]
    assert fitted.costs[c] == best
    model = LinearSVC(C=best, class_weight={True: 2.0, False: 1.0}, dual=False).fit(features[rows], wanted)  # fmt: skip
    assert np.allclose(fitted.scores(features)[:, c], model.decision_function(features), atol=1e-6)
  assert len(set(fitted.costs)) > 1


def test_draws_are_nested_and_hold_what_they_should():
  presence = problem(images=200)[1]
  few, more, other = (svm.draw(presence, k, 0, r) for k, r in ((4, 0), (8, 0), (4, 1)))
  for c in range(3):
    kinds = presence[few[c], c]
    assert (kinds == 1).sum() == 4 and (kinds == 0).sum() == 8 and len(set(few[c])) == 12
    assert set(few[c]) <= set(more[c]) and set(few[c]) != set(other[c])
  scarce = np.ones((10, 2), np.int8)
  scarce[:3] = 0
  assert [len(rows) for rows in svm.draw(scarce, 6, 0, 0)] == [
    9,
    9,
  ]  # as many negatives as there are


def test_the_cost_of_few_is_not_chosen_on_test_images():
  """Test images whose labels are turned round would have the worst cost, of theirs."""
  features, presence = problem(images=150)
  test, tested = problem(images=80, seed=1)
  setting = svm.Setting((1e-4, 1.0, 1e4))
  few = lambda truth: svm.fit_few(features, presence, test, truth, setting, positives=6, draws=3, seed=0)  # fmt: skip
  right, wrong = few(tested), few(np.where(tested >= 0, 1 - tested, -1).astype(np.int8))
  assert right["cost"] == wrong["cost"] and len(right["draws"]) == 3
  assert right["mean"] == pytest.approx(np.mean(right["draws"]))
  for found in (right, wrong):
    assert found["on_test"]["mean"] >= found["mean"]
  assert wrong["on_test"]["mean"] > wrong["mean"] or right["on_test"]["mean"] > right["mean"]


# The task.

SHADES = {"dark": 20, "light": 120, "bright": 220}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with drawn weights at step 3."""
  folder = tmp_path_factory.mktemp("svm") / "run"
  settings.save_run(str(folder), settings.tiny_config(data__num_examples=64), step=3)
  return folder


@pytest.fixture
def run(workdir, tmp_path):
  return shutil.copytree(workdir, tmp_path / "run")


def picture(path, kinds, rng):
  """Thirds of an image, each of a kind's shade or black."""
  image = np.zeros((12, 12, 3), np.uint8)
  for i, name in enumerate(SHADES):
    if name in kinds:
      image[:, 4 * i : 4 * i + 4, i] = np.clip(rng.normal(200, 20, (12, 4)), 0, 255)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def several(root, train=30, test=20):
  """A CSV set with any number of kinds per image; returns the truth of test."""
  rng, truth = np.random.RandomState(0), []
  for split, count in (("train", train), ("val", test)):
    lines = ["file,labels"]
    for i in range(count):
      kinds = [name for name in SHADES if rng.rand() < 0.5]
      picture(root / split / f"{i}.png", kinds, rng)
      lines.append(f"{split}/{i}.png,{';'.join(kinds)}")
      truth += [[name in kinds for name in SHADES]] if split == "val" else []
    (root / f"{split}.csv").write_text("\n".join(lines))
  return root


QUICK = ["--config.labels_per_class=(2,)", "--config.draws=2", "--config.costs=(.1,10.)", "--config.folds=2"]  # fmt: skip


def score(run, *flags, config="svm"):
  return main.main([f"--config={config}", f"--config.pretrained={run}", *QUICK, *flags])


def test_a_csv_is_scored_stored_and_shown(run, tmp_path, capsys):
  data = several(tmp_path / "kinds")
  flags = ["--config.data.source=csv", f"--config.data.dir={data}"]
  assert score(run, *flags) == 0
  said = capsys.readouterr().out
  assert f"reads csv {data}, split val: 20 images, 3 classes" in said
  assert "SVMs on kinds, split val: mean average precision; step 3, 20 test and 30 train images" in said  # fmt: skip
  facts = json.loads((run / "eval" / "svm-kinds-val-3.json").read_text())
  assert list(facts["results"]) == ["trained", "untrained", "pixels"]
  assert facts["results"]["pixels"]["all"] == 1.0  # the colours tell
  for kind, rows in facts["by_class"].items():
    assert set(rows) == set(SHADES)
    mean = np.mean([row["area"] for row in rows.values()])
    assert facts["results"][kind]["all"] == pytest.approx(mean)
    assert 0.3 < mean <= 1 and {"mean", "spread", "draws", "cost", "on_test"} <= set(facts["results"][kind]["2"])  # fmt: skip
  assert "mean of eleven points" in said and "bright" in said
  before = (run / "eval" / "svm-kinds-val-3.json").read_text()
  assert score(run, *flags) == 0 and "features of" not in capsys.readouterr().out  # as stored
  assert (run / "eval" / "svm-kinds-val-3.json").read_text() == before
  assert score(run, *flags, "--config.ignored_are_negatives=False", "--config.baselines=False") == 0
  assert len(results.read_all(str(run))) == 2 and "ignored_are_negatives False" in capsys.readouterr().out  # fmt: skip
  report.write_report(str(run))
  page = (run / "report.html").read_text()
  assert "<h3>SVMs on kinds, split val: mean average precision</h3>" in page
  assert "Average precision of classes" in page and "<tr><td>bright<td>" in page


def test_one_label_per_image_is_one_class_against_the_rest(run, capsys):
  """The pre-training's own digits; draws leave an image of a class."""
  assert score(run, "--config.baselines=False") == 0
  facts = json.loads((run / "eval" / "svm-digits-test-3.json").read_text())
  rows = facts["by_class"]["trained"].values()
  area, eleven = (np.mean([row[key] for row in rows]) for key in ("area", "eleven_points"))
  assert len(rows) == 10 and facts["results"]["trained"]["all"] == pytest.approx(area)
  assert 0.3 < area != pytest.approx(eleven) and f"{eleven:.3f}" in capsys.readouterr().out


def test_voc07_by_its_preset(run, tmp_path, capsys):
  """trainval and test, difficult objects, the whole picture seen; two runs in one table."""
  base, rng = tmp_path / "VOCdevkit" / "VOC2007", np.random.RandomState(1)
  (base / "ImageSets/Main").mkdir(parents=True)
  number = 0
  for split, count in (("trainval", 24), ("test", 16)):
    rows: dict = {name: [] for name in SHADES}
    for _ in range(count):
      number += 1
      said = {name: rng.choice([1, -1, 0], p=[0.4, 0.5, 0.1]) for name in SHADES}
      picture(base / f"JPEGImages/{number:06d}.jpg", [n for n, x in said.items() if x == 1], rng)
      for name, x in said.items():
        rows[name].append(f"{number:06d} {x:2d}")
    (base / f"ImageSets/Main/{split}.txt").write_text("\n".join(r.split()[0] for r in rows["dark"]))
    for name, lines in rows.items():
      (base / f"ImageSets/Main/{name}_{split}.txt").write_text("\n".join(lines))
  other = shutil.copytree(run, tmp_path / "other")
  flags = [f"--config.data.dir={base.parent}", "--config.size=8", "--config.baselines=False"]
  assert score(f"{run},{other}", *flags, config="svm:voc07") == 0
  facts = json.loads((run / "eval" / "svm-VOC2007-trainval-test-3.json").read_text())
  assert facts["identity"]["view"]["fraction"] == 0.0
  counted = sum(row["test_images"] for row in facts["by_class"]["trained"].values())
  assert counted == sum(f.read_text().count(" 1") for f in (base / "ImageSets/Main").glob("*_test.txt"))  # fmt: skip
  assert "all, squeezed" in capsys.readouterr().out
  (table,) = tmp_path.glob("comparison-svm-*.md")
  assert "mean average precision" in table.read_text().splitlines()[0]


def test_a_class_that_cannot_be_scored_is_left_out_and_said(run, tmp_path, capsys):
  data = several(tmp_path / "kinds")
  for split in ("train", "val"):
    lines = (data / f"{split}.csv").read_text().splitlines()
    lines[1] += ";rare" if split == "train" else ""
    (data / f"{split}.csv").write_text("\n".join(lines))
  path = data / "val.csv"  # no test image is light
  path.write_text(path.read_text().replace("light", ""))
  flags = ["--config.data.source=csv", f"--config.data.dir={data}", "--config.baselines=False"]
  assert score(run, *flags) == 0
  assert "not scored: light, rare" in capsys.readouterr().out
  facts = json.loads((run / "eval" / "svm-kinds-val-3.json").read_text())
  assert facts["left_out"] == ["light", "rare"]
  assert set(facts["by_class"]["trained"]) == {"bright", "dark"}


def refused(capsys, status):
  said = capsys.readouterr().err.strip()
  assert status == 2 and said.startswith("error: ") and "\n" not in said
  return said


def test_labels_that_do_not_suit_are_refused(run, tmp_path, capsys):
  data = several(tmp_path / "kinds")
  flags = ["--config.data.source=csv", f"--config.data.dir={data}"]
  for task in ("knn", "linear"):
    command = [f"--config={task}", f"--config.pretrained={run}", *flags]
    said = refused(capsys, main.main(command))
    assert "kinds has several labels per image; score it with --config=configs/svm.py" in said
  train = [
    "--config=supervised_cifar10", f"--workdir={tmp_path / 'new'}", *flags, "--config.data.split=train",
    "--config.data.batch_size=8", "--config.model.arch=tiny",
  ]  # fmt: skip
  assert "needs one label per image, which the data has not" in refused(capsys, main.main(train))
  pack = ["--config=pack", f"--config.out={tmp_path / 'packed'}", *flags]
  assert "packings hold one label per image" in refused(capsys, main.main(pack))
  assert "class dark has only 8 train images" in refused(capsys, score(run, *flags, "--config.labels_per_class=(2,50)"))  # fmt: skip
  for split in ("train", "val"):
    lines = "".join(f"{split}/{i}.png,dark\n" for i in range(9))
    (data / f"{split}.csv").write_text(f"file,labels\n{lines}")
  said = refused(capsys, score(run, *flags))
  assert "of no class 2 train images are labelled, as many without" in said


@pytest.mark.parametrize("task", ["knn", "svm"])
def test_one_class_is_nothing_to_tell_apart(run, tmp_path, capsys, task):
  for split in ("train", "val"):
    for i in range(4):
      picture(tmp_path / "one" / split / "dark" / f"{i}.png", ["dark"], np.random.RandomState(i))
  flags = [f"--config.data.dir={tmp_path / 'one'}", "--config.data.source=folder"]
  said = refused(capsys, main.main([f"--config={task}", f"--config.pretrained={run}", *flags]))
  assert ("all train images are of one class, dark" in said) == (task == "knn")
  assert ("of no class" in said) == (task == "svm")


def test_classes_that_train_lacks_are_refused(run, tmp_path, capsys):
  data = several(tmp_path / "kinds")
  path = data / "val.csv"
  path.write_text(path.read_text().replace("val/0.png,", "val/0.png,strange;"))
  flags = ["--config.data.source=csv", f"--config.data.dir={data}"]
  assert "has classes that train lacks: ['strange']" in refused(capsys, score(run, *flags))


@pytest.mark.slow
@pytest.mark.storage
def test_a_pretraining_on_several_labels_goes_without_them(tmp_path, capsys):
  data = several(tmp_path / "kinds")
  flags = [
    "--config=adco_digits", f"--workdir={tmp_path / 'new'}", "--config.data.source=csv", f"--config.data.dir={data}",
    "--config.data.split=train", "--config.model.arch=tiny", "--config.model.width=0.125", "--config.data.batch_size=16",
    "--config.bn.group_size=2", "--config.method.bank.size=32", "--config.method.bank.init=random", "--config.epochs=1",
    f"--config.views.crops={settings.CROPS['single']}", "--config.eval.size=8", "--config.eval.every_epochs=1",
  ]  # fmt: skip
  assert main.main(flags) == 0
  assert "several labels per image: no kNN and no probe" in capsys.readouterr().out
  command = ["--config=embed", f"--config.pretrained={tmp_path / 'new'}", f"--config.out={tmp_path / 'x.npz'}"]  # fmt: skip
  assert main.main(command) == 0
  labels = np.load(tmp_path / "x.npz")["labels"]
  assert labels.shape == (30, 3) and set(np.unique(labels)) == {0, 1}


def test_a_plan_counts_no_classes_where_an_image_has_several(tmp_path):
  source = load_source("csv", str(several(tmp_path / "kinds")), "train")
  config = settings.tiny_config(bn__group_size=2)
  assert build.make_plan(config, source).num_classes == 0 and len(source.classes) == 3


def test_a_subset_restricts_what_is_learnt_from_alone(run, tmp_path, capsys):
  """Own data still: the images are those of a subset of the pre-training's."""
  plan = run / "plan.json"
  own = {"data": load_source("digits", "", "train").identity()}
  plan.write_text(json.dumps(json.loads(plan.read_text()) | own))
  path = tmp_path / "some.txt"
  path.write_text("".join(f"{i}\n" for i in range(0, 400, 2)))
  command = ["--config=knn", f"--config.pretrained={run}", f"--config.data.subset={path}", "--config.baselines=False"]  # fmt: skip
  assert main.main([*command, "--config.neighbours=0", "--config.labels_per_class=()"]) == 0
  said = capsys.readouterr().out
  assert "500 test and 200 train images" in said and "data.subset" in said
  assert json.loads((run / "eval" / "knn-digits-test-3.json").read_text())["own"] is True


def test_the_whole_image_is_squeezed():
  for size in ((30, 50), (50, 30)):
    height, width = map(np.float64, size)
    assert crops.centre_boxes(height, width, 0.0).tolist() == [0, 0, *size]
    assert crops.centre_boxes(height, width, 1.0)[2] == 30


def test_the_preset_is_vissl_s():
  config = config_files.load("svm:voc07")
  assert (config.data.source, config.data.split, config.data.test_split) == ("voc", "trainval", "test")  # fmt: skip
  assert config.costs == (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)
  assert (config.folds, config.positive_weight, config.draws) == (3, 2.0, 5)
  assert config.labels_per_class == (1, 2, 4, 8, 16, 32, 64, 96)
  assert os.path.basename(config_files.find("svm")) == "svm.py"
