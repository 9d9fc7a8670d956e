"""A look at a few images before anyone trains: how large they are, and which show nothing.

Flow: pretrain's first lines ask `glance`; inspect_data asks its parts of all that it reads.
Shapes: pixels uint8 [H, W, 3]; levels int [256, 3], how often each value occurs in each channel.
Holds: nothing is said of a set that is as it should be.
Not here: reading (images), what is broken (images.refusal), which views suit a size (config.advice).
"""

import collections

import numpy as np

from adco_jax.data.images import decode
from adco_jax.data.sources.base import Source
from adco_jax.data.sources.files import BadImage

LOOKS = 32  # images, spread evenly
FLAT = 8  # levels of 255 between a picture's darkest and brightest hundredth that show nothing
KINDS = ("almost black", "almost white", "of one colour", "of nothing but 0 and 255")


def glance(source: Source, max_megapixels: float) -> tuple[int, list[str]]:
  """(median short side in pixels, lines that a user must know before training) of a few images."""
  index = np.unique(np.linspace(0, source.num_examples - 1, LOOKS).astype(int))
  images = {int(i): image for i in index if (image := _read(source, i, max_megapixels)) is not None}
  if not images:
    return 0, [f"none of {len(index)} images looked at can be read, such as {source.where(int(index[0]))}"]  # fmt: skip
  shown = {source.where(i): kind for i, x in images.items() if (kind := emptiness(levels_of(x)))}
  short = round(float(np.median([min(image.shape[:2]) for image in images.values()])))
  return short, [empty_line(shown, len(images))] if shown else []


def empty_line(shown: dict[str, str], looked_at: int) -> str:
  """How many images show (almost) nothing, and why; `shown`: {where an image lies: one of KINDS}."""
  first = {kind: where for where, kind in reversed(shown.items())}
  counts = collections.Counter(shown.values()).most_common()
  parts = ", ".join(f"{count} {kind} such as {first[kind]}" for kind, count in counts)
  return f"{len(shown)} of {looked_at} images looked at show almost nothing, or black and white alone: {parts}"


def levels_of(image: np.ndarray) -> np.ndarray:
  """Pixels -> levels."""
  return np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)], 1)


def emptiness(levels: np.ndarray) -> str:
  """'' or which of KINDS a picture of these levels is."""
  reached = np.cumsum(levels, 0) / levels.sum(0)
  dark, bright = (reached >= 0.01).argmax(0), (reached >= 0.99).argmax(0)
  if (bright - dark).max() <= FLAT:
    return KINDS[0] if bright.max() < 2 * FLAT else KINDS[1] if dark.min() > 255 - 2 * FLAT else KINDS[2]  # fmt: skip
  ends = levels[[0, 255]].sum(0) / levels.sum(0)
  return KINDS[3] if ends.min() > 0.99 else ""


def _read(source, i, max_megapixels):
  if source.images is not None:
    return source.images[i]
  try:
    return decode(source.on_disk.read(i), max_megapixels * 1e6)
  except BadImage:
    return None  # the run names it
