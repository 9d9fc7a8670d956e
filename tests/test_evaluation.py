"""kNN against brute force, the probe against scikit-learn, few labels, features."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from adco_jax.data.sources.loading import load_source
from adco_jax.errors import ConfigError
from adco_jax.evaluation import features, few_labels, knn, linear, results


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


def test_knn_search_in_chunks(monkeypatch):
  index, _ = clusters(60)
  whole = knn.search(index, index, 3)
  monkeypatch.setattr(knn, "CHUNK", 7)
  parts = knn.search(index, index, 3)
  assert np.array_equal(whole[1], parts[1]) and np.allclose(whole[0], parts[0], atol=1e-6)
  assert np.array_equal(whole[1][:, 0], np.arange(60))


def test_knn_choice_is_the_best_of_the_grid():
  index, labels = clusters(60)
  held, held_labels = clusters(40, seed=1)
  grid = dict(ks=(1, 5, 500), temperatures=(0.05, 1.0), num_classes=4)
  k, t = knn.choose(index, labels, held, held_labels, **grid)
  score = lambda k, t: knn.accuracy(
    knn.predict(index, labels, held, k=k, temperature=t, num_classes=4), held_labels
  )
  assert score(k, t) == max(score(a, b) for a in (1, 5, 60) for b in grid["temperatures"])


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


def test_few_shot_draws():
  labels = load_source("digits", "", "train").labels
  draws = [few_labels.draw(labels, 5, seed=0, number=d) for d in range(3)]
  for draw in draws:
    assert len(set(draw)) == 50 and (np.bincount(labels[draw]) == 5).all()
  assert len({tuple(d) for d in draws}) == 3
  with pytest.raises(ConfigError, match=r"class \d has only \d+ train images; use \(1,\)"):
    few_labels.check(labels, tuple("0123456789"), (1, 500))


def test_extract_leaves_padding_out():
  batches = [(np.ones((4, 2)), 4), (np.zeros((4, 2)), 1)]
  found = features.extract(lambda x: x, batches)
  assert found.shape == (5, 2) and found.sum() == 8


def test_table():
  scores = {"trained": {"all": 0.5, "1": {"mean": 0.25, "spread": 0.01}}}
  head, row = results.format_table(scores).split("\n")
  assert head.split() == ["all", "labels", "1", "per", "class"]
  assert row.split() == ["trained", "0.500", "0.250", "+-", "0.010"]
