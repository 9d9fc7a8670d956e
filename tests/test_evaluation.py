"""kNN against brute force, the probe against scikit-learn, few labels, features."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score

from adco_jax.data.sources.loading import load_source
from adco_jax.errors import ConfigError
from adco_jax.evaluation import confusion, features, few_labels, knn, linear, results, sweep


def clusters(count, classes=4, size=6, seed=0):
  rng = np.random.RandomState(seed)
  labels = rng.randint(classes, size=count)
  centres = np.random.RandomState(9).standard_normal((classes, size)) * 2
  return (centres[labels] + rng.standard_normal((count, size)) + 1).astype(np.float32), labels


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (7, 0.07), (500, 1.0)])
def test_knn_equals_brute_force(k, temperature):
  index, labels = clusters(60)
  queries, _ = clusters(25, seed=1)
  found = knn.predict(index, labels, queries, k=k, temperature=temperature, num_classes=4)
  for query, prediction in zip(queries.astype(float), found, strict=True):
    cosine = index @ query / np.linalg.norm(index, axis=1) / np.linalg.norm(query)
    votes = np.zeros(4)
    for i in np.argsort(-cosine)[:k]:
      votes[labels[i]] += np.exp(cosine[i] / temperature)
    assert votes.argmax() == prediction


@pytest.mark.parametrize("count, block, kind", [(60, 7, "<f4"), (60, 64, "<f2"), (5, 2, "<f4")])
def test_knn_search_in_chunks_and_blocks(monkeypatch, tmp_path, count, block, kind):
  """Of a file as of an array; blocks may hold fewer rows than are asked for, and rows may be left out."""
  index = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", kind, (count, 6))
  index[:] = clusters(count)[0]
  index[count // 2] = index[1]  # a tie: the lower row goes first
  rows = np.delete(np.arange(count), count // 3)
  queries = np.asarray(index, np.float32)
  unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
  cosines = (unit @ unit.T)[:, rows]
  cosines[:, np.searchsorted(rows, count // 2)] = cosines[:, np.searchsorted(rows, 1)]
  expected = np.argsort(-cosines, axis=1, kind="stable")[:, :3]
  monkeypatch.setattr(knn, "CHUNK", 7)
  monkeypatch.setattr(knn, "BLOCK", block)
  found = knn.search(index, queries, 3, rows)
  assert np.allclose(found[0], np.take_along_axis(cosines, expected, 1), atol=1e-6)
  assert np.array_equal(found[1], expected)


def test_knn_choice_is_the_best_of_the_grid():
  features, labels = clusters(100)
  searched, held = np.arange(0, 100, 2), np.arange(1, 100, 2)
  grid = dict(ks=(1, 5, 500), temperatures=(0.05, 1.0), num_classes=4)
  k, t = knn.choose(features, labels, searched, held, **grid)
  score = lambda k, t: knn.accuracy(
    knn.predict(
      features[searched], labels[searched], features[held], k=k, temperature=t, num_classes=4
    ),
    labels[held],
  )
  assert score(k, t) == max(score(a, b) for a in (1, 5, 50) for b in grid["temperatures"])


@pytest.mark.parametrize("copies", [0, 6])
def test_recall_is_brute_force_s(copies):
  """The image itself never counts, also where so many equal ones stand before it that it is not among the nearest."""
  features, labels = clusters(40)
  features[:copies], labels[:copies] = features[0], np.arange(copies)
  found = knn.recall(features, labels, (1, 3, 500))
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  cosines = unit @ unit.T
  np.fill_diagonal(cosines, -np.inf)
  order = np.argsort(-cosines, axis=1, kind="stable")
  hit = labels[order] == labels[:, None]
  assert set(found) == {1, 3, 39}
  slack = copies / 40  # of equal images any may go first
  for k, value in found.items():
    assert abs(value - hit[:, :k].any(1).mean()) <= slack
  if not copies:
    assert found == pytest.approx({k: hit[:, :k].any(1).mean() for k in (1, 3, 39)})


@pytest.mark.parametrize("k", [1, 5, 500])
def test_left_out_is_a_search_without_each_in_turn(k):
  features, labels = clusters(40)
  rest = lambda i: np.delete(np.arange(40), i)
  setting = dict(k=k, temperature=0.1, num_classes=4)
  one = lambda i: knn.predict(features, labels, features[i : i + 1], rows=rest(i), **setting)[0]
  expected = knn.accuracy([one(i) for i in range(40)], labels)
  assert knn.left_out(features, labels, **setting) == expected < 1


def test_logistic_regression_equals_scikit_learn():
  """One penalty is the inverse of its C; the minimum is unique."""
  x, y = clusters(80)
  x = linear.scale_of(x)(x)
  ours = linear.fit(x, y, 4, penalty=0.5)["fc"]
  theirs = LogisticRegression(C=2.0, tol=1e-8, max_iter=2000).fit(x, y)
  assert np.abs(np.asarray(ours["kernel"]).T - theirs.coef_).max() < 5e-3
  probabilities = lambda logits: np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  found = probabilities(x @ ours["kernel"] + ours["bias"][None])
  assert np.abs(found - theirs.predict_proba(x)).max() < 1e-3


@pytest.mark.parametrize("penalty", [0.001, 1.0])
def test_logistic_regression_is_at_its_minimum_however_stretched_the_features_are(penalty):
  """Loss in float64 against scikit-learn's; components of lengths from 1 to 1/100."""
  x, y = clusters(400)
  rng = np.random.RandomState(1)
  x = 0.3 * x @ rng.standard_normal((6, 60)) + rng.standard_normal((400, 60))
  x = x * np.logspace(0, -2, 60)
  x = linear.scale_of(x)(x).astype(np.float32)

  def loss(kernel, bias):
    logits = x.astype(np.float64) @ kernel + bias
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]
    return each.sum() + penalty / 2 * np.square(kernel).sum()

  ours = linear.fit(x, y, 4, penalty)["fc"]
  theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=100_000).fit(
    x.astype(np.float64), y
  )
  least = loss(theirs.coef_.T, theirs.intercept_)
  assert loss(
    np.asarray(ours["kernel"], np.float64), np.asarray(ours["bias"])
  ) - least < 1e-4 * len(y)


def test_many_fits_are_single_fits():
  x, y = clusters(40)
  x = linear.scale_of(x)(x)
  draws = np.stack([np.arange(20), np.arange(20, 40)])
  many = linear.predict(linear.fit(x[draws], y[draws], 4), x)
  single = [linear.predict(linear.fit(x[d], y[d], 4), x) for d in draws]
  assert np.array_equal(many, single) and not np.array_equal(*single)


def test_unscaled_probe_gives_the_same_logits():
  x, y = clusters(40)
  scale = linear.scale_of(x)
  scaled = scale(x)
  params = linear.fit(scaled, y, 4)
  plain = scale.undo(params)
  found = x @ plain["kernel"] + plain["bias"]
  assert np.abs(found - (scaled @ params["fc"]["kernel"] + params["fc"]["bias"][None])).max() < 1e-4


def test_sgd_recipe_learns_separable_classes():
  import jax

  x, y = clusters(64)
  x = linear.scale_of(x)(x)
  rate = lambda step: 1.0
  probe = linear.fit_sgd([(x, y)] * 100, jax.random.key(0), 6, 4, rate, 0.9, 0.0)
  assert knn.accuracy((x @ probe["kernel"] + probe["bias"]).argmax(1), y) > 0.9
  (start,) = (linear.fit_sgd([], jax.random.key(0), 6, 4, rate, 0.9, 0.0),)
  assert np.abs(start["kernel"]).max() < 0.05 and (start["bias"] == 0).all()


def test_a_sweep_is_every_sgd_alone():
  """Three settings against NumPy; what has no weight is not learnt from, whatever it is."""
  x, y = clusters(48)
  crops = np.stack([x, x[:, ::-1]]).reshape(2, 6, 8, 6).swapaxes(0, 1)  # [step, V, B, F]
  y, weights = y.reshape(6, 8), np.random.RandomState(3).rand(6, 8) < 0.7
  scale = linear.scale_of(x)
  settings = [sweep.Setting(0.3, "plain", 0), sweep.Setting(2.0, "scaled", 0), sweep.Setting(2.0, "scaled", 1)]  # fmt: skip
  fit = lambda crops: sweep.fit(
    zip(crops, y, weights, strict=True), jax.random.key(1), 4, scale, settings,
    steps=6, momentum=0.9, weight_decay=0.01,
  )  # fmt: skip
  found = fit(crops)
  for (rate, head, crop), probe in zip(settings, found, strict=True):
    kernel, bias = np.array(0.01 * jax.random.normal(jax.random.key(1), (6, 4)), float), np.zeros(4)
    trace = [0, 0]
    for step in range(6):
      f = scale(crops[step, crop]) if head == "scaled" else crops[step, crop]
      logits = f @ kernel + bias
      p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
      error = (p - np.eye(4)[y[step]]) * weights[step][:, None] / weights[step].sum()
      trace[0] = 0.9 * trace[0] + f.T @ error + 0.01 * kernel
      trace[1] = 0.9 * trace[1] + error.sum(0) + 0.01 * bias
      now = rate * 0.5 * (1 + np.cos(np.pi * step / 6))
      kernel, bias = kernel - now * trace[0], bias - now * trace[1]
    apart = scale(x) @ kernel + bias if head == "scaled" else x @ kernel + bias
    assert np.abs(x @ probe["kernel"] + probe["bias"] - apart).max() < 1e-4
  other = fit(np.where(weights[:, None, :, None], crops, 100.0))
  assert all(np.array_equal(a["kernel"], b["kernel"]) for a, b in zip(found, other, strict=True))


def test_top_k_and_confusion_are_scikit_learn_s():
  rng = np.random.RandomState(0)
  logits, labels = (
    rng.standard_normal((50, 7)),
    rng.randint(6, size=50),
  )  # no image of the last class
  for k in (1, 3):
    expected = top_k_accuracy_score(labels, logits, k=k, labels=np.arange(7))
    assert confusion.top(logits, labels, k) == pytest.approx(expected)
  assert (
    confusion.top(np.zeros((4, 3)), np.array([0, 1, 2, 2]), 2) == 0.5
  )  # ties: lower numbers first
  logits[:10, 6] = np.nan  # of a class that no image is of
  for k in (1, 3):
    expected = 0.8 * top_k_accuracy_score(labels[10:], logits[10:], k=k, labels=np.arange(7))
    assert confusion.top(logits, labels, k) == pytest.approx(expected)
  logits[:10, 6] = -9
  counts = confusion.matrix(labels, logits.argmax(1), 7)
  assert np.array_equal(counts, confusion_matrix(labels, logits.argmax(1), labels=np.arange(7)))
  means = confusion.per_class(counts)
  assert np.isnan(means[6]) and np.nanmean(means) == pytest.approx(
    recall_score(labels, logits.argmax(1), labels=np.arange(6), average="macro")
  )


def test_few_shot_draws():
  labels = load_source("digits", "", "train").labels
  draws = [few_labels.draw(labels, 5, seed=0, number=d) for d in range(3)]
  for draw in draws:
    assert len(set(draw)) == 50 and (np.bincount(labels[draw]) == 5).all()
  assert len({tuple(d) for d in draws}) == 3
  with pytest.raises(ConfigError, match=r"class \d has only \d+ train images; use \(1,\)"):
    few_labels.check(labels, tuple("0123456789"), (1, 500))


def test_shares_of_labels_are_drawn_per_class():
  labels = np.repeat([0, 1, 2], (100, 40, 3))
  drawn = few_labels.draw(labels, 0.1, seed=1, number=0)
  assert np.array_equal(np.bincount(labels[drawn]), [10, 4, 1]) and len(set(drawn)) == 15
  asked = []
  scores = few_labels.score(
    labels, np.zeros(4, int), lambda d, n: asked.append((d.shape, n)) or np.zeros((len(d), 4)),
    labels_per_class=(2,), label_shares=(0.1,), draws=3, seed=1,
  )  # fmt: skip
  assert list(scores) == ["2", "10 %"] and asked == [((3, 6), 2), ((3, 15), 5)]
  assert results.named("10 %") == "10 % of labels" and scores["10 %"]["mean"] == 1.0


def test_extract_leaves_padding_out():
  batches = [(np.ones((4, 2)), 4), (np.zeros((4, 2)), 1)]
  found = features.extract(lambda x: x, batches)
  assert found.shape == (5, 2) and found.sum() == 8


def test_table():
  scores = {"trained": {"all": 0.5, "1": {"mean": 0.25, "spread": 0.01}}}
  head, row = results.format_table(scores).split("\n")
  assert head.split() == ["all", "labels", "1", "per", "class"]
  assert row.split() == ["trained", "0.500", "0.250", "+-", "0.010"]
