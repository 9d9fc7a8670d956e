"""Packing: interrupted equals uninterrupted to the byte; what no longer fits is refused."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from adco_jax import main
from adco_jax.data.images import Reader
from adco_jax.data.sources import loading
from adco_jax.errors import ConfigError
from adco_jax.runtime import files
from adco_jax.tasks import pack
from tests.faults.images import photograph, write_broken, write_images
from tests.test_sources import as_folder, as_npz, write_tar

pytestmark = pytest.mark.kills  # the slow ones' group

PACK = "--config=configs/pack.py"


def flags(tmp_path, name, /, **more):
  given = {"data.dir": tmp_path / "data", "out": tmp_path / name, "shard_images": 8, "data.test_split": "''"}  # fmt: skip
  return [PACK, *(f"--config.{k.replace('__', '.')}={v}" for k, v in (given | more).items())]


def contents(folder):
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def photographs(tmp_path):
  """40 JPEGs of two classes, some larger than the cap."""
  for name in ("ant", "bee"):
    write_images(tmp_path / "data" / "train" / name, 20, sizes=[(60, 90), (30, 24), (200, 130)])
  return tmp_path / "data"


def test_packed_images_are_the_source_s(tmp_path, photographs):
  assert main.main(flags(tmp_path, "out", short_side=64)) == 0
  plain = loading.load_source("folder", str(photographs), "train")
  packed = loading.load_source("packed", str(tmp_path / "out"), "train")
  assert packed.num_examples == 40 and packed.classes == plain.classes
  assert np.array_equal(packed.labels, plain.labels) and packed.names() == plain.names()
  read, read_packed = Reader(plain).read, Reader(packed).read
  for i in range(40):
    before, after = read(i), read_packed(i)
    if min(before.shape[:2]) <= 64:
      assert before.shape == after.shape and np.abs(before.astype(int) - after).mean() < 8
    else:
      assert min(after.shape[:2]) == 64
      assert abs(after.shape[1] / after.shape[0] - before.shape[1] / before.shape[0]) < 0.02
  with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as archive:
    assert archive.getnames()[:2] == ["000000000.jpg", "000000000.cls"]
  as_tar = loading.load_source("webdataset", str(tmp_path / "out"), "train")  # others read it too
  assert np.array_equal(as_tar.labels, plain.labels)


def test_png_keeps_every_pixel(tmp_path):
  images = np.random.RandomState(0).randint(0, 256, (20, 9, 11, 3), np.uint8)
  as_npz(tmp_path / "data", images, np.arange(20) % 3)
  more = {"data.source": "npz", "data.dir": tmp_path / "data" / "all.npz", "format": "png"}
  assert main.main(flags(tmp_path, "out", **more)) == 0
  packed = loading.load_source("packed", str(tmp_path / "out"), "train")
  assert all(np.array_equal(Reader(packed).read(i), images[i]) for i in range(20))


def test_an_interrupted_packing_goes_on_to_the_same_bytes(
  tmp_path, photographs, monkeypatch, capsys
):
  assert main.main(flags(tmp_path, "straight")) == 0
  write, written = pack.write_shard, []

  def stop_at_third(*args):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(args[0])
    write(*args)

  monkeypatch.setattr(pack, "write_shard", stop_at_third)
  assert main.main(flags(tmp_path, "stopped")) == 130
  monkeypatch.setattr(pack, "write_shard", write)
  with pytest.raises(ConfigError, match="let it finish"):
    loading.load_source("packed", str(tmp_path / "stopped"), "train")
  capsys.readouterr()
  assert main.main(flags(tmp_path, "stopped")) == 0
  assert "16 of 40 images are there" in capsys.readouterr().out
  assert contents(tmp_path / "stopped" / "train") == contents(tmp_path / "straight" / "train")


@pytest.mark.slow
def test_a_killed_packing_goes_on_to_the_same_bytes(tmp_path):
  """SIGKILL of the process at three moments."""
  write_images(tmp_path / "data" / "train", 3000, sizes=[(300, 400)])
  assert main.main(flags(tmp_path, "straight", shard_images=100)) == 0
  command = [sys.executable, "-m", "adco_jax.main", *flags(tmp_path, "killed", shard_images=100)]
  folder, kills = tmp_path / "killed" / "train", 0
  while kills < 3:
    before = len(list(folder.glob("*.npz"))) if folder.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not folder.exists() or len(list(folder.glob("*.npz"))) < before + 4):  # fmt: skip
      time.sleep(0.01)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kills += 1
  assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
  found = {k: v for k, v in contents(folder).items() if not k.endswith(".part")}
  assert found == contents(tmp_path / "straight" / "train")


def test_broken_images_are_named_and_left_out(tmp_path, photographs, capsys):
  names = write_broken(photographs / "train" / "ant")
  for _ in range(2):
    assert main.main(flags(tmp_path, "out")) == 3  # more than a hundredth, however often one asks
  half = {"data.max_bad_fraction": 0.5}
  assert main.main(flags(tmp_path, "out", **half)) == 0
  manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
  assert sorted(manifest["broken"]) == sorted(f"ant/{name}" for name in names)
  packed = loading.load_source("packed", str(tmp_path / "out"), "train")
  assert packed.num_examples == manifest["examples"] == 40
  assert packed.labels.tolist() == [0] * 20 + [1] * 20
  assert main.main(flags(tmp_path, "out")) == 3
  for name in names:
    write_images(photographs / "spare", 1)
    os.replace(photographs / "spare" / "00.jpg", photographs / "train" / "ant" / name)
  capsys.readouterr()
  assert main.main(flags(tmp_path, "out")) == 0  # mended: all are there now
  assert "left out images that can be read now" in capsys.readouterr().out
  assert loading.load_source("packed", str(tmp_path / "out"), "train").num_examples == 40 + len(
    names
  )


def test_equal_names_and_a_broken_image(tmp_path):
  """Shards that number their members anew each: counted by number, not by name."""
  sound = pack.io.BytesIO()
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(sound, "JPEG")
  for shard in range(2):
    write_tar(tmp_path / "data" / "train" / f"{shard}.tar", {f"{i}.jpg": sound.getvalue() if (shard, i) != (1, 3) else b"x" for i in range(5)})  # fmt: skip
  more = {"data.source": "webdataset", "data.max_bad_fraction": 0.5}
  assert main.main(flags(tmp_path, "out", **more)) == 0
  manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
  assert manifest["examples"] == 9 and manifest["broken"] == ["3.jpg"]


def test_an_image_too_wide_for_jpeg_is_broken(tmp_path, photographs, capsys):
  Image.fromarray(np.zeros((10, 70000, 3), np.uint8)).save(
    photographs / "train" / "ant" / "wide.png"
  )
  assert main.main(flags(tmp_path, "out", **{"data.max_bad_fraction": 0.1})) == 0
  assert "broken image" in capsys.readouterr().out


@pytest.mark.parametrize("more, says", [
  ({"out": "{}/data"}, "lies in config.data.dir"),
  ({"out": "{}/data/packed"}, "lies in config.data.dir"),
  ({"out": "{}/data/train/ant/00.jpg/x"}, "config.out="),
  ({"threads": -1}, "config.threads=-1"),
  ({"data.max_megapixels": -1.0}, "config.data.max_megapixels=-1.0"),
  ({"format": "gif"}, "use jpeg or png"),
])  # fmt: skip
def test_bad_options_are_refused_before_anything_is_made(tmp_path, photographs, capsys, more, says):
  more = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in more.items()}
  before = sorted(tmp_path.rglob("*"))
  assert main.main(flags(tmp_path, "out", **more)) == 2
  assert says in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_no_part_behind(tmp_path, photographs, monkeypatch, capsys):
  def full(path):
    if ".tar" in path:
      raise OSError(28, "No space left on device")

  monkeypatch.setattr(files, "_to_disk", full)
  assert main.main(flags(tmp_path, "out")) == 3
  assert "00000.tar" in capsys.readouterr().err
  assert [p.name for p in (tmp_path / "out" / "train").iterdir()] == ["settings.json"]


def test_a_damaged_shard_is_found_and_packed_again(tmp_path, photographs, capsys):
  main.main(flags(tmp_path, "out"))
  whole = contents(tmp_path / "out" / "train")
  path = tmp_path / "out" / "train" / "00002.tar"
  path.write_bytes(whole["00002.tar"][:-1] + b"x")
  assert main.main(flags(tmp_path, "out")) == 0
  assert "00002.tar is not what was written" in capsys.readouterr().out
  assert contents(tmp_path / "out" / "train") == whole


REFUSED = {
  "a shard without index": (lambda f: os.remove(f / "00001.npz"), "00001.tar has no index"),
  "a shard missing": (lambda f: os.remove(f / "00001.tar"), "00001.tar is missing, the manifest says"),
  "a shard of another size": (lambda f: (f / "00001.tar").write_bytes(b"x"), "is 1 bytes, the manifest says"),
  "an index of others": (lambda f: os.replace(f / "00004.npz", f / "00001.npz"), "of other files than the manifest"),
  "no manifest": (lambda f: os.remove(f / "manifest.json"), "no manifest.json there"),
  "a damaged manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
  "an empty manifest": (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_manifest_that_no_longer_fits_is_refused(tmp_path, photographs, what):
  damage, says = REFUSED[what]
  main.main(flags(tmp_path, "out", shard_images=9))  # 5 shards, the last one shorter
  damage(tmp_path / "out" / "train")
  with pytest.raises(ConfigError, match=says) as caught:
    loading.load_source("packed", str(tmp_path / "out"), "train")
  assert "\n" not in str(caught.value)


def test_what_is_there_is_never_overwritten(tmp_path, photographs, capsys):
  (tmp_path / "out" / "train").mkdir(parents=True)
  (tmp_path / "out" / "train" / "mine.txt").write_text("precious")
  assert main.main(flags(tmp_path, "out")) == 2
  assert "holds other files" in capsys.readouterr().err
  assert main.main(flags(tmp_path, "new")) == 0
  assert main.main(flags(tmp_path, "new", quality=80)) == 2
  assert "holds a packing with another quality" in capsys.readouterr().err


def test_no_room_is_said_before_it_starts(tmp_path, photographs, monkeypatch, capsys):
  monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
  assert main.main(flags(tmp_path, "out")) == 2
  said = capsys.readouterr()
  assert "has no room" in said.err and "40 images to pack, about" in said.out


def test_small_originals_stay_as_they_are(tmp_path):
  """Encoding again what is small already would lose quality for nothing."""
  folder = tmp_path / "data" / "train"
  folder.mkdir(parents=True)
  image = np.random.RandomState(0).randint(0, 256, (40, 50, 3), np.uint8)
  Image.fromarray(image).save(folder / "low.jpg", quality=30)
  Image.fromarray(image).save(folder / "top.jpg", quality=100)
  assert main.main(flags(tmp_path, "out")) == 0
  packed = loading.load_source("packed", str(tmp_path / "out"), "train")
  assert packed.files.read(0) == (folder / "low.jpg").read_bytes()
  assert len(packed.files.read(1)) < (folder / "top.jpg").stat().st_size


def test_both_splits_are_packed_and_scored_alike(tmp_path):
  images = np.random.RandomState(0).randint(0, 256, (12, 9, 11, 3), np.uint8)
  as_folder(tmp_path / "data", images, np.arange(12) % 2)
  os.rename(tmp_path / "data" / "train", tmp_path / "data" / "val")
  as_folder(tmp_path / "data", images, np.arange(12) % 2)
  assert main.main(flags(tmp_path, "out", **{"data.test_split": "val"})) == 0
  train, val = (loading.load_source("packed", str(tmp_path / "out"), s) for s in ("train", "val"))
  assert train.num_examples == val.num_examples == 12 and train.classes == val.classes


def test_labels_of_both_splits_are_numbered_alike(tmp_path):
  """Also where the test split lacks a class, or has one more: other programs read numbers alone."""
  images = np.zeros((1, 9, 11, 3), np.uint8)
  for split, names in (("train", "abc"), ("val", "acd")):
    for name in names:
      write_png(tmp_path / "data" / split / name / "1.png", images[0])
  assert main.main(flags(tmp_path, "out", **{"data.test_split": "val"})) == 0
  found = {s: loading.load_source("webdataset", str(tmp_path / "out"), s) for s in ("train", "val")}
  assert {s: x.labels.tolist() for s, x in found.items()} == {"train": [0, 1, 2], "val": [0, 2, 3]}
  assert found["val"].classes == ("a", "b", "c", "d")


def test_everything_as_it_is_is_packed_as_train(tmp_path, capsys):
  """Under a name that is found again; a test split inside of it would be a copy."""
  for name in ("cat", "dog", "val/cat"):
    write_png(tmp_path / "data" / name / "1.png", np.zeros((9, 9, 3), np.uint8))
  more = {"data.split": ".", "data.test_split": "val"}
  assert main.main(flags(tmp_path, "out", **more)) == 2 and not (tmp_path / "out").exists()
  assert "holds images of data.split=. too; to pack" in capsys.readouterr().err
  assert main.main(flags(tmp_path, "out", **{"data.split": "."})) == 0
  assert loading.load_source("packed", str(tmp_path / "out"), "train").classes == (
    "cat",
    "dog",
    "val",
  )


def write_png(path, image):
  path.parent.mkdir(parents=True)
  Image.fromarray(image).save(path)


def test_packed_pictures_stand_upright_for_every_reader(tmp_path):
  """Also the small originals, which would be kept as they are: other readers look for no EXIF."""
  folder, exif = tmp_path / "data" / "train" / "7", Image.Exif()
  folder.mkdir(parents=True)
  exif[274] = 6  # the camera lay on its side
  upright = photograph(40, 30)
  Image.fromarray(np.rot90(upright)).save(folder / "x.jpg", quality=30, exif=exif)
  Image.fromarray(upright).save(tmp_path / "data" / "train" / "y.png")
  os.makedirs(tmp_path / "data" / "train" / "10")
  os.rename(tmp_path / "data" / "train" / "y.png", tmp_path / "data" / "train" / "10" / "y.png")
  assert main.main(flags(tmp_path, "out")) == 0
  for kind in ("packed", "webdataset"):  # names travel with the labels, in the order of numbers
    found = loading.load_source(kind, str(tmp_path / "out"), "train")
    assert found.classes == ("7", "10") and found.labels.tolist() == [1, 0]
  for i in range(2):
    with Image.open(pack.io.BytesIO(found.files.read(i))) as image:
      assert image.size == (30, 40) and not image.getexif()
      assert np.abs(np.asarray(image).astype(int) - upright).mean() < 20


def test_labels_that_changed_are_noticed(tmp_path, capsys):
  """The images are as they were; a packing of before, whose settings say nothing of labels, is taken as it is."""
  images, labels = (
    np.random.RandomState(0).randint(0, 256, (20, 8, 8, 3), np.uint8),
    np.arange(20) % 2,
  )
  path = tmp_path / "data.npz"
  more = {"data.source": "npz", "data.dir": path}
  np.savez(path, train_images=images, train_labels=labels)
  assert main.main(flags(tmp_path, "out", **more)) == 0
  np.savez(path, train_images=images, train_labels=1 - labels)
  capsys.readouterr()
  assert main.main(flags(tmp_path, "out", **more)) == 2
  assert "holds a packing with another source (images or labels)" in capsys.readouterr().err
  settings = tmp_path / "out" / "train" / "settings.json"
  before = json.loads(settings.read_text())
  del before["source"]["labels"]
  settings.write_text(json.dumps(before))
  assert main.main(flags(tmp_path, "out", **more)) == 0
