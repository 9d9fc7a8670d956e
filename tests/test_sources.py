"""Every kind of source on real files: the same pixels whatever holds them; what is damaged is refused."""

import io
import os
import struct
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from adco_jax import main
from adco_jax.data import listing, sources
from adco_jax.data.files import Strings
from adco_jax.data.images import Reader
from adco_jax.plan import ConfigError, RunError
from tests.faults.images import photograph

COUNT = 30


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("ADCO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures():
  """(uint8 [30, 20, 24, 3], labels)."""
  images = np.stack([photograph(20, 24, seed) for seed in range(COUNT)])
  return images, np.arange(COUNT) % 3


def png(image):
  content = io.BytesIO()
  Image.fromarray(image).save(content, "PNG")
  return content.getvalue()


def as_folder(folder, images, labels):
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    path = folder / "train" / f"class{label}" / f"{i:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(image))
  return {"kind": "folder"}


def as_npz(folder, images, labels):
  folder.mkdir()
  np.savez(folder / "all.npz", train_images=images, train_labels=labels)
  return {"kind": "npz", "directory": str(folder / "all.npz")}


def as_webdataset(folder, images, labels, shards=4):
  (folder / "train").mkdir(parents=True)
  for part, index in enumerate(np.array_split(np.arange(len(images)), shards)):
    with tarfile.open(folder / "train" / f"{part:05d}.tar", "w") as archive:
      for i in index:
        for name, content in (
          (f"{i:03d}.png", png(images[i])),
          (f"{i:03d}.cls", b"%d" % labels[i]),
        ):
          member = tarfile.TarInfo(name)
          member.size = len(content)
          archive.addfile(member, io.BytesIO(content))
  return {"kind": "webdataset"}


def varint(number):
  found = b""
  while number > 127:
    found, number = found + bytes([number & 127 | 128]), number >> 7
  return found + bytes([number])


def field(number, content):
  return varint(number << 3 | 2) + varint(len(content)) + content


def example(image, label):
  """A tf.train.Example, written by hand so that the reader is not checked against itself."""
  values = {
    "note": field(2, field(1, struct.pack("<f", 0.5))),
    "image/encoded": field(1, field(1, image)),
    "image/class/label": field(3, field(1, varint(label))),
  }
  entries = [field(1, field(1, name.encode()) + field(2, value)) for name, value in values.items()]
  return field(1, b"".join(entries))


def as_tfrecord(folder, images, labels, shards=3):
  folder.mkdir(parents=True)
  for part, index in enumerate(np.array_split(np.arange(len(images)), shards)):
    with open(folder / f"birds-train.tfrecord-{part:05d}-of-{shards:05d}", "wb") as file:
      for i in index:
        record = example(png(images[i]), int(labels[i]))
        file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
  return {"kind": "tfrecord"}


def as_tfds(folder, images, labels, file_format):
  import tensorflow_datasets as tfds

  features = {
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
    "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
  }
  pairs = enumerate(zip(images, labels, strict=True))
  rows = [(i, {"image": x, "label": int(y)}) for i, (x, y) in pairs]
  tfds.dataset_builders.store_as_tfds_dataset(
    "birds", "1.0.0", data_dir=folder, split_datasets={"train": rows}, file_format=file_format,
    features=tfds.features.FeaturesDict(features), disable_shuffling=True,
  )  # fmt: skip
  return {"kind": "tfds", "name": "birds"}


FORMS = {
  "npz": as_npz,
  "folder": as_folder,
  "webdataset": as_webdataset,
  "tfrecord": as_tfrecord,
  "tfds tfrecord": lambda *x: as_tfds(*x, "tfrecord"),
  "tfds array_record": lambda *x: as_tfds(*x, "array_record"),
}


def opened(folder, form, pictures):
  where = FORMS[form](folder, *pictures)
  return sources.load_source(**{"directory": str(folder), "split": "train"} | where)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_pixels_and_labels_whatever_holds_them(tmp_path, pictures, form):
  source, reader = opened(tmp_path / "data", form, pictures), None
  reader = Reader(source)
  assert source.num_examples == COUNT
  order = np.arange(COUNT)
  if form == "folder":  # sorted by class
    order = np.argsort(pictures[1], kind="stable")
  for i in np.random.RandomState(0).permutation(COUNT):
    assert np.array_equal(reader.read(int(i)), pictures[0][order[i]])
  assert np.array_equal(source.labels, pictures[1][order])
  assert len(source.classes) == 3 and (source.classes[0] == "ant") == form.startswith("tfds")
  assert len(set(source.names())) == COUNT
  again = sources.load_source(**_arguments(tmp_path, form))
  assert again.identity() == source.identity()


def _arguments(tmp_path, form):
  kind, folder = form.split()[0], tmp_path / "data"
  place = str(folder / "all.npz") if kind == "npz" else str(folder)
  return {"kind": kind, "directory": place, "split": "train", "name": "birds"}


@pytest.mark.parametrize("form", ["tfds array_record"])
def test_a_run_through_main(tmp_path, pictures, form):
  where = FORMS[form](tmp_path / "data", *pictures)
  flags = [
    "--config=configs/adco_digits.py", "--config.model.arch=resnet8", "--config.model.width=0.125",
    "--config.data.batch_size=8", "--config.bn.group_size=1", "--config.bank.size=8", "--config.epochs=1",
    "--config.views.crops=((12,.5,1.),(12,.5,1.))", "--config.eval.every_epochs=0",
    f"--config.data.source={where['kind']}", f"--config.data.name={where.get('name', '')}",
    f"--config.data.dir={tmp_path}/data", "--config.data.loader=pipeline", f"--workdir={tmp_path}/run",
  ]  # fmt: skip
  assert main.main(flags) == 0


def test_labels_can_be_forgotten(tmp_path, pictures):
  as_folder(tmp_path, *pictures)
  source = sources.load_source("folder", str(tmp_path), "train", labels=False)
  assert source.labels is None and source.classes == () and source.num_examples == COUNT


def test_identity_sees_what_changed(tmp_path, pictures):
  """Names of a folder, places in shards."""
  for form in ("folder", "webdataset", "tfrecord"):
    one = opened(tmp_path / form / "a", form, pictures).identity()
    images = [*pictures[0][:-1], np.zeros((20, 24, 3), np.uint8)]
    other = opened(tmp_path / form / "b", form, (images, pictures[1])).identity()
    assert (one == other) == (form == "folder")  # of a folder's files only the names count


def make_tree(root, folders=5, files=20):
  for i in range(folders):
    folder = root / f"day{i}" / "deep"
    folder.mkdir(parents=True)
    for j in range(files):
      (folder / f"{j:04d}.JPG").write_bytes(b"x")
  old = time.time() - 100
  for path in [root, *root.rglob("*")]:
    os.utime(path, (old, old), follow_symlinks=False)


def test_a_tree_is_listed_once(tmp_path, monkeypatch):
  root = tmp_path / "tree"
  make_tree(root)
  walks, walk = [], listing._walk
  monkeypatch.setattr(listing, "_walk", lambda r: walks.append(r) or walk(r))
  names = [list_names(root) for _ in range(3)]
  assert len(walks) == 1 and names[0] == names[1] == names[2] and len(names[0]) == 100
  assert names[0] == sorted(str(p.relative_to(root)) for p in root.rglob("*.JPG"))
  (root / "day3" / "deep" / "new.png").write_bytes(b"x")
  assert len(list_names(root)) == 101 and len(walks) == 2
  assert (
    len(list_names(root)) == 101 and len(walks) == 3
  )  # changed too short a time ago to be trusted
  os.remove(root / "day0" / "deep" / "0000.JPG")
  assert len(list_names(root)) == 100


def list_names(root):
  found = listing.list_tree(str(root))
  return [found[i] for i in range(len(found))]


def test_a_damaged_or_unwritable_cache_costs_nothing(tmp_path, monkeypatch):
  root = tmp_path / "tree"
  make_tree(root)
  list_names(root)
  (file,) = (tmp_path / "cache").iterdir()
  file.write_bytes(b"no archive")
  assert len(list_names(root)) == 100
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("ADCO_JAX_CACHE", str(tmp_path / "file" / "below"))
  assert len(list_names(root)) == 100


def test_links_circles_and_odd_entries(tmp_path):
  root = tmp_path / "tree"
  make_tree(root, 2, 3)
  (root / "circle").symlink_to(root, target_is_directory=True)
  (root / "day0" / "up").symlink_to(root / "day0", target_is_directory=True)
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "far.webp").write_bytes(b"x")
  (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
  (root / "one.tiff").symlink_to(tmp_path / "elsewhere" / "far.webp")
  (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
  (root / ".hidden.jpg").write_bytes(b"x")
  (root / "notes.txt").write_bytes(b"x")
  os.mkfifo(root / "pipe.jpg")  # opening it would wait for ever
  names = list_names(root)
  assert len(names) == 6 + 3 and {"one.tiff", "gone.jpg", "linked/far.webp"} <= set(names)


def test_strings_of_any_bytes():
  words = ["a", "", "ümlaut.jpg", os.fsdecode(b"\xff\xfe.jpg"), "x" * 1000]
  found = Strings.of(words)
  assert [found[i] for i in range(len(found))] == words


@pytest.mark.parametrize("damage, says", [
  (lambda p: p.write_bytes(p.read_bytes()[:-9]), "cut short"),
  (lambda p: p.write_bytes(b"\x1f\x8b" + b"z" * 500), "damaged or of another kind"),
  (lambda p: p.write_bytes(b""), None),
])  # fmt: skip
def test_damaged_tfrecords_are_refused_by_name(tmp_path, pictures, damage, says):
  as_tfrecord(tmp_path / "data", *pictures)
  path = tmp_path / "data" / "birds-train.tfrecord-00001-of-00003"
  damage(path)
  if says is None:  # TFDS makes empty shards of small sets
    assert sources.load_source("tfrecord", str(tmp_path / "data"), "train").num_examples == 20
    return
  with pytest.raises(ConfigError, match=rf"00001-of-00003 .*{says}"):
    sources.load_source("tfrecord", str(tmp_path / "data"), "train")


def test_damaged_tars_are_refused_by_name(tmp_path, pictures):
  as_webdataset(tmp_path / "data", *pictures)
  path = tmp_path / "data" / "train" / "00002.tar"
  path.write_bytes(path.read_bytes()[:3000])
  with pytest.raises(ConfigError, match="00002.tar is damaged"):
    sources.load_source("webdataset", str(tmp_path / "data"), "train")


def test_a_shard_that_lost_its_end_is_no_broken_image(tmp_path, pictures, monkeypatch):
  from adco_jax.data import files

  monkeypatch.setattr(files, "DISK_PAUSE_SECONDS", 0.0)
  source = opened(tmp_path / "data", "webdataset", pictures)
  path = tmp_path / "data" / "train" / "00003.tar"
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(RunError, match="00003.tar cannot be read"):
    Reader(source).read(COUNT - 1)


BAD = {
  "no tfrecords": (["tfrecord", "{}", "train"], {}, "no tfrecord files"),
  "no tars": (["webdataset", "{}", "train"], {}, "no webdataset files"),
  "not packed": (["packed", "{}", "train"], {}, "configs/pack.py"),
  "tfds without name": (["tfds", "{}", "train"], {}, "config.data.name"),
  "tfds unknown": (["tfds", "{}", "train"], {"name": "no_such_set_anywhere"}, "does not know it"),
  "tfds not prepared": (["tfds", "{}", "train"], {"name": "cifar10"}, "tfds build cifar10 --data_dir="),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_refused_in_one_line(tmp_path, name):
  places, more, says = BAD[name]
  with pytest.raises(ConfigError, match=says) as caught:
    sources.load_source(*(p.format(tmp_path) for p in places), **more)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_wrong_feature_names_are_told(tmp_path, pictures):
  as_tfrecord(tmp_path / "data", *pictures)
  with pytest.raises(
    ConfigError, match="found image/class/label, image/encoded, note: set data.image_key"
  ):
    sources.load_source("tfrecord", str(tmp_path / "data"), "train", image_key="picture")
