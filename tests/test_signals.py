"""What needs no label: ranks, cosines, uniformity, and the alarms."""

import numpy as np
import pytest

from adco_jax.evaluation import signals
from adco_jax.evaluation.online import guessing
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


@pytest.mark.parametrize("count, width, rank", [(40, 12, 1), (40, 12, 5), (9, 20, 4), (300, 7, 7)])
def test_ranks_of_matrices_with_equal_singular_values(count, width, rank):
  """A matrix of rank r whose singular values are equal has both ranks r; a mean beside it counts in RankMe alone."""
  rng = np.random.RandomState(rank)
  left = rng.standard_normal((count, rank))
  left -= left.mean(0)  # the mean is none of its directions
  left = np.linalg.qr(left)[0]
  right = np.linalg.qr(rng.standard_normal((width, rank)))[0]
  x = left @ right.T
  found = signals.spread(x, 1000 * x)
  for name in ("rank_features", "rank_embeddings", "effective_rank_features"):
    assert found[f"signal/{name}"] == pytest.approx(rank, rel=1e-6), name
  offset = 1e6 * rng.standard_normal(width)
  found = signals.spread(x + offset, x)
  assert found["signal/rank_features"] == pytest.approx(1, abs=1e-3)
  assert found["signal/effective_rank_features"] == pytest.approx(rank, rel=1e-5)


def test_planted_dead_dimensions_are_counted_and_lengths_measured():
  """Constant ones, at zero or not, and one that moves by less than a hundredth of its share; one that moves by more is alive."""
  rng = np.random.RandomState(0)
  x = rng.standard_normal((500, 10))
  x[:, [2, 5]] = 0, 0.7
  x[:, 7] *= 0.005
  x[:, 8] *= 0.05
  units = x / np.linalg.norm(x, axis=1, keepdims=True)
  low = units.std(0) * np.sqrt(10) < 0.01
  assert (
    low[[2, 7]].all() and not low[[0, 5, 8]].any()
  )  # brought to length 1 a constant one moves with the others
  assert signals.dead(x) == low.mean() == 0.2 == signals.dead(1e-6 * x)
  found = signals.spread(x, 3 * x)
  assert found["signal/dead_features"] == found["signal/dead_embeddings"] == 0.2
  lengths = np.sqrt((x**2).sum(1)).mean()
  assert found["signal/norm_features"] == pytest.approx(lengths)
  assert found["signal/norm_embeddings"] == pytest.approx(3 * lengths)
  assert signals.dead(np.ones((9, 4))) == 1 and signals.dead(np.eye(4)) == 0


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


def evaluated(step, cosine=0.3, embeddings=13.0, features=25.0, **more):
  """A line of an evaluation, healthy unless told otherwise."""
  names = {"mean_cosine": cosine, "rank_embeddings": embeddings, "rank_features": features}
  return {"step": step} | {f"signal/{k}": v for k, v in names.items() if v is not None} | more


def said(lines, start=0):
  """Steps at which something was said of lines."""
  alarms = Alarms(start)
  return [line["step"] for line in lines if alarms.look(line)]


def test_a_collapse_is_told_once_and_again_after_it_had_passed():
  cosines = [0.99, 0.97, 0.9, 0.99, 0.3, 0.96, 0.99]
  lines = [evaluated(100 * i, x) for i, x in enumerate(cosines, 1)]
  assert said(lines) == [100, 600]
  assert said(lines, 201) == [400, 600]  # less than a hundred steps of training, all are alike
  healthy = [0.9925, 0.3198, 0.2534, 0.195, 0.1425]  # of the quickstart, the first one untrained
  assert said([evaluated(200 * i, x) for i, x in enumerate(healthy)], 8) == []
  told = [evaluated(100, 0.99)]
  assert not Alarms(0, told).look(evaluated(200, 0.99))  # a restart


def test_a_rank_that_is_gone_is_told():
  """Embeddings on a line through the middle have a mean cosine of 0; without embeddings the features are looked at."""
  rng = np.random.RandomState(0)
  line = np.sign(rng.standard_normal((200, 1))) * np.eye(16)[:1] + 0.002 * rng.standard_normal(
    (200, 16)
  )
  found = signals.spread(rng.standard_normal((200, 8)), line)
  assert abs(found["signal/mean_cosine"]) < 0.1 and found["signal/rank_embeddings"] < 2
  (text,) = Alarms(0).look({"step": 100} | found)
  assert "looks collapsed" in text and "of dimensions dead" in text
  ranks = [9.0, 1.9, 2.5, 3.1, 2.1, 1.2]
  assert said([evaluated(100 * i, embeddings=x) for i, x in enumerate(ranks, 1)]) == [200, 600]
  alone = [evaluated(100 * i, None, None, x) for i, x in enumerate(ranks, 1)]
  assert said(alone) == [200, 600]


def test_an_accuracy_at_chance_is_told_where_there_was_one():
  """Not where the untrained encoder is no better than guessing, and not for what an older file does not know."""

  def scored(first, *others):
    return [
      evaluated(100 * i, **{"knn/top1": x, "knn/chance": 0.19})
      for i, x in enumerate((first, *others))
    ]

  assert said(scored(0.83, 0.8, 0.19, 0.1, 0.2, 0.15)) == [200, 500]
  assert said(scored(0.18, 0.1, 0.1, 0.1)) == []
  assert said([evaluated(100 * i, **{"knn/top1": 0.1}) for i in range(4)]) == []
  alarms = Alarms(0)
  *_, text = [t for line in scored(0.83, 0.1) for t in alarms.look(line)]
  assert "kNN 0.100" in text and "guessing may give 0.190" in text and "step 0 had 0.830" in text
  assert "optim.learning_rate" in text
  line = evaluated(200, 0.99, **{"knn/top1": 0.1, "knn/chance": 0.19})
  said_of_both = alarms.look(line)
  assert len(said_of_both) == 1  # the accuracy was told before
  alarms = Alarms(0, scored(0.83))
  assert ["optim.learning_rate" in text for text in alarms.look(line)] == [True, False]


def test_a_healthy_run_is_called_so_when_it_can_be_judged():
  alarms = Alarms(0)
  for step, cosine, words in ((0, 0.99, ""), (100, 0.3, "no sign of a collapse"), (200, 0.99, "")):
    line = evaluated(step, cosine)
    alarms.look(line)
    assert alarms.healthy(line).startswith(words) and bool(alarms.healthy(line)) == bool(words)
  assert alarms.healthy({"step": 300, "train/loss": 1.0}) == ""


def test_features_worse_than_at_the_start_are_called_so():
  alarms = Alarms(0)
  lines = [evaluated(100 * i, **{"knn/top1": x, "knn/chance": 0.19}) for i, x in enumerate((0.8, 0.7, 0.8))]  # fmt: skip
  told = [alarms.look(line) or alarms.healthy(line) for line in lines]
  assert told[1].endswith("kNN 0.700, which is less than the 0.800 of step 0")
  assert told[2].endswith("kNN 0.800")


def test_guessing_is_the_largest_class_and_two_standard_errors():
  labels = np.repeat([0, 1, 2], [50, 30, 20])
  assert guessing(labels) == pytest.approx(0.5 + 2 * np.sqrt(0.25 / 100))
  assert guessing(np.zeros(5, int)) == 1 and guessing(np.arange(2)) == 1  # .5 + .71


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
  line = evaluated(900, 0.987, 2.44, **{"signal/dead_embeddings": 0.25})
  (text,) = Alarms(0).look(line)
  assert "0.987" in text and "2.4 (25% of" in text and "optim.learning_rate" in text


def test_prototypes_that_nobody_prefers_are_told():
  """SwAV's loss at the log of their number, from the second epoch on."""
  chance = np.log(30)
  line = {"train/chance": chance, "prototypes/used": 30.0, "epoch": 2.0}
  told = lambda values, **more: looked(Alarms(0), "train/loss", values, **line | more)
  assert told([chance] * 30) == [110] == told([chance + 0.1] * 30)
  assert told([0.99 * chance] * 30) == [] == told([chance] * 30, epoch=1.9)
  assert told([chance] * 12 + [0.98 * chance] + [chance] * 20) == [110, 240]
  assert told([float("nan")] * 30) == []


def at_chance(shares, before=(), **more):
  """Steps at which it is said that nothing is learnt, of lines with such shares of a chance of 6.4."""
  alarms, found = Alarms(0, before), []
  for i, share in enumerate(shares, 1):
    line = {"step": 20 * i, "epoch": i / 2, "train/query_loss": 6.4 * share, "train/chance": 6.4}
    found += [line["step"] for text in alarms.look(line | more) if "nothing is learnt" in text]
  return found


def test_a_loss_that_stays_at_chance_is_told():
  """Not in the first epoch, not of a loss that falls, again only after it had fallen; prototypes are told of elsewhere."""
  assert at_chance([1.0] * 20) == [140]  # a hundred steps after 40, where the first epoch is over
  assert at_chance([1.0] * 4 + [0.98] * 16) == []
  assert at_chance([1.0] * 10 + [0.96] + [1.1] * 10) == [140, 340]
  assert at_chance([1.0] * 10 + [0.98] + [1.1] * 10) == [140]
  assert at_chance([1.0] * 20, **{"prototypes/used": 1.0, "train/loss": 5.0}) == []
  assert at_chance([1.0] * 20, **{"train/chance": None}) == []


def test_a_loss_at_chance_tells_nothing_where_features_improve_or_a_bank_is_hard():
  """The loss against a bank may stay at chance while kNN rises; where nobody knows kNN, it is no sign."""
  bank = {"bank/mean_norm": 1.0}
  scored = lambda last: [
    {"step": i, "epoch": 0.1, "knn/top1": top1, "knn/chance": 0.1}
    for i, top1 in enumerate((0.5, last))
  ]
  assert at_chance([1.0] * 20, **bank) == []
  assert at_chance([1.0] * 20, scored(0.56)) == [] == at_chance([1.0] * 20, scored(0.56), **bank)
  assert at_chance([1.0] * 20, scored(0.54)) == [140] == at_chance([1.0] * 20, scored(0.54), **bank)


def test_a_run_that_learns_nothing_is_not_called_healthy():
  alarms = Alarms(0)
  for step in range(20, 200, 20):
    alarms.look({"step": step, "epoch": 2.0, "train/loss": 2.3, "train/chance": 2.3})
  assert alarms.healthy(evaluated(200)) == ""
  alarms.look({"step": 200, "epoch": 3.0, "train/loss": 2.0, "train/chance": 2.3})
  assert alarms.healthy(evaluated(220))
