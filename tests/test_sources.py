"""Every kind of source on real files: the same pixels whatever holds them; what is damaged is refused."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from adco_jax import main
from adco_jax.data.images import Reader
from adco_jax.data.sources import listing, loading, shards, tfds
from adco_jax.data.sources.files import Strings
from adco_jax.errors import ConfigError, NoSplit, RunError
from tests.faults.images import photograph

pytestmark = pytest.mark.storage  # the slow ones' group

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


def example(image, *labels):
  """A tf.train.Example, written by hand so that the reader is not checked against itself."""
  values = {
    "note": field(2, field(1, struct.pack("<f", 0.5))),
    "image/encoded": field(1, field(1, image)),
    "image/class/label": field(3, field(1, b"".join(map(varint, labels)))),
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
  return loading.load_source(**{"directory": str(folder), "split": "train"} | where)


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
  again = loading.load_source(**_arguments(tmp_path, form))
  assert again.identity() == source.identity()


def _arguments(tmp_path, form):
  kind, folder = form.split()[0], tmp_path / "data"
  place = str(folder / "all.npz") if kind == "npz" else str(folder)
  return {"kind": kind, "directory": place, "split": "train", "name": "birds"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["webdataset", "tfds array_record"])
def test_a_run_through_main(tmp_path, pictures, form):
  where = FORMS[form](tmp_path / "data", *pictures)
  flags = [
    "--config=configs/adco_digits.py", "--config.model.arch=resnet8", "--config.model.width=0.125",
    "--config.data.batch_size=8", "--config.bn.group_size=1", "--config.method.bank.size=8", "--config.epochs=1",
    "--config.views.crops=((12,.5,1.),(12,.5,1.))", "--config.eval.every_epochs=0",
    f"--config.data.source={where['kind']}", f"--config.data.name={where.get('name', '')}",
    f"--config.data.dir={tmp_path}/data", "--config.data.loader=pipeline", f"--workdir={tmp_path}/run",
  ]  # fmt: skip
  assert main.main(flags) == 0


def test_labels_can_be_forgotten(tmp_path, pictures):
  as_folder(tmp_path, *pictures)
  source = loading.load_source("folder", str(tmp_path), "train", labels=False)
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


@pytest.fixture
def walks(monkeypatch):
  """The roots that were really walked; everything counts as settled at once."""
  found, walk = [], listing._walk
  monkeypatch.setattr(listing, "_walk", lambda r: found.append(r) or walk(r))
  monkeypatch.setattr(listing, "SETTLED_NS", -(10**10))
  return found


def test_a_tree_is_listed_once(tmp_path, walks, monkeypatch):
  root = tmp_path / "tree"
  make_tree(root)
  names = [list_names(root) for _ in range(3)]
  assert len(walks) == 1 and names[0] == names[1] == names[2] and len(names[0]) == 100
  assert names[0] == sorted(str(p.relative_to(root)) for p in root.rglob("*.JPG"))
  (root / "day3" / "deep" / "new.png").write_bytes(b"x")
  assert len(list_names(root)) == 101 and len(walks) == 2
  os.remove(root / "day0" / "deep" / "0000.JPG")
  monkeypatch.setattr(listing, "SETTLED_NS", 2 * 10**9)
  assert len(list_names(root)) == 100 and len(walks) == 3
  assert (
    len(list_names(root)) == 100 and len(walks) == 4
  )  # changed too short a time ago to be trusted


def test_set_back_time_stamps_deceive_nobody(tmp_path, walks, pictures):
  """tar, rsync and cp -a restore the times of what they write."""
  root = tmp_path / "tree"
  make_tree(root)
  folder = root / "day3" / "deep"
  before = os.stat(folder)
  assert len(list_names(root)) == 100
  (folder / "new.png").write_bytes(b"x")
  os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert len(list_names(root)) == 101
  where = FORMS["webdataset"](tmp_path / "data", *pictures) | {"directory": str(tmp_path / "data")}
  path = tmp_path / "data" / "train" / "00000.tar"
  assert loading.load_source(split="train", **where).labels[0] == 0
  before, content = os.stat(path), path.read_bytes()
  at = content.index(b"000.cls") + 512
  path.write_bytes(content[:at] + b"2" + content[at + 1 :])
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert loading.load_source(split="train", **where).labels[0] == 2


def list_names(root):
  found = listing.list_tree(str(root)).names
  return [found[i] for i in range(len(found))]


def test_a_damaged_or_unwritable_cache_costs_nothing(tmp_path, monkeypatch):
  root = tmp_path / "tree"
  make_tree(root)
  monkeypatch.setattr(listing, "SETTLED_NS", -(10**10))
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
  (root / "self.jpg").symlink_to(root / "self.jpg")
  (root / "below.jpg").symlink_to(root / "one.tiff" / "below")
  (root / "long.jpg").symlink_to("x" * 300)
  (root / ".hidden.jpg").write_bytes(b"x")
  (root / "notes.txt").write_bytes(b"x")
  os.mkfifo(root / "pipe.jpg")  # opening it would wait for ever
  (root / "to_pipe.jpg").symlink_to(root / "pipe.jpg")
  names = list_names(root)
  links = {"one.tiff", "gone.jpg", "linked/far.webp", "self.jpg", "below.jpg", "long.jpg"}
  assert len(names) == 6 + len(links) and links <= set(names)
  reader = Reader(loading.load_source("folder", str(root), "train"))
  assert all(
    reader.read(i) is None
    for i, n in enumerate(names)
    if n in links - {"one.tiff", "linked/far.webp"}
  )


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
    assert loading.load_source("tfrecord", str(tmp_path / "data"), "train").num_examples == 20
    return
  with pytest.raises(ConfigError, match=rf"00001-of-00003 .*{says}"):
    loading.load_source("tfrecord", str(tmp_path / "data"), "train")


@pytest.mark.parametrize(
  "damage", ["content cut", "header cut", "header overwritten", "no end", "another tar behind"]
)
def test_damaged_tars_are_refused_by_name(tmp_path, pictures, damage):
  as_webdataset(tmp_path / "data", *pictures)
  path = tmp_path / "data" / "train" / "00002.tar"
  content = path.read_bytes()
  member = content.index(b"018.png")  # a header in the middle
  end = len(content.rstrip(b"\0")) // 512 * 512 + 512
  path.write_bytes({
    "content cut": content[: member + 600],
    "header cut": content[: member + 100],
    "header overwritten": content[:member] + b"\xff" * 100 + content[member + 100 :],
    "no end": content[:end],
    "another tar behind": content * 2,
  }[damage])  # fmt: skip
  with pytest.raises(ConfigError, match="00002.tar is damaged"):
    loading.load_source("webdataset", str(tmp_path / "data"), "train")


def write_tar(path, members):
  """{name: bytes, or the name that a hard link points to}."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as archive:
    for name, content in members.items():
      member = tarfile.TarInfo(name)
      if isinstance(content, str):
        member.type, member.linkname, content = tarfile.LNKTYPE, content, b""
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def test_what_counts_as_a_tar_s_image(tmp_path, capsys):
  """Masks do not, hidden files neither, hard links do; a label that is no number is none, and that is said."""
  image = png(photograph(9, 9))
  write_tar(tmp_path / "a.tar", {
    "x/1.PNG": image, "x/1.seg.png": image, "x/1.CLS": b"3", "x/._1.png": b"junk", "x/2.png": "x/1.PNG", "x/2.cls": b"cat",
    "y/1.jpg": image, "y/1.json": b"{}", "y/1.cls": b"7",
  })  # fmt: skip
  source = loading.load_source("webdataset", str(tmp_path), "train")
  assert source.names() == ["x/1.PNG", "x/2.png", "y/1.jpg"] and source.labels is None
  assert "1 of 3 images have no label" in capsys.readouterr().out
  assert all(np.array_equal(Reader(source).read(i), photograph(9, 9)) for i in range(3))


@pytest.mark.parametrize("members, says", [
  ({"1.png": b"x", "1.jpg": b"y"}, "two images of one key"),
  ({"1.png": b"x", "1.cls": b"-5"}, "a label is -5"),
  ({"1.png": b"x", "1.cls": b"%d" % 2**40}, f"a label is {2**40}"),
  ({"1.txt": b"x"}, "hold no images"),
])  # fmt: skip
def test_tars_that_cannot_be_right_are_refused(tmp_path, members, says):
  write_tar(tmp_path / "a.tar", members)
  with pytest.raises(ConfigError, match=says):
    loading.load_source("webdataset", str(tmp_path), "train")


def test_splits_are_whole_words(tmp_path):
  image = png(photograph(9, 9))
  for name in ("x-train", "x-interval", "x-val"):
    write_tar(tmp_path / f"{name}-000.tar", {f"{name}.png": image})
  found = {s: loading.load_source("webdataset", str(tmp_path), s).names() for s in ("train", "val")}
  assert found == {"train": ["x-train.png"], "val": ["x-val.png"]}
  os.remove(tmp_path / "x-train-000.tar")
  assert loading.load_source("webdataset", str(tmp_path), "train").names() == ["x-interval.png"]
  taken = loading.load_source("webdataset", str(tmp_path), "test")  # what else is a test split
  assert (
    taken.names() == ["x-val.png"] and taken.split == "val" and "read from val" in taken.notes[0]
  )
  os.remove(tmp_path / "x-val-000.tar")
  with pytest.raises(NoSplit):
    loading.load_source("webdataset", str(tmp_path), "test")


def test_a_label_key_without_labels_is_refused(tmp_path, pictures):
  as_tfrecord(tmp_path / "data", *pictures)
  with pytest.raises(ConfigError, match="config.data.label_key='zzz'"):
    loading.load_source("tfrecord", str(tmp_path / "data"), "train", label_key="zzz")


def test_a_shard_that_lost_its_end_is_no_broken_image(tmp_path, pictures, monkeypatch):
  from adco_jax.data.sources import files

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
    loading.load_source(*(p.format(tmp_path) for p in places), **more)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_wrong_feature_names_are_told(tmp_path, pictures):
  as_tfrecord(tmp_path / "data", *pictures)
  with pytest.raises(
    ConfigError, match="image_key='picture'.* has image/class/label, image/encoded, note;"
  ):
    loading.load_source("tfrecord", str(tmp_path / "data"), "train", image_key="picture")


def test_a_damaged_compressed_npz_is_refused(tmp_path):
  images = np.random.RandomState(0).randint(0, 32, (30, 16, 16, 3), np.uint8)
  np.savez_compressed(tmp_path / "x.npz", train_images=images)
  content = bytearray((tmp_path / "x.npz").read_bytes())
  for at in range(150, 2000, 400):
    (tmp_path / "x.npz").write_bytes(content[:at] + bytes(range(40, 80)) + content[at + 40 :])
    with pytest.raises(ConfigError, match="not a readable .npz"):
      read(tmp_path / "x.npz", kind="npz")
    assert shards.read_index(str(tmp_path / "x.tar")) is None


def test_class_names_in_bytes_are_text(tmp_path):
  images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.arange(2)
  np.savez(
    tmp_path / "x.npz", train_images=images, train_labels=labels, classes=[b"cat", "ü".encode()]
  )
  assert read(tmp_path / "x.npz", kind="npz").classes == ("cat", "ü")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"\x93NUMPY"])
def test_what_is_no_npz_is_refused(tmp_path, content):
  (tmp_path / "x.npz").write_bytes(content)
  with pytest.raises(ConfigError, match="not a readable .npz"):
    loading.load_source("npz", str(tmp_path / "x.npz"), "train")


def test_a_script_that_ends_early_does_not_hang(tmp_path, pictures):
  """TensorFlow's threads wait for Python while Python waits for them, unless the loader ends first."""
  as_folder(tmp_path, *pictures)
  code = (
    "import jax, sys; from adco_jax.config import plan; from adco_jax.runtime import sharding; from adco_jax.data import images, pipeline; from adco_jax.data.sources import loading\n"
    "source = loading.load_source('folder', sys.argv[1], 'train')\n"
    "loader = pipeline.PipelineLoader(images.Reader(source), sharding.create_mesh(), 2)\n"
    "p = plan.make_probe_plan(30, 0, batch_size=8, crops=((16, .5, 1.),), epochs=10**6, devices=1, processes=1, process=0)\n"
    "batches = loader.train(0, 10**6, seed=0, plan=p, ratio=(.75, 4 / 3)); next(batches)\n"
    "print('ends')\n"
  )
  found = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100
  )
  assert found.returncode == 0 and found.stdout == "ends\n" and "Exception" not in found.stderr


def tree(root, *files):
  """Small images under these paths; what ends otherwise than .png is some text."""
  for name in files:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(photograph(9, 9)) if name.endswith(".png") else b"x")


def read(root, split="train", kind="folder", **more):
  return loading.load_source(kind, str(root), split, **more)


LAYOUTS = {  # files -> what train and val are
  "coco": ("train2017/1.png train2017/2.png val2017/3.png annotations/x.json", ["1.png", "2.png"], ["3.png"]),
  "words": ("training/1.png validation/3.png", ["1.png"], ["3.png"]),
  "capitals": ("Train/a/1.png Train/b/2.png Val/a/3.png", ["a/1.png", "b/2.png"], ["a/3.png"]),
  "deeper": ("images/train/1.png images/val/3.png labels/train/1.txt labels/val/3.txt", ["1.png"], ["3.png"]),
  "test": ("train/a/1.png train/b/2.png test/a/3.png", ["a/1.png", "b/2.png"], ["a/3.png"]),
  "valid": ("train/a/1.png train/b/2.png valid/a/3.png test/a/4.png", ["a/1.png", "b/2.png"], ["a/3.png"]),
  "glued": ("traindata/a/1.png traindata/b/2.png testdata/a/3.png", ["a/1.png", "b/2.png"], ["a/3.png"]),
  "validate": ("train/1.png validate/3.png", ["1.png"], ["3.png"]),
  "sets": ("Trainset/1.png test_images/3.png unlabeled/4.png", ["1.png"], ["3.png"]),
  "roboflow": ("train/images/1.png train/labels/1.txt valid/images/3.png", ["images/1.png"], ["images/3.png"]),
  "much deeper": ("x/images/Train/1.png x/images/Val/3.png", ["1.png"], ["3.png"]),
  "twice": ("training_set/training_set/a/1.png test_set/test_set/a/3.png", ["a/1.png"], ["a/3.png"]),
  "a class named train": ("train/bus/1.png train/train/2.png test/train/3.png", ["bus/1.png", "train/2.png"], ["train/3.png"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_are_found_under_the_names_people_give_them(tmp_path, name):
  """And are never classes; what was taken for what was not there to the letter is said."""
  files, train, val = LAYOUTS[name]
  tree(tmp_path, *files.split())
  for split, wanted in (("train", train), ("val", val)):
    found = read(tmp_path, split)
    assert found.names() == wanted
    assert {splits_kind(c) for c in found.classes} <= {
      "",
      "train",
    } and "images" not in found.classes
    assert any(found.split in note for note in found.notes) == (found.split != split)


def splits_kind(name):
  from adco_jax.data.sources.splits import kind_of

  return kind_of(name)


REFUSED = {
  "a test folder among classes": ("cat/1.png dog/2.png test/3.png", "test would be trained on .*--config.data.split=.$"),
  "nothing to train on": ("val/a/1.png test/a/2.png", "no folder of this name.*--config.data.split=test"),
  "a test folder beside images": ("1.png Test/3.png", "Test would be trained on"),
  "two that could be train": ("train2014/1.png train2017/2.png val2017/3.png", "train2014, train2017; name one"),
  "splits in each class": ("cup/train/1.png cup/test/2.png pen/train/3.png pen/test/4.png", "such as .*/cup,"),
  "a class named train": ("bus/1.png car/2.png train/3.png", "a split, or a class as bus, car.*--config.data.split=. "),
  "one more word": ("seg_pred/4.png seg_test/a/3.png seg_train/a/1.png", "seg_train, seg_test, which look.*--config.data.split=seg_train,"),
  "a letter more": ("trainA/1.png trainB/2.png testA/3.png testB/4.png", "trainA, testA, trainB, testB, which look like splits"),
  "glued to a word": ("finetrain/a/1.png finetest/a/2.png", "finetrain, finetest, which look like splits"),
  "other words beside": ("public_train/a/1.png private_test/a/2.png", "public_train, private_test, which look"),
  "splits and an image in a split": ("train/1.png train/train/2.png train/val/3.png", "look like splits, not like"),
  "splits in a split": ("train/train/1.png train/val/2.png", "look like splits, not like classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_a_split_or_a_class_is_refused_with_a_way_out(tmp_path, name):
  files, says = REFUSED[name]
  tree(tmp_path, *files.split())
  with pytest.raises(ConfigError, match=says) as caught:
    read(tmp_path)
  assert "\n" not in str(caught.value)
  assert read(tmp_path, ".").num_examples == files.count(
    ".png"
  )  # the way out: everything, as it is


def test_splits_of_linked_classes_are_found_too(tmp_path):
  for part in ("birds_train", "birds_test"):
    tree(tmp_path / "store" / part, "1.png")
    (tmp_path / "data" / part).mkdir(parents=True)
    (tmp_path / "data" / part / "wren").symlink_to(tmp_path / "store" / part)
    (tmp_path / "data" / part / "again").symlink_to(tmp_path / "data")  # a circle
  with pytest.raises(ConfigError, match="birds_train, birds_test, which look like splits"):
    read(tmp_path / "data")


def test_class_names_with_such_letters_are_classes(tmp_path):
  names = ("bullet_train", "carnival", "contest", "constraint", "photoset")
  tree(tmp_path, *(f"{name}/1.png" for name in names))
  assert read(tmp_path).classes == tuple(sorted(names))


def test_two_stand_ins_are_refused_by_the_name_of_their_option(tmp_path):
  tree(tmp_path, "train/1.png", "test1/2.png", "test2/3.png")
  with pytest.raises(
    ConfigError, match="test1, test2; name one, such as --config.data.test_split=test1"
  ):
    read(tmp_path, "val")
  with pytest.raises(NoSplit, match="only test1, test2, train"):
    read(tmp_path, "mine")


def test_shards_and_arrays_of_other_splits_are_never_trained_on(tmp_path):
  image = png(photograph(9, 9))
  names = ("coco-train2017", "coco-val2017", "train-station-testing", "Validation", "birds_dev")
  for name in names:
    write_tar(tmp_path / f"{name}.tar", {f"{name}.png": image})
  assert read(tmp_path, kind="webdataset").names() == ["coco-train2017.png"]
  os.remove(tmp_path / "coco-train2017.tar")
  with pytest.raises(NoSplit):
    read(tmp_path, kind="webdataset")
  for name in names[1:4]:
    os.remove(tmp_path / f"{name}.tar") if name != "Validation" else None
  assert read(tmp_path, "dev", "webdataset").names() == ["birds_dev.png"]
  images = np.zeros((3, 4, 4, 3), np.uint8)
  np.savez(tmp_path / "x.npz", Training_images=images, test_images=images[:2])
  found = {s: read(tmp_path / "x.npz", s, "npz") for s in ("train", "val")}
  assert {s: (x.num_examples, x.split) for s, x in found.items()} == {"train": (3, "Training"), "val": (2, "test")}  # fmt: skip


def test_numeric_folders_sort_as_numbers_and_names_stay(tmp_path):
  """The images keep their order, so a run that began before resumes; only labels are others."""
  tree(tmp_path, *(f"train/{i}/x.png" for i in range(12)))
  found = read(tmp_path)
  assert found.classes == tuple(str(i) for i in range(12))
  assert found.names() == sorted(found.names())
  assert [found.classes[y] for y in found.labels] == [n.split("/")[0] for n in found.names()]
  tree(tmp_path, "train/x/x.png")
  assert read(tmp_path).classes[:3] == ("0", "1", "10")  # one word among them: sorted as text


def test_what_is_not_read_is_counted_by_its_ending(tmp_path, walks):
  tree(tmp_path, "train/a/1.png", "train/a/2.HEIC", "train/a/notes", "train/b/3.heic", "train/c/x.0001", "train/.DS_Store", "train/__MACOSX/a/1.png")  # fmt: skip
  for _ in range(2):  # the second time from the cache
    found = read(tmp_path)
    assert found.unread == {".heic": 2, "without ending": 2, "hidden": 2} and found.empty == (
      "b",
      "c",
    )
    said = found.left_out()
    assert "2 .heic" in said and "2 hidden" in said and "in the folders b, c" in said
  assert len(walks) == 1 and found.names() == ["a/1.png"] and found.classes == ("a",)
  (tmp_path / "only").mkdir()
  tree(tmp_path / "only", "1.png", ".hidden", "._1.png")
  assert read(tmp_path / "only").left_out() == ""  # no alarm
  for name in ("a.heic", "b.heic"):
    tree(tmp_path / "none", name)
  with pytest.raises(ConfigError, match="2 .heic; name another folder .*[.]jpg"):
    read(tmp_path / "none")


def test_members_and_files_beside_shards_are_counted_too(tmp_path):
  image = png(photograph(9, 9))
  write_tar(tmp_path / "train" / "0.tar", {"1.png": image, "1.cls": b"3", "1.json": b"{}", "1.pgm": image, "._1.png": b"", "2.heic": b"x"})  # fmt: skip
  (tmp_path / "train" / "1.tar.gz").write_bytes(b"x")
  found = read(tmp_path, kind="webdataset")
  assert found.names() == ["1.png"]  # a picture of a rarer kind beside it is no second one
  assert found.unread == {".json": 1, ".pgm": 1, ".heic": 1, "hidden": 1, ".gz": 1}


def test_labels_that_are_no_numbers_are_counted(tmp_path):
  """Of tars and of records, where they leave a set without labels; the second time from the cache."""
  image = png(photograph(9, 9))
  write_tar(tmp_path / "tar" / "x.tar", {"1.png": image, "1.cls": b"cat", "2.png": image, "2.cls": b"1.5", "LICENSE": b"x"})  # fmt: skip
  (tmp_path / "records").mkdir()
  entries = {"image": field(1, field(1, image)), "label": field(1, field(1, b"cat"))}
  record = field(
    1, b"".join(field(1, field(1, k.encode()) + field(2, v)) for k, v in entries.items())
  )
  content = struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0)
  (tmp_path / "records" / "x.tfrecord").write_bytes(content * 3)
  for _ in range(2):
    found = read(tmp_path / "tar", kind="webdataset"), read(tmp_path / "records", kind="tfrecord")
    assert [x.labels for x in found] == [None, None]
    says = "labels that are no whole number"
    assert [x.unread for x in found] == [{says: 2, "without ending": 1}, {says: 3}]


def test_every_ending_whose_format_pillow_reads_is_listed(tmp_path):
  image = Image.fromarray(photograph(24, 24))
  for ending in ("jfif", "jp2", "avif", "ppm", "tga", "ico", "jpe", "dib", "pcx", "webp"):
    image.save(tmp_path / f"x.{ending}")
  tree(tmp_path, "doc.pdf", "film.mpg", "table.h5", "figure.eps")
  found = read(tmp_path)
  assert found.num_examples == 10 and set(found.unread) == {".pdf", ".mpg", ".h5", ".eps"}
  assert all(Reader(found).read(i).shape[-1] == 3 for i in range(10))


def test_an_older_listing_is_not_misread(tmp_path, walks):
  """A cache without the counts of unread files, under the key of before."""
  import hashlib

  tree(tmp_path / "data", "a/1.png", "a/2.heic")
  key = hashlib.sha256(os.fsencode(f"tree {os.path.realpath(tmp_path / 'data')}")).hexdigest()[:32]
  (tmp_path / "cache").mkdir()
  np.savez(tmp_path / "cache" / f"{key}.npz", stamps=np.zeros((1, 3), np.int64))
  assert read(tmp_path / "data").unread == {".heic": 1} and len(walks) == 1


@pytest.mark.parametrize("form", ["folder", "webdataset", "tfrecord", "npz"])
@pytest.mark.parametrize("kind", ["npz", "digits", "folder", "packed", "webdataset"])
def test_the_kind_is_told_from_what_lies_there(tmp_path, pictures, form, kind):
  """Where the configured kind cannot read it; one line says so. Digits with a data.dir are a folder's."""
  FORMS[form](tmp_path / "data", *pictures)
  found = loading.load_source(kind, str(tmp_path / "data"), "train")
  assert found.kind == form and found.num_examples == COUNT and len(found.classes) == 3
  assert ("read as data.source" in "".join(found.notes)) == (form != kind)


def test_a_stray_picture_overrules_no_kind_that_was_asked_for(tmp_path, pictures):
  """Beside shards; for other kinds pictures are a folder's."""
  as_webdataset(tmp_path / "split", *pictures)
  tree(tmp_path / "split", "preview.png")
  write_tar(tmp_path / "flat" / "train.tar", {"1.png": png(pictures[0][0])})
  tree(tmp_path / "flat", "preview.png")
  assert [read(tmp_path / name, kind="webdataset").kind for name in ("split", "flat")] == ["webdataset"] * 2  # fmt: skip
  assert read(tmp_path / "flat", kind="npz").kind == read(tmp_path / "flat").kind == "folder"


def test_labels_in_a_folder_beside_images_are_said(tmp_path):
  tree(tmp_path, "1.png", "a/2.png")
  (note,) = read(tmp_path).notes
  assert "1 images lie in no folder" in note and "no labels" in note


def as_pets(folder, fine=("tabby", "pug", "lynx"), keys=("fine", "coarse")):
  """A TFDS set without code, whose features come in another order at every start: two images and two labels each."""
  import tensorflow_datasets as tfds

  image = lambda channels: tfds.features.Image(shape=(8, 8, channels), encoding_format="png")
  features = {
    "segmentation_mask": image(1), "image": image(3), keys[0]: tfds.features.ClassLabel(names=fine),
    keys[1]: tfds.features.ClassLabel(names=["cat", "dog"]),
  }  # fmt: skip
  rows = [
    (i, {"image": np.full((8, 8, 3), 200, np.uint8), "segmentation_mask": np.ones((8, 8, 1), np.uint8),
         keys[0]: i % 3, keys[1]: i % 2})
    for i in range(6)
  ]  # fmt: skip
  tfds.dataset_builders.store_as_tfds_dataset(
    "pets", "1.0.0", data_dir=folder, split_datasets={"train": rows}, features=tfds.features.FeaturesDict(features),
    disable_shuffling=True,
  )  # fmt: skip


def test_tfds_features_are_those_that_are_meant_in_whatever_order(tmp_path):
  """Names of classes are those of the label that is read; what could be meant in two ways is asked."""
  as_pets(tmp_path / "two")
  pets = lambda **keys: loading.load_source("tfds", str(tmp_path / "two"), "train", name="pets", **keys)  # fmt: skip
  with pytest.raises(ConfigError, match="config.data.label_key='': pets has coarse, fine; name the one"):  # fmt: skip
    pets()
  source = pets(label_key="coarse")
  assert source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1, 0, 1, 0, 1]
  assert pets(label_key="fine").classes == ("tabby", "pug", "lynx")
  assert (Reader(source).read(0) == 200).all()
  as_pets(tmp_path / "usual", keys=("coarse", "label"))
  source = loading.load_source("tfds", str(tmp_path / "usual"), "train", name="pets")
  assert source.classes == ("cat", "dog")
  for order in (("image", "mask"), ("mask", "image")):
    assert tfds._meant("pets", order, (), "image") == "image"
    assert (
      tfds._meant("pets", order, ("mask", "label"), "image") == "mask"
    )  # the pair that TFDS trains on
  assert tfds._meant("pets", ("photo",), (), "image") == "photo" and not tfds._meant("x", (), (), "image")  # fmt: skip


def test_array_records_are_known_by_their_images(tmp_path, pictures):
  """Their positions are 0 to N - 1 in every set of as many."""
  one = opened(tmp_path / "a", "tfds array_record", pictures)
  again = opened(tmp_path / "b", "tfds array_record", pictures)
  other = opened(tmp_path / "c", "tfds array_record", (pictures[0][::-1], pictures[1]))
  assert one.identity() == again.identity() != other.identity()


@pytest.mark.parametrize("labels", [(1, 0, 0, 0), (3, 300)])
def test_a_list_of_numbers_is_no_label(tmp_path, labels):
  """One-hot rows, and the labels of several objects: the first number would be a class of its own."""
  (tmp_path / "data").mkdir()
  with open(tmp_path / "data" / "x-train.tfrecord", "wb") as file:
    for _ in range(4):
      record = example(png(np.zeros((8, 8, 3), np.uint8)), *labels)
      file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
  source = loading.load_source("tfrecord", str(tmp_path / "data"), "train")
  assert source.labels is None and source.unread == {"labels of several numbers": 4}


def test_missing_shards_are_said(tmp_path, pictures):
  opened(tmp_path / "data", "tfrecord", pictures)
  os.remove(tmp_path / "data" / "birds-train.tfrecord-00001-of-00003")
  source = loading.load_source("tfrecord", str(tmp_path / "data"), "train")
  (note,) = source.notes
  assert note.startswith("1 of the shards that their names count are missing: birds-train.tfrecord-00001-of-00003;")  # fmt: skip
  assert shards.missing(["a-00000-of-00002", "a-00001-of-00002", "b.tar"]) == ()


def test_a_folder_that_is_mounted_later_is_found(tmp_path, walks):
  """A link that led nowhere when the tree was listed is no reason to leave its images out for ever."""
  make_tree(tmp_path / "tree")
  (tmp_path / "tree" / "cats").symlink_to(tmp_path / "disk")
  found = listing.list_tree(str(tmp_path / "tree"))
  assert len(found.names) == 100 and found.unread == {"links that lead nowhere": 1}
  assert len(list_names(tmp_path / "tree")) == 100 and len(walks) == 1
  make_tree(tmp_path / "disk", folders=1)
  found = listing.list_tree(str(tmp_path / "tree"))
  assert len(found.names) == 120 and found.unread == {} and "cats" in found.folders


def test_arrays_in_any_order_of_memory_are_the_same_images(tmp_path):
  images = np.random.RandomState(0).randint(0, 256, (6, 8, 9, 3), np.uint8)
  found = []
  for name, stored in (("c", images), ("f", np.asfortranarray(images))):
    path = tmp_path / f"{name}.NPZ"
    with open(path, "wb") as file:
      np.savez(file, train_images=stored, train_labels=np.arange(6)[:, None] % 2)
    found.append(loading.load_source("folder", str(path), "train"))
  assert found[0].identity() == found[1].identity() and found[1].targets.tolist() == [0, 1] * 3
