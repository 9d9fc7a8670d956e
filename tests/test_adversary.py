"""What rows of negatives do: use, pull, density by hand; the gallery over evaluations, restarts and devices."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from adco_jax.config import method
from adco_jax.config.plan import Sizes
from adco_jax.evaluation import adversary, gallery
from adco_jax.objectives.adco import AdCo, Bank
from adco_jax.objectives.base import Base, Rows, Variables
from adco_jax.objectives.query_softmax import QuerySoftmax
from adco_jax.objectives.simclr import SimCLR
from adco_jax.report import report
from adco_jax.runtime import sharding

E = np.e
IMAGES = np.array([[3.0, 0.0], [0.0, 0.1]])
ROWS = np.array([[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])  # cosines 1 0 -1 and 0 1 0
SUMS = np.array([E + 1 + 1 / E, 1 + E + 1])


def played(keys, over="rows", temperature=1.0, batch_size=3):
  return adversary.play(IMAGES, Rows(ROWS, temperature, keys, over), batch_size)


def test_two_images_and_three_rows_by_hand():
  found = played("own")
  own = SUMS / (SUMS + E)
  mass = own @ np.array([[E, 1, 1 / E] / SUMS[0], [1, E, 1] / SUMS[1]]) / own.sum()
  assert found.mass == pytest.approx(mass) and found.density == pytest.approx([-4, -4])  # d^2 = 2
  assert found.over_rows == pytest.approx(own / own.mean())
  batch = SUMS / (SUMS + E + 2)  # two other keys of a batch of three: the other image
  assert played("batch").over_rows == pytest.approx(batch / batch.mean())
  lacks = 1 - np.array([E, E]) / SUMS
  assert played("none").over_rows == pytest.approx(lacks / lacks.mean(), rel=1e-5)
  by_images = [E / (E + 1) + 1 / (1 + E) + 1 / (1 + E), 1 / (E + 1) + E / (1 + E) + E / (1 + E)]
  assert found.over_queries == pytest.approx(np.array(by_images) * 2 / 3)
  values = adversary.numbers(found, "queries")
  assert values["adversary/rows_in_play"] == pytest.approx(np.prod(mass**-mass))
  assert values["adversary/low_density_over_queries"] == pytest.approx(found.over_queries[0])
  assert "adversary/density_correlation" not in values  # both densities are alike


def test_who_pulls_against_density_by_hand():
  """Ranks of pull 1 2.5 2.5 4 against those of density 4 3 2 1."""
  pull, density = np.array([0.1, 1.0, 1.0, 1.9]), np.array([0.0, -1.0, -2.0, -3.0])
  assert adversary.spearman(pull, density) == pytest.approx(-4.5 / np.sqrt(4.5 * 5))
  found = adversary.Play(np.array([0.5, 0.5, 0.0]), density, pull, np.ones(4))
  assert adversary.numbers(found, "rows") == pytest.approx(
    {
      "adversary/rows_in_play": 2,
      "adversary/density_correlation": -4.5 / np.sqrt(4.5 * 5),
      "adversary/low_density_over_rows": 1.9,
      "adversary/low_density_over_queries": 1,
    }
  )
  assert "adversary/density_correlation" not in adversary.numbers(found, "queries")


@pytest.mark.parametrize("batch_size, parts", [(5, 4), (7, 3), (300, 1)])
def test_rows_share_among_the_queries_of_a_batch(batch_size, parts):
  """Each query is in one batch, in which a row's shares sum to 1, as in training."""
  images, rows = cloud(1), cloud(2, 8)
  found = adversary.play(images, Rows(rows, 0.3, "own"), batch_size).over_queries
  batches = adversary._batches(20, batch_size)
  assert len(batches) == parts and sorted(np.concatenate(batches)) == list(range(20))
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  weights = np.exp(unit(images) @ unit(rows).T / 0.3)
  expected = np.empty(20)
  for batch in batches:
    expected[batch] = len(batch) * (weights[batch] / weights[batch].sum(0)).mean(1)
  assert found == pytest.approx(expected, rel=1e-4) and found.mean() == pytest.approx(1)


def test_rows_that_only_weak_queries_meet_are_not_in_play():
  """Ninety images on one row; the nearest row of ten others is so far that their own keys take almost all of their weight."""
  images = np.repeat([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [90, 10], 0)
  found = adversary.play(images, Rows(np.array([[1.0, 0, 0], [0, 0.6, 0.8]]), 0.1, "own"), 8)
  assert found.mass[1] == pytest.approx(0.1 / (1 + np.exp(4)) / (0.9 / 2), rel=0.02)


def test_softmaxes_in_runs_are_those_at_once(monkeypatch):
  rng = np.random.RandomState(0)
  a, b = (rng.standard_normal((n, 5)).astype(np.float32) for n in (11, 7))
  monkeypatch.setattr(adversary, "RUN", 21)  # three rows of cosines
  exact = np.exp(a.astype(float) @ b.T / 0.3)
  shares = exact / exact.sum(1, keepdims=True)
  for found, wanted in zip(adversary.softmaxes(a, b, 0.3), (shares.mean(0), np.log(exact.sum(1)), shares.max(1)), strict=True):  # fmt: skip
    assert found == pytest.approx(wanted, rel=1e-4)
  exact = np.exp(a.astype(float) @ a.T / 0.3) * (1 - np.eye(11))
  assert adversary.softmaxes(a, a, 0.3, among_others=True)[1] == pytest.approx(np.log(exact.sum(1)), rel=1e-4)  # fmt: skip


def test_what_cannot_be_measured_is_left_out():
  assert adversary.play(IMAGES[:1], Rows(ROWS, 1.0, "own"), 3) is None
  assert adversary.play(IMAGES, Rows(ROWS * np.nan, 1.0, "own"), 3) is None
  for keys in ("batch", "own", "none"):  # exponentials of a thousand
    found = played(keys, temperature=0.001)
    assert all(np.isfinite(x).all() for x in found) and found.over_rows.mean() == pytest.approx(1)


def test_which_objectives_keep_rows():
  sizes = Sizes(16, 8, 10_000, 10, 1, "symmetric", 2)
  kept = {}
  for name in method.OBJECTIVES:
    objective = method.find(name)()
    variables = jax.eval_shape(lambda o=objective: o.init(jax.random.key(0), sizes, np.float32))
    rows = jax.eval_shape(objective.rows, variables)
    if rows is not None:
      assert rows.vectors.shape[1] == 8
      kept[name] = rows.keys, rows.over
  assert kept == {
    "adco": ("batch", "rows"), "query_softmax": ("batch", "queries"), "still": ("batch", "rows"),
    "random": ("batch", "rows"), "moco": ("own", "rows"), "mochi": ("own", "rows"), "caco": ("none", "rows"),
  }  # fmt: skip
  assert AdCo(in_batch=False).rows(Variables(adversary={"bank": ROWS})).keys == "own"
  assert Base().rows(Variables()) is None


def a_gallery(folder, objective=None, devices=1):
  """Its pictures of image i are grey of shade i."""
  mesh = sharding.create_mesh(jax.devices()[:devices])
  thumbnail = lambda i: np.full((4, 4, 3), i, np.uint8)
  objective = objective or AdCo(bank=Bank(size=8, temperature=0.2))
  return gallery.Gallery(objective, 4, mesh, str(folder), thumbnail), mesh


def cloud(seed, count=20):
  return np.random.RandomState(seed).standard_normal((count, 6)).astype(np.float32)


EXAMPLES = np.arange(100, 120)  # numbers of the images in their source


def test_rows_equal_to_images_have_these_as_nearest_at_every_evaluation(tmp_path):
  see, _ = a_gallery(tmp_path)
  for step in (0, 5, 10):
    images = cloud(step)
    at = (np.arange(8) + step) % 20
    values = see(step, Variables(adversary={"bank": 3 * images[at]}), EXAMPLES, images)
    assert 1 <= values["adversary/rows_in_play"] <= 8
  with np.load(see.picture.replace(".png", ".npz")) as file:
    assert file["steps"].tolist() == [0, 5, 10] and file["rows"] == 8 and file["over"] == "rows"
    assert file["nearest"].tolist() == [[100 + (r + s) % 20 for r in range(8)] for s in (0, 5, 10)]
    assert file["density"].shape == file["over_rows"].shape == (20,)


def test_a_run_that_went_back_forgets_what_came_after(tmp_path):
  """Stopped after step 10, resumed at 5: the files are those of a run in one go; of another bank, a new beginning."""
  bank = lambda step, size=8: Variables(adversary={"bank": cloud(50 + step, size)})
  straight, stopped = (a_gallery(tmp_path / name)[0] for name in ("straight", "stopped"))
  for see, steps in ((straight, (0, 5, 10)), (stopped, (0, 5, 10, 5, 10))):
    os.makedirs(os.path.dirname(see.picture))
    for step in steps:
      see(step, bank(step), EXAMPLES, cloud(step))
  for name in ("adversary.npz", "adversary.png"):
    assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
  stopped(15, bank(15, 16), EXAMPLES, cloud(15))
  with np.load(tmp_path / "stopped" / "adversary.npz") as file:
    assert file["steps"].tolist() == [15]


def test_an_objective_without_rows_leaves_nothing(tmp_path):
  see, _ = a_gallery(tmp_path, SimCLR())
  assert see(0, Variables(), EXAMPLES, cloud(0)) == {} and not os.listdir(tmp_path)
  assert report.negatives(str(tmp_path), []) == ""


@pytest.mark.parametrize("kind", [AdCo, QuerySoftmax])
def test_devices_make_no_difference(kind, tmp_path):
  """Rows split over eight, and on one."""
  objective, found = kind(bank=dataclasses.replace(Bank(), size=16)), []
  for devices in (1, 8):
    see, mesh = a_gallery(tmp_path, objective, devices)
    to = sharding.from_specs(mesh, objective.specs().adversary)
    bank = jax.device_put(cloud(1, 16), to)
    assert len(bank.sharding.device_set) == devices
    variables = Variables(adversary={"bank": bank})
    found.append((see(0, variables, EXAMPLES, cloud(0)), (tmp_path / "adversary.npz").read_bytes()))
  assert found[0] == found[1] and len(found[0][0]) == 4


def test_the_most_and_the_least_used_rows_are_of_different_images(monkeypatch):
  monkeypatch.setattr(gallery, "SHOWN", 2)
  use, nearest = np.array([5, 4, 3, 2, 1, 0]), np.array([7, 7, 8, 9, 9, 7])
  assert gallery.most_and_least(use, nearest) == ([0, 2], [5, 4])
  assert gallery.most_and_least(use[:2], nearest[:2]) == ([0], [1])
  assert gallery.most_and_least(use[:1], nearest[:1]) == ([0], [])


def test_the_report_shows_both_pictures(tmp_path):
  see, _ = a_gallery(tmp_path)
  values = see(7, Variables(adversary={"bank": cloud(1, 8)}), EXAMPLES, cloud(0))
  page = report.negatives(str(tmp_path), [{"step": 7, **values}])
  in_play = f"At step 7 {values['adversary/rows_in_play']:.0f} of 8 rows are in play"
  assert in_play in page
  assert page.count("data:image/png") == page.count("data:image/svg+xml") == 1
