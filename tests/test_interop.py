"""Weights in and out: names, layouts and outputs against PyTorch, refusals, the three tasks."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from adco_jax import main
from adco_jax.interop import authors, detectron2, files
from adco_jax.interop import torch_weights as names
from adco_jax.models.heads import Encoder
from tests import torch_reference as reference

D = 16


def ours(arch, width=1.0, group_size=4, dtype=np.float64):
  """(encoder, variables of zeros)."""
  encoder = Encoder(arch, width, "imagenet", D, group_size, "first", dtype)
  images = np.zeros((1, 32, 32, 3), dtype)
  shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))
  return encoder, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def theirs(arch, width=64, **fc):
  torch.manual_seed(0)
  return reference.scramble(reference.ResNet(arch, width, **fc)).double()


def state_of(module):
  return {name: value.numpy().copy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torch_to_us_and_back(float64, arch):
  """Embeddings in both modes and running statistics agree; what we export torch loads strictly."""
  module = theirs(arch, dim=D)
  encoder, blank = ours(arch)
  variables, report = names.import_encoder(state_of(module), blank)
  assert report["missing"] == report["unexpected"] == []
  images = np.random.RandomState(0).standard_normal((4, 64, 64, 3))
  x = reference.images([images])[0]
  evaluated = jax.jit(lambda v, x: encoder.apply(v, x, False))(variables, images)
  trained, new = jax.jit(lambda v, x: encoder.apply(v, x, True, mutable=["batch_stats"]))(
    variables, images
  )
  with torch.no_grad():
    assert np.abs(evaluated - module.eval()(x).numpy()).max() < 1e-9
    assert np.abs(trained - module.train()(x).numpy()).max() < 1e-8
  back = names.export_encoder({**variables, **jax.device_get(new)}, head=True, steps=1)
  assert set(back) == set(module.state_dict())
  for name, value in module.state_dict().items():
    np.testing.assert_allclose(back[name], value.numpy(), rtol=1e-6, atol=1e-9)
  fresh = theirs(arch, dim=D)
  loaded = fresh.load_state_dict(
    {n: torch.from_numpy(np.array(v)) for n, v in back.items()}, strict=True
  )
  assert not loaded.missing_keys


def test_import_after_export_is_the_identity():
  _, blank = ours("resnet18", 0.125, dtype=np.float32)
  rng = np.random.RandomState(0)
  variables = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), blank)
  back, _ = names.import_encoder(names.export_encoder(variables, head=True), blank)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, variables, back)))


def test_a_projection_that_made_room_for_a_classifier():
  """It is found again; arrays that another program calls so are not taken for it."""
  _, blank = ours("resnet18", 0.125, dtype=np.float32)
  state = names.export_encoder(jax.tree.map(np.asarray, blank), head=True)
  fc = {"fc.weight": np.zeros((3, 4)), "fc.bias": np.zeros(3)}
  aside = names.set_aside(state)
  assert names.taken_back(aside | fc).keys() == state.keys() and "fc.0.weight" not in aside
  backbone = {name: x for name, x in state.items() if not name.startswith("fc.")}
  for other in (
    state | {"projection.0.weight": 1},
    state | {"projection.weight": 1},
    backbone | fc | {"projection.weight": 1},
    backbone | fc,
  ):
    assert names.taken_back(other) is other


@pytest.mark.parametrize("arch, width", [("resnet8", 8), ("resnet18", 64), ("resnet50", 64)])
def test_describe(arch, width):
  facts = names.describe(state_of(theirs(arch, width, dim=D)))
  assert facts == {"arch": arch, "width": width / 64, "stem": "imagenet", "dim": D}


def test_detectron2_names():
  """Names as detectron2's R-50 lists them: 53 convolutions with a norm of four arrays each."""
  state = state_of(theirs("resnet50"))
  renamed = detectron2.rename(state)
  assert len(renamed) == 53 * 5
  documented = [
    "stem.conv1.weight", "stem.conv1.norm.running_mean", "res2.0.conv1.weight",
    "res2.0.shortcut.weight", "res2.0.shortcut.norm.bias", "res3.3.conv2.norm.weight",
    "res5.2.conv3.norm.running_var",
  ]  # fmt: skip
  assert set(documented) <= set(renamed)
  back = detectron2.restore_names(renamed)
  assert all(back[name] is state[name] for name in back) and set(back) <= set(state)


def test_moco_queue_starts_at_its_oldest_row():
  state = {f"module.encoder_q.{n}": v for n, v in state_of(theirs("resnet8", 8, dim=D)).items()}
  queue = np.arange(D * 6, dtype=np.float32).reshape(D, 6)
  held = authors.parse_checkpoint(
    {"state_dict": state | {"module.queue": queue, "module.queue_ptr": np.array([4])}}
  )
  assert held.facts["bank_size"] == 6
  np.testing.assert_array_equal(held.queue[:, 0] % 6, [4, 5, 0, 1, 2, 3])


# What a user may hand over by mistake: (how the file is made, what the line says).


class Payload:
  """Would create a file if it were ever unpickled."""

  def __reduce__(self):
    return (open, ("executed", "w"))


def truncated(path):
  torch.save(theirs("resnet8", 8).state_dict(), path)
  path.write_bytes(path.read_bytes()[:2000])


def not_finite(path):
  state = theirs("resnet8", 8, dim=D).state_dict()
  state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
  torch.save(state, path)


def with_bank(path):
  state = {f"encoder_q.{n}": v for n, v in theirs("resnet8", 8, dim=D).state_dict().items()}
  torch.save(
    {"state_dict": state, "Memory_Bank": {"W": torch.randn(D, 48), "v": torch.zeros(D, 48)}}, path
  )


BAD = {
  "truncated": (truncated, ["bad.pth", "truncated or no checkpoint"]),
  "text": (
    lambda path: path.write_text("hello"),
    ["bad.pth", "neither a zip archive nor a pickle"],
  ),
  "code": (
    lambda path: torch.save({"state_dict": Payload()}, path),
    ["nothing of it was executed"],
  ),
  "not a network": (lambda path: torch.save({"a": torch.zeros(3)}, path), ["no ResNet"]),
  "other architecture": (
    lambda path: torch.save(theirs("resnet18", 8, dim=D).state_dict(), path),
    ["config.model.arch='resnet8'", "holds resnet18", "--config.model.arch=resnet18"],
  ),
  "not finite": (not_finite, ["layer1.0.conv1.weight", "not finite"]),
  "other bank": (
    with_bank,
    ["config.method.bank.size=32", "holds 48", "--config.method.bank.size=48"],
  ),
}
IMPORT = [
  "--config=configs/import.py:adco_digits", "--config.model.arch=resnet8", "--config.model.width=0.125",
  "--config.model.stem=imagenet", "--config.model.dim=16", "--config.method.bank.size=32",
  "--config.bn.group_size=8",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path, capsys):
  make, wanted = BAD[name]
  path = tmp_path / "bad.pth"
  make(path)
  assert main.main([*IMPORT, f"--config.file={path}", f"--workdir={tmp_path}/run"]) == 2
  error = capsys.readouterr().err.strip()
  assert len(error.splitlines()) == 1 and all(word in error for word in wanted), error
  assert not (tmp_path / "run").exists()
  assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """(module whose weights were imported, workdir), through the command line."""
  folder = tmp_path_factory.mktemp("imported")
  torch.manual_seed(3)
  model = reference.scramble(reference.AdCo("resnet8", 8, D))
  state = {f"module.{n}": v for n, v in model.state_dict().items()}
  bank = {"W": torch.randn(D, 32), "v": torch.randn(D, 32)}
  torch.save(
    {"epoch": 1, "arch": "resnet8", "state_dict": state, "Memory_Bank": bank}, folder / "a.pth.tar"
  )
  workdir = folder / "run"
  assert main.main([*IMPORT, f"--config.file={folder}/a.pth.tar", f"--workdir={workdir}"]) == 0
  return model.encoder_q, workdir


def export(workdir, *flags):
  return main.main(["--config=configs/export.py", f"--config.pretrained={workdir}", *flags])


@pytest.mark.slow
@pytest.mark.storage
def test_imported_run_is_scored_and_goes_on(imported, tmp_path, capsys):
  """kNN and linear probe; one more step under the same config; the file again is refused."""
  workdir = shutil.copytree(imported[1], tmp_path / "run")
  small = ["--config.labels_per_class=()", "--config.baselines=False"]
  assert (
    main.main(
      ["--config=configs/knn.py", f"--config.pretrained={workdir}", "--config.map=0", *small]
    )
    == 0
  )
  assert (
    main.main(["--config=configs/linear.py:small", f"--config.pretrained={workdir}", *small]) == 0
  )
  flags = ["--config=configs/adco_digits.py", *IMPORT[1:], f"--workdir={workdir}"]
  assert main.main([*flags, "--config.stop_at_step=2"]) == 0
  assert (
    "resuming at step 1 of 2001" in capsys.readouterr().out
  )  # 32 rows in one step, then 100 epochs
  assert main.main([*IMPORT, "--config.file=x.npz", f"--workdir={workdir}"]) == 2


def features_of(module, run_images):
  module = module.eval()
  with torch.no_grad():
    return module(reference.images([run_images])[0]).numpy()


@pytest.mark.parametrize("format, suffix", [("torchvision", ".pth"), ("timm", ".safetensors")])
def test_export_loads_strictly(imported, tmp_path, format, suffix):
  module, workdir = imported
  path = tmp_path / f"out{suffix}"
  assert export(workdir, f"--config.format={format}", f"--config.out={path}") == 0
  state = {name: torch.from_numpy(np.array(v)) for name, v in files.read(str(path)).items()}
  bare = reference.ResNet("resnet8", 8)
  bare.load_state_dict(state, strict=True)
  images = np.random.RandomState(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
  module.fc = torch.nn.Identity()
  np.testing.assert_array_equal(features_of(bare, images), features_of(module, images))
  card = path.with_name(path.name + ".md").read_text()
  assert "license:" in card and "`method.bank.size`: 32" in card and "centre crop 16" in card
  assert export(workdir, f"--config.format={format}", f"--config.out={path}") == 2


@pytest.mark.parametrize(
  "flags, wanted",
  [
    (["--config.format=onnx"], "use one of torchvision"),
    (["--config.format=npz", "--config.out=a.pth"], "written as .npz"),
    (["--config.format=detectron2", "--config.linear=p.npz"], "carry a classifier"),
    (["--config.encoder=teacher"], "use query or key"),
  ],
)
def test_bad_exports(imported, flags, wanted, capsys):
  assert export(imported[1], *flags) == 2
  assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_embed(imported, tmp_path, suffix):
  """A feature vector, a name and a label for each of the 1,297 digits."""
  path = tmp_path / f"out.{suffix}"
  flags = [
    "--config=configs/embed.py",
    f"--config.pretrained={imported[1]}",
    f"--config.out={path}",
  ]
  assert main.main(flags) == 0
  if suffix == "npz":
    found = files.read(str(path))
  else:
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(path).to_pydict()
  assert (
    np.shape(found["features"]) == (1297, 32)
    and len(found["names"]) == len(found["labels"]) == 1297
  )
  assert main.main(flags) == 2  # nothing is overwritten


def test_report_of_names(tmp_path, capsys):
  """A backbone alone: its head is missing and says so; the run starts before the bank's initialisation."""
  state = state_of(theirs("resnet8", 8))
  save_file(
    {n: v.astype(np.float32) for n, v in state.items()} | {"extra": np.zeros(1)},
    tmp_path / "b.safetensors",
  )
  flags = [*IMPORT, f"--config.file={tmp_path}/b.safetensors", f"--workdir={tmp_path}/run"]
  assert main.main(flags) == 0
  said = capsys.readouterr().out
  assert "missing 4 names: fc.0.weight" in said and "unexpected 1 names: extra" in said
  assert "at step 0, before its first step" in said
  assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["task"] == "pretrain"
