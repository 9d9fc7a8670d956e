"""Every augmentation against Pillow on real photographs, and the drawn amounts against torchvision's rules.

Command: python -m benchmarks.augmentation
Compares on scikit-learn's two photographs, each operation with its Pillow meaning (what torchvision's transforms call
on Pillow images; the Gaussian of torchvision's own GaussianBlur by a direct sum in float64), eager and under
jit; writes benchmarks/results/augmentation.json, docs/augmentation.png, docs/augmentation_draws.png and prints the tables.
A level is 1/255 of the range. Pillow rounds to whole levels after every operation, we never do.
"""

import argparse
import os
import random
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from adco_jax.data import cuts, resident
from adco_jax.data.images import decode, decode_for
from adco_jax.views import augment, crops
from adco_jax.workdir import pictures
from benchmarks import record
from benchmarks import torchvision_rules as rules

SIDE = 224
BOXES = ((3, 5, 300, 310), (40, 60, 120, 140), (0, 0, 427, 427), (100, 80, 180, 240))
DRAWS = 20000


def photographs():
  """uint8 [4, 224, 224, 3]: two squares of each of scikit-learn's photographs, and both whole."""
  from sklearn.datasets import load_sample_images

  whole = load_sample_images().images
  squares = [image[top : top + SIDE, left : left + SIDE] for image in whole for top, left in ((20, 30), (180, 300))]  # fmt: skip
  return np.stack(squares), whole


def gaussian(image, sigma, reach):
  """torchvision's GaussianBlur with edges mirrored, as a direct sum; float levels."""
  taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
  taps /= taps.sum()
  pixels = np.pad(np.asarray(image, np.float64), ((reach,) * 2, (reach,) * 2, (0, 0)), "reflect")
  for axis in (0, 1):
    pixels = np.apply_along_axis(lambda v: np.convolve(v, taps, "valid"), axis, pixels)
  return pixels


def operations():
  """[(name, ours(images), reference(one Pillow image))]."""
  many = lambda value: jnp.full(4, value, jnp.float32)
  found = []
  for factor in (0.2, 0.6, 1.4, 1.8):
    for name, enhance in (("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)):  # fmt: skip
      adjust = getattr(augment, f"adjust_{name}")
      found.append((f"{name} {factor}", lambda x, a=adjust, f=factor: a(x, many(f)), lambda i, e=enhance, f=factor: e(i).enhance(f)))  # fmt: skip
  for turn in (-0.2, -0.1, 0.05, 0.1):
    found.append((f"hue {turn:+}", lambda x, t=turn: augment.adjust_hue(x, many(t)), lambda i, t=turn: rules.turn_hue(i, t)))  # fmt: skip
  found.append(("grayscale", augment.to_gray, lambda i: i.convert("L").convert("RGB")))
  found.append(("solarise", augment.solarize, ImageOps.solarize))
  found.append(("flip", lambda x: x[:, :, ::-1], ImageOps.mirror))
  for sigma in (0.1, 0.5, 1.0, 1.5, 2.0):
    found.append((f"blur, Pillow's, {sigma}", lambda x, s=sigma: augment.adjust_blur(x, many(s), "pillow"), lambda i, s=sigma: i.filter(ImageFilter.GaussianBlur(s))))  # fmt: skip
    found.append((f"blur, torchvision's, {sigma}", lambda x, s=sigma: augment.adjust_blur(x, many(s), "torchvision"), lambda i, s=sigma: gaussian(i, s, 11)))  # fmt: skip
  return sorted(found, key=lambda row: row[0].split(" ")[0])


def compare_operations(images):
  """{name: {'eager'/'jit': (largest, mean) difference in levels, 'changed': mean change of the pixels}}."""
  x, table, drawn = jnp.asarray(images, jnp.float32) / 255, {}, []
  for name, ours, reference in operations():
    wanted = np.stack([np.asarray(reference(Image.fromarray(i)), np.float64) for i in images])
    found = {"eager": ours(x), "jit": jax.jit(ours)(x)}
    table[name] = {"changed": float(np.abs(wanted - images).mean())}
    for how, value in found.items():
      gap = np.abs(np.asarray(value, np.float64) * 255 - wanted)
      table[name][how] = {"largest": float(gap.max()), "mean": float(gap.mean())}
    drawn.append((name, wanted, np.asarray(found["jit"]) * 255))
  return table, drawn


def by_opencv(image, box, how):
  """A box as OpenCV alone resizes it."""
  top, left, height, width = box
  return cv2.resize(image[top : top + height, left : left + width], (SIDE, SIDE), interpolation=how)


def compare_cuts(whole):
  """The same for crops: the three ways to cut, boxes that shrink and that enlarge."""
  table = {}
  ways = {
    "crop, pipeline, cut=pillow": lambda i, b: cuts.cut_exactly(i, b, SIDE),
    "crop, pipeline, cut=fast": lambda i, b: cuts.cut_fast(i, b, SIDE),
    "OpenCV INTER_LINEAR (for comparison)": lambda i, b: by_opencv(i, b, cv2.INTER_LINEAR),
    "OpenCV INTER_AREA (for comparison)": lambda i, b: by_opencv(i, b, cv2.INTER_AREA),
    "crop, resident (device)": lambda i, b: np.asarray(resident.crop_and_resize(i[None], np.array([b], np.float32), SIDE))[0],
  }  # fmt: skip
  for name, way in ways.items():
    gaps = []
    for image in whole:
      for top, left, height, width in BOXES:
        part = Image.fromarray(image).crop((left, top, left + width, top + height))
        wanted = np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR), float)
        gaps.append(np.abs(way(image, (top, left, height, width)).astype(float) - wanted))
    table[name] = {"largest": float(np.max(gaps)), "mean": float(np.mean(gaps)), "99%": float(np.percentile(gaps, 99))}  # fmt: skip
  return table


def compare_smaller(whole):
  """{'from a half, shrinks by 2 to 2.2': differences from Pillow's crops of the whole decoded image, one mean and largest per channel}.

  On 2403 x 1801 pixels of each photograph, mirrored: as much detail as a photograph has that was made smaller.
  """
  table, random_sides = {}, np.random.RandomState(0)
  for low, high in ((2, 2.2), (2.2, 3), (3, 3.99), (4, 4.4), (4.4, 6), (6, 7.99), (8, 8.04)):
    gaps = []
    for image in whole:
      tiled = np.pad(image, ((0, 1801 - 427), (0, 2403 - 640), (0, 0)), "symmetric")
      content = simplejpeg.encode_jpeg(tiled, quality=92, colorsubsampling="420")
      decoded = decode(content, 64e6)
      for _ in range(8):
        height, width = np.ceil(SIDE * random_sides.uniform(low, high, 2)).astype(int).tolist()
        box = (random_sides.randint(1802 - height), random_sides.randint(2404 - width), height, width)  # fmt: skip
        found = decode_for(lambda *_, box=box: cuts.scale_for([box], [SIDE]), content, 64e6)
        view = cuts.cut_fast(found.pixels, [x / found.scale for x in box], SIDE)
        gaps.append(np.abs(view.astype(float) - cuts.cut_exactly(decoded, box, SIDE)))
    part = {2: "a half", 4: "a quarter", 8: "an eighth"}[found.scale]
    table[f"crop, decoded at {part}, shrinks by {low} to {high}"] = {
      "largest": float(np.max(gaps)), "mean": float(np.mean(gaps)), "99%": float(np.percentile(gaps, 99)),
      "mean of red, green, blue": np.mean(gaps, (0, 1, 2)).tolist(), "largest of red, green, blue": np.max(gaps, (0, 1, 2)).tolist(),
    }  # fmt: skip
  return table


def draws():
  """{name: (ours, theirs)} of DRAWS drawn amounts by MoCo v2's policy and a 500 x 375 image."""
  random.seed(0)
  ours = augment.draw(jax.random.key(0), DRAWS, augment.MOCO_V2)
  boxes = crops.boxes(crops.random_draws(0, 0, DRAWS, ((0.2, 1.0),), (3 / 4, 4 / 3))[:, 0], np.float64(375), np.float64(500), (3 / 4, 4 / 3))  # fmt: skip
  sizes = [rules.crop_size(500, 375, 0.2) for _ in range(DRAWS)]
  theirs = np.array([(w * h / (500 * 375), w / h) for w, h in sizes])
  many = lambda draw: np.array([draw() for _ in range(DRAWS)])
  found = {
    "crop: area share": (boxes[:, 2] * boxes[:, 3] / (375 * 500), theirs[:, 0]),
    "crop: width / height": (boxes[:, 3] / boxes[:, 2], theirs[:, 1]),
    "brightness": (ours["brightness"], many(lambda: random.uniform(0.6, 1.4))),
    "contrast": (ours["contrast"], many(lambda: random.uniform(0.6, 1.4))),
    "saturation": (ours["saturation"], many(lambda: random.uniform(0.6, 1.4))),
    "hue": (ours["hue"], many(lambda: random.uniform(-0.1, 0.1))),
    "blur sigma": (ours["sigma"], many(lambda: random.uniform(0.1, 2.0))),
    "place of hue in the order": (np.argmax(np.asarray(ours["order"]) == 3, 1), many(lambda: random.sample(range(4), 4).index(3))),
  }  # fmt: skip
  return {name: tuple(np.asarray(x, float) for x in pair) for name, pair in found.items()}


def distance(one, other):
  """Kolmogorov-Smirnov: the largest gap between both shares of values up to x."""
  at = np.sort(np.concatenate([one, other]))
  share = lambda values: np.searchsorted(np.sort(values), at, "right") / len(values)
  return float(np.abs(share(one) - share(other)).max())


def draw_histograms(path, pairs):
  """Both distributions of every amount over each other."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(2, 4, figsize=(12, 5), layout="constrained")
  for axis, (name, (ours, theirs)) in zip(axes.flat, pairs.items(), strict=True):
    bins = np.linspace(min(ours.min(), theirs.min()), max(ours.max(), theirs.max()), 33)
    axis.hist(theirs, bins, color="#bbb", label="torchvision's rule")
    axis.hist(ours, bins, histtype="step", color="#c33", label="adco_jax")
    axis.set_title(name, fontsize=9)
    axis.set_yticks([])
  axes.flat[0].legend(fontsize=7, frameon=False)
  figure.savefig(path, dpi=80)
  pyplot.close(figure)


def draw_pairs(path, images, drawn):
  """Rows of (photograph, Pillow, ours) for one setting of each operation."""
  chosen = ("brightness 1.4", "contrast 0.6", "saturation 1.8", "hue +0.1", "grayscale", "solarise", "blur, Pillow's, 2.0", "blur, torchvision's, 2.0")  # fmt: skip
  level = lambda x: np.uint8(np.clip(np.round(x), 0, 255))
  pick = {name: (wanted, ours) for name, wanted, ours in drawn}
  rows = []
  for at in (0, 3):
    rows.append([images[at]] * len(chosen))
    rows += [[level(pick[name][which][at]) for name in chosen] for which in (0, 1)]
  pictures.save_sheet(path, rows, side=112)


def run(argv):
  """Measures, draws, writes, prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
  parser.add_argument("--out", type=os.path.expanduser, default=record.RESULTS)
  parser.add_argument(
    "--pictures",
    type=os.path.expanduser,
    default=os.path.join(os.path.dirname(__file__), "..", "docs"),
  )
  options = parser.parse_args(argv)
  images, whole = photographs()
  table, drawn = compare_operations(images)
  cut_table, pairs = compare_cuts(whole) | compare_smaller(whole), draws()
  distances = {name: distance(*pair) for name, pair in pairs.items()}
  print(
    "| operation | largest, mean eager | largest, mean jit | how much it changes |\n|---|---|---|---|"
  )
  for name, row in table.items():
    cells = (f"{row[how]['largest']:.2f}, {row[how]['mean']:.3f}" for how in ("eager", "jit"))
    print(f"| {name} | {' | '.join(cells)} | {row['changed']:.1f} |")
  print("| crop | largest | mean | 99 % of pixels within |\n|---|---|---|---|")
  for name, row in cut_table.items():
    print(f"| {name} | {row['largest']:.0f} | {row['mean']:.3f} | {row['99%']:.0f} |")
  limit = 1.36 * np.sqrt(2 / DRAWS)
  print(f"| drawn amount | distance (95 % of equal ones below {limit:.4f}) |\n|---|---|")
  for name, value in distances.items():
    print(f"| {name} | {value:.4f} |")
  draw_pairs(os.path.join(options.pictures, "augmentation.png"), images, drawn)
  draw_histograms(os.path.join(options.pictures, "augmentation_draws.png"), pairs)
  result = {"operations": table, "crops": cut_table, "distances": distances, "draws": DRAWS}
  print(record.write(options.out, "augmentation", "python -m benchmarks.augmentation", result))
  return 0


if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
