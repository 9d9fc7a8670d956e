"""From config to sizes; every refusal says the option, the value and what to do."""

import dataclasses
import importlib

import pytest

from adco_jax import build
from adco_jax.config import plan as planning
from adco_jax.config.pairing import MODES, make_pairing
from adco_jax.config.plan import Machine
from adco_jax.errors import ConfigError
from adco_jax.workdir.files import flatten
from tests.settings import tiny_config, tiny_plan


def test_published_sizes():
  """ImageNet at batch 256: 5,004 steps per epoch, 256 of initialisation (algorithm of the authors' run)."""
  from configs import adco_r50

  plan = build.plan_for(adco_r50.get_config(), 1281167, 1000, Machine(backend="gpu", devices=8))
  assert (plan.steps_per_epoch, plan.fill_steps) == (5004, 256)
  assert plan.total_steps == 256 + 200 * 5004
  assert (
    plan.compute_dtype == "bfloat16" and plan.learning_rate == 0.03 and plan.shuffle_block == 256
  )


def test_steps_epochs_and_batches():
  plan = tiny_plan(tiny_config(epochs=2.5, method__bank__size=40), num_examples=70)
  assert (plan.steps_per_epoch, plan.fill_steps, plan.total_steps) == (4, 3, 13)
  assert [plan.batch(s) for s in (0, 2, 3, 12)] == [0, 2, 0, 9]
  assert [plan.epoch(s) for s in (0, 3, 7, 13)] == [0, 0, 1, 2.5]
  assert [s for s in range(14) if plan.evaluates(s)] == [0, 7, 11, 13]
  assert not any(plan.keeps(s) for s in range(14))
  kept = tiny_plan(tiny_config(epochs=3, save__keep_every_epochs=1), num_examples=70)
  assert [s for s in range(kept.total_steps + 1) if kept.keeps(s)] == [6, 10, 14]
  assert plan.pairing(2) == plan.phases[0].pairing and plan.pairing(3) == plan.train_pairing


def test_pairs_of_the_modes():
  weights = {m: [w for *_, w in make_pairing(m, 2 if "crop" not in m else 4).pairs] for m in MODES}
  assert (
    weights["single"] == [1]
    and weights["symmetric"] == [0.5, 0.5]
    and weights["multicrop"] == [1, 1, 1]
  )
  pairing = make_pairing("symmetric_multicrop", 4)
  views = [(pairing.query_views[q], pairing.key_views[k]) for q, k, _ in pairing.pairs]
  assert views == [(1, 0), (2, 0), (3, 0), (0, 1), (2, 1), (3, 1)]
  assert weights["symmetric_multicrop"] == [0.5] * 6
  assert make_pairing("multicrop", 4).query_views == (1, 2, 3)


def test_rate_scales_only_when_asked():
  assert tiny_plan(tiny_config()).learning_rate == 0.03
  plan = tiny_plan(tiny_config(optim__scale_from_batch=256))
  assert plan.learning_rate == pytest.approx(0.03 / 16) and plan.lr_final == pytest.approx(
    0.0006 / 16
  )


def test_no_initialisation_for_random_rows_and_queues():
  assert tiny_plan(tiny_config(method__bank__init="random")).fill_steps == 0
  assert tiny_plan(tiny_config(objective="moco")).fill_steps == 0


def test_one_group_needs_no_shuffle():
  assert tiny_plan(tiny_config(bn__group_size=16)).shuffle_block == 0
  assert tiny_plan(tiny_config()).shuffle_block == 16
  for block, over in ((8, False), (16, True), (0, True)):
    plan = tiny_plan(tiny_config(bn__shuffle_block=block), 2, processes=2)
    assert (plan.shuffle_block, plan.shuffles_over_processes) == (block or 16, over)


REFUSED = {
  "devices": (dict(data__batch_size=20), dict(devices=8), "does not divide over 8 devices; use 16 or 24"),
  "groups": (dict(bn__group_size=3), dict(devices=2), "BatchNorm groups of 3; use 12 or 18"),
  "few images": (dict(), dict(num_examples=15), "the data has 15 images, fewer than one batch"),
  "fewer than a group": (dict(bn__group_size=16), dict(num_examples=7), "use a batch of 7 or less, and no larger bn.group_size"),
  "bank rows": (dict(method__bank__size=33), dict(devices=8), "does not divide over 8 devices; use 32 or 40"),
  "low temperature": (dict(mode="symmetric_multicrop", method__temperature=0.01), {}, "0.0133 or more"),
  "low bank temperature": (dict(mode="symmetric_multicrop", method__bank__temperature=0.01), {}, "0.0133 or more"),
  "queue": (dict(objective="moco", method__queue_size=8), {}, "a queue must hold a batch; use 16"),
  "block": (dict(bn__shuffle_block=5), {}, "must divide the batch of 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
  changes, setting, message = REFUSED[case]
  with pytest.raises(ConfigError) as refusal:
    tiny_plan(tiny_config(**changes), **setting)
  assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_may_change_names_real_keys():
  assert set(planning.MAY_CHANGE) <= set(flatten(tiny_config().to_dict()))


def test_probe_plan():
  plan = planning.make_probe_plan(
    100, 10, batch_size=256, crops=((32, 0.08, 1.0),), epochs=3, devices=8, processes=1, process=0
  )
  assert (plan.batch_size, plan.steps_per_epoch, plan.total_steps) == (96, 1, 3)
  assert plan.pairing(0).views == (0,) and dataclasses.asdict(plan)["view_sizes"] == (32,)


@pytest.mark.parametrize(
  "images, rows", [(60, 256), (5000, 1024), (100_000, 32768), (10**7, 65536)]
)
def test_the_bank_of_photographs_follows_their_number(images, rows):
  """A power of two near a quarter of them, within what is known to work."""
  config = importlib.import_module("configs.adco_photos").get_config(str(images))
  assert config.method.bank.size == rows and config.data.num_examples == images
  turn = lambda c: (
    c.method.bank.learning_rate * 10 / (rows_and_batch(c) * c.method.bank.temperature)
  )
  rows_and_batch = lambda c: c.method.bank.size + c.data.batch_size
  published = importlib.import_module("configs.adco_r50").get_config()
  assert turn(config) == pytest.approx(turn(published), rel=0.05)


def test_synchronised_batchnorm_divides_over_devices_alone():
  config = tiny_config(bn__group_size=0, data__batch_size=24)
  assert tiny_plan(config, devices=8).shuffle_block == 0
  config.accumulate = 2
  with pytest.raises(
    ConfigError, match="accumulate=2: a batch in parts has no statistics of all its"
  ):
    tiny_plan(config, devices=4)
