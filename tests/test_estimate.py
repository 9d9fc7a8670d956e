"""--plan: says what a run takes without data, and refuses what cannot be."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from adco_jax import build, main
from adco_jax.data.batch import Batch, Constants
from adco_jax.data.pipeline import PipelineLoader
from adco_jax.data.resident import ResidentLoader
from adco_jax.errors import ConfigError
from adco_jax.profile import collectives, roofline
from adco_jax.runtime import sharding
from adco_jax.tasks import estimate
from configs import adco_r50, adco_vits16
from tests import settings
from tests.faults.images import write_images

TINY = [
  "--config=configs/adco_r50.py", "--config.model.arch=resnet8", "--config.model.width=0.125", "--config.model.stem=small",
  "--config.views.crops=((16,.2,1.),(16,.2,1.))", "--config.data.batch_size=16", "--config.bn.group_size=8", "--config.method.bank.size=4096",
]  # fmt: skip


def test_plan_of_a_machine_that_is_not_here():
  """Two CPU devices, in a process of their own: no data, no workdir, the numbers of the compiled step."""
  command = [sys.executable, "-m", "adco_jax.main", *TINY, "--plan", "--plan_topology=cpu:2"]
  found = subprocess.run(command, capture_output=True, text=True, timeout=200)
  assert found.returncode == 0, found.stderr
  said = found.stdout
  assert "2 x cpu, float32, batch 16" in said and "4,096 x 128" in said
  assert (
    all(kind in said for kind in ("all-gather", "all-reduce", "reduce-scatter"))
    and "all-to-all" not in said
  )
  assert "H200" in said and "no measurement" in said
  assert "steps                 16,014,656 = 256 of the bank's initialisation" in said


def test_figures_are_read_without_exponents():
  assert [estimate._figure(x) for x in (2.083e7, 1066.6, 40.66, 0.01449, 0)] == ["20,800,000", "1,070", "40.7", "0.0145", "0"]  # fmt: skip


@pytest.mark.parametrize("group, keys", [(2, 2), (0, 0)])  # several groups, whose keys move, or one
@pytest.mark.parametrize("kind", [PipelineLoader, ResidentLoader])
def test_the_planned_inputs_are_those_of_training(kind, group, keys):
  """Shapes, types and shardings of `Batch.shapes` against what a loader really ships; a view that is a query too travels
  again only where it is shuffled."""
  config = settings.tiny_config("symmetric", method__bank__init="random", bn__group_size=group)
  mesh = sharding.create_mesh(jax.devices()[:2])
  source = build.load_source("digits", "", "train")
  plan = settings.tiny_plan(config, 2, source.num_examples)
  loader = kind(build.Reader(source), mesh, threads=1)
  batch = next(loader.train(0, 1, seed=0, plan=plan, ratio=(0.75, 4 / 3))).batch.put(mesh)
  planned = Batch.shapes(plan, plan.train_pairing, mesh, kind.item)
  facts = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)
  assert facts(batch) == facts(planned)
  assert len(batch.keys) == 2 and sum(key is not None for key in batch.keys) == keys
  assert facts(Constants.put(mesh, 0)) == facts(Constants.shapes(mesh))


def test_bytes_of_a_program_written_by_hand():
  """Two devices: a gather of 8 floats to each, a sum of 4."""
  mesh = sharding.create_mesh(jax.devices()[:2])

  def f(x):
    return jax.lax.all_gather(x, "data", tiled=True), jax.lax.psum(
      jnp.sum(x.reshape(2, 2), 0), "data"
    )

  mapped = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))
  text = jax.jit(mapped).lower(jnp.zeros(8)).compile().as_text()
  rows = {row.kind: row for row in collectives.table(text, 2)}
  assert rows["all-gather"].bytes == 8 * 4 / 2 and rows["all-reduce"].bytes == 2 * 2 * 4 / 2


@pytest.mark.parametrize("flags, says", [
  (["--plan", "--plan_topology=cpu:0"], "--plan_topology=cpu:0: use one of"),
  (["--plan", "--plan_topology=gpu"], "--plan_topology=gpu: use one of"),
  (["--plan_topology=cpu:8"], "give --plan as well"),
  (["--plan=False", "--plan_topology=cpu:8"], "give --plan as well"),
  (["--plan=maybe"], "--plan=maybe"),
  (["--plan", "--config.data.num_examples=0"], "config.data.num_examples=0: say how many images there are"),
  (["--plan", "--config.method.bank.size=0"], "config.method.bank.size=0"),
])  # fmt: skip
def test_bad_plans_are_refused(flags, says, capsys):
  assert main.main([*TINY, *flags]) == 2
  assert says in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_refused_before_compiling(capsys):
  assert main.main([*TINY, "--plan", "--config.data.dir=/nowhere"]) == 2
  said = capsys.readouterr()
  assert "config.data.dir='/nowhere'" in said.err and "compil" not in said.out


def test_images_that_are_there_are_counted_and_others_said_to_be_assumed(tmp_path):
  """The same count as the run's."""
  write_images(tmp_path / "train" / "ant", 7)
  write_images(tmp_path / "train" / "bee", 5)
  config = adco_r50.get_config()
  images, classes, told, _ = estimate.count_images(config)
  assert (images, classes) == (1281167, 0) and "none given: assumed 1,281,167 images" in told
  config.data.dir = str(tmp_path)
  images, classes, told, _ = estimate.count_images(config)
  assert (images, classes) == (12, 2) and "12 images" in told and "counted" in told
  assert images == build.open_source(config.data).num_examples
  config.data.source, config.data.dir = "digits", ""
  assert estimate.count_images(config)[:2] == (1297, 10)
  source = estimate.count_images(config)[3]
  kept = lambda chip, platform: estimate.resident_bytes(config, source, chip, platform)
  assert (
    kept("v4", "tpu")
    == kept("", "cpu")
    == source.images.nbytes
    > 0
    == estimate.resident_bytes(config, None, "v4", "tpu")
  )
  lines = estimate.describe_program(2**30, 2**29, 2**31, 2**28, [])
  assert lines[0].endswith("+ new outputs + images that stay there 0.25")
  config.data.loader = "pipeline"
  assert kept("v4", "tpu") == 0


def test_only_pretraining_is_planned(capsys):
  assert main.main(["--config=configs/knn.py", "--plan"]) == 2
  assert "config.task='knn' is not planned" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_with_what_would():
  config, gib = settings.tiny_config(), 2**30  # 16 slots in groups of 2: at most 8 parts
  refuse = lambda *sizes: str(estimate.refusal(config, settings.tiny_plan(config), *sizes, "v5e"))
  assert "batch_size=16: needs 42.0 GiB on each v5e of 16; try --config.accumulate=4" in refuse(
    40 * gib, 42 * gib
  )
  for temporaries in (200, 40):  # more parts than groups; a state that is too large by itself
    assert "use more devices, a smaller batch or a smaller bank" in refuse(
      temporaries * gib, 202 * gib
    )


def test_a_compiler_that_refuses_is_one_line():
  """XLA's TPU compiler ends with an error when memory does not suffice; what it says becomes ours."""
  config = settings.tiny_config()
  error = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO temporaries (18.76G) exceeds available HBM (15.75G)."
  )
  built = SimpleNamespace(abstract_state={}, abstract_packed={}, updates=(SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=lambda: raise_(error))),))  # fmt: skip
  mesh = sharding.create_mesh(jax.devices()[:1])
  with pytest.raises(ConfigError, match="needs 18.8 GiB on each v5e of 16; try"):
    estimate.compile_step(config, estimate.Step(settings.tiny_plan(config), mesh, built), "v5e")


def raise_(error):
  raise error


def test_a_collective_beside_others_counts_once():
  """The TPU compiler writes one gather into the fusion that starts it and into all that run beside it."""
  gather = 'f32[256,128] all-gather(%p), backend_config={"async_collective_fusion_config":{}}'
  text = f"""
%fused_computation.1 (p: f32[32,128]) -> f32[256,128] {{
  %all-gather.1 = {gather}
%async_collective_fusion.2 (p: f32[32,128]) -> f32[256,128] {{
  %all-gather.2 = {gather}
ENTRY %main (p: f32[32,128]) -> f32[256,128] {{
  %async-collective-start.3 = (f32[32,128], f32[256,128]) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %beside = f32[8] fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  %all-gather.4 = f32[256,128] all-gather(%q), dimensions={{0}}
"""
  (row,) = collectives.table(text, 8)
  assert row.kind == "all-gather" and row.number == 2
  assert row.bytes == 2 * 256 * 128 * 4 * 7 / 8


def test_resnet50_is_what_was_enumerated_by_hand():
  """8.18 GFLOP forward, 32.5 per pair, 321 MB moved fused and 465 unfused at 224 pixels."""
  found = roofline.count(build.create_encoder(adco_r50.get_config(), "bfloat16"), 224)
  assert found.flops == pytest.approx(8.18e9, rel=1e-3)
  work = roofline.work([found], [found], 1)
  assert work.flops == pytest.approx(32.50e9, rel=1e-3)
  assert work.fused == pytest.approx(321.3e6, rel=1e-3)
  assert work.unfused == pytest.approx(464.8e6, rel=1e-3)
  twice = roofline.work([found] * 2, [found] * 2, 1)
  assert twice.flops == 2 * work.flops
  again = roofline.work([found], [found], 2)  # parts embed every query a second time
  assert again.flops == work.flops + found.flops


def test_a_vit_is_what_was_enumerated_by_hand():
  """Twelve blocks of 20 n + 2 m numbers and the patches; passes within 4 % of the enumeration."""
  config = adco_vits16.get_config()
  found = roofline.count(build.create_encoder(config, "bfloat16"), 224)
  n, m, patches = 197 * 384, 6 * 197**2, 196 * (768 + 384)
  assert found.elements == 12 * (20 * n + 2 * m) + patches + 2 * 384 + 384 + config.model.dim
  for tokens in (65, 197):
    n, m = tokens * 64, tokens**2
    whole = 20 * n + 2 * m
    fused, unfused = (28 * n + 4 * m, 52 * n + 7 * m), (38 * n + 4 * m, 73 * n + 7 * m)
    for passes, numbers in zip(roofline.VIT, (fused, unfused), strict=True):
      assert passes == pytest.approx([x / whole for x in numbers], rel=0.04)
  work = roofline.work([found], [found], 1, roofline.VIT)
  assert work.fused == pytest.approx(2 * found.elements * (2 * 1.5 + 2.75))


def test_warnings_say_what_a_colleague_would():
  config = settings.tiny_config(method__bank__size=128, bn__group_size=1)
  said = " ".join(build.warnings(config, settings.tiny_plan(config)))
  assert "method.bank.size=128 for 64 images" in said and "groups of one image" in said
  late = settings.tiny_config(
    bn__group_size=16,
    objective="mochi",
    method__queue_size=64,
    method__hardest=8,
    epochs=15,
  )
  said = " ".join(build.warnings(late, settings.tiny_plan(late)))
  assert "method.start_epochs=15 never comes in 15 epochs" in said
  queue = settings.tiny_config(
    bn__group_size=16, objective="moco", method__queue_size=64, method__in_batch=True
  )
  assert "which MoCo's are not; False is its own" in " ".join(
    build.warnings(queue, settings.tiny_plan(queue))
  )
  assert not build.warnings(settings.tiny_config(bn__group_size=16), settings.tiny_plan(settings.tiny_config(bn__group_size=16)))  # fmt: skip
