"""Encoders side by side: workdirs and exported files, groups of seeds, one table."""

import json
import shutil

import numpy as np
import pytest

from adco_jax import main
from adco_jax.evaluation import comparison
from tests.test_scores import TINY

QUICK = ["--config.labels_per_class=(2,)", "--config.draws=2", "--config.neighbours=0", "--config.recall=()"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two seeds of one recipe and an export of the first."""
  root = tmp_path_factory.mktemp("runs")
  for seed in (0, 1):
    assert main.main([*TINY, f"--config.seed={seed}", f"--workdir={root / f'seed{seed}'}"]) == 0
  export = ["--config=export", f"--config.pretrained={root / 'seed0'}", f"--config.out={root / 'one.npz'}", "--config.format=npz"]  # fmt: skip
  assert main.main(export) == 0
  return root


def knn(pretrained, *flags):
  return main.main(["--config=knn", f"--config.pretrained={pretrained}", *QUICK, *flags])


def test_three_encoders_in_one_table(runs, tmp_path, capsys):
  root = shutil.copytree(runs, tmp_path / "runs")
  places = [root / "seed0", root / "seed1", root / "one.npz"]
  flag = ",".join(map(str, places))
  assert knn(flag) == 0
  said = capsys.readouterr().out
  table = json.loads((root / "comparison-knn-digits-test.json").read_text())["rows"]
  of = {(row["encoder"], row["representation"]): row["scores"] for row in table}
  assert of["seed0", "trained"] == of["one.npz", "trained"]  # the same weights
  both = [of[f"seed{s}", "trained"]["all"][0] for s in (0, 1)]
  mean, spread = of["mean of seed0, seed1", "trained"]["all"]
  assert mean == pytest.approx(np.mean(both)) and spread == pytest.approx(np.std(both, ddof=1))
  assert sum(row["encoder"] == "pixels" for row in table) == 1 and table[-1]["encoder"] == "pixels"
  assert [r["scores"]["all"][0] for r in table[:-1]] == sorted(
    (r["scores"]["all"][0] for r in table[:-1]), reverse=True
  )
  text = (root / "comparison-knn-digits-test.md").read_text()
  assert text.startswith("kNN on digits, split test: top-1") and text in said
  alone = json.loads((root / "seed0" / "eval" / "knn-digits-test-3.json").read_text())
  assert alone["results"]["trained"]["all"] == both[0]
  assert (root / "one.npz.scores" / "eval").is_dir()
  assert knn(flag) == 0 and (root / "comparison-knn-digits-test-2.md").read_text() == text
  assert capsys.readouterr().out.count("features of") == 0  # all stored


@pytest.mark.parametrize("change, text", [
  ("{root}/seed0,{root}/nowhere", "nowhere'"), ("{root}/seed0,{root}/seed0", "twice"),
])  # fmt: skip
def test_what_cannot_be_compared_is_said_before_work(runs, capsys, change, text):
  assert knn(change.format(root=runs)) == 2
  said = capsys.readouterr()
  assert text in said.err and said.err.count("\n") == 1 and "reads" not in said.out


def test_embed_and_export_of_an_exported_file(runs, tmp_path, capsys):
  root = shutil.copytree(runs, tmp_path / "runs")
  for place in ("seed0", "one.npz"):
    assert main.main(["--config=embed", f"--config.pretrained={root / place}"]) == 0
  of_run, of_file = (
    np.load(root / folder / "embeddings-digits-train-3.npz")["features"]
    for folder in ("seed0", "one.npz.scores")
  )
  assert np.array_equal(of_run, of_file)
  capsys.readouterr()
  assert main.main(["--config=export", f"--config.pretrained={root / 'one.npz'}"]) == 2
  assert "is an exported file; name the workdir of its run" in capsys.readouterr().err
  assert knn(root / "one.npz", "--config.step=1") == 2
  assert "is of step 3; use 0" in capsys.readouterr().err


def test_one_seed_is_no_spread_of_seeds():
  """A run and a file of it, or its other encoder, have no mean; of two seeds each counts once."""

  def entry(place, seed, weights, alike="x"):
    identity = {"checkpoint": {"fingerprint": weights}, "view": {"size": 8}}
    facts = {"step": 3, "test_images": 100, "task": "knn", "identity": identity, "results": {"trained": {"all": 0.8}}}  # fmt: skip
    return comparison.Entry(place, alike, seed, facts)

  of = lambda *entries: [r["encoder"] for r in comparison.rows(entries) if "mean" in r["encoder"]]
  run, file, key = entry("a", 0, "1"), entry("a.safetensors", 0, "2"), entry("key.npz", 0, "3", "y")
  assert of(run, file) == of(run, key) == of(run, file, key) == []
  assert of(run, file, entry("b", 1, "4")) == ["mean of a, b"]
  assert of(run, entry("imported again", 1, "1")) == []  # the same weights


def test_spreads_of_a_row():
  facts = {"step": 3, "test_images": 100, "task": "knn", "results": {"trained": {"all": 0.8, "5": {"mean": 0.5, "spread": 0.1, "draws": []}}}}  # fmt: skip
  (row,) = comparison.rows([comparison.Entry("runs/a/", "x", 0, facts)])
  assert row["encoder"] == "a" and row["scores"] == {
    "all": [0.8, pytest.approx(0.04)],
    "5": [0.5, 0.1],
  }
