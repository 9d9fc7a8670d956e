"""CIFAR-10 in the two forms that everybody has on disk: the same images of both; what is damaged or no batch is refused."""

import os
import pickle

import numpy as np
import pytest

from adco_jax import build, main
from adco_jax.config import ranges
from adco_jax.data.sources import cifar, loading
from adco_jax.errors import ConfigError, NoSplit
from tests import cifar_files
from tests.faults.images import write_images

FORMS = list(cifar_files.WRITERS)


@pytest.fixture
def batches():
  return cifar_files.draw()


def load(place, split="train", kind="cifar10_binary"):
  return loading.load_source(kind, str(place), split)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [".", ".."])
def test_both_forms_hold_the_same_images(tmp_path, batches, form, place):
  """Named by their folder or by the one above it; train is the five batches in their order."""
  cifar_files.WRITERS[form](tmp_path / form, batches)
  for split, names in cifar.FILES.items():
    images, labels = (np.concatenate(x) for x in zip(*(batches[n] for n in names), strict=True))
    source = load(os.path.join(tmp_path, form, place), split)
    assert np.array_equal(source.images, images) and np.array_equal(source.labels, labels)
    assert source.classes == tuple(cifar_files.CLASSES) and source.split == split
    assert source.name == "cifar10" and not source.notes
  assert load(tmp_path, "val").split == "test"
  with pytest.raises(NoSplit, match="data.split='all'.*train and test"):
    load(tmp_path, "all")


def test_a_batch_that_python_3_wrote_again_is_read_too(tmp_path, batches):
  """With text for names, in either protocol; arrays that lie column by column as well."""
  cifar_files.write_python(tmp_path / "x", batches)
  images, labels = batches["test_batch"]
  for protocol, pixels in ((2, np.asfortranarray), (4, np.asarray)):
    tree = {"labels": labels.tolist(), "data": pixels(cifar_files.rows(images))}
    (tmp_path / "x" / "test_batch").write_bytes(pickle.dumps(tree, protocol))
    assert np.array_equal(load(tmp_path / "x", "test").images, images)


def test_python_s_batches_are_what_they_were_then(tmp_path, batches):
  """The writer of these tests against the first bytes of the published file."""
  cifar_files.write_python(tmp_path / "x", batches)
  content = (tmp_path / "x" / "data_batch_1").read_bytes()
  assert content.startswith(b"\x80\x02}q\x00(U\x0bbatch_label") and b"cnumpy.core.multi" in content


class Evil:
  """What runs as soon as an ordinary unpickler reads it."""

  def __init__(self, called, *args):
    self.called, self.args = called, args

  def __reduce__(self):
    return self.called, self.args


@pytest.mark.parametrize(
  "called", [(os.mkdir, "made"), (eval, "1"), (np.load, "x"), (np.frombuffer, b"x")]
)
def test_a_pickle_calls_nothing(tmp_path, batches, monkeypatch, called):
  monkeypatch.chdir(tmp_path)
  cifar_files.write_python(tmp_path / "x", batches)
  for protocol in (0, 2, 4):
    (tmp_path / "x" / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil(*called)}, protocol))
    with pytest.raises(ConfigError, match=f"data_batch_2 is damaged .names .*{called[0].__name__}"):
      load(tmp_path / "x")
  assert not (tmp_path / "made").exists()


def damaged(folder, form, case):
  """Spoils a file of the folder; returns what must be said of it."""
  python = form == FORMS[0]
  path = folder / ("data_batch_3" if python else "data_batch_3.bin")
  content = path.read_bytes()
  if case == "missing":
    path.unlink()
    return "data_batch_3.* cannot be read .No such file"
  if case == "no names":
    (folder / ("batches.meta" if python else "batches.meta.txt")).unlink()
    return "batches.meta.* cannot be read"
  if case == "label":
    at = content.index(b"labels") + 12 if python else 0
    path.write_bytes(content[:at] + b"\x4b\xc8" * python + b"\xc8" * (not python) + content[at + 1 + python :])  # fmt: skip
    return "a label of .* is 200, outside 0..9"
  path.write_bytes(content[: {"truncated": -100, "empty": 0}[case]])
  return "data_batch_3.* is damaged .*unpack the archive again"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["missing", "no names", "label", "truncated", "empty"])
def test_what_is_damaged_is_refused_by_name(tmp_path, batches, form, case):
  cifar_files.WRITERS[form](tmp_path / form, batches)
  says = damaged(tmp_path / form, form, case)
  with pytest.raises(ConfigError, match=says) as caught:
    load(tmp_path)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("tree", [
  [], {b"data": 1, b"labels": [1]}, {b"labels": [0]}, {b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]},
  {b"data": np.zeros((1, 3072), np.uint8), b"labels": [0, 1]}, {b"data": np.zeros((1, 3072), np.float32), b"labels": [0]},
  {b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"cat"]}, {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [0]},
])  # fmt: skip
def test_pickles_of_something_else_are_refused(tmp_path, batches, tree):
  cifar_files.write_python(tmp_path / "x", batches)
  (tmp_path / "x" / "test_batch").write_bytes(cifar_files.pickled(tree))
  with pytest.raises(ConfigError, match="test_batch is damaged"):
    load(tmp_path / "x", "test")


def test_a_folder_without_batches_is_told_what_to_name(tmp_path):
  (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
  with pytest.raises(ConfigError, match="cifar-10-batches-py .*unpacked.* or the one above it"):
    load(tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["npz", "digits", "webdataset"])
def test_batches_are_found_whatever_the_config_was_made_for(tmp_path, batches, form, kind):
  """A folder of classes that lies beside them stays what it is for who asks for one."""
  cifar_files.WRITERS[form](tmp_path / form, batches)
  for place in (tmp_path, tmp_path / form):
    found = load(place, kind=kind)
    assert found.kind == "cifar10_binary" and "read as data.source" in found.notes[0]
  np.savez(tmp_path / "x.npz", train_images=batches["test_batch"][0])
  assert load(tmp_path / "x.npz").kind == "npz"
  write_images(tmp_path / "train" / "cat", 3)
  assert load(tmp_path, kind="folder").kind == "folder"


def test_a_config_names_them(tmp_path, batches):
  cifar_files.write_binary(tmp_path / FORMS[1], batches)
  where = ["--config.data.source=cifar10_binary", f"--config.data.dir={tmp_path}"]
  config, _ = main.parse(["--config=adco_cifar10_r18", *where])
  ranges.check(config)
  assert build.open_source(config.data).num_examples == 40
