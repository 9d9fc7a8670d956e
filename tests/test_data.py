"""Order, crops, sources and the two loaders."""

import contextlib
import dataclasses
import io
import itertools
import math
import zlib

import cv2
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from adco_jax import build
from adco_jax.config.plan import in_place
from adco_jax.data import cuts, order, pipeline
from adco_jax.data.ahead import Ahead
from adco_jax.data.batch import Batch, Constants
from adco_jax.data.images import Reader, decode, decode_for
from adco_jax.data.pipeline import PipelineLoader
from adco_jax.data.resident import ResidentLoader, crop_and_resize, expected_bytes
from adco_jax.data.sources import loading
from adco_jax.errors import ConfigError
from adco_jax.runtime import rng, sharding
from adco_jax.training.prepare import make_prepare
from adco_jax.views import crops
from adco_jax.views.augment import policies_for
from tests import settings
from tests.faults.images import photograph, write_images

RATIO = (3 / 4, 4 / 3)


def test_streams_are_frozen():
  """Runs resume only if these numbers never change, whatever NumPy or JAX does."""
  assert zlib.crc32(order.permutation(7, 3, 1000).astype(np.int64).tobytes()) == 2536305127
  assert rng.host_rng_for(1, rng.CROPS, 2, 3).randint(10**6) == 361669
  bits = jax.random.bits(rng.rng_for(5, rng.AUGMENT, 9), (2,))
  assert [int(b) for b in bits] == [70871527, 2530813493]


def test_streams_differ():
  names = [n for n in dir(rng) if n.isupper()]
  numbers = [getattr(rng, n) for n in names]
  assert len(set(numbers)) == len(names)
  draws = {tuple(rng.host_rng_for(0, n, 0).randint(10**9, size=3)) for n in numbers}
  assert len(draws) == len(names)


def test_an_epoch_visits_each_example_at_most_once():
  batches = [order.batch_indices(0, b, 50, 8) for b in range(12)]
  first, second = np.concatenate(batches[:6]), np.concatenate(batches[6:])
  assert len(set(first)) == len(set(second)) == 48
  assert not np.array_equal(first, second)
  assert np.array_equal(batches[6], order.batch_indices(0, 6, 50, 8))


def test_key_order_permutes_blocks():
  whole = order.key_order(0, 5, 1, 64, 64)
  blocks = order.key_order(0, 5, 1, 64, 16)
  assert sorted(whole) == sorted(blocks) == list(range(64))
  assert all(
    np.array_equal(np.sort(blocks[i : i + 16]), np.arange(i, i + 16)) for i in range(0, 64, 16)
  )
  assert not np.array_equal(np.sort(whole[:16]), np.arange(16))
  others = (
    order.key_order(0, 6, 1, 64, 64),
    order.key_order(0, 5, 0, 64, 64),
    order.key_order(1, 5, 1, 64, 64),
  )
  assert all(not np.array_equal(whole, o) for o in others)


@pytest.mark.parametrize("block", [8, 0])
@pytest.mark.parametrize("mode", ["single", "symmetric", "symmetric_multicrop"])
def test_processes_partition_the_batch(mode, block):
  """Two processes ship exactly the halves of what one ships, with blocks that fit them or reach over both."""
  config = settings.tiny_config(mode, bn__shuffle_block=block, method__bank__init="random")
  source = loading.load_source("digits", "", "train")
  mesh = sharding.create_mesh(jax.devices()[:1])
  loader = ResidentLoader(Reader(source), mesh)

  def shipped(processes, process):
    plan = settings.tiny_plan(config, 2, source.num_examples, processes=processes, process=process)
    return next(loader.train(3, 4, seed=0, plan=plan, ratio=RATIO))

  assert settings.is_joined(shipped(1, 0), [shipped(2, p) for p in (0, 1)])


def test_shuffled_keys_are_the_slots_of_their_order():
  config = settings.tiny_config(method__bank__init="random")
  source = loading.load_source("digits", "", "train")
  loader = ResidentLoader(Reader(source), sharding.create_mesh(jax.devices()[:1]))
  plan = settings.tiny_plan(config, 1, source.num_examples)
  batch = next(loader.train(0, 1, seed=0, plan=plan, ratio=RATIO)).batch
  index = order.batch_indices(0, 0, source.num_examples, 16)
  assert np.array_equal(batch.queries[0].index, index)
  assert np.array_equal(batch.keys[0].index, index[batch.key_orders[0]])
  assert np.array_equal(batch.keys[0].index[batch.key_positions[0]], index)
  assert not np.array_equal(batch.key_orders[0], np.arange(16))


@pytest.mark.parametrize("size", [(32, 32), (40, 500), (9, 8)])
def test_boxes_of_one_size_are_the_boxes_of_their_draws(size):
  """To the bit, those included that fit at no try or at a late one."""
  setting = 256, ((0.2, 1.0), (0.05, 0.14)), (0.3, 4.0)
  size, steps = np.float64(size), range(5, 8)
  draws = [crops.random_draws(3, step, *setting) for step in steps]
  expected = [crops.boxes(x, *size, setting[-1]) for x in draws]
  assert np.array_equal(crops.random_boxes(3, steps, *setting, *size), expected)


def test_batches_made_ahead_are_the_same_batches():
  """In order, an error at its own place, and the generator closed with its thread."""
  closed = []

  def batches():
    try:
      yield from range(3)
      raise OSError("the disk")
    finally:
      closed.append(True)

  ready = Ahead(batches(), 2)
  assert [next(ready) for _ in range(3)] == [0, 1, 2]
  for _ in range(2):
    with pytest.raises(OSError, match="the disk"):
      next(ready)
  endless = (n for n in itertools.count())
  ready = Ahead(endless, 4)
  assert [next(ready) for _ in range(9)] == list(range(9)) and closed
  ready.close()
  assert not ready._thread.is_alive() and endless.gi_frame is None
  assert list(Ahead((n for n in range(5)), 1)) == list(range(5))


def torchvision_box(draws, height, width, ratio):
  """RandomResizedCrop.get_params, one image, in plain Python, from the same uniform numbers."""
  for w_share, h_share, u_top, u_left in draws:
    w = int(round(math.sqrt(height * width) * w_share))
    h = int(round(math.sqrt(height * width) * h_share))
    if 0 < w <= width and 0 < h <= height:
      return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
  in_ratio = width / height
  w, h = width, height
  if in_ratio < min(ratio):
    h = int(round(w / min(ratio)))
  elif in_ratio > max(ratio):
    w = int(round(h * max(ratio)))
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(32, 32), (375, 500), (500, 40), (31, 400)])
def test_boxes_equal_torchvision(size):
  """On ordinary and on extreme images (where the ten tries often fail), to the pixel."""
  draws = crops.random_draws(0, 1, 200, ((0.2, 1.0), (0.05, 0.3)), RATIO)
  height, width = np.float64(size[0]), np.float64(size[1])
  found = crops.boxes(draws, height, width, RATIO)
  wanted = [[torchvision_box(view, *size, RATIO) for view in image] for image in draws]
  assert np.array_equal(found, np.array(wanted))
  one = [[crops.box(view, *size, RATIO) for view in image] for image in draws.tolist()]
  assert np.array_equal(found, np.array(one))
  assert (found[..., 0] >= 0).all() and (found[..., 0] + found[..., 2] <= size[0]).all()
  assert (found[..., 1] >= 0).all() and (found[..., 1] + found[..., 3] <= size[1]).all()
  if size == (500, 40):
    assert (found[..., 2] == np.round(40 / RATIO[0])).any()  # the fallback was really taken


def test_draws_have_the_stated_distribution():
  draws = crops.random_draws(0, 0, 4000, ((0.2, 1.0),), RATIO)[:, 0]
  area, aspect = draws[..., 0] * draws[..., 1], draws[..., 0] / draws[..., 1]
  assert abs(area.mean() - 0.6) < 0.005 and area.min() >= 0.2 and area.max() <= 1
  assert abs(np.log(aspect).mean()) < 0.005 and aspect.min() >= 3 / 4 and aspect.max() <= 4 / 3


def test_centre_boxes():
  assert crops.centre_boxes(np.float64(300), np.float64(500), 0.875).tolist() == [19, 119, 262, 262]
  assert crops.centre_boxes(np.float64(32), np.float64(32), 1.0).tolist() == [0, 0, 32, 32]


@pytest.mark.parametrize("box", [(0, 0, 40, 56), (3, 5, 30, 21), (10, 20, 7, 9), (39, 55, 1, 1)])
def test_cut_equals_pillow(box):
  """Shrinking and enlarging; Pillow rounds between its two passes, hence one level of slack."""
  top, left, height, width = box
  image = photograph(40, 56)
  part = Image.fromarray(image).crop((left, top, left + width, top + height))
  pillow = part.resize((16, 16), Image.Resampling.BILINEAR)
  found = np.asarray(crop_and_resize(image[None], np.array([box], np.float32), 16))[0]
  assert np.abs(found.astype(int) - np.asarray(pillow).astype(int)).max() <= 1


def test_loaders_give_the_same_views():
  """tf.data and the device, through every step of a plan that changes pairing, to one level.

  They differ where the result is near one half: Pillow rounds after its first pass too.
  """
  config = settings.tiny_config("multicrop", method__bank__size=32)
  source = loading.load_source("digits", "", "train")
  mesh = sharding.create_mesh(jax.devices()[:1])
  plan = settings.tiny_plan(config, 1, source.num_examples)
  first, last = plan.phases
  phases = dataclasses.replace(first, steps=1), dataclasses.replace(last, steps=1), first, last
  plan = dataclasses.replace(
    plan, phases=in_place(phases), fill_steps=4
  )  # its pairing changes thrice
  resident, pipeline = (
    ResidentLoader(Reader(source), mesh),
    PipelineLoader(Reader(source), mesh, threads=2, cut="pillow"),
  )
  setting = dict(seed=3, plan=plan, ratio=RATIO)
  pairs = list(zip(resident.train(0, 6, **setting), pipeline.train(0, 6, **setting), strict=True))
  assert [len(loaded.batch.queries) for loaded, _ in pairs] == [1, 2, 1, 1, 2, 2]
  for (a, *which_a), (b, *which_b) in pairs:
    assert jax.tree.all(jax.tree.map(np.array_equal, (a[2:], which_a), (b[2:], which_b)))
    for boxes, pixels in ((a.queries, b.queries), (a.keys, b.keys)):
      assert len(boxes) == len(pixels) > 0
      for item, (view,) in zip(boxes, pixels, strict=True):
        found = np.asarray(item.crops(view.shape[1], resident.images)).astype(int)
        assert np.abs(found - view).max() <= 1 and np.abs(found - view).mean() < 0.2


@pytest.mark.parametrize("cut", ["fast", "pillow"])
def test_padded_images_are_cut_as_torchvision_s_random_crop_does(cut):
  """RandomCrop(16, padding=2) of 16 pixels: every one of 25 places, black outside, not resized; on host and device alike."""
  crop = ((16, 0.64, 0.64),)
  config = settings.tiny_config(views__mode="one", objective="supervised", views__crops=crop, views__pad=2)  # fmt: skip
  source, mesh = loading.load_source("digits", "", "train"), sharding.create_mesh(jax.devices()[:1])
  plan, reader = settings.tiny_plan(config, 1, source.num_examples), Reader(source)
  resident, host = ResidentLoader(reader, mesh), PipelineLoader(reader, mesh, threads=2, cut=cut)
  plain = policies_for("none", 1)
  prepare = make_prepare(plan.train_pairing, plan, policies=plain, mean=(0,) * 3, std=(1 / 255,) * 3)  # fmt: skip
  specs, constants = Batch.specs(), Constants.put(mesh, 3, resident.images)
  prepare = jax.jit(jax.shard_map(prepare, mesh=mesh, in_specs=(P(), specs, P()), out_specs=specs))
  setting, seen = dict(seed=3, plan=plan, ratio=(1.0, 1.0)), set()
  for a, b in zip(resident.train(0, 20, **setting), host.train(0, 20, **setting), strict=True):
    (views,), item = prepare(0, a.batch.put(mesh), constants).queries, a.batch.queries[0]
    assert np.array_equal(np.rint(views), b.batch.queries[0].pixels)
    for view, box, i in zip(b.batch.queries[0].pixels, item.boxes.astype(int), item.index, strict=True):  # fmt: skip
      whole = np.pad(source.images[i], ((2, 2), (2, 2), (0, 0)))
      assert np.array_equal(view, whole[box[0] : box[0] + 16, box[1] : box[1] + 16])
      seen.add(tuple(box))
  assert seen == {(y, x, 16, 16) for y in range(5) for x in range(5)}


def test_without_tensorflow_the_pipeline_is_refused_at_once(monkeypatch):
  monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
  mesh = sharding.create_mesh(jax.devices()[:1])
  with pytest.raises(ConfigError, match="loader='pipeline': TensorFlow is not installed; pip"):
    PipelineLoader(Reader(loading.load_source("digits", "", "train")), mesh)


def test_pipeline_starts_anywhere():
  """Step 4 from a fresh start is step 4 of a run that got there, bit for bit."""
  config = settings.tiny_config(method__bank__init="random")
  source = loading.load_source("digits", "", "train")
  loader = PipelineLoader(Reader(source), sharding.create_mesh(jax.devices()[:1]), threads=2)
  plan = settings.tiny_plan(config, 1, source.num_examples)
  setting = dict(seed=0, plan=plan, ratio=RATIO)
  run = list(loader.train(0, 6, **setting))
  late = list(loader.train(4, 6, **setting))
  assert jax.tree.all(jax.tree.map(np.array_equal, run[4:], late))


@pytest.mark.parametrize("kind", ["resident", "pipeline"])
def test_evaluation_scores_each_image_once(kind):
  source = loading.load_source("digits", "", "test")
  mesh = sharding.create_mesh()
  loader = {"resident": ResidentLoader, "pipeline": PipelineLoader}[kind](Reader(source), mesh)
  index = np.array([5, 3, 20, 0, 1, 2, 7, 8, 9, 10, 11])
  batches = loader.evaluation(index, size=16, fraction=1.0, batch_size=8)
  found = [(np.asarray(images), count) for images, count in batches]
  assert [count for _, count in found] == [8, 3] and all(len(x) == 8 for x, _ in found)
  assert np.array_equal(np.concatenate([x[:n] for x, n in found]), source.images[index])


def test_digits_are_split_once_and_for_all():
  train, test = (loading.load_source("digits", "", s) for s in ("train", "test"))
  assert train.images.shape == (1297, 16, 16, 3) and test.images.shape == (500, 16, 16, 3)
  assert len(train.classes) == 10 and train.labels.dtype == np.int32
  assert zlib.crc32(train.labels.tobytes()) == 1458311776


def test_folder_with_and_without_labels(tmp_path):
  write_images(tmp_path / "train" / "cat", 3)
  write_images(tmp_path / "train" / "dog" / "deep", 2)
  write_images(tmp_path / "val" / "dog", 1)
  (tmp_path / "train" / ".hidden").mkdir()
  (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
  train = loading.load_source("folder", str(tmp_path), "train")
  assert train.classes == ("cat", "dog") and train.labels.tolist() == [0, 0, 0, 1, 1]
  val = loading.align_classes(loading.load_source("folder", str(tmp_path), "val"), train.classes)
  assert val.classes == ("cat", "dog") and val.labels.tolist() == [1]
  write_images(tmp_path / "train", 1)
  assert loading.load_source("folder", str(tmp_path), "train").labels is None


def test_folder_of_photographs_through_both_loaders(tmp_path):
  """JPEGs of several sizes: the pipeline cuts the files, the resident loader squares of them."""
  write_images(tmp_path, 8, sizes=[(60, 90), (100, 40), (33, 33)])
  source = loading.load_source("folder", str(tmp_path), "train")
  mesh = sharding.create_mesh(jax.devices()[:1])
  loader = PipelineLoader(Reader(source), mesh, threads=2)
  images, count = next(loader.evaluation(np.arange(8), size=24, fraction=1.0, batch_size=8))
  with Image.open(source.files.where(0)) as image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    square = square.resize((24, 24), Image.Resampling.BILINEAR)
  assert np.abs(np.asarray(images[0]).astype(int) - np.asarray(square).astype(int)).mean() < 1.5
  with pytest.raises(ConfigError, match="data.resident_size"):
    ResidentLoader(Reader(source), mesh)
  resident = ResidentLoader(Reader(source), mesh, 24)
  images, _ = next(resident.evaluation(np.arange(8), size=24, fraction=1.0, batch_size=8))
  assert np.array_equal(np.asarray(images[0]), np.asarray(square))


def test_fast_cuts_are_nearly_pillow_s():
  """On photographs, over boxes of the policies; plain interpolation is three times as far away."""
  from sklearn.datasets import load_sample_images

  draws = crops.random_draws(0, 0, 24, ((0.08, 1.0),), RATIO)[:, 0].tolist()
  gaps, plain = [], []
  for image in load_sample_images().images:
    for draw in draws:
      box = crops.box(draw, *image.shape[:2], RATIO)
      wanted = cuts.cut_exactly(image, box, 112).astype(int)
      gaps.append(np.abs(cuts.cut_fast(image, box, 112) - wanted).mean())
      top, left, height, width = box
      part = image[top : top + height, left : left + width]
      plain.append(np.abs(cv2.resize(part, (112, 112)) - wanted).mean())
  assert np.mean(gaps) < 0.6 and max(gaps) < 2.0
  assert np.mean(plain) > 3 * np.mean(gaps)


@pytest.mark.parametrize("box", [(0, 0, 40, 56), (3, 5, 7, 9), (39, 55, 1, 1), (0, 3, 40, 2)])
def test_fast_cuts_stay_in_their_box(box):
  """Pixels outside of it, however bright, leave no trace; odd shapes work."""
  image = photograph(40, 56)
  top, left, height, width = box
  alone = np.zeros_like(image)
  alone[top : top + height, left : left + width] = image[top : top + height, left : left + width]
  bright = np.where(alone == 0, 255, alone).astype(np.uint8)
  bright[top : top + height, left : left + width] = alone[top : top + height, left : left + width]
  assert np.array_equal(cuts.cut_fast(alone, box, 16), cuts.cut_fast(bright, box, 16))
  out = np.zeros((16, 16, 3), np.uint8)
  assert np.array_equal(cuts.cut_fast(image, box, 16, out), out) and out.any()


def test_very_large_boxes_are_cut_in_time():
  """A scale of 90: pixels are averaged before the blur, whose filter would be 200 long."""
  image = np.repeat(np.repeat(photograph(45, 60), 32, 0), 32, 1)
  found = cuts.cut_fast(image, (0, 0, 1440, 1900), 16).astype(int)
  assert np.abs(found - cuts.cut_exactly(image, (0, 0, 1440, 1900), 16)).mean() < 2


def test_an_image_is_decoded_as_small_as_all_its_views_allow():
  box = lambda height, width: (3, 5, height, width)
  assert cuts.scale_for([box(447, 900)], [224]) == 1
  assert cuts.scale_for([box(448, 448)], [224]) == cuts.scale_for([box(895, 2000)], [224]) == 2
  assert cuts.scale_for([box(900, 900), box(200, 200)], [224, 96]) == 2  # the largest shrinks by 4
  assert cuts.scale_for([box(900, 900), box(191, 192)], [224, 96]) == 1
  assert cuts.scale_for([box(9000, 9000)], [224]) == 8
  assert cuts.CUTS["pillow"].scale_for([box(9000, 9000)], [224]) == 1


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_views_of_an_image_decoded_smaller_lie_where_they_should(scale):
  """Odd sides and odd corners: half a pixel beside it, a ramp of 8 levels a pixel of the view would be 4 off."""
  height, width, size = 24 * scale + 1, 20 * scale + 3, 16
  y, x = np.mgrid[0:height, 0:width] * 8 / scale
  image = np.uint8(np.stack([y, x, (x + y) / 2], -1).clip(0, 255))
  content = io.BytesIO()
  Image.fromarray(image).save(content, "JPEG", quality=98, subsampling=0)
  for box in ((1, 1, 17 * scale, 16 * scale + 1), (scale + 1, 3, 20 * scale - 1, 17 * scale)):
    assert cuts.scale_for([box], [size]) == scale
    found = decode_for(lambda *_: scale, content.getvalue(), 1e6)
    assert found.scale == scale and (found.height, found.width) == (height, width)
    view = cuts.cut_fast(found.pixels, [x / scale for x in box], size).astype(int)
    assert np.abs(view - cuts.cut_exactly(image, box, size)).mean() < 1


def test_views_of_images_decoded_smaller_are_near_pillow_s():
  """On detailed photographs; twice as near as plain interpolation of the whole image."""
  from sklearn.datasets import load_sample_images

  draws = crops.random_draws(0, 0, 12, ((0.2, 1.0),), RATIO)[:, 0].tolist()
  gaps, plain = [], []
  for image in load_sample_images().images:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=95)
    whole = decode(content.getvalue(), 1e6)
    for draw in draws:
      box = crops.box(draw, *image.shape[:2], RATIO)
      found = decode_for(lambda *_, box=box: cuts.scale_for([box], [96]), content.getvalue(), 1e6)
      wanted = cuts.cut_exactly(whole, box, 96).astype(int)
      view = cuts.cut_fast(found.pixels, [x / found.scale for x in box], 96)
      if found.scale > 1:
        gaps.append(np.abs(view - wanted).mean())
        top, left, height, width = box
        part = whole[top : top + height, left : left + width]
        plain.append(np.abs(cv2.resize(part, (96, 96)) - wanted).mean())
  assert len(gaps) > 12 and np.mean(gaps) < 2.5 and 2 * np.mean(gaps) < np.mean(plain)


@pytest.mark.parametrize("cut", ["fast", "pillow"])
def test_views_of_large_photographs_are_a_function_of_seed_and_step(tmp_path, cut):
  """Decoded whole and cut by Pillow to the bit, or smaller, by the boxes that seed and step draw."""
  write_images(tmp_path, 16, sizes=[(61, 75), (13, 15)])
  source = loading.load_source("folder", str(tmp_path), "train")
  plan = settings.tiny_plan(settings.tiny_config(method__bank__init="random", epochs=6), 1, 16)
  loader = PipelineLoader(
    Reader(source), sharding.create_mesh(jax.devices()[:1]), threads=2, cut=cut
  )
  batch, indices, _ = next(loader.train(5, 6, seed=3, plan=plan, ratio=RATIO))
  draws, scales = crops.random_draws(3, 5, 16, plan.view_scales, RATIO).tolist(), set()
  for slot, index in enumerate(indices):
    content = source.files.read(int(index))
    size = decode(content, 1e6).shape[:2]
    boxes = [crops.box(draw, *size, RATIO) for draw in draws[slot]]
    scale = (lambda *_, boxes=boxes: cuts.scale_for(boxes, plan.view_sizes)) if cut == "fast" else None  # fmt: skip
    found = decode_for(scale, content, 1e6)
    scales.add(found.scale)
    box = [x / found.scale for x in boxes[0]]
    assert np.array_equal(
      batch.queries[0].pixels[slot], cuts.CUTS[cut].crop_and_resize(found.pixels, box, 8)
    )
  assert (len(scales) > 1) == (cut == "fast")


def test_enlarging_is_pillow_s_to_a_level():
  image = photograph(40, 56)
  gap = cuts.cut_fast(image, (3, 5, 20, 30), 64).astype(int) - cuts.cut_exactly(image, (3, 5, 20, 30), 64)  # fmt: skip
  assert np.abs(gap).max() <= 1


def test_batches_keep_their_pixels_while_anyone_holds_them(tmp_path):
  """The pipeline writes into memory again; never into what a batch, a part of one, or JAX still looks at."""
  write_images(tmp_path, 16, sizes=[(40, 50)])
  source = loading.load_source("folder", str(tmp_path), "train")
  mesh = sharding.create_mesh(jax.devices()[:1])
  loader = PipelineLoader(Reader(source), mesh, threads=2)
  plan = settings.tiny_plan(settings.tiny_config(method__bank__init="random", epochs=12), 1, 16)
  train = lambda: loader.train(0, 12, seed=0, plan=plan, ratio=RATIO)
  part = lambda loaded: jax.tree.map(lambda x: x[1:3, ::2], loaded.batch)
  fresh = [jax.tree.map(np.copy, x.batch) for x in train()]
  held = list(train())
  on_device = [x.batch.put(mesh) for x in train()]
  with contextlib.closing(Ahead(train(), 2)) as batches:  # read while the parts are kept
    parts = [part(loaded) for loaded in batches]
  assert len(held) == 12
  for wanted, loaded, arrays, some in zip(fresh, held, on_device, parts, strict=True):
    assert jax.tree.all(jax.tree.map(np.array_equal, wanted, loaded.batch))
    assert jax.tree.all(jax.tree.map(np.array_equal, wanted, arrays))
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x[1:3, ::2], y), wanted, some))


def test_memory_is_used_again_once_nothing_looks_at_it():
  pool, address = pipeline._Pool((4, 8, 3)), lambda array: array.ctypes.data
  array = pool.take()
  first, row = address(array), array.reshape(4, -1)[2, ::3]
  del array
  other = pool.take()
  assert address(other) != first  # a part of it is still looked at
  del row
  assert address(pool.take()) == first
  on_device = []
  for value in range(100):  # some lie so that JAX looks at them in place
    array = pool.take()
    array[...] = value
    on_device.append(jax.device_put(array))
  for value, array in enumerate(on_device):
    assert (np.asarray(array) == value).all()


@pytest.mark.parametrize("block", [4, 0])
@pytest.mark.parametrize("step", [0, 1, 1000, 10**6])
def test_any_step_from_a_fresh_start_on_any_number_of_processes(tmp_path, step, block):
  """Of a run that got there (from 40 steps before), on 1, 2 and 4 processes, keys shuffled in blocks or over all; of
  images that are decoded whole, at a half and at a quarter."""
  write_images(tmp_path, 64, sizes=[(13, 15), (25, 31), (61, 75)])
  source = loading.load_source("folder", str(tmp_path), "train")
  mesh = sharding.create_mesh(jax.devices()[:1])
  views = dict(method__bank__init="random", bn__shuffle_block=block)
  config = settings.tiny_config("symmetric_multicrop", epochs=step + 1, **views)

  def batch(first, processes, process):
    loader = PipelineLoader(Reader(source), mesh, threads=2)
    plan = settings.tiny_plan(config, 4, 64, processes=processes, process=process)
    *_, last = loader.train(first, step + 1, seed=3, plan=plan, ratio=RATIO)
    return last

  whole = batch(step, 1, 0)
  arrived = batch(max(0, step - 40), 1, 0)
  assert jax.tree.all(jax.tree.map(np.array_equal, whole, arrived))
  for processes in (2, 4):
    parts = [batch(step, processes, p) for p in range(processes)]
    assert settings.is_joined(whole, parts)


def test_auto_keeps_on_the_device_what_fits(tmp_path, monkeypatch):
  config = settings.tiny_config()
  mesh = sharding.create_mesh(jax.devices()[:1])
  digits = loading.load_source("digits", "", "train")
  write_images(tmp_path, 30, sizes=[(24, 24)])
  folder = loading.load_source("folder", str(tmp_path), "train")
  kind = lambda source: type(build.create_loader(config, source, mesh)).__name__
  assert kind(digits) == "ResidentLoader" and kind(folder) == "PipelineLoader"  # a CPU
  assert expected_bytes(Reader(folder), 0) == 30 * 24 * 24 * 3
  assert expected_bytes(Reader(folder), 8) == 30 * 8 * 8 * 3
  small = ResidentLoader(Reader(digits), mesh, 4).images
  assert small.shape == (1297, 4, 4, 3) and expected_bytes(Reader(digits), 4) == small.nbytes
  assert np.array_equal(small[7], cuts.cut_centre(digits.images[7], 4))
  monkeypatch.setattr(sharding, "memory_bytes", lambda _: digits.images.nbytes * 4 - 4)
  assert kind(digits) == "PipelineLoader"
  config.data.resident_share = 0.5
  assert kind(digits) == "ResidentLoader"
  monkeypatch.setattr(
    build, "kept_bytes", lambda *_: 1
  )  # as on a GPU, had the looks missed the odd one
  write_images(tmp_path / "more", 10, sizes=[(24, 30)])
  mixed = loading.load_source("folder", str(tmp_path), "train")
  assert expected_bytes(Reader(mixed), 0) is None
  assert kind(mixed) == "PipelineLoader" and kind(folder) == "ResidentLoader"
