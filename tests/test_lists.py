"""Sources that a list describes: CSV, lines of path and number, VOC's layout, and subsets, on small trees in the true form."""

import dataclasses
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from adco_jax import build
from adco_jax.config import config_files
from adco_jax.data.images import Reader
from adco_jax.data.sources import loading
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.subset import restrict
from adco_jax.errors import ConfigError, NoSplit
from adco_jax.tasks import scored_data
from tests.test_sources import png, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("ADCO_JAX_CACHE", str(tmp_path / "cache"))


def picture(shade):
  content = io.BytesIO()
  Image.new("RGB", (6, 4), (shade, shade, shade)).save(content, "PNG")
  return content.getvalue()


def images(root, *names):
  """Pictures, each of its own shade."""
  for shade, name in enumerate(names):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(picture(shade))


def read(kind, root, split="train", **keys):
  return loading.load_source(kind, str(root), split, **keys)


def refused(kind, root, split="train", **keys):
  """The line with which a source is refused."""
  with pytest.raises(ConfigError) as error:
    read(kind, root, split, **keys)
  assert "\n" not in str(error.value)
  return str(error.value)


# CSV.


@pytest.mark.parametrize("text, classes, labels", [
  ("file,label\nb.png,cat\na.png,dog\nx/c.png,cat\n", ("cat", "dog"), [0, 1, 0]),
  ("label,note,image\n10,x,b.png\n9,y,a.png\n9,z,x/c.png\n", ("9", "10"), [1, 0, 0]),
  ("file,labels\nb.png,cat; dog\na.png,\nx/c.png,dog;\n", ("cat", "dog"), [[1, 1], [0, 0], [0, 1]]),
  ("dog,file,cat\n1,b.png,0\n0,a.png,-1\n,x/c.png,1\n", ("dog", "cat"), [[1, 0], [0, -1], [-1, 1]]),
  ("\ufefffile,label\r\n\"b.png\",\"cat, big\"\r\na.png,dog\r\n\r\nx/c.png,dog\r\n", ("cat, big", "dog"), [0, 1, 1]),
  ("file\nb.png\na.png\nx/c.png\n", (), None),
])  # fmt: skip
def test_a_csv_says_files_and_labels(tmp_path, text, classes, labels):
  images(tmp_path, "a.png", "b.png", "x/c.png")
  (tmp_path / "train.csv").write_text(text)
  source = read("csv", tmp_path)
  assert source.names() == ["b.png", "a.png", "x/c.png"] and source.classes == classes
  assert [Reader(source).read(i)[0, 0, 0] for i in range(3)] == [1, 0, 2]
  if labels is None:
    assert source.labels is None
    return
  assert source.labels.tolist() == labels and source.has_several == (np.ndim(labels) == 2)
  assert (source.presence == 1).sum() == (np.size(labels) if np.ndim(labels) == 1 else np.sum(np.array(labels) == 1))  # fmt: skip


def test_columns_of_a_csv_can_have_other_names(tmp_path):
  images(tmp_path, "a.png", "b.png")
  (tmp_path / "Training.csv").write_text("id,kind,label\na.png,x,1\nb.png,y,2\n")
  source = read("csv", tmp_path, image_key="id", label_key="kind")
  assert source.classes == ("x", "y") and source.split == "Training"


WRONG_CSV = {
  "": "is an empty list",
  "file,label\n": "is an empty list",
  "name,label\na.png,1\n": "has the columns name, label; name that of the files with --config.data.image_key",
  "file,label\na.png,1\na.png,1\n": "names 1 files twice: a.png",
  "file,label\na.png,1\n./a.png,1\n": "names 1 files twice: a.png",
  "file,label\na.png,1\nb.png\n": "line 3 has 1 fields, the header 2",
  "file,label\na.png,1\nb.png,\nc.png,\nd.png,\ne.png,\n": "train.csv has no label in the column label for 4 of 5 images: b.png, c.png, d.png and 1 more",
  "file,label\nu.png,1\nv.png,1\nw.png,1\nx/x.png,1\na.png,1\n": "names 4 files that are not in",
  "file,labels\na.png,\n": "gives no image a label",
  "file,width\na.png,640\n": "the column width has '640'",
  "file,label,label\na.png,1,2\n": "has the column 'label' twice",
  'file,label\n"a.png,1\n': "is no CSV that can be read",
}


@pytest.mark.parametrize("text", WRONG_CSV)
def test_a_wrong_csv_is_refused(tmp_path, text):
  images(tmp_path, *(f"{letter}.png" for letter in "abcde"))
  (tmp_path / "train.csv").write_text(text)
  said = refused("csv", tmp_path)
  assert WRONG_CSV[text] in said
  assert ("u.png, v.png, w.png and 1 more" in said) == ("not in" in said)


def test_a_csv_of_another_split_is_not_read(tmp_path):
  images(tmp_path, "a.png")
  (tmp_path / "train.csv").write_text("file,label\na.png,1\n")
  with pytest.raises(NoSplit, match=r"data.test_split='val': .* no val.csv, only train.csv"):
    read("csv", tmp_path, "val")
  assert "no such folder" in refused("csv", tmp_path / "nowhere")
  assert "name one of them" in refused("csv", tmp_path, label_key="kind")


# Lists.


def places(root, train, val=("a/abbey/1.jpg 0",)):
  """Places205 as its archives lie."""
  below = root / "data/vision/torralba/deeplearning/images256"
  images(below, *{line.split()[0] for line in (*train, *val)})
  folder = root / "trainvalsplit_places205"
  folder.mkdir(parents=True)
  (folder / "train_places205.csv").write_text("\n".join(train))
  (folder / "val_places205.csv").write_text("\n".join(val))
  (folder / "categoryIndex_places205.csv").write_text("/a/abbey 0\n")


def test_places205_as_it_is_unpacked(tmp_path):
  places(tmp_path, ["b/bar/2.jpg 2", "a/abbey/3.jpg 0", "b/bar/1.jpg 2"])
  train, val = (read("list", tmp_path, split) for split in ("train", "val"))
  assert train.names() == ["b/bar/2.jpg", "a/abbey/3.jpg", "b/bar/1.jpg"]
  assert train.labels.tolist() == [2, 0, 2] and train.classes == ("0", "1", "2")
  assert val.labels.tolist() == [0] and not scored_data.share_images(train, val)
  assert Reader(train).read(0).shape == (4, 6, 3)
  aligned = loading.align_classes(val, train.classes)
  assert aligned.classes == train.classes and aligned.labels.tolist() == [0]


def test_caffe_s_lists_with_blanks_in_paths(tmp_path):
  images(tmp_path / "images", "my cat.png", "dog.png")
  (tmp_path / "train.txt").write_text("my cat.png 1\n\ndog.png, 0\n")
  source = read("list", tmp_path)
  assert source.names() == ["my cat.png", "dog.png"] and source.labels.tolist() == [1, 0]


@pytest.mark.parametrize("text, says", [
  ("", "is an empty list"),
  ("a.png 1\nb.png\nc.png x\n", "2 lines of .*train.txt are not a path and a class number: b.png, c.png x"),
  ("a.png 1\nq.png 1\n", "names 1 files that are not in .*: q.png"),
  ("a.png 1\na.png 2\n", "names 1 files twice: a.png"),
])  # fmt: skip
def test_a_wrong_list_is_refused(tmp_path, text, says):
  images(tmp_path, "a.png", "b.png", "c.png")
  (tmp_path / "train.txt").write_text(text)
  with pytest.raises(ConfigError, match=says):
    read("list", tmp_path)
  (tmp_path / "more").mkdir()
  (tmp_path / "more" / "train_2.txt").write_text("a.png 1\n")
  assert "are lists of train; move all but one" in refused("list", tmp_path)
  with pytest.raises(NoSplit, match=r"has no list val.txt or val_\*.csv, lists there: "):
    read("list", tmp_path, "val")


# VOC.

OBJECTS = {  # (class, difficult) of every object, by image
  "000005": [("chair", 0), ("chair", 1)],
  "000007": [("car", 1)],
  "000009": [("horse", 0), ("car", 0)],
  "000012": [],
  "000001": [("car", 0), ("chair", 1), ("chair", 1)],
}
TRUTH = {"car": [0, -1, 1, 0, 1], "chair": [1, 0, 0, 0, -1], "horse": [0, 0, 1, 0, 0]}
SETS = {"trainval": ["000005", "000007", "000009", "000012"], "test": ["000001"]}


def voc(root, lists=True):
  """VOC2007's layout, with lists of each class or with annotations alone."""
  base = root / "VOC2007"
  images(base / "JPEGImages", *(f"{name}.jpg" for name in OBJECTS))
  for folder in ("ImageSets/Main", "Annotations", "ImageSets/Layout"):
    (base / folder).mkdir(parents=True)
  for name, objects in OBJECTS.items():
    body = "".join(
      f"<object><name>{kind}</name><difficult>{hard}</difficult><bndbox><xmin>1</xmin></bndbox></object>"
      for kind, hard in objects
    )
    text = f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>{body}</annotation>"
    (base / "Annotations" / f"{name}.xml").write_text(text)
  order, said = list(OBJECTS), {1: " 1", 0: "-1", -1: " 0"}
  for split, names in SETS.items():
    (base / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
    for kind, truth in TRUTH.items() if lists else ():
      lines = [f"{n} {said[truth[order.index(n)]]}\n" for n in names]
      (base / "ImageSets/Main" / f"{kind}_{split}.txt").write_text("".join(lines))
  return base


def truth_of(split):
  rows = [list(OBJECTS).index(name) for name in SETS[split]]
  return np.stack([np.array(TRUTH[kind])[rows] for kind in sorted(TRUTH)], 1)


@pytest.mark.parametrize("lists", [True, False])
def test_voc_by_lists_and_by_annotations(tmp_path, lists):
  """The two say the same, difficult objects too; an annotation's test split lacks classes, and is given them."""
  base = voc(tmp_path, lists)
  for place in (tmp_path, base):
    train, test = (read("voc", place, split) for split in ("trainval", "test"))
    assert train.name == "VOC2007" and train.classes == ("car", "chair", "horse")
    assert train.names() == [f"{n}.jpg" for n in SETS["trainval"]]
    assert train.labels.tolist() == truth_of("trainval").tolist()
    assert test.classes == (("car", "chair", "horse") if lists else ("car", "chair"))
    test = loading.align_classes(test, train.classes)
    assert test.labels.tolist() == truth_of("test").tolist() and test.labels.dtype == np.int8
  assert Reader(train).read(2)[0, 0, 0] == 2 and not scored_data.share_images(train, test)
  assert read("voc", tmp_path).split == "trainval"  # what serves as train


def test_voc_that_is_damaged_is_refused(tmp_path):
  base = voc(tmp_path, lists=False)
  path = base / "Annotations" / "000007.xml"
  text = path.read_text()
  for damaged in (text[:-9], "", "<annotation><object></object></annotation>"):
    path.write_text(damaged)
    said = refused("voc", tmp_path, "trainval")
    assert "000007.xml is damaged" in said and "take the image out" in said
  path.unlink()
  said = refused("voc", tmp_path, "trainval")
  assert "has no labels for 1 of 4 images" in said and "000007" in said
  (base / "ImageSets/Main/trainval.txt").write_text("000099\n000098\n000097\n000096\n")
  assert "000099.jpg, 000098.jpg, 000097.jpg and 1 more" in refused("voc", tmp_path, "trainval")
  with pytest.raises(NoSplit, match="has no mine.txt, only test, trainval"):
    read("voc", tmp_path, "mine")
  assert "has no ImageSets/Main" in refused("voc", base / "JPEGImages")
  (tmp_path / "VOC2012/ImageSets/Main").mkdir(parents=True)
  assert "VOC2007" in refused("voc", tmp_path) and "name one of them" in refused("voc", tmp_path)


def test_lists_of_voc_must_have_every_image(tmp_path):
  path = voc(tmp_path) / "ImageSets/Main/car_trainval.txt"
  path.write_text("000005 -1\n")
  assert "has no label for 3 of 4 images of trainval.txt: 000007, 000009, 000012" in refused("voc", tmp_path, "trainval")  # fmt: skip
  path.write_text("000005 2\n")
  assert "car_trainval.txt has 1 lines that are not an image and 1, 0 or -1: 000005 2" in refused(
    "voc", tmp_path, "trainval"
  )


# Several labels in other sources, and in what reads them.


def test_arrays_may_have_several_labels(tmp_path):
  pixels, path = np.zeros((3, 4, 4, 3), np.uint8), tmp_path / "x.npz"
  labels = np.array([[1, 0], [0, -1], [1, 1]])
  np.savez(path, train_images=pixels, train_labels=labels, classes=["a", "b"])
  source = read("npz", path)
  assert source.has_several and source.labels.tolist() == labels.tolist() and source.classes == ("a", "b")  # fmt: skip
  assert "leave it 0" in refused("npz", path, num_classes=5)
  np.savez(path, train_images=pixels, train_labels=labels * 3)
  assert "1 (there), 0 (not) or -1" in refused("npz", path)
  np.savez(path, train_images=pixels, train_labels=labels[:2])
  assert "store integers [3], one per image, or [3, classes]" in refused("npz", path)


def test_columns_are_put_in_the_order_of_train(tmp_path):
  pixels = np.zeros((2, 4, 4, 3), np.uint8)
  source = Source("x", pixels, None, np.array([[1, 0], [0, -1]], np.int8), ("b", "a"))
  found = loading.align_classes(source, ("a", "b", "c"))
  assert found.labels.tolist() == [[0, 1, 0], [-1, 0, 0]]
  with pytest.raises(ConfigError, match=r"has classes that train lacks: \['b'\]"):
    loading.align_classes(source, ("a",))


# Subsets.


def folder_of(root):
  images(root, *(f"train/n{c}/n{c}_{i}.JPEG" for c in range(2) for i in range(3)), "val/n0/v.JPEG", "val/n1/w.JPEG")  # fmt: skip
  return root


def shards_of(root):
  (root / "train").mkdir(parents=True)
  with tarfile.open(root / "train" / "0.tar", "w") as archive:
    for c in range(2):
      for i in range(3):
        content = picture(3 * c + i)
        for name, text in ((f"n{c}_{i}.JPEG", content), (f"n{c}_{i}.cls", b"%d" % c)):
          member = tarfile.TarInfo(name)
          member.size = len(text)
          archive.addfile(member, io.BytesIO(text))
  return root


@pytest.mark.parametrize("kind, make", [("folder", folder_of), ("webdataset", shards_of)])
def test_a_published_list_names_the_images_without_their_folders(tmp_path, kind, make):
  """In any order; pixels, labels, names and identity are those of the chosen images, and only of train."""
  path = tmp_path / "1percent.txt"
  path.write_text("n1_2.JPEG\nn0_1.JPEG\r\n\n")
  data = config_files.load("adco_r50").data
  data.source, data.dir, data.subset = kind, str(make(tmp_path / "data")), str(path)
  whole = read(kind, data.dir)
  source = build.open_source(data)
  assert [n.rpartition("/")[2] for n in source.names()] == ["n0_1.JPEG", "n1_2.JPEG"]
  assert source.labels.tolist() == [0, 1] and source.classes == whole.classes
  assert [Reader(source).read(i)[0, 0, 0] for i in range(2)] == [1, 5]
  assert source.identity() != whole.identity() and source.whole == whole.identity()
  assert scored_data.describe(source) != scored_data.describe(whole)
  assert build.open_source(data, "train").num_examples == 2
  if kind == "folder":
    assert build.open_source(data, "val").num_examples == 2


def test_a_subset_by_paths_and_of_arrays(tmp_path):
  path = tmp_path / "some.txt"
  path.write_text("n1/n1_0.JPEG\n")
  source = restrict(read("folder", folder_of(tmp_path / "data")), str(path))
  assert source.names() == ["n1/n1_0.JPEG"]
  path.write_text("9\n2\n")
  digits = read("digits", "")
  source = restrict(digits, str(path))
  assert np.array_equal(source.images, digits.images[[2, 9]])
  assert source.labels.tolist() == digits.labels[[2, 9]].tolist()


@pytest.mark.parametrize("text, says", [
  ("", "is an empty list"),
  ("n0_0.JPEG\nn0_0.JPEG\n", "names 1 files twice: n0_0.JPEG"),
  ("n0_0.JPEG\nn0/n0_0.JPEG\n", "names 1 images twice: n0/n0_0.JPEG"),
  ("p.JPEG\nq.JPEG\nr.JPEG\ns.JPEG\nn0_0.JPEG\n", "names 4 images that data train has not: p.JPEG, q.JPEG, r.JPEG and 1 more; its first is called n0/n0_0.JPEG"),
  ("same.JPEG\n", "same.JPEG fit several images of data; name them by their paths"),
])  # fmt: skip
def test_a_wrong_subset_is_refused(tmp_path, text, says):
  root = folder_of(tmp_path / "data")
  images(root / "train", "n0/same.JPEG", "n1/same.JPEG")
  path = tmp_path / "list.txt"
  path.write_text(text)
  with pytest.raises(ConfigError, match="config.data.subset") as error:
    restrict(read("folder", root), str(path))
  assert says in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(ConfigError, match="nowhere.txt cannot be read"):
    restrict(read("folder", root), "nowhere.txt")


def test_a_name_that_two_shards_hold_is_refused(tmp_path):
  """Writers begin to count anew in every shard."""
  for shard in ("0", "1"):
    write_tar(tmp_path / "data" / "train" / f"{shard}.tar", {"000001.png": png(np.zeros((8, 8, 3), np.uint8))})  # fmt: skip
  (tmp_path / "list.txt").write_text("000001.png\n")
  with pytest.raises(ConfigError, match="000001.png fit several images"):
    restrict(read("webdataset", tmp_path / "data"), str(tmp_path / "list.txt"))


def test_records_without_names_have_no_subset(tmp_path):
  path = tmp_path / "list.txt"
  path.write_text("x\n")
  source = dataclasses.replace(read("digits", ""), images=None, files=object.__new__(Nameless))
  with pytest.raises(ConfigError, match="has no names of images"):
    restrict(source, str(path))


class Nameless:
  """Files of someone else's source."""

  def __len__(self):
    return 3
