"""What two 224 pixel views of an image cost the host, against Pillow and Python as torchvision's transforms work.

Command: python -m benchmarks.input        (--photos=FOLDER measures your own JPEGs)
Makes 320 JPEGs as ImageNet has them (mean 494 x 423 pixels, median 500 x 375, one in 25 up to 2400, 120 KiB) from scikit-learn's two
photographs, packs them, and measures in turn, several rounds: CPU milliseconds per pair (all threads of the process) and pairs/s.
  pillow        decode, two RandomResizedCrops, one Python thread: no colour, no floats
  pillow full   the same with jitter, gray, blur, flip, floats and normalisation: the CPU recipe of MoCo v2
  originals     this pipeline; colour, blur and floats are the device's work
  whole         the same with every image decoded at its full size, as it was before
  exact         the same with data.cut=pillow
  two processes originals on one of two, keys shuffled over both: keys are of other images than queries
  packed        the same from what configs/pack.py made (short side 400, quality 90); packed-256: short side 256
  resident      images on the device (256 pixel squares): what is left to the host; the cut itself is the device's
"""

import argparse
import dataclasses
import functools
import importlib
import io
import itertools
import os
import random
import statistics
import sys
import tempfile
import time

import cv2
import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from adco_jax.config import plan as planning
from adco_jax.data import cuts, images
from adco_jax.data.images import Reader
from adco_jax.data.pipeline import PipelineLoader, import_tensorflow
from adco_jax.data.resident import ResidentLoader
from adco_jax.data.sources import files, loading
from adco_jax.runtime import sharding
from adco_jax.tasks import pack
from adco_jax.views import crops
from benchmarks import record
from benchmarks import torchvision_rules as rules

COUNT, SIDE, BATCH = 320, 224, 64
SIZES = [(500, 375)] * 6 + [(375, 500)] * 3 + [(500, 333)] * 3 + [(333, 500), (400, 300), (640, 480), (500, 500), (256, 256), (300, 225)]  # fmt: skip
LARGE = [(1024, 768), (1600, 1200), (2048, 1536), (768, 1024), (2400, 1800), (1280, 960)]
EVERY = 25  # one picture of so many is large
QUALITIES = (85, 90, 92, 95, 97)


def make_photographs(folder):
  """COUNT JPEGs: two photographs made smaller, so that every pixel has detail, mirrored on to ImageNet's sizes, with a
  camera's grain; one in five keeps its colours at full resolution."""
  from sklearn.datasets import load_sample_images

  photographs = [Image.fromarray(x) for x in load_sample_images().images]
  draw = np.random.RandomState(0)
  os.makedirs(folder)
  for i in range(COUNT):
    width, height = SIZES[draw.randint(len(SIZES))] if i % EVERY else LARGE[i // EVERY % len(LARGE)]
    photograph, scale = photographs[i % 2], draw.uniform(0.5, 1)
    side = round(photograph.width * scale), round(photograph.height * scale)
    small = np.asarray(photograph.resize(side, Image.Resampling.LANCZOS))
    top, left = draw.randint(small.shape[0]), draw.randint(small.shape[1])
    tiled = np.pad(small, ((0, top + height), (0, left + width), (0, 0)), "symmetric")
    image = tiled[top : top + height, left : left + width]
    noisy = image + draw.normal(0, 3, (height, width, 1))
    image = Image.fromarray(np.uint8(np.clip(noisy, 0, 255)))
    quality, subsampling = draw.choice(QUALITIES), draw.choice([2, 2, 2, 2, 0])
    image.save(
      os.path.join(folder, f"{i:03d}.jpg"), quality=int(quality), subsampling=int(subsampling)
    )


def random_resized_crop(image, low=0.2):
  """torchvision's transform on a Pillow image."""
  w, h = rules.crop_size(*image.size, low)
  left, top = random.randint(0, image.width - w), random.randint(0, image.height - h)
  return image.crop((left, top, left + w, top + h)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def colour(image):
  """MoCo v2's jitter, gray, blur, flip on a Pillow image, then normalised floats."""
  if random.random() < 0.8:
    steps = [
      lambda x: ImageEnhance.Brightness(x).enhance(random.uniform(0.6, 1.4)),
      lambda x: ImageEnhance.Contrast(x).enhance(random.uniform(0.6, 1.4)),
      lambda x: ImageEnhance.Color(x).enhance(random.uniform(0.6, 1.4)),
      lambda x: rules.turn_hue(x, random.uniform(-0.1, 0.1)),
    ]
    for step in random.sample(steps, 4):
      image = step(image)
  if random.random() < 0.2:
    image = image.convert("L").convert("RGB")
  if random.random() < 0.5:
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
  if random.random() < 0.5:
    image = ImageOps.mirror(image)
  pixels = np.asarray(image, np.float32) / 255
  return (pixels - np.float32((0.485, 0.456, 0.406))) / np.float32((0.229, 0.224, 0.225))


def by_pillow(paths, finish):
  """Yields batches of BATCH pairs, as a DataLoader's worker would make them."""
  turns = itertools.chain.from_iterable(random.sample(paths, len(paths)) for _ in itertools.count())
  while True:
    views = []
    for path in itertools.islice(turns, BATCH):
      with Image.open(path) as image:
        image = image.convert("RGB")
      views.append([finish(random_resized_crop(image)) for _ in range(2)])
    yield np.array(views)


def by_loader(loader, source, processes=1):
  """Yields the batches of one of our loaders, as the first of `processes`."""
  plan = planning.make_probe_plan(
    source.num_examples, 0, batch_size=BATCH * processes, crops=((SIDE, 0.2, 1.0),) * 2, mode="single", epochs=10**6,
    devices=processes, processes=processes, process=0,
  )  # fmt: skip
  if processes > 1:
    plan = dataclasses.replace(plan, shuffle_block=plan.batch_size)
  return loader.train(0, plan.total_steps, seed=0, plan=plan, ratio=rules.RATIO)


def prepare(folder):
  """{name: () -> iterator of batches of BATCH pairs}."""
  photographs = os.path.join(folder, "photographs")
  if not os.path.exists(photographs):
    make_photographs(photographs)
  paths = sorted(os.path.join(photographs, name) for name in os.listdir(photographs))
  mesh = sharding.create_mesh(jax.devices()[:1])
  stored = {"originals": loading.load_source("folder", photographs, "train")}
  for name, side in (("packed", 400), ("packed-256", 256)):
    config = importlib.import_module("configs.pack").get_config()
    config.out, config.short_side = os.path.join(folder, name), side
    config.data.dir, config.data.test_split = photographs, ""
    pack.run(config)
    stored[name] = loading.load_source("packed", config.out, "train")
  cuts.CUTS["whole"] = cuts.CUTS["fast"]._replace(scale_for=cuts.CUTS["pillow"].scale_for)
  pipeline = lambda name, **how: by_loader(PipelineLoader(Reader(stored[name]), mesh, **how), stored[name])  # fmt: skip
  originals = stored["originals"]
  first = lambda: by_loader(PipelineLoader(Reader(originals), mesh), originals, processes=2)
  resident = ResidentLoader(Reader(originals), mesh, 256)
  return {
    "pillow": lambda: by_pillow(paths, np.asarray),
    "pillow full": lambda: by_pillow(paths, colour),
    "originals": lambda: pipeline("originals"),
    "whole": lambda: pipeline("originals", cut="whole"),
    "exact": lambda: pipeline("originals", cut="pillow"),
    "two processes": first,
    "packed": lambda: pipeline("packed"),
    "packed-256": lambda: pipeline("packed-256"),
    "resident": lambda: by_loader(resident, originals),
  }


def measure_parts(folder):
  """{part: CPU milliseconds per image}, best of five: decoding, and two cuts by each way there is, alone in one thread."""
  paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))][: 4 * EVERY]
  contents = [files.read_file(path) for path in paths]
  decoded = [images.decode(content, 64e6) for content in contents]
  draws = crops.random_draws(0, 0, len(decoded), ((0.2, 1.0),) * 2, rules.RATIO).tolist()
  boxes = [
    [crops.box(d, *x.shape[:2], rules.RATIO) for d in two]
    for x, two in zip(decoded, draws, strict=True)
  ]
  out = np.empty((SIDE, SIDE, 3), np.uint8)

  def by_opencv(how):
    def cut(image, box, size, out):
      top, left, height, width = box
      return cv2.resize(
        image[top : top + height, left : left + width], (size, size), dst=out, interpolation=how
      )

    return cut

  fitting = [functools.partial(cuts.scale_for, two, (SIDE, SIDE)) for two in boxes]
  decode = lambda: [
    images.decode_for(lambda *_, fit=fit: fit(), content, 64e6)
    for fit, content in zip(fitting, contents, strict=True)
  ]
  smaller = decode()

  def cut_smaller():
    for picture, two in zip(smaller, boxes, strict=True):
      for box in two:
        cuts.cut_fast(picture.pixels, [x / picture.scale for x in box], SIDE, out)

  tf = import_tensorflow()

  def decode_needed():
    """Only what lies between the first and the last row and column of both views."""
    for content, two in zip(contents, boxes, strict=True):
      top, left = (min(box[axis] for box in two) for axis in (0, 1))
      bottom, right = (max(box[axis] + box[axis + 2] for box in two) for axis in (0, 1))
      window = top, left, bottom - top, right - left
      tf.io.decode_and_crop_jpeg(content, window, channels=3, dct_method="INTEGER_ACCURATE")

  by_pillow = lambda content: np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
  cut = lambda way: (
    lambda: [way(x, b, SIDE, out) for x, two in zip(decoded, boxes, strict=True) for b in two]
  )
  parts = {
    "decode, Pillow": lambda: [by_pillow(content) for content in contents],
    "decode, ours": lambda: [images.decode(content, 64e6) for content in contents],
    "decode, ours, as small as both views allow": decode,
    "decode, TensorFlow, the rows and columns of both views": decode_needed,
    "two cuts, pillow": cut(cuts.cut_exactly),
    "two cuts, fast": cut(cuts.cut_fast),
    "two cuts, fast, of those decoded smaller": cut_smaller,
    "two cuts, OpenCV INTER_LINEAR (not antialiased)": cut(by_opencv(cv2.INTER_LINEAR)),
    "two cuts, OpenCV INTER_AREA": cut(by_opencv(cv2.INTER_AREA)),
  }
  found = {}
  for name, part in parts.items():
    times = []
    for _ in range(5):
      start = time.process_time()
      part()
      times.append(time.process_time() - start)
    found[name] = 1e3 * min(times) / len(paths)
  return found


def measure(batches, count):
  """(CPU milliseconds per pair, pairs per second) of `count` batches after an epoch; large images are rare, so that
  whole epochs compare."""
  for _ in range(COUNT // BATCH):
    next(batches)
  cpu, start = time.process_time(), time.perf_counter()
  for _ in range(count):
    next(batches)
  cpu, wall = time.process_time() - cpu, time.perf_counter() - start
  batches.close()
  time.sleep(0.5)  # what was still under way is nobody else's
  return 1e3 * cpu / (count * BATCH), count * BATCH / wall


def run(argv):
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
  parser.add_argument("--photos", help="a folder of JPEGs to take instead")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--batches", type=int, default=10, help="measured batches of 64 in each round; 5 are an epoch"
  )
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  options = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    if options.photos:
      os.symlink(os.path.abspath(options.photos), os.path.join(folder, "photographs"))
    ways = prepare(folder)
    parts = measure_parts(os.path.join(folder, "photographs"))
    found = {name: [] for name in ways}
    for number in range(options.rounds):
      for name, start in ways.items():
        random.seed(number)
        found[name].append(measure(start(), options.batches))
      print(f"round {number + 1} of {options.rounds}", flush=True)
  for name, value in parts.items():
    print(f"{name:56} {value:6.3f} ms CPU per image")
  table = {}
  for name, rows in found.items():
    cpu, speed = (statistics.median(column) for column in zip(*rows, strict=True))
    table[name] = {"cpu_milliseconds_per_pair": cpu, "pairs_per_second": speed, "rounds": rows}
  for name, row in table.items():
    for base in ("pillow", "pillow full"):
      ratios = [b[0] / r[0] for b, r in zip(found[base], found[name], strict=True)]
      row[f"times less cpu than {base}"] = statistics.median(ratios)
    cores = len(os.sched_getaffinity(0))
    print(f"{name:13} {row['cpu_milliseconds_per_pair']:7.3f} ms CPU per pair, {1e3 / row['cpu_milliseconds_per_pair']:6.0f} pairs/s per core, "
          f"{row['pairs_per_second']:6.0f} pairs/s on {cores} cores; {row['times less cpu than pillow']:5.2f} x pillow, {row['times less cpu than pillow full']:5.2f} x pillow full")  # fmt: skip
  print(
    record.write(
      options.out,
      "input",
      "python -m benchmarks.input " + " ".join(argv),
      {"parts": parts, **table},
    )
  )
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
