"""Files as they are found in the wild: unusual ones are read right, broken ones lose their slot to another."""

import io
import struct
import subprocess
import sys
from unittest.mock import Mock

import cv2
import jax
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from adco_jax import main
from adco_jax.data import images, modes, order
from adco_jax.data.images import Reader
from adco_jax.data.pipeline import PipelineLoader
from adco_jax.data.resident import ResidentLoader
from adco_jax.data.sources import files, loading
from adco_jax.errors import RunError
from adco_jax.runtime import sharding
from adco_jax.workdir.metrics import read_metrics
from tests import settings
from tests.faults.images import photograph, write_broken, write_images, write_unusual

RATIO = (3 / 4, 4 / 3)


def folder_source(path):
  return loading.load_source("folder", str(path), "train")


def test_unusual_files_are_read(tmp_path, recwarn):
  means = write_unusual(tmp_path)
  for name, mean in means.items():
    found = images.decode(files.read_file(tmp_path / name), 1e6)
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[-1] == 3, name
    assert abs(found.mean() - mean) < 4, name
  assert not recwarn.list


def test_broken_files_are_named_once_with_a_reason(tmp_path, capsys):
  reasons = write_broken(tmp_path)
  reader = Reader(folder_source(tmp_path))
  assert len(reader.source.files) == len(reasons)
  for _ in range(2):
    assert all(reader.read(i) is None for i in range(len(reasons)))
  said = capsys.readouterr().out.strip().split("\n")
  assert len(said) == len(reader.broken) == len(reasons)
  for name, reason in reasons.items():
    (line,) = (line for line in said if name in line)
    assert reason in line and len(line.split(name + ": ")[1]) > 5


def test_a_forged_size_allocates_nothing(tmp_path):
  """60,000 x 60,000 pixels would be 10.8 GB; the peak of a process moves by less than a hundredth of it."""
  huge = [str(tmp_path / name) for name in write_broken(tmp_path) if "huge" in name]
  code = (
    "import resource, sys; from adco_jax import main; from adco_jax.data import images; from adco_jax.data.sources import files\n"
    "main.settle()\n"
    "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "for path in sys.argv[1:]:\n"
    "  try: images.decode(files.read_file(path), 64e6)\n"
    "  except images.BadImage as error: print(error)\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
  )
  command = [sys.executable, "-c", code, *huge]
  *reasons, kilobytes = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
  assert len(reasons) == 3 and all("max_megapixels=64" in reason for reason in reasons)
  assert int(kilobytes) < 100_000


def test_a_file_that_is_gone_is_no_broken_image(tmp_path, monkeypatch):
  """A lost mount must not turn into a run on gray images; a dangling link is broken from the start."""
  monkeypatch.setattr(files, "DISK_PAUSE_SECONDS", 0.0)
  with pytest.raises(RunError, match="No such file"):
    files.read_file(tmp_path / "gone.jpg")
  (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
  with pytest.raises(images.BadImage):
    files.read_file(tmp_path / "link.jpg")


def test_too_many_broken_files_end_the_run(tmp_path):
  write_images(tmp_path, 30)
  (tmp_path / "03.jpg").write_bytes(b"")
  source = folder_source(tmp_path)
  for fraction, fine in ((0.0, False), (0.03, False), (0.04, True)):
    reader = Reader(source, fraction)
    assert reader.read(3) is None and reader.read(4) is not None
    if fine:
      reader.check()
      continue
    with pytest.raises(RunError, match=rf"max_bad_fraction={fraction:g}: 1 of 30 .*03\.jpg"):
      reader.check()


def test_a_failing_disk_is_no_broken_image(tmp_path, monkeypatch):
  """What may be there again after a restart must not be replaced: the run would not be the same."""
  monkeypatch.setattr(files, "DISK_PAUSE_SECONDS", 0.0)
  write_images(tmp_path, 1)

  def fail(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr("builtins.open", fail)
  with pytest.raises(RunError, match="Input/output error, tried 5 times"):
    files.read_file(tmp_path / "00.jpg")


@pytest.mark.parametrize("block", [8, 0])
@pytest.mark.parametrize("kind", ["pipeline", "resident"])
def test_a_broken_image_s_slot_goes_to_its_spare_and_nothing_else_moves(tmp_path, kind, block):
  """Against the same folder unbroken: equal in every slot but those, over one and two processes."""
  write_images(tmp_path / "a", 64, sizes=[(24, 24)])
  write_images(tmp_path / "b", 64, sizes=[(24, 24)])
  broken = (5, 17, 40)
  for i in broken:
    (tmp_path / "b" / f"{i:02d}.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
  mesh = sharding.create_mesh(jax.devices()[:1])
  config = settings.tiny_config(method__bank__init="random", bn__shuffle_block=block)
  loaders = {"pipeline": PipelineLoader, "resident": ResidentLoader}

  def batches(name, processes=1, process=0):
    loader = loaders[kind](Reader(folder_source(tmp_path / name), 0.1), mesh)
    plan = settings.tiny_plan(config, 2, 64, processes=processes, process=process)
    return list(loader.train(0, 4, seed=0, plan=plan, ratio=RATIO))  # one epoch

  whole, mended = batches("a"), batches("b")
  assert sum(batch.replaced for batch in mended) >= len(broken)
  for step, (x, y) in enumerate(zip(whole, mended, strict=True)):
    same = ~np.isin(x.indices, broken)
    assert np.array_equal(x.indices[same], y.indices[same])
    assert not np.isin(y.indices, broken).any() and y.replaced == (~same).sum()
    for one, other in zip(
      jax.tree.leaves(x.batch.queries), jax.tree.leaves(y.batch.queries), strict=True
    ):
      assert np.array_equal(one[same], other[same])
    spares = order.request(0, step, settings.tiny_plan(config, 2, 64), RATIO).candidates[:, 0]
    assert all(y.indices[i] in spares[i] for i in np.flatnonzero(~same))
  assert jax.tree.all(jax.tree.map(np.array_equal, mended, batches("b")))
  halves = [batches("b", 2, p) for p in (0, 1)]
  for batch, *parts in zip(mended, *halves, strict=True):
    assert sum(part.replaced for part in parts) == batch.replaced
    assert settings.is_joined(batch, parts)


def test_both_loaders_replace_alike(tmp_path):
  write_images(tmp_path, 20, sizes=[(24, 24)])
  write_broken(tmp_path)
  mesh = sharding.create_mesh(jax.devices()[:1])
  plan = settings.tiny_plan(settings.tiny_config(method__bank__init="random", epochs=3), 1, 30)
  found = [
    list(
      kind(Reader(folder_source(tmp_path), 0.5), mesh).train(0, 3, seed=1, plan=plan, ratio=RATIO)
    )
    for kind in (PipelineLoader, ResidentLoader)
  ]
  for x, y in zip(*found, strict=True):
    assert np.array_equal(x.indices, y.indices) and x.replaced == y.replaced > 0


def test_evaluation_shows_a_broken_image_as_gray(tmp_path):
  write_images(tmp_path, 9, sizes=[(24, 24)])
  (tmp_path / "03.jpg").write_bytes(b"")
  mesh = sharding.create_mesh(jax.devices()[:1])
  for kind in (PipelineLoader, ResidentLoader):
    loader = kind(Reader(folder_source(tmp_path), 0.5), mesh)
    ((found, count),) = loader.evaluation(np.arange(9), size=24, fraction=1.0, batch_size=9)
    assert count == 9 and (np.asarray(found)[3] == 127).all() and np.asarray(found)[4].std() > 20


def test_a_folder_with_broken_images_trains(tmp_path, capsys):
  """Through main: status 0, counts in metrics.jsonl, names in the output; above the share: status 3."""
  write_images(tmp_path / "data" / "x", 60, sizes=[(24, 24)])
  write_images(tmp_path / "data" / "y", 30, sizes=[(24, 30)])
  reasons = write_broken(tmp_path / "data" / "y")
  flags = [
    "--config=configs/adco_digits.py", f"--config.model.arch={settings.TINY}", "--config.model.width=0.125",
    "--config.data.batch_size=16", "--config.bn.group_size=2", "--config.method.bank.size=32", "--config.epochs=2",
    "--config.augment.policy=none", "--config.views.crops=((12,.5,1.),(12,.5,1.))", "--config.log.every_steps=1", "--config.data.source=folder",
    f"--config.data.dir={tmp_path}/data", "--config.data.loader=pipeline",
  ]  # fmt: skip
  assert (
    main.main([*flags, f"--workdir={tmp_path}/fine", "--config.data.max_bad_fraction=0.2"]) == 0
  )
  said = capsys.readouterr().out
  assert all(said.count(name) == 1 for name in reasons)
  replaced = [x["data/replaced"] for x in read_metrics(tmp_path / "fine") if "data/replaced" in x]
  assert len(replaced) == 14 and sum(replaced) >= len(reasons)
  rare = [
    *flags,
    f"--workdir={tmp_path}/rare",
    "--config.data.max_bad_fraction=0.2",
    "--config.log.every_steps=7",
  ]
  assert (
    main.main([*rare, "--config.stop_at_step=10"]) == main.main(rare) == 0
  )  # stopped between two lines
  told = [x["data/replaced"] for x in read_metrics(tmp_path / "rare") if "data/replaced" in x]
  assert told == [sum(replaced[:7]), sum(replaced[7:])]
  assert main.main([*flags, f"--workdir={tmp_path}/bad"]) == 3
  assert "config.data.max_bad_fraction=0.01:" in capsys.readouterr().err


def gray16(top, dtype=np.uint16):
  """A photograph in gray whose values fill 0..top, [40, 50]."""
  gray = photograph(40, 50).mean(-1)
  gray = (gray - gray.min()) / (gray.max() - gray.min())
  return np.asarray(gray * top, dtype)


def save_rgb16(path, top):
  values = gray16(top)
  assert cv2.imwrite(
    str(path), np.stack([values // 4, values // 2, values], -1)
  )  # blue, green, red


MODES = {
  "8 bits in 16": ("x.tif", gray16(255), 1.0),
  "12 bits in 16": ("x.tif", gray16(4095), 1.0),
  "16 bits": ("x.png", gray16(65535), 1.0),
  "int32 of 12 bits": ("x.tif", gray16(4095, np.int32), 1.0),
  "float 0..1": ("x.tif", gray16(1, np.float32), 1.0),
  "float 0..255": ("x.tif", gray16(255, np.float32), 1.0),
  "a dark picture of 16 bits": ("x.tif", gray16(20000), 20000 / 65535),
  "a darker one fills 12 bits": ("x.tif", gray16(3000), 3000 / 4095),
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_values_of_other_modes_are_mapped_by_a_stated_rule(tmp_path, name):
  file, values, top = MODES[name]
  Image.fromarray(values).save(tmp_path / file)
  found = images.decode((tmp_path / file).read_bytes(), 1e6)
  assert np.abs(found.astype(float) - gray16(255.0, float)[..., None] * top).max() <= 1.01


@pytest.mark.parametrize("file", ["x.png", "x.tif"])
@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_colours_of_sixteen_bits_follow_the_same_rule(tmp_path, file, top):
  """Pillow keeps their upper eight bits, which of 8 or 12 are nothing."""
  save_rgb16(tmp_path / file, top)
  found = images.decode((tmp_path / file).read_bytes(), 1e6).astype(float)
  wanted = gray16(255.0, float)
  for channel, part in enumerate((1, 1 / 2, 1 / 4)):
    assert np.abs(found[..., channel] - wanted * part).max() <= 1.5


def test_a_tiff_that_states_its_largest_value_is_believed(tmp_path):
  Image.fromarray(gray16(3000)).save(tmp_path / "x.tif", tiffinfo={281: 65535})
  found = images.decode((tmp_path / "x.tif").read_bytes(), 1e6)
  assert found.max() == 3000 >> 8


@pytest.mark.parametrize("values, says", [
  (gray16(1, np.float32) - 0.5, "floating numbers from -0.5 to 0.5"),
  (gray16(3000, np.float32), "neither 0..1 nor 0..255"),
  (np.where(gray16(1, np.float32) > 0.5, np.nan, 0.25).astype(np.float32), "floating numbers from nan"),
  (np.where(gray16(1, np.float32) > 0.5, np.inf, 0.25).astype(np.float32), "to inf"),
  (gray16(1000, np.int32) - 5, "whole numbers from -5 to 995"),
  (gray16(70000, np.int32), "neither 8, 12 nor 16 bits"),
])  # fmt: skip
def test_values_without_a_rule_are_no_image_and_say_why(tmp_path, values, says):
  Image.fromarray(values).save(tmp_path / "x.tif")
  with pytest.raises(images.BadImage, match=says):
    images.decode((tmp_path / "x.tif").read_bytes(), 1e6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "PA"])
def test_every_mode_of_eight_bits_is_read_as_it_looks(tmp_path, mode):
  image, name = Image.fromarray(photograph(40, 50)), "x.tif"
  wanted = image.convert("L") if mode in ("1", "L", "LA", "PA") else image
  if mode == "LAB":
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
  elif mode == "PA":
    image, name = image.convert("L").convert("P"), "x.png"
    image.info["transparency"] = bytes(range(256))
  else:
    image = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode)
  image.save(tmp_path / name)
  found = images.decode((tmp_path / name).read_bytes(), 1e6)
  assert found.shape == (40, 50, 3)
  near = {"1": 30, "P": 12, "LAB": 4, "YCbCr": 3}.get(mode, 1)
  blur = lambda x: cv2.blur(np.asarray(x.convert("RGB") if isinstance(x, Image.Image) else x), (5, 5)).astype(float)  # fmt: skip
  assert np.abs(blur(found) - blur(wanted)).mean() < near


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_pictures_are_read_upright(tmp_path, kind, orientation):
  """By EXIF's eight orientations, the fast JPEG decoder included; 9 is none."""
  exif = Image.Exif()
  exif[274] = orientation
  upright = photograph(24, 32)
  upright[:8, :8] = 255  # a white corner at the upper left
  upright[16:, 24:] = 0  # a black one at the lower right
  back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, 1)  # its inverse
  stored = modes.upright(upright, back)
  Image.fromarray(stored).save(tmp_path / f"x.{kind}", exif=exif, quality=98)
  found = images.decode((tmp_path / f"x.{kind}").read_bytes(), 1e6)
  assert found.shape == upright.shape and found.flags.c_contiguous
  assert found[1:6, 1:6].mean() > 240 and found[18:, 26:].mean() < 15
  with Image.open(tmp_path / f"x.{kind}") as image:  # as Pillow shows it
    shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
  assert np.array_equal(found, shown)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(48, 64), (37, 51)])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_jpegs_are_decoded_smaller_upright_and_in_place(mode, size, scale):
  """A pixel is the mean of those it stands for, whichever way the picture lies; mirrored ones keep whole pixels."""
  y, x = np.mgrid[0 : size[0], 0 : size[1]]
  shown = np.uint8(np.stack([4 * y, 3 * x, 255 - 3 * x], -1))
  for orientation, back in {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.items():
    content, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(modes.upright(shown, back)).convert(mode)
    stored.save(content, "JPEG", exif=exif, quality=98, subsampling=0)
    asked = Mock(return_value=scale)
    found = images.decode_for(asked, content.getvalue(), 1e6)
    asked.assert_called_once_with(*size)
    assert (found.height, found.width) == size
    least = scale if orientation == 1 or size == (48, 64) else 1
    assert found.scale == least and found.pixels.shape[:2] == tuple(-(-n // least) for n in size)
    whole = images.decode(content.getvalue(), 1e6).astype(float)
    h, w = (n // least for n in size)
    means = whole[: h * least, : w * least].reshape(h, least, w, least, 3).mean((1, 3))
    assert np.abs(found.pixels[:h, :w] - means).mean() < 1


def test_only_sound_jpegs_are_decoded_smaller(tmp_path):
  """CMYK and other formats come whole, to the same pixels; what is broken is so at every scale."""
  smaller = lambda height, width: 2
  for name in write_unusual(tmp_path / "unusual"):
    content = files.read_file(tmp_path / "unusual" / name)
    found, whole = images.decode_for(smaller, content, 1e6), images.decode(content, 1e6)
    assert found.scale == (2 if name == "gray.jpg" else 1)
    assert found.scale == 2 or np.array_equal(found.pixels, whole)
  for name in write_broken(tmp_path / "broken"):
    with pytest.raises(images.BadImage):
      images.decode_for(smaller, files.read_file(tmp_path / "broken" / name), 64e6)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize(
  "where", ["filled marker", "XMP", "XMP behind EXIF without it", "EXIF before XMP"]
)
def test_orientation_is_the_same_for_every_decoder(where, mode):
  """The fast one and Pillow, which reads JPEGs in CMYK."""
  part = lambda text: b"\xff\xe1" + struct.pack(">H", len(text) + 2) + text
  xmp = part(modes.XMP + b'<rdf:Description tiff:Orientation="6"/>')
  exif = lambda **tags: part(_exif(**tags))
  head = {
    "filled marker": b"\xff\xff" + exif(orientation=6),
    "XMP": xmp,
    "XMP behind EXIF without it": exif(maker="x") + xmp,
    "EXIF before XMP": exif(orientation=6) + xmp.replace(b'"6"', b'"3"'),
  }[where]
  content = io.BytesIO()
  Image.fromarray(photograph(24, 32)).convert(mode).save(content, "JPEG")
  content = content.getvalue()
  content = content[:2] + head + content[2:]
  with Image.open(io.BytesIO(content)) as image:
    assert ImageOps.exif_transpose(image).size == (24, 32)
  assert modes.jpeg_orientation(content) == 6 and images.decode(content, 1e6).shape == (32, 24, 3)


def _exif(**tags):
  found = Image.Exif()
  for name, value in tags.items():
    found[{"orientation": 274, "maker": 271}[name]] = value
  return found.tobytes()


def test_damaged_exif_costs_no_image(tmp_path):
  exif = Image.Exif()
  exif[274] = 6
  Image.fromarray(photograph(24, 32)).save(tmp_path / "x.jpg", exif=exif)
  content = (tmp_path / "x.jpg").read_bytes()
  at = content.index(b"Exif") + 6
  for damage in (b"", b"\xff" * 20, b"II*\0\xff\xff\xff\xff"):
    broken = content[:at] + damage + content[at + len(damage) :]
    assert images.decode(broken, 1e6).shape in ((24, 32, 3), (32, 24, 3))
