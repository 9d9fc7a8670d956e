"""The map of features: places, points and thumbnails by themselves, then what the task makes of them (tests/test_scores.py draws one)."""

import io
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from adco_jax.report import charts, feature_map
from adco_jax.report.feature_map import Panel
from adco_jax.tasks.feature_map import FeatureMap


def clusters(count, classes=3, size=16, seed=0):
  rng = np.random.RandomState(seed)
  labels = np.arange(count) % classes
  centres = 4 * np.random.RandomState(9).standard_normal((classes, size))
  return centres[labels] + rng.standard_normal((count, size)), labels


@pytest.mark.parametrize("count", [8, 30, 90])
def test_places_keep_neighbours_and_follow_from_the_seed(count):
  features, labels = clusters(count)
  places = feature_map.layout(features, seed=1)
  assert places.shape == (count, 2) and np.ptp(places, axis=0).max() == pytest.approx(1)
  assert places.min() >= -1e-9 and places.max() <= 1 + 1e-9
  assert np.array_equal(places, feature_map.layout(features, seed=1))
  # t-SNE looks at cosines here: lengths say nothing.
  lengths = 2.0 ** np.random.RandomState(0).randint(-3, 4, (count, 1))
  assert np.array_equal(places, feature_map.layout(features * lengths, seed=1))
  distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(count)
  assert np.mean(labels[distance.argmin(1)] == labels) > 0.8 or count < 9


def test_equal_features_lie_in_the_middle():
  assert (feature_map.layout(np.ones((20, 4)), 0) == 0.5).all()
  assert (feature_map.layout(np.zeros((20, 4)), 0) == 0.5).all()
  assert feature_map.pick(np.full((20, 2), 0.5)) == [0]


def test_thumbnails_stand_apart_and_are_few():
  places = np.random.RandomState(0).uniform(0, 1, (500, 2))
  chosen = feature_map.pick(places)
  assert len(set(chosen)) == len(chosen) == feature_map.THUMBNAILS == len(chosen)
  apart = np.linalg.norm(places[chosen][:, None] - places[chosen][None], axis=-1)
  assert apart[~np.eye(len(chosen), dtype=bool)].min() >= feature_map.APART
  near = 0.5 + 0.01 * places
  assert len(feature_map.pick(near)) == 1


def test_classes_are_told_apart_by_colour_and_marker():
  styles = [feature_map.style(i) for i in range(feature_map.TOLD)]
  assert len(set(styles)) == feature_map.TOLD
  assert (
    len({colour for colour, _ in styles[:10]}) == len({marker for _, marker in styles[:10]}) == 10
  )
  labels = np.repeat(np.arange(200), 5)
  labels[:5] = 150  # which is then the most frequent
  told = feature_map.told(labels)
  assert len(told) == feature_map.TOLD and told == sorted(told) and 150 in told
  assert feature_map.told(np.array([3, 1, 1])) == [1, 3]


def drawn(classes, count, note="note"):
  labels = np.arange(count) % len(classes)
  places = np.random.RandomState(0).uniform(0, 1, (count, 2))
  image = np.zeros((6, 9, 3), np.uint8)
  panels = [Panel(name, places, {0: image, count - 1: image}) for name in ("trained", "untrained")]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    return feature_map.draw(panels, labels, classes, note)


def test_pictures_of_two_classes_and_of_two_hundred(tmp_path):
  """The legend stays small; names that Matplotlib would take for formulas or leave out; the note is found again."""
  few, many = (
    drawn(names, 400) for names in (("_a", "$b^{$"), [f"class {i} " + "x" * 60 for i in range(200)])
  )
  sizes = [Image.open(io.BytesIO(png)).size for png in (few, many)]
  assert sizes[1][1] < 1.35 * sizes[0][1] and sizes[1][0] < 1.1 * sizes[0][0]
  assert few == drawn(("_a", "$b^{$"), 400) != drawn(("_a", "c"), 400)
  (tmp_path / "a.png").write_bytes(few)
  assert feature_map.note_of(str(tmp_path / "a.png")) == "note"
  (tmp_path / "b.png").write_bytes(b"no picture")
  assert feature_map.note_of(str(tmp_path / "b.png")) == "" == feature_map.note_of("absent.png")


def test_what_makes_no_map_is_said(capsys):
  """Too few images, none wanted, features that are not finite."""
  make = lambda count, images: FeatureMap(
    SimpleNamespace(test=SimpleNamespace(num_examples=count)),
    ConfigDict({"map": images, "seed": 0, "baselines": False}), "eval/knn-a-1.json",
  )  # fmt: skip
  assert (
    make(7, 100).lacks == set()
    and "no map: 7 test images are too few; it takes 8" in capsys.readouterr().out
  )
  assert make(100, 0).lacks == set() and not capsys.readouterr().out
  plane = make(20, 10)
  assert plane.lacks == {"trained"}
  features = np.ones((20, 4))
  features[0] = np.nan
  plane.add("trained", features)
  assert "no map of trained: features are not finite" in capsys.readouterr().out
  plane.save()
  assert not capsys.readouterr().out


def test_names_of_classes_are_no_formulas_and_no_bytes():
  """Folders may be called so; Matplotlib takes $ for mathematics and has no letter for a lone byte."""
  odd = ["a$^$b", "$5 and $9", os.fsdecode(b"caf\xe9"), "_hidden", "x" * 99]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert charts.draw_confusion(np.eye(5, dtype=int), odd).startswith(b"<?xml")
  assert [charts.plain(name, 9) for name in odd[2:]] == ["caf\\udce9", " _hidden", "xxxxxxxx…"]
