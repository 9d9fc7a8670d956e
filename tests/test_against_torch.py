"""What benchmarks/against_torch compares: the same step on both sides; and how its sides take turns."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import torch

from adco_jax import build
from adco_jax.data.batch import Batch
from adco_jax.interop.torch_weights import export_encoder
from adco_jax.runtime import sharding
from adco_jax.training.train_step import make_update
from benchmarks import against_torch, gpu_table, kernels, torch_step, turns
from tests.counting_side import Counting
from tests.settings import embeddings, tiny_config, tiny_plan

B, SIDE, STEPS = 8, 8, 3


def ours(config, plan):
  """(update, first state) in float64."""
  mesh = sharding.create_mesh(jax.devices()[:1])
  encoder, spec, create = build.create_setup(config, plan, mesh)
  state = jax.jit(create)()
  state = state.replace(
    objective=state.objective._replace(
      adversary={"bank": embeddings(encoder, state, config.method.bank.size)}
    )
  )
  return jax.jit(make_update(spec, plan.phases[-1])), state


def weights(state, role):
  """An encoder under torch's names."""
  variables = {"params": getattr(state, f"{role}_params"), **getattr(state, f"{role}_stats")}
  return export_encoder(jax.device_get(variables), head=True)


def largest_gap(state, step):
  """Over bank, its momentum, both encoders and their statistics, relative to each array's largest value."""
  pairs = [(np.asarray(state.objective.adversary["bank"]), step.bank)]
  for role in ("query", "key"):
    mine = weights(state, role)
    pairs += [(mine[n], x) for n, x in getattr(step, role).state_dict().items()]
  return max(np.abs(a - b.numpy()).max() / (np.abs(a).max() + 1e-6) for a, b in pairs)


TRANSFORMER = dict(
  model__arch="vit_tiny", model__width=1 / 6, model__vit__patch=4, model__vit__depth=2, model__vit__registers=1, bn__group_size=0,
  optim__name="adamw", optim__no_decay="vectors", optim__learning_rate=1e-3, optim__weight_decay=0.1,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.steps
@pytest.mark.parametrize("network", [dict(optim__learning_rate=1.0, bn__group_size=B), TRANSFORMER])
def test_both_sides_are_the_same_step(float64, network):
  """Two queries and two keys with weights; three steps, so that all momenta count."""
  config = tiny_config("symmetric", data__batch_size=B, augment__policy="none", **network)
  plan = dataclasses.replace(tiny_plan(config), compute_dtype="float64")
  update, state = ours(config, plan)
  step = torch_step.Step(config, plan, torch.float64)
  for role in ("query", "key"):
    found = {n: torch.from_numpy(np.array(x)) for n, x in weights(state, role).items()}
    assert not getattr(step, role).load_state_dict(found, strict=False).missing_keys
  step.bank.copy_(torch.from_numpy(np.array(state.objective.adversary["bank"])))
  images = np.random.RandomState(0).randint(256, size=(2, B, SIDE, SIDE, 3), dtype=np.uint8)
  views = {v: (images[v] / 255 - np.array(config.data.mean)) / np.array(config.data.std) for v in (0, 1)}  # fmt: skip
  pairing = plan.train_pairing
  roles = pairing.query_views, pairing.key_views
  play = torch_step.make_update(step, "eager", *([torch.from_numpy(images[v]) for v in role] for role in roles))  # fmt: skip
  first = largest_gap(state, step)
  for _ in range(STEPS):
    before = state
    state, metrics = update(state, Batch.of(*([views[v] for v in role] for role in roles)))
    assert abs(metrics["train/query_loss"] - play().item()) < 1e-12
    assert largest_gap(before, step) > 1e-5  # it moved
  print(f"{largest_gap(state, step):.1e}")
  assert first == 0 and largest_gap(state, step) < (
    1e-10 if config.optim.name == "sgd" else 1e-8
  )  # AdamW divides by roots of gradients near 0


def test_sides_take_turns_and_fail_alone(tmp_path):
  names = ("well", "aborts", "raises", "wide", "also well")
  sides = [
    turns.Side(n, functools.partial(Counting, n, str(tmp_path)), "json", {"SIDE": n}) for n in names
  ]
  turns.play(sides, 3, 2, 60)
  found = {side.name: side for side in sides}
  for name in ("well", "wide", "also well"):
    assert [value for *_, value in found[name].turns] == [6, 8, 10]  # 4 steps while it was built
    assert found[name].facts["fact"] == 1 and found[name].facts.get("alone", False) == (name == "wide")  # fmt: skip
  assert found["aborts"].facts["error"] == "its process ended with status -6"
  assert found["raises"].facts["error"] == "ValueError: two lines"
  described = {side.name: against_torch.describe(side, 8, 1) for side in sides}
  assert described["well"]["milliseconds"] > 0 and "error" in described["raises"]


def test_ratio_is_of_the_best_variant_and_above_one_where_ours_is_faster():
  side = lambda wall, cpu: {"milliseconds": wall, "cpu_milliseconds": cpu}
  sides = {"ours plain": side(10, 30), "torch eager": side(30, 15), "torch graph": side(20, 60), "torch compile": {"error": "x"}}  # fmt: skip
  assert against_torch.compare(sides) == {
    "ours plain": {
      "best": "torch graph",
      "ratio_of_milliseconds": 2,
      "ratio_of_cpu_milliseconds": 0.5,
    }  # fmt: skip
  }
  assert against_torch.compare({"ours plain": side(1, 1)}) == {}


def test_the_table_of_a_gpu_tells_every_part(tmp_path):
  """Numbers where there are some, else what was said last; the same in JSON."""
  rows = [("cifar_256", "1", "20"), ("kernels", "0", "9"), ("resume", "134", "7"), ("start", "-", "0")]  # fmt: skip
  (tmp_path / "parts.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
  facts = {"device": "1 x card", "processor": "2 cores", "jax": "0", "commit": "c", "date": "d"}
  profile = kernels.table([("loop_1", 2.0), ("loop_2", 1.0), ("gemm", 4.0)] * 2, 2, 2)
  assert profile == [["gemm", 1.0, 4.0], ["loop_1", 1.0, 2.0]]
  results = {
    "cifar_256": {"ratios": {}, "sides": {"torch eager": {"error": "no card"}}},
    "kernels": {"kernels": profile, "kinds": [], "launches": 3, "milliseconds": 7.0},
  }
  for name, *_ in rows[:3]:
    (tmp_path / name).mkdir()
    (tmp_path / name / "log").write_text("first\nF0000 Check failed\n")
  for name, result in results.items():
    (tmp_path / name / "x.json").write_text(json.dumps(facts | result))
  gpu_table.run(tmp_path, tmp_path)
  text = (tmp_path / "table.txt").read_text()
  for piece in ("1 x card", "cifar_256: failed with status 1 (20 s)", "torch eager            failed: no card",
                "57.1%  gemm", "resume: failed with status 134", "F0000 Check failed", "start: left out"):  # fmt: skip
    assert piece in text, piece
  assert json.loads((tmp_path / "table.json").read_text())["kernels"]["result"]["launches"] == 3
  assert kernels.kind("input_reduce_fusion_12.1") == "input_reduce_fusion"
