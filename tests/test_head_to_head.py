"""The comparison of methods: every recipe can be run, only held-out images choose, what is there is not done again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adco_jax import build, main
from adco_jax.config.plan import Machine
from adco_jax.errors import ConfigError
from adco_jax.objectives.base import Context, Embeddings, Variables
from adco_jax.runtime.files import read_json, write_json
from adco_jax.runtime.sharding import AXIS, create_mesh
from benchmarks import head_to_head, head_to_head_report, one_run, recipes

SIZES = recipes.Sizes(epochs=5, batch=128, rows=2048, images=10_000, width=0.25)


@pytest.mark.parametrize("method", recipes.methods())
def test_every_recipe_is_one_that_runs(method):
  """Checked as main checks flags, and planned; a filling takes its epochs from the run's own."""
  for flags in (recipes.equal(method, SIZES, 0.2), recipes.own(method, SIZES)):
    config, *_ = main.parse([*flags, "--config.data.dir=nowhere"])
    plan = build.plan_for(config, SIZES.images, 10, Machine("cpu", 1))
    assert plan.total_steps == 5 * 78 and plan.fill_steps == 0
    assert plan.filled_at == (2 * 78 if method in recipes.BANKS else 0)
    assert all(phase.pairing == plan.train_pairing for phase in plan.phases)
  same = main.parse([*recipes.equal(method, SIZES, 0.2)])[0]
  if method not in recipes.NO_TEMPERATURE:
    assert same.method.temperature == 0.2
    assert same.method.get("bank", {}).get("temperature", 0.2) == 0.2
  assert same.optim.name == "sgd" and same.data.batch_size == 128


def test_the_equal_recipe_is_equal_step_by_step():
  """Rate, average, batch and views of every update, those that fill a bank too; supervised has one view."""
  seen, rates = {}, {}
  for method in recipes.methods():
    config, *_ = main.parse(recipes.equal(method, SIZES, 0.2))
    plan = build.plan_for(config, SIZES.images, 10, Machine("cpu", 1))
    spec = build.create_setup(config, plan, create_mesh()).spec
    steps = jnp.arange(plan.total_steps) - spec.fill_steps
    batches = [plan.batch(step) for step in range(plan.total_steps)]
    views = [plan.pairing(step).views for step in range(plan.total_steps)]
    views = views if method != "supervised" else [(0, 1)] * len(views)
    factor = 0.4 if method == "mocov3" else 1.0  # 2T, of its loss
    rates[method] = np.asarray(jax.vmap(spec.rate)(steps)) * factor
    assert config.optim.weight_decay / factor == pytest.approx(5e-4)
    seen[method] = jax.vmap(spec.ema_rate)(steps).tolist(), batches, views
  assert len({*rates["moco"]}) == SIZES.epochs
  assert all(of == seen["moco"] for of in seen.values())
  assert all(np.allclose(of, rates["moco"], rtol=1e-5, atol=0) for of in rates.values())


@pytest.mark.parametrize("method", ["adco", "query_softmax", "caco"])
@pytest.mark.parametrize(
  ("rows", "batch", "t"), [(4096, 256, 0.1), (2048, 128, 0.05), (512, 64, 0.2)]
)
def test_rows_turn_as_where_the_recipe_was_found(method, rows, batch, t):
  """By .023 per step under momentum, measured on each objective's own gradient: of unit rows that all queries pull one way."""
  config, *_ = main.parse(recipes.equal(method, SIZES._replace(rows=rows, batch=batch), t))
  plan = build.plan_for(config, SIZES.images, 10, Machine("cpu", 1))
  mesh = create_mesh(jax.devices()[:1])
  spec, phase = build.create_setup(config, plan, mesh).spec, plan.phases[-1]
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), (*shape, spec.sizes.dim))
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  seen = Embeddings(jnp.tile(unit(draw(0)), (2, batch, 1)), draw(1, 2, batch))
  at = jnp.int32(0), jnp.float32(5), jax.random.key(0)
  of = Context(phase.pairing.pairs, *at, spec.sizes, None)

  def loss(bank):
    value, _ = spec.objective.loss(Variables(adversary={"bank": bank}), seen, of, phase)
    return value

  pull = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
  found, bank = jax.jit(pull)(unit(draw(2, rows))), config.method.bank
  turn = bank.learning_rate / (1 - bank.momentum) * jnp.linalg.norm(found, axis=-1).mean()
  # query_softmax has AdCo's rate, but its rows share nothing with the batch's keys.
  more = (rows + batch) / rows if method == "query_softmax" else 1.0
  assert float(turn) == pytest.approx(0.023 * more, rel=0.03)  # two digits


@pytest.mark.parametrize("method", ["moco", "mocov3", "caco", "swav"])
def test_an_own_recipe_has_every_key_once(method):
  for flags in (recipes.equal(method, SIZES, 0.1), recipes.own(method, SIZES)):
    keys = [flag.partition("=")[0] for flag in flags]
    assert len(keys) == len(set(keys))


def test_a_recipe_of_another_config_keeps_its_crops():
  for base, crop in (("adco_digits", (16, 0.6, 1.0)), ("adco_photos:5000", (128, 0.2, 1.0))):
    for method, views in (("byol", 2), ("supervised", 1)):
      config, *_ = main.parse(recipes.equal(method, SIZES._replace(base=base)))
      assert config.views.crops == (crop,) * views and config.objective == method
    config, *_ = main.parse(recipes.own("moco", SIZES._replace(base=base)))
    assert config.views.crops == ((crop[0], 0.08, 1.0),) * 2


MADE = {"commit": "c" * 40, "date": "2026-11-28", "device": "1 x cpu", "processor": "1 cores, X", "jax": "0.10.1"}  # fmt: skip
OF_TWO = recipes.Sizes(epochs=2, batch=256, rows=4096, images=50_000, width=1.0)


def result(knn, left_out, flags, images="5a53bc50"):
  """What a run leaves, in small."""
  linear = {"all": knn, "penalty": 1.0, "1": 0.2, "5": 0.3, "10": 0.4, "50": 0.5}
  scores = {
    "knn": {"k20": knn, "k200": knn},
    "knn_projected": {"k20": knn},
    "linear": linear,
    "knn_left_out": {"k20": left_out},
  }
  return {
    "scores": scores, "held_out": [[0.0, 0, 0.1], [2.0, 390, 0.5]], "seconds_per_step": 0.5, "pairs_per_second": 256.0,
    "steps": 390, "epochs": 2.0, "device_peak_bytes": None, "process_peak_bytes": 2**30, "flags": flags, "made": [MADE],
    "images": {
      "train": {"name": "x", "split": "train", "images": 50_000, "checksum": images},
      "test": {"name": "x", "split": "test", "images": 10_000, "checksum": "0"},
    },
    "settings": one_run.settings(flags),
  }  # fmt: skip


@pytest.fixture
def finished(tmp_path, monkeypatch):
  """A folder with results of all runs of two methods; the higher test score is at the temperature that is worse left out."""
  folder = tmp_path / "both"
  for kind in ("equal", "own"):
    (folder / kind).mkdir(parents=True)
  equal = lambda method, t, seed: [*recipes.equal(method, OF_TWO, t), f"--config.seed={seed}"]
  own = lambda method, seed: [*recipes.own(method, OF_TWO), f"--config.seed={seed}"]
  for seed in (0, 1):
    start = [*recipes.untrained(OF_TWO)[1], f"--config.seed={seed}"]
    nothing = {"held_out": [], "seconds_per_step": None, "steps": 0}
    write_json(folder / f"equal/untrained-seed{seed}.json", result(0.3, 0.3, start) | nothing)
    for t, knn, held in ((0.1, 0.7, 0.6), (0.2, 0.8, 0.5)):
      write_json(folder / f"equal/moco-t{t}-seed{seed}.json", result(knn + seed / 10, held, equal("moco", t, seed)))  # fmt: skip
    write_json(folder / f"equal/byol-seed{seed}.json", result(0.5, 0.5, equal("byol", None, seed)))
    for method in ("moco", "byol"):
      write_json(folder / f"own/{method}-seed{seed}.json", result(0.6, 0.6, own(method, seed)))
  monkeypatch.setattr(head_to_head.record, "RESULTS", str(tmp_path))
  monkeypatch.setattr(head_to_head.Runner, "_start", None)  # nothing may start
  return folder


FLAGS = ["--methods=moco,byol", "--seeds=2", "--grid=0.1,0.2", "--epochs=2"]


def test_temperatures_come_from_held_out_images(finished, tmp_path, capsys):
  assert head_to_head.main([*FLAGS, f"--runs={finished}-runs", "--name=both"]) == 0
  found = read_json(tmp_path / "both.json")
  moco = found["table"]["equal"]["moco"]
  assert moco["kNN, k 20"] == pytest.approx([0.75, np.std([0.7, 0.8], ddof=1), 2])
  assert ["moco", 0.1, 0.6] in found["temperatures"]
  assert found["table"]["own"]["byol"]["minutes"] == [3.25, 0.0, 2]  # 390 steps of half a second
  assert (
    found["runs"]["commits"] == ["c" * 40] and "cccccccccc" in (tmp_path / "both.md").read_text()
  )
  assert "; x: 50,000 of train (5a53bc50), " in (tmp_path / "both.md").read_text()
  said = capsys.readouterr().out
  order = [said.index(f"| {name} |") for name in ("moco", "byol", "untrained")]
  assert "| moco | .750 ± .071 |" in said and order == sorted(order)
  assert "equal recipe, mean ± deviation of 2 seeds" in said
  assert {"both.md", "both-equal.png", "both-own.png"} <= {x.name for x in tmp_path.iterdir()}


def test_what_is_not_over_is_said_and_left_with_its_status(finished, tmp_path, capsys):
  (finished / "own" / "byol-seed1.json").unlink()
  flags = [*FLAGS, f"--runs={finished}-runs", "--name=both", "--minutes=0.000001"]
  assert head_to_head.main(flags) == head_to_head.AGAIN
  assert "the same command goes on" in capsys.readouterr().out
  assert not (tmp_path / "both.json").exists()


def test_what_failed_is_no_comparison_that_goes_on(finished, monkeypatch, capsys):
  """Not with the status of one whose time is over: that would be called again for ever."""
  (finished / "own" / "byol-seed1.json").unlink()
  (finished / "equal" / "moco-t0.1-seed0.json").unlink()  # of the grid, which is asked for twice
  fail = lambda runner, name, *_: runner.failed.append(name)
  monkeypatch.setattr(head_to_head.Runner, "_start", fail)
  assert head_to_head.main([*FLAGS, f"--runs={finished}-runs", "--name=both"]) == 1
  assert "error: equal/moco-t0.1-seed0, own/byol-seed1: failed" in capsys.readouterr().err


def test_a_best_temperature_at_the_edge_is_said():
  """Not of a method without a grid, nor of one whose grid is not done."""
  accuracies = {"moco": (0.4, 0.3, 0.2), "swav": (0.1, 0.2, 0.3), "adco": (0.1, 0.2, 0.1), "byol": (None, 0.1, 0.2)}  # fmt: skip
  seen = [
    [m, t, x] for m, of in accuracies.items() for t, x in zip((0.1, 0.2, 0.5), of, strict=True)
  ]
  assert head_to_head_report.at_edge([*seen, ["supervised", None, 0.9]]) == ["moco 0.1", "swav 0.5"]


@pytest.mark.slow
@pytest.mark.steps
def test_methods_with_and_without_labels_are_of_the_same_images(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(head_to_head.record, "RESULTS", str(tmp_path))
  flags = ["--base=adco_digits", "--methods=simclr,supervised", "--kinds=equal", "--seeds=1", "--grid=0.2"]  # fmt: skip
  flags += ["--epochs=1", "--batch=256", "--rows=64", "--width=0.25", f"--runs={tmp_path}/runs", "--name=two"]  # fmt: skip
  assert head_to_head.main(flags) == 0
  found = read_json(tmp_path / "two.json")
  assert {*found["table"]["equal"]} == {"simclr", "supervised", "untrained"} and "labels" in found[
    "runs"
  ]["images"]["train"]


def test_neighbours_of_separable_features_and_of_noise():
  rng = np.random.RandomState(0)
  labels = np.arange(400) % 4
  apart = np.eye(4)[labels] + 0.05 * rng.standard_normal((400, 4))
  noise = rng.standard_normal((400, 4))
  for features, low, high in ((apart, 0.99, 1.0), (noise, 0.1, 0.4)):
    features = features.astype(np.float32)
    scores = one_run.score_knn(features[:300], labels[:300], features[300:], labels[300:], 4)
    assert scores.keys() == one_run.KNN.keys() and all(low <= x <= high for x in scores.values())
  assert one_run.few_per_class(labels) == [1, 5, 10]  # 1 and 10 per cent of 100


def test_a_spread_is_a_sample_s():
  assert head_to_head_report.spread([1.0, None, 3.0]) == [2.0, np.sqrt(2), 2]
  assert (
    head_to_head_report.spread([1.0]) == [1.0, None, 1]
    and head_to_head_report.spread([None]) is None
  )


def test_what_is_of_other_flags_or_images_is_refused(finished, tmp_path, capsys):
  """Nothing is a row of the table because of its file's name alone."""
  path = finished / "own" / "byol-seed1.json"
  right = read_json(path)
  changed = [f.replace("learning_rate=0.03", "learning_rate=0.06") for f in right["flags"]]
  for wrong, said in (
    ({"flags": changed}, "other flags (--config.optim.learning_rate=0.03, "),
    ({"images": {}}, "of other images"),
    (
      {"settings": right["settings"] | {"optim.momentum": 0.8}},
      "other settings then (optim.momentum)",
    ),
  ):
    write_json(path, right | wrong)
    assert head_to_head.main([*FLAGS, f"--runs={finished}-runs", "--name=both"]) == 2
    said_here = capsys.readouterr().err
    assert (
      said_here.startswith(f"error: {path}: ") and said in said_here and said_here.count("\n") == 1
    )
  assert not (tmp_path / "both.json").exists()


@pytest.mark.parametrize("best", [0.1, 0.5])
def test_a_recipe_that_is_the_equal_one_is_not_run_twice(best):
  """Neither where the temperature of the own recipe was looked at and not chosen."""
  options = head_to_head.parse(["--methods=adco,byol", "--seeds=1"])
  grid = head_to_head.grid_runs(options, SIZES)
  runs = grid | head_to_head.wanted({"adco": best, "byol": None}, options, SIZES)
  names = {key: name for key, (name, _) in head_to_head.once(runs).items()}
  assert names["own", "adco", 0] == "equal/adco-t0.1-seed0"
  assert names["equal", "adco", 0] == f"equal/adco-t{best}-seed0"
  others = 3  # BYOL, equal and own, and untrained
  assert len(set(names.values())) == len(options.grid) + others


def test_temperatures_of_another_comparison(tmp_path):
  write_json(tmp_path / "small.json", {"temperatures": [["moco", 0.1, 0.2], ["moco", 0.2, 0.3]]})
  options = head_to_head.parse([f"--like={tmp_path}/small.json", "--methods=moco"])
  assert head_to_head.grid_runs(options, SIZES) == {}
  assert head_to_head.choose_temperatures(None, options, {})[0] == {"moco": 0.2}
  options.methods = ["moco", "caco"]
  with pytest.raises(ConfigError, match="has no temperature for caco"):
    head_to_head.choose_temperatures(None, options, {})
  assert head_to_head_report.best_of(["moco"], [["moco", 0.1, None], ["moco", 0.2, 0.3]]) == {}
