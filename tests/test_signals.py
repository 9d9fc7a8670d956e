"""What needs no label: ranks, cosines, uniformity, and the alarms."""

import numpy as np
import pytest

from adco_jax.evaluation import signals
from adco_jax.training.alarms import Alarms


def test_spread_of_known_clouds():
  """Orthogonal rows, equal rows, and a Gaussian cloud against the definitions written out."""
  eye = np.eye(8)
  found = signals.spread(eye, eye)
  assert found["signal/rank_features"] == pytest.approx(8) and found["signal/mean_cosine"] == 0
  assert found["signal/uniformity"] == pytest.approx(-4)  # d^2 = 2
  same = np.ones((8, 5))
  found = signals.spread(same, same)
  assert found["signal/rank_embeddings"] == pytest.approx(1, abs=1e-6)
  assert found["signal/mean_cosine"] == pytest.approx(1) and abs(found["signal/uniformity"]) < 1e-9
  x = np.random.RandomState(0).standard_normal((40, 6)) + 1
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
  found = signals.spread(x, x)
  assert found["signal/mean_cosine"] == pytest.approx(
    np.mean([unit[i] @ unit[j] for i, j in pairs])
  )
  distances = np.array([np.sum((unit[i] - unit[j]) ** 2) for i, j in pairs])
  assert found["signal/uniformity"] == pytest.approx(np.log(np.mean(np.exp(-2 * distances))))
  shares = np.linalg.svd(x)[1] / np.linalg.svd(x)[1].sum()
  assert found["signal/rank_features"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_what_cannot_be_said_is_left_out():
  assert signals.spread(np.ones((1, 3)), np.ones((1, 3))) == {}
  assert signals.spread(np.full((4, 3), np.nan), np.ones((4, 3))) == {}
  assert signals.rank(np.zeros((4, 3))) == 0
  assert list(signals.evenly(5000)[[0, -1]]) == [0, 4999] and len(signals.evenly(5000)) == 2000
  assert list(signals.evenly(3)) == [0, 1, 2]


def looked(alarms, name, values, first=10, every=10, **more):
  """Steps at which something was said of a metric's values."""
  steps = range(first, first + every * len(values), every)
  return [s for s, v in zip(steps, values, strict=True) if alarms.look({"step": s, name: v} | more)]


def test_a_collapse_is_told_once_and_again_after_it_had_passed():
  cosines = [0.99, 0.97, 0.9, 0.99, 0.3, 0.96, 0.99]
  rank = {"signal/rank_embeddings": 1.5}
  told = lambda start, first: looked(
    Alarms(start), "signal/mean_cosine", cosines, first, 100, **rank
  )
  assert told(0, 100) == [100, 600]
  assert told(201, 100) == [400, 600]  # less than a hundred steps of training, all are alike
  healthy = [0.9925, 0.3198, 0.2534, 0.195, 0.1425]  # of the quickstart, the first one untrained
  assert looked(Alarms(8), "signal/mean_cosine", healthy, first=0, every=200, **rank) == []


def test_a_bank_is_called_dead_after_long_and_only_then():
  """Five lines and a hundred steps in a row; a dip below begins anew; a queue has no part to take."""
  name = "bank/in_batch_mass"
  assert looked(Alarms(0), name, [1.0] * 30) == [110]
  assert looked(Alarms(0), name, [1.0] * 8 + [0.98] + [1.0] * 30) == [200]
  assert looked(Alarms(0), name, [1.0] * 30, every=50) == [210]
  assert looked(Alarms(0), name, [1.0] * 12 + [0.98] * 5 + [1.0] * 30) == [110]
  assert looked(Alarms(0), name, [1.0] * 12 + [0.5] * 5 + [1.0] * 30) == [110, 280]
  assert looked(Alarms(0), "train/in_batch_mass", [1.0] * 30) == []
  assert looked(Alarms(0), name, [float("nan")] * 30) == []
  told = [{"step": s, name: 1.0} for s in range(10, 200, 10)]
  assert looked(Alarms(0, told), name, [1.0] * 30, first=200) == []  # a restart


def test_alarms_say_the_numbers_and_what_to_try():
  line = {"step": 900, "signal/mean_cosine": 0.987, "signal/rank_embeddings": 2.44}
  (said,) = Alarms(0).look(line)
  assert "0.987" in said and "2.4" in said and "optim.learning_rate" in said


def test_prototypes_that_nobody_prefers_are_told():
  """SwAV's loss at the log of their number, from the second epoch on; other losses at chance say nothing: a bank is hard."""
  chance = np.log(30)
  line = {"train/chance": chance, "prototypes/used": 30.0, "epoch": 2.0}
  told = lambda values, **more: looked(Alarms(0), "train/loss", values, **line | more)
  assert told([chance] * 30) == [110] == told([chance + 0.1] * 30)
  assert told([0.99 * chance] * 30) == [] == told([chance] * 30, epoch=1.9)
  assert told([chance] * 12 + [0.98 * chance] + [chance] * 20) == [110, 240]
  assert told([float("nan")] * 30) == []
  bank = {"train/chance": chance, "epoch": 9.0}
  assert looked(Alarms(0), "train/loss", [chance] * 30, **bank) == []
